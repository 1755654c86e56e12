"""The comparison of mixed with uniform precision: what it makes, and what it says of it."""

import dataclasses
import json

import pytest

from experiments import mixed_precision, precision_study, quantize
from experiments.allocation import AllocationConfig
from experiments.precision_study import PrecisionStudyConfig
from experiments.sensitivity import SensitivityConfig
from experiments.tables import with_tables
from experiments.testing import TestConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_quantize_config, float_run, speech):
    return PrecisionStudyConfig(
        workdir=str(tmp_path_factory.mktemp("study")),
        pretrained=str(float_run),
        bit_widths=("2",),
        seeds=2,
        allocation=AllocationConfig(candidate_bits=("1", "2", "4")),
        sensitivities=SensitivityConfig(sensitivity="distortion"),
        finetune=make_quantize_config("unused").finetune,
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def results(config):
    return precision_study.run(config)


def test_every_strategy_has_a_row_with_differences_that_add_up(results):
    uniform, one_shot, staged = results["rows"]
    assert [row["strategy"] for row in results["rows"]] == ["uniform", "one_shot", "ascending_bits"]
    for row in results["rows"]:
        assert row["eer_percent"] == pytest.approx(sum(row["eer_percent_of_seeds"]) / 2)
    assert one_shot["eer_percent_above_uniform"] == pytest.approx(one_shot["eer_percent"] - uniform["eer_percent"])
    assert staged["eer_percent_above_one_shot"] == pytest.approx(staged["eer_percent"] - one_shot["eer_percent"])
    assert "eer_percent_above_uniform" not in uniform


def test_mixed_files_are_as_large_as_the_uniform_one_and_not_larger(config, results):
    uniform, *mixed = (row["file_bytes"] for row in results["rows"])
    assert all(0.97 * uniform < size <= uniform for size in mixed)
    allocation = json.loads((config.folder("one_shot", 2, 0) / "allocation.json").read_text())
    assert len(set(allocation["bits"].values())) > 1


def test_models_that_are_there_are_only_evaluated(config, results, monkeypatch):
    monkeypatch.setattr(quantize, "run", None)
    monkeypatch.setattr(mixed_precision, "run", None)
    assert precision_study.run(config)["rows"] == results["rows"]
    shorter = dataclasses.replace(config, strategies=("one_shot",), seeds=1)
    assert len(precision_study.run(shorter)["rows"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"allocation": AllocationConfig(candidate_bits=("1", "2"))},
            r"one_shot_2_seed0 was made with candidate_bits=",
        ),
        ({"sensitivities": SensitivityConfig(sensitivity="drift")}, "one_shot_2_seed0 was made with sensitivity="),
        ({"allocation": AllocationConfig(pin=("4:stem/.*",))}, r"uniform_2_seed0 was made with pin="),
    ],
)
def test_models_of_other_settings_are_refused(config, results, changes, message):
    with pytest.raises(ValueError, match=message):
        precision_study.run(dataclasses.replace(config, **changes))


def test_readmes_table_shows_both_comparisons(tmp_path, results):
    (tmp_path / "study.json").write_text(json.dumps(results))
    table = with_tables("<!-- table study.json -->\n<!-- end table -->", tmp_path)
    assert "| 2 bits | mixed, stages by ascending bits |" in table
    assert "means of 2 seeds" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_widths": ("2:3",)}, "--bit_widths must be whole numbers"),
        ({"strategies": ("backwards",)}, "stages must be one of ascending_bits, .*, got 'backwards'"),
    ],
)
def test_wrong_settings_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


def test_a_target_is_refused_before_anything_is_made(config, monkeypatch):
    monkeypatch.setattr(precision_study, "load_test_set", None)
    with pytest.raises(ValueError, match="give --bit_widths in place of a target"):
        precision_study.run(dataclasses.replace(config, allocation=AllocationConfig(target_bits=2.0)))
