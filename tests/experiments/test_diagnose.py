"""The diagnosis of quantized models: what it measures, what it writes, what it refuses."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments import diagnose
from experiments.diagnose import DiagnoseConfig
from experiments.models import load_float_model
from experiments.tables import with_tables
from experiments.testing import TestConfig, load_test_set
from qsv.deploy import load_packed
from qsv.quant import QTensor, leaf_paths

PNG = b"\x89PNG"


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
    return DiagnoseConfig(
        workdir=str(tmp_path_factory.mktemp("diagnosis")),
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


def test_each_layer_is_tested_by_itself_without_groups(config, float_run, quantized_run):
    one = dataclasses.replace(config, group_depth=0, layer_tests="quantized")
    paths = ["stem/conv/kernel", "embedding/kernel"]
    packed = load_packed(quantized_run / "model.safetensors")
    rows = diagnose.measure_layers(one, load_float_model(str(float_run)), packed, paths, load_test_set(config.test))
    assert [(row["layer"], row["paths"]) for row in rows] == [(path, (path,)) for path in paths]
    assert all("eer_percent_alone_float" not in row for row in rows)


def test_drift_and_flips_count_all_trials(model):
    scores = model["scores"]
    assert scores["drift"]["all"]["trials"] == scores["flips"]["all"]["trials"] == 66
    assert sum(row["trials"] for row in scores["drift_by_distance"]) == 66


def test_report_plots_and_table_are_written(config, results):
    folder = pathlib.Path(config.workdir)
    report = (folder / "report.md").read_text()
    for part in ("Layers whose weights moved most", "when they alone are quantized", "Drift of scores"):
        assert part in report
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
    kept = json.loads((folder / "results.json").read_text())
    assert kept["models"][name]["eer_percent"] == results["models"][name]["eer_percent"]
    assert f"| {name} |" in with_tables("<!-- table results.json -->\n<!-- end table -->\n", folder)


def test_probes_cover_labels_length_and_speaker(config, labels, tmp_path):
    pytest.importorskip("sklearn", reason="probes need scikit-learn (qsv[analysis])")
    changes = {"labels": str(labels), "workdir": str(tmp_path), "layer_tests": "none", "probe_folds": 2}
    found = diagnose.run(dataclasses.replace(config, **changes))
    probes = found["probes"]
    attributes = ("side", "duration", "speaker")
    assert set(probes) == {f"{attribute}, {kind}" for attribute in attributes for kind in ("logistic", "mlp")}
    assert probes["side, logistic"]["float"]["utterances"] == 11
    for models in probes.values():
        assert models["float"]["gap"] == 0 and set(models) == {"float", *found["models"]}
        low, high = next(reversed(models.values()))["gap_interval"]
        assert np.isfinite([low, high]).all() and low <= high
    assert "What embeddings tell" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [("a\tb\nx\ty", "must name the columns"), ("utterance\nx", "must name"), ("utterance\tb\nx\ty", "in no trial")],
)
def test_bad_labels_are_refused_before_anything_is_embedded(config, tmp_path, content, message):
    path = tmp_path / "labels.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        diagnose.run(dataclasses.replace(config, labels=str(path), reference="nowhere"))


def test_what_cannot_be_diagnosed_is_refused(config, quantized_run):
    with pytest.raises(ValueError, match="--models must be given"):
        diagnose.run(dataclasses.replace(config, models=()))
    with pytest.raises(ValueError, match="different names"):
        diagnose.run(dataclasses.replace(config, models=(str(quantized_run), str(quantized_run))))
    with pytest.raises(ValueError, match="smaller --drift_seconds"):
        diagnose.run(dataclasses.replace(config, drift_seconds=100.0))
