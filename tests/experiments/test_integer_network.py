"""Weights and activations in 8-bit integers: the file, its evaluation, agreement with integers, refusals."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments import integer_network
from experiments.finetune_config import FinetuneConfig
from experiments.integer_network import IntegerNetworkConfig
from experiments.models import load_embedder, load_float_model
from experiments.study_tables import integer_table
from experiments.testing import TestConfig
from qsv.deploy import IntegerNetwork, load_packed
from qsv.models import activation_points
from qsv.quant import ActivationQuantizer


@pytest.fixture(scope="module")
def config(tmp_path_factory, float_run, speech, make_speech_config):
    return IntegerNetworkConfig(
        workdir=str(tmp_path_factory.mktemp("integer")),
        pretrained=str(float_run),
        weight_bits=4,
        compared_utterances=1,
        exported=True,
        finetune=FinetuneConfig(
            integer_levels=True, mse_weight=1.0, steps=4, calibration_crops=64, speech=make_speech_config()
        ),
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def path(config):
    return integer_network.run(config)


def test_the_file_has_integer_weights_and_ranges(path):
    model = load_packed(path)
    assert model.activations.quantizer == ActivationQuantizer(8) and model.activation_bits == 8
    integer = IntegerNetwork.of(model.network, model.packed_params, model.batch_stats, model.activations)
    points = activation_points(model.network)
    assert set(model.activations.ranges) == {*points.inputs.values(), *points.outputs.values()}
    assert set(integer.layers) == set(points.inputs)
    assert "KMeans(bits=4, integer_levels=True)" in model.plan_description.values()


def test_the_file_is_evaluated_with_quantized_activations(config, path, speech):
    figures = json.loads((path.parent / "results.json").read_text())
    assert figures["weight_bits"] == 4 and figures["equalized"] and figures["file_bytes"] == path.stat().st_size
    integers = figures["integers"]
    assert integers["utterances"] == 1 and integers["least_cosine"] > 0.999 and integers["largest_step"] <= 1
    embedder, _ = load_embedder(str(path))
    audio = sorted(speech.test.glob("*/*.wav"))[:2]
    found = embedder.embed_files(audio, progress=False)
    assert not np.array_equal(found, dataclasses.replace(embedder, activations=None).embed_files(audio, progress=False))
    reference, _ = load_embedder(config.pretrained)
    expected = reference.embed_files(audio, progress=False)
    cosines = np.sum(found * expected, axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.9
    exported = figures["exported"]
    assert exported["file_bytes"] == path.with_suffix(".onnx").stat().st_size
    assert exported["trials"] == figures["trials"] and abs(exported["eer_percent_difference"]) <= 1
    row = integer_table(figures, figures).splitlines()[3]
    assert "| 4 | tensor | 8 |" in row
    assert f"| {exported['file_bytes']:,} |" in row and f"| {figures['file_bytes']:,} |" in row
    assert "computed in integers" in (path.parent / "report.md").read_text().lower()


def test_ranges_are_learnt(config, path, tmp_path):
    untrained = dataclasses.replace(
        config,
        workdir=str(tmp_path),
        finetune=dataclasses.replace(config.finetune, steps=0),
        test=TestConfig(),
        exported=False,
    )
    before, after = (load_packed(one).activations.ranges for one in (integer_network.run(untrained), path))
    assert set(before) == set(after)
    moved = [name for name in before if before[name].high != after[name].high]
    assert len(moved) > len(before) / 2


def test_without_equalization_the_same_function_is_quantized(config, tmp_path):
    plain = dataclasses.replace(
        config,
        workdir=str(tmp_path),
        weight_bits=8,
        equalize=False,
        finetune=dataclasses.replace(config.finetune, steps=0),
        test=TestConfig(),
        exported=False,
    )
    model = load_packed(integer_network.run(plain))
    original = load_float_model(config.pretrained)
    for own, other in zip(
        jax.tree.leaves(model.variables()["params"]["embedding"]),
        jax.tree.leaves(original.params["embedding"]),
        strict=True,
    ):
        np.testing.assert_allclose(own, other, atol=0.05 * np.abs(other).max())


def test_levels_off_the_grid_of_integers_are_refused_before_anything_is_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(integer_network, "unquantized", None)
    floating = dataclasses.replace(config.finetune, integer_levels=False)
    for changes in ({"scheme": "apot"}, {"scheme": "pot", "weight_bits": 5}, {"finetune": floating}):
        with pytest.raises(ValueError, match="levels must be on an int8 grid"):
            integer_network.run(dataclasses.replace(config, workdir=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_other_settings_in_the_folder_of_a_run_are_refused(config, path):
    record = (path.parent / "run.json").read_bytes()
    with pytest.raises(ValueError, match="was made with range_method='mse', not 'min_max'; choose another --workdir"):
        integer_network.run(dataclasses.replace(config, range_method="min_max"))
    assert (path.parent / "run.json").read_bytes() == record


def test_what_can_not_be_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="give --test_dir"):
        IntegerNetworkConfig(exported=True)
    silent = dataclasses.replace(config.finetune, calibration_crops=0, rounding="nearest")
    with pytest.raises(ValueError, match="give --calibration_crops"):
        integer_network.run(dataclasses.replace(config, workdir=str(tmp_path), finetune=silent))
    with pytest.raises(ValueError, match="bits"):
        integer_network.run(dataclasses.replace(config, workdir=str(tmp_path), weight_bits=9))
    same = str(
        pathlib.Path(config.pretrained).parent if config.pretrained.endswith(".safetensors") else config.pretrained
    )
    with pytest.raises(ValueError, match="would overwrite"):
        integer_network.run(dataclasses.replace(config, workdir=same))
