"""The cascade from three models to its decisions: calibration's speakers, figures, runtime, what it refuses."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import soundfile

from experiments import cascade
from experiments.cascade import CascadeConfig
from experiments.tables import with_tables
from experiments.testing import TestConfig, load_test_set
from qsv.deploy import load_cascade


@pytest.fixture(scope="module")
def development(tmp_path_factory, make_voice):
    """Folder of speakers whom no network was trained on."""
    rng, folder = np.random.default_rng(5), tmp_path_factory.mktemp("speech") / "development"
    for speaker, pitch_hz in enumerate((95, 130, 170, 230)):
        own = folder / f"development{speaker}"
        own.mkdir(parents=True)
        for number in range(4):
            voice = make_voice(pitch_hz, rng)
            soundfile.write(own / f"{number}.wav", voice + 0.003 * rng.normal(size=len(voice)), 16000)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory, development, speech, quantized_run, float_run):
    return CascadeConfig(
        workdir=str(tmp_path_factory.mktemp("cascade")),
        stages=(str(quantized_run), str(float_run)),
        dev_dir=str(development),
        budget="escalation",
        max_escalated=0.4,
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def results(config):
    return cascade.run(config)


def test_the_cascade_lies_between_its_stages_in_cost(results):
    own = results["cascade"]
    assert sum(own["settled"]) == pytest.approx(1)
    quarter = results["rows"][0]["relative_operations"]
    assert quarter < own["relative_operations_of_a_trial"] < 1 + quarter
    assert own["relative_operations_of_a_trial"] == pytest.approx(quarter + own["settled"][1])
    assert own["utterances_embedded"][0] == 12 >= own["utterances_embedded"][1]


def test_bytes_are_expected_of_a_trial_and_memory_of_all_stages(results):
    own, rows = results["cascade"], results["rows"]
    sizes = [row["file_bytes"] for row in rows]
    assert own["bytes_read"] == sum(sizes)
    assert own["bytes_read_of_a_trial"] == pytest.approx(sizes[0] + own["settled"][1] * sizes[1])
    assert own["resident_bytes"] == sum(row["resident_bytes"] for row in rows)
    assert [row["resident_bytes"] for row in rows] == [use["resident_bytes"] for use in results["runtime"]["stages"]]
    np.testing.assert_allclose(
        own["utterances_settled"], [1 - own["utterances_embedded"][1] / 12, own["utterances_embedded"][1] / 12]
    )


def test_the_curve_has_the_shares_that_no_others_beat_on_development_speakers(results):
    first = results["curve"][0]
    assert first["max_escalated"] == [0.0] and first["settled_at_first"] == 1
    assert first["eer_percent"] == pytest.approx(results["rows"][0]["eer_percent"])
    errors = [point["development_eer_percent"] for point in results["curve"]]
    assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize(("stages", "shares"), [(1, 21), (2, 21), (3, 7), (9, 2)])
def test_every_stage_has_a_share_of_its_own(stages, shares):
    grid = list(cascade._share_grid(stages))
    assert len(grid) == shares**stages
    assert (grid[0], grid[-1]) == ((0.0,) * stages, (1.0,) * stages)


def test_the_runtime_decides_as_the_simulator_does(config, results):
    runtime = results["runtime"]
    assert runtime["trials"] == 66
    assert (runtime["decisions_equal"], runtime["stages_equal"]) == (66, 66)
    assert [use["utterances"] for use in runtime["stages"]] == results["cascade"]["utterances_embedded"]
    verifier = load_cascade(pathlib.Path(config.workdir) / "cascade.json")
    assert verifier.cascade.bounds == tuple(results["bounds"])


def test_calibration_shares_no_speaker_with_the_trials(config, speech, tmp_path):
    test_set = load_test_set(config.test)
    corpus = cascade.development_corpus(config, test_set)
    assert not set(corpus.speakers) & set(test_set.corpus.speakers)
    own = dataclasses.replace(config, dev_dir=str(speech.test))
    with pytest.raises(ValueError, match="development speakers are in the trials"):
        cascade.run(own)
    # The same people in a folder of another name.
    shutil.copytree(speech.test, tmp_path / "copy")
    with pytest.raises(ValueError, match="development speakers are in the trials"):
        cascade.development_corpus(dataclasses.replace(config, dev_dir=str(tmp_path / "copy")), test_set)


def test_speakers_of_a_stages_training_are_refused(config, speech):
    own = dataclasses.replace(config, dev_dir=str(speech.train))
    with pytest.raises(ValueError, match=r"4 development speakers are those that a stage was trained on, .*'train0'"):
        cascade.run(own)


def test_development_speakers_can_be_named(config, development, tmp_path):
    test_set, names = load_test_set(config.test), tmp_path / "speakers.txt"
    speakers = sorted(path.name for path in development.iterdir())[:2]
    names.write_text("\n".join(speakers))
    chosen = dataclasses.replace(config, dev_speakers=str(names))
    assert list(cascade.development_corpus(chosen, test_set).speakers) == speakers
    names.write_text("nobody")
    with pytest.raises(ValueError, match=r"speakers \['nobody'\] are not in"):
        cascade.development_corpus(chosen, test_set)
    names.write_text(speakers[0])
    with pytest.raises(ValueError, match="has 1 development speakers"):
        cascade.development_corpus(chosen, test_set)


def test_table_plot_and_results_are_written(config, results):
    folder = pathlib.Path(config.workdir)
    kept = json.loads((folder / "results.json").read_text())
    assert kept["bounds"] == results["bounds"]
    table = with_tables("<!-- table results.json -->\n<!-- end table -->\n", folder)
    assert "| cascade |" in table and "66 of 66 decisions are the same" in table
    row = results["cascade"]
    assert f"{row['act_dcf_at_prior']:.3f}" in table and "actDCF at 0.5" in table
    assert f"| {row['bytes_read_of_a_trial']:,.0f} | {row['resident_bytes']:,} |" in table
    assert (folder / "trade_off.png").stat().st_size > 10_000


def test_bounds_for_flips_cost_no_more_decisions_than_allowed(config, results, tmp_path):
    strict = dataclasses.replace(config, workdir=str(tmp_path), budget="flips", max_harmful=0.0, runtime=False)
    found = cascade.run(strict)
    assert found["runtime"] is None and found["bounds"][0] >= 0
    assert np.isfinite(found["cascade"]["act_dcf"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("one",)}, "needs two --stages"),
        ({"stages": ()}, "--stages must be given"),
        ({"dev_dir": ""}, "--dev_dir must be given"),
    ],
)
def test_what_makes_no_cascade_is_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        cascade.run(dataclasses.replace(config, **change))


def test_settings_out_of_range_are_refused(config):
    with pytest.raises(ValueError, match="--prior must be between 0 and 1"):
        dataclasses.replace(config, prior=0.0)
    with pytest.raises(ValueError, match="--max_escalated"):
        dataclasses.replace(config, max_escalated=1.5)
    with pytest.raises(ValueError, match="plain cosine"):
        cascade.run(dataclasses.replace(config, test=dataclasses.replace(config.test, as_norm=True)))
