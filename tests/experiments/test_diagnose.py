"""The diagnosis of quantized models: what it measures, what it writes, what it refuses."""

import dataclasses
import json
import pathlib
import sys

import numpy as np
import pytest

from experiments import diagnose
from experiments.diagnose import DiagnoseConfig
from experiments.diagnosis_layers import layer_correlations, layer_test_trials, measure_layers
from experiments.diagnosis_probes import probed_attributes
from experiments.models import load_float_model
from experiments.scoring import score
from experiments.tables import with_tables
from experiments.testing import TestConfig, load_test_set
from qsv.deploy import Embedder, load_packed
from qsv.quant import QTensor, leaf_paths, with_leaves

PNG = b"\x89PNG"
STEM, EMBEDDING = "stem/conv/kernel", "embedding/kernel"


def strict_json(path):
    """Its content; raises where it holds what only Python reads, such as Infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def labels(tmp_path_factory, speech):
    """Every second speaker has one value, one utterance has none."""
    names = sorted(str(path.relative_to(speech.test)) for path in pathlib.Path(speech.test).rglob("*.wav"))
    speakers = sorted({name.split("/")[0] for name in names})
    path = tmp_path_factory.mktemp("labels") / "labels.tsv"
    rows = [f"{name}\t{'ab'[speakers.index(name.split('/')[0]) % 2]}" for name in names]
    rows[0] = f"{names[0]}\t"
    path.write_text("\n".join(["utterance\tside", *rows]))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory, speech, quantized_run, float_run):
    workdir = tmp_path_factory.mktemp("diagnosis")
    return DiagnoseConfig(
        workdir=str(workdir),
        output=str(workdir / "summary.json"),
        reference=str(float_run),
        models=(str(quantized_run),),
        layer_tests="both",
        group_depth=1,
        drift_utterances=3,
        drift_seconds=0.5,
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def results(config):
    return diagnose.run(config)


@pytest.fixture(scope="module")
def model(results):
    (model,) = results["models"].values()
    return model


def test_every_quantized_layer_is_measured(model, quantized_run):
    packed = load_packed(quantized_run / "model.safetensors").packed_params
    paths = [path for path, leaf in leaf_paths(packed) if isinstance(leaf, QTensor)]
    assert sorted(row["path"] for row in model["layers"]) == sorted(paths)
    assert [row["path"] for row in model["layers"]] == [f"{row['path']}/kernel" for row in model["drift"]]
    assert {f"{row['path']}/kernel" for row in model["drift"]} == set(paths)
    assert all(0 < row["distortion"]["relative_error"] < 1 for row in model["layers"])


def test_groups_of_layers_are_tested_alone(model):
    names = [row["layer"] for row in model["layer_tests"]]
    assert "stem" in names and "stage1_block1" in names and "embedding" in names
    assert sum(len(row["paths"]) for row in model["layer_tests"]) == len(model["layers"])
    for row in model["layer_tests"]:
        assert 0 <= row["eer_percent_alone_quantized"] <= 100 and 0 <= row["eer_percent_alone_float"] <= 100


def test_a_layer_alone_is_quantized_from_its_float_weights(config, float_run, quantized_run):
    packed = load_packed(quantized_run / "model.safetensors")
    leaves = dict(leaf_paths(packed.packed_params))
    moved = {path: dataclasses.replace(leaves[path], codes=leaves[path].codes[::-1]) for path in (STEM, EMBEDDING)}
    other = dataclasses.replace(packed, packed_params=with_leaves(packed.packed_params, moved))
    reference, test_set = load_float_model(str(float_run)), load_test_set(config.test)
    before = score(Embedder(reference.network, reference.variables), test_set)
    rows = [
        measure_layers(reference, model, [STEM, EMBEDDING], test_set, before=before, group_depth=0, alone_float=False)
        for model in (packed, other)
    ]
    assert rows[0] == rows[1]


def test_each_layer_is_tested_by_itself_without_groups(config, float_run, quantized_run):
    paths, test_set = [STEM, EMBEDDING], load_test_set(config.test)
    packed = load_packed(quantized_run / "model.safetensors")
    reference = load_float_model(str(float_run))
    before = score(Embedder(reference.network, reference.variables), test_set)
    rows = measure_layers(reference, packed, paths, test_set, before=before, group_depth=0, alone_float=False)
    assert [(row["layer"], row["paths"]) for row in rows] == [(path, (path,)) for path in paths]
    assert all("eer_percent_alone_float" not in row and 0 < row["score_drift_alone_quantized"] < 2 for row in rows)


def test_drift_and_flips_count_all_trials(model):
    scores = model["scores"]
    assert scores["drift"]["all"]["trials"] == scores["flips"]["all"]["trials"] == 66
    assert sum(row["trials"] for row in scores["drift_by_distance"]) == 66
    for place in ("", "_at_own_threshold"):
        density, flips = scores[f"flip_density{place}"], scores[f"flips{place}"]["all"]
        assert sum(density["trials"]) == 66
        assert (sum(density["harmful"]), sum(density["beneficial"])) == (flips["harmful"], flips["beneficial"])


def test_layers_can_be_tested_on_a_part_of_the_trials(config):
    test_set = load_test_set(config.test)
    assert layer_test_trials(test_set, 0) is test_set
    part = layer_test_trials(test_set, 6)
    assert part.trials.names == test_set.trials.names[::2]
    kept = {(part.trials.names[a], part.trials.names[b]) for a, b in zip(*sides(part.trials), strict=True)}
    every = [(test_set.trials.names[a], test_set.trials.names[b]) for a, b in zip(*sides(test_set.trials), strict=True)]
    assert kept == {pair for pair in every if set(pair) <= set(part.trials.names)}
    with pytest.raises(ValueError, match="of one class only; give more --layer_test_utterances"):
        layer_test_trials(test_set, 2)


def sides(trials):
    return trials.enrolment, trials.test


def test_the_look_of_the_weights_is_set_beside_the_errors():
    layers = [
        {"path": f"{name}/kernel", "smoothness": look, "kurtosis": -look, "distortion": {"relative_error": 0.1 * look}}
        for look, name in enumerate("abcd")
    ]
    tests = [
        {
            "paths": [row["path"]],
            "eer_percent_alone_quantized": 5.0 - row["smoothness"],
            "score_drift_alone_quantized": row["smoothness"],
        }
        for row in layers
    ]
    found = layer_correlations({"layers": layers, "drift": [], "layer_tests": tests}, 1.0)
    assert found["smoothness and EER with this layer alone quantized"]["estimate"] == pytest.approx(-1)
    assert found["kurtosis and EER with this layer alone quantized"]["estimate"] == pytest.approx(1)
    assert found["smoothness and score drift with this layer alone quantized"]["estimate"] == pytest.approx(1)


def test_what_json_cannot_say_is_null():
    assert diagnose._without_infinities({"a": np.inf, "b": [float("nan"), 1.5, "x"], "c": (1, None)}) == {
        "a": None,
        "b": [None, 1.5, "x"],
        "c": [1, None],
    }


def test_report_plots_and_table_are_written(config, results):
    folder = pathlib.Path(config.workdir)
    report = (folder / "report.md").read_text()
    for part in ("Layers whose weights moved most", "when they alone are quantized", "Drift of scores", "flip"):
        assert part in report
    assert "Not probed: speaker, " in report
    name = next(iter(results["models"]))
    figures = (
        "det",
        "score_drift",
        "flips",
        "flips_own_threshold",
        "layers",
        "drift",
        "layer_tests",
        f"weights_{name}",
    )
    for figure in figures:
        assert (folder / f"{figure}.png").read_bytes().startswith(PNG)
    kept = strict_json(folder / "results.json")
    assert kept["models"][name]["eer_percent"] == results["models"][name]["eer_percent"]
    summary = strict_json(folder / "summary.json")["models"][name]
    assert kept["models"][name] == summary | {part: kept["models"][name][part] for part in ("layers", "drift")}
    assert not {"layers", "drift"} & set(summary)
    table = with_tables("<!-- table summary.json -->\n<!-- end table -->\n", folder)
    assert f"| {name} |" in table and f"| rank correlation over layers (95 % interval) | {name} |" in table
    (worst,) = [line for line in table.splitlines() if line.startswith(f"| {name} | ") and ", " in line]
    drifts = [row["score_drift_alone_quantized"] for row in results["models"][name]["layer_tests"]]
    assert [float(cell.split()[1]) for cell in worst.split(" | ")[1].rstrip(" |").split(", ")] == [
        round(drift, 3) for drift in sorted(drifts, reverse=True)[:5]
    ]


def test_probes_cover_labels_length_speaker_and_augmentation(config, labels, speech, monkeypatch, tmp_path):
    pytest.importorskip("sklearn", reason="probes need scikit-learn (qsv[analysis])")
    embedded, embed_files = [], Embedder.embed_files

    def counted(self, files, **options):
        embedded.append(len(files))
        return embed_files(self, files, **options)

    monkeypatch.setattr(Embedder, "embed_files", counted)
    changes = {"labels": str(labels), "workdir": str(tmp_path), "layer_tests": "none", "probe_folds": 2}
    changes |= {"augmented_utterances": 4, "noise_dir": (str(speech.noise),)}
    found = diagnose.run(dataclasses.replace(config, **changes))
    # Both networks: the test speech once, then three types of each of four utterances.
    assert embedded == [12, 12, 12, 12]
    probes = found["probes"]
    attributes = ("side", "duration", "speaker", "augmentation")
    assert set(probes) == {f"{attribute}, {kind}" for attribute in attributes for kind in ("logistic", "mlp")}
    assert probes["side, logistic"]["float"]["utterances"] == 11
    augmentation = probes["augmentation, logistic"]["float"]
    assert (augmentation["utterances"], augmentation["values"], augmentation["majority"]) == (16, 4, 0.25)
    for models in probes.values():
        assert models["float"]["gap"] == 0 and set(models) == {"float", *found["models"]}
        low, high = next(reversed(models.values()))["gap_interval"]
        assert np.isfinite([low, high]).all() and low <= high
    assert "What embeddings tell" in (tmp_path / "report.md").read_text()
    assert "| augmentation, mlp | 25.0 % | 25.0 % |" in (tmp_path / "report.md").read_text()


def test_what_is_one_speakers_alone_is_probed_on_known_speakers(config):
    pytest.importorskip("sklearn", reason="probes need scikit-learn (qsv[analysis])")
    test_set = load_test_set(config.test)
    names, speakers = test_set.trials.names, test_set.speakers.tolist()
    half = {speaker: "ab"[place % 2] for place, speaker in enumerate(sorted(set(speakers)))}
    sessions = {
        name: f"{speaker}{place % 2}" for place, (name, speaker) in enumerate(zip(names, speakers, strict=True))
    }
    labels = {"side": {name: half[speaker] for name, speaker in zip(names, speakers, strict=True)}, "session": sessions}
    attributes, left_out = probed_attributes(labels, test_set, types=["faster"], places=[0, 3, 6, 9], num_folds=2)
    assert not left_out and set(attributes) == {"speaker", "duration", "side", "session", "augmentation"}
    assert attributes["session"].groups == attributes["speaker"].groups == names
    assert attributes["side"].groups == attributes["duration"].groups == tuple(speakers)
    assert attributes["augmentation"].rows == (0, 3, 6, 9, 12, 13, 14, 15)
    assert attributes["augmentation"].values == ("clean",) * 4 + ("faster",) * 4
    assert attributes["augmentation"].groups == tuple(speakers[place] for place in (0, 3, 6, 9)) * 2


def test_results_are_kept_when_probes_fail(config, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("of the probes")

    monkeypatch.setattr(diagnose, "run_probes", fail)
    with pytest.raises(RuntimeError, match="of the probes"):
        diagnose.run(dataclasses.replace(config, workdir=str(tmp_path), layer_tests="none"))
    assert strict_json(tmp_path / "results.json")["models"]


def test_what_cannot_be_probed_is_refused_before_anything_is_embedded(config, labels, monkeypatch, tmp_path):
    monkeypatch.setattr(Embedder, "embed_files", lambda *_: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="'side' of --labels can't be probed: 5 folds need as many groups"):
        diagnose.run(dataclasses.replace(config, labels=str(labels)))
    monkeypatch.setitem(sys.modules, "sklearn.model_selection", None)
    with pytest.raises(ImportError, match="probes need scikit-learn"):
        diagnose.run(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a\tb\nx\ty", "must name the columns"), ("utterance\nx", "must name"), ("utterance\tb\nx\ty", "in no trial")],
)
def test_bad_labels_are_refused_before_anything_is_embedded(config, tmp_path, content, message):
    path = tmp_path / "labels.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        diagnose.run(dataclasses.replace(config, labels=str(path), reference="nowhere"))


def test_what_cannot_be_diagnosed_is_refused(config, float_run, quantized_run):
    with pytest.raises(ValueError, match="float has no quantized layer"):
        diagnose.run(dataclasses.replace(config, models=(str(quantized_run), str(float_run))))
    with pytest.raises(ValueError, match="--models must be given"):
        diagnose.run(dataclasses.replace(config, models=()))
    with pytest.raises(ValueError, match="different names"):
        diagnose.run(dataclasses.replace(config, models=(str(quantized_run), str(quantized_run))))
    with pytest.raises(ValueError, match="smaller --drift_seconds"):
        diagnose.run(dataclasses.replace(config, drift_seconds=100.0))
