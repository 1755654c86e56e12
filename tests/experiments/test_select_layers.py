"""Selections of layers: the front, the selected file, rankings by drift and by errors, what is refused."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments import select_layers
from experiments.finetune_config import FinetuneConfig
from experiments.models import load_float_model
from experiments.select_layers import SelectLayersConfig
from experiments.sensitivity import SensitivityConfig
from experiments.study_tables import selection_table
from experiments.testing import TestConfig, load_test_set
from qsv.deploy import load_packed
from qsv.quant import QTensor, leaf_paths


@pytest.fixture(scope="module")
def config(tmp_path_factory, float_run, speech, make_speech_config):
    return SelectLayersConfig(
        workdir=str(tmp_path_factory.mktemp("selected")),
        pretrained=str(float_run),
        points=3,
        sensitivities=SensitivityConfig(sensitivity_crops=4, max_probes=8, trace_error=10.0),
        finetune=FinetuneConfig(steps=0, calibration_crops=4, speech=make_speech_config()),
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def results(config):
    return select_layers.run(config)


def quantized(workdir):
    packed = load_packed(pathlib.Path(workdir) / "model.safetensors")
    return {path for path, leaf in leaf_paths(packed.packed_params) if isinstance(leaf, QTensor)}


def test_both_fronts_keep_their_sizes(results):
    whole, rows = results["float_parameter_bytes"], results["rows"]
    assert [row["front"] for row in rows] == ["greedy", "hessian"] * 2
    for first, second in zip(rows[:2], rows[2:], strict=True):
        assert second["parameter_bytes"] < first["parameter_bytes"] < whole
        assert second["layers"] > first["layers"] > 0
    assert rows[2]["layers"] == len(results["order"])


def test_the_selected_file_has_the_first_layers_of_the_order(config, results):
    selected = results["selected"]
    assert selected["parameter_bytes"] <= 0.5 * results["float_parameter_bytes"]
    assert quantized(config.workdir) == set(results["order"][: selected["layers"]])
    path = pathlib.Path(config.workdir) / "model.safetensors"
    assert selected["file_bytes"] == path.stat().st_size
    kept = json.loads((path.parent / "selection.json").read_text())
    assert {name for name, bits in kept["bits"].items() if bits == 8} == quantized(config.workdir)
    assert (path.parent / "front.png").exists()
    assert selection_table(results).count("\n| ") == 6


def test_a_rise_of_the_error_on_development_speech_can_be_the_limit(config, results, speech, tmp_path):
    generous = dataclasses.replace(
        config, workdir=str(tmp_path), rank_by="eer", dev_dir=str(speech.train), max_eer_rise=100.0
    )
    found = select_layers.run(generous)
    # Anything is allowed: the smallest of the front.
    assert quantized(tmp_path) == set(found["order"])
    assert found["ranked_by"] == "eer" and sorted(found["order"]) == sorted(results["order"])


def test_rises_are_kept_as_they_are_measured(config, results, speech, tmp_path, monkeypatch):
    own = dataclasses.replace(
        config, workdir=str(tmp_path), rank_by="eer", dev_dir=str(speech.train), test=TestConfig(str(speech.test))
    )
    selector = select_layers.Selector(own, load_float_model(own.pretrained), own.quantization().quantizer())
    development = load_test_set(dataclasses.replace(own.test, test_dir=own.dev_dir, resample="trials"))
    paths, labels, measured = results["order"], development.trials.labels, []

    def scores(self, plan, test_set):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(set(plan.quantized))
        return labels + len(measured) * np.arange(len(labels)) % 3

    monkeypatch.setattr(select_layers.Selector, "scores", scores)
    with pytest.raises(KeyboardInterrupt):
        select_layers._rises(selector, paths, development)
    assert measured == [set(), {paths[0]}]
    measured.clear()
    with pytest.raises(KeyboardInterrupt):
        select_layers._rises(selector, paths, development)
    assert measured == [set(), {paths[1]}]
    measured.clear()
    assert list(select_layers._rises(selector, paths[:2], development)) == list(paths[:2]) and measured == []
    other = dataclasses.replace(development, config=dataclasses.replace(development.config, as_norm=True))
    with pytest.raises(ValueError, match="eer_rises.json was made with as_norm=False, not True"):
        select_layers._rises(selector, paths, other)


def test_a_selection_is_scored_once(config, results, monkeypatch):
    plans, score = [], select_layers.Selector.scores
    monkeypatch.setattr(
        select_layers.Selector, "scores", lambda self, plan, test_set: plans.append(plan) or score(self, plan, test_set)
    )
    again = select_layers.run(config)
    assert again["rows"] == results["rows"]
    assert len(plans) == len(set(plans))


def test_other_settings_in_the_folder_of_a_run_are_refused_before_anything_is_measured(config, results, monkeypatch):
    workdir = pathlib.Path(config.workdir)
    record = (workdir / "run.json").read_bytes()
    monkeypatch.delattr(select_layers, "sensitivities")
    with pytest.raises(ValueError, match=r"was made with target_share=0\.5, not 0\.9; choose another --workdir"):
        select_layers.run(dataclasses.replace(config, target_share=0.9))
    finetune = dataclasses.replace(config.finetune, per_channel=True, calibration_crops=8)
    differences = "per_channel=False, not True; .*calibration_crops=4, not 8; choose another --workdir"
    with pytest.raises(ValueError, match=f"was made with {differences}"):
        select_layers.run(dataclasses.replace(config, finetune=finetune))
    assert (workdir / "run.json").read_bytes() == record


def test_what_can_not_be_is_refused(config, speech, tmp_path):
    with pytest.raises(ValueError, match="need --dev_dir"):
        dataclasses.replace(config, rank_by="eer")
    with pytest.raises(ValueError, match="target_share"):
        dataclasses.replace(config, target_share=0.0)
    same = dataclasses.replace(config, workdir=str(tmp_path), dev_dir=str(speech.test))
    with pytest.raises(ValueError, match="are in --dev_dir and in the trials"):
        select_layers.run(same)
