"""The comparison of binary networks: what it makes, how it goes from more bits to one, what it refuses."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import binary
from experiments.binary import BinaryConfig, Kind
from experiments.models import MODEL_FILE
from experiments.quantize import QuantizeConfig
from experiments.sensitivity import SensitivityConfig
from experiments.tables import with_tables
from experiments.testing import TestConfig
from qsv.deploy import load_packed
from qsv.quant import QTensor, StaticBinary, leaf_paths
from qsv.training.metrics import read_metrics

CHEAP = SensitivityConfig(sensitivity="distortion")


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_quantize_config, float_run, speech):
    return BinaryConfig(
        workdir=str(tmp_path_factory.mktemp("binary")),
        pretrained=str(float_run),
        schemes=("sign", "adaptive_binary"),
        finetune=make_quantize_config("unused", steps=4).finetune,
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def results(config):
    return binary.run(config)


def test_every_kind_has_a_row_and_a_file_of_one_bit(config, results):
    kinds = ["sign", "adaptive_binary"]
    assert [row["kind"] for row in results["rows"]] == kinds
    for kind, row in zip(kinds, results["rows"], strict=True):
        path = config.folder(Kind(kind), 0) / MODEL_FILE
        assert row["file_bytes"] == path.stat().st_size
        bits = {leaf.bits for _, leaf in leaf_paths(load_packed(path).packed_params) if isinstance(leaf, QTensor)}
        assert bits == {1}
        assert ("eer_percent_above_sign" in row) == (kind != "sign")


def test_half_of_the_steps_are_with_more_bits(config, results):
    rows = binary.run(dataclasses.replace(config, schemes=("adaptive_binary",), from_bits=("2",)))["rows"]
    assert [row["kind"] for row in rows] == ["adaptive_binary", "adaptive_binary_from_2_bits"]
    folder = config.folder(Kind("adaptive_binary", from_bits=2), 0) / "stages"
    assert sorted(one.name for one in folder.iterdir()) == ["1_2_bits", "2_1_bit"]
    for stage in folder.iterdir():
        assert [line["step"] for line in read_metrics(stage)] == [1, 2]
    assert len(read_metrics(config.folder(Kind("sign"), 0) / "stages" / "1_1_bit")) == 4


def test_between_one_and_two_bits_layers_get_their_own(config, results):
    settings = dataclasses.replace(config, schemes=("sign",), mixed_bits=("1.5",), sensitivities=CHEAP)
    rows = binary.run(settings)["rows"]
    assert [row["kind"] for row in rows] == ["sign", "kmeans_1.5_bits"]
    assert rows[1]["file_bytes"] > rows[0]["file_bytes"]
    path = config.folder(Kind("kmeans", mean_bits=1.5), 0) / MODEL_FILE
    kernels = [leaf for _, leaf in leaf_paths(load_packed(path).packed_params) if isinstance(leaf, QTensor)]
    weights = [math.prod(leaf.shape) for leaf in kernels]
    assert np.average([leaf.bits for leaf in kernels], weights=weights) <= 1.5
    assert 1 in {leaf.bits for leaf in kernels}
    assert max(leaf.bits for leaf in kernels) > 1


def test_models_that_are_there_are_only_evaluated(config, results, monkeypatch):
    monkeypatch.setattr(binary, "finetune_in_stages", None)
    assert binary.run(config)["rows"] == results["rows"]
    assert len(binary.run(dataclasses.replace(config, schemes=("adaptive_binary",)))["rows"]) == 1


def test_models_of_other_settings_are_refused(config, results):
    finetune = dataclasses.replace(config.finetune, steps=2)
    with pytest.raises(ValueError, match="sign_seed0 was made with steps=4, not 2; choose another --workdir"):
        binary.run(dataclasses.replace(config, finetune=finetune))
    with pytest.raises(ValueError, match="sign_seed0 was made with compact=True, not False"):
        binary.run(dataclasses.replace(config, compact=False))


def test_readmes_table_shows_the_differences(tmp_path, results):
    (tmp_path / "binary.json").write_text(json.dumps(results))
    table = with_tables("<!-- table binary.json -->\n<!-- end table -->", tmp_path)
    assert "| adaptive binary |" in table
    assert "4 steps of fine-tuning in all; one seed" in table


def test_the_static_set_is_the_same_in_every_layer_but_for_a_power_of_two(config):
    settings = dataclasses.replace(config, schemes=("static_binary",), from_bits=())
    binary.run(settings)
    params = load_packed(config.folder(Kind("static_binary"), 0) / MODEL_FILE).packed_params
    for _, leaf in leaf_paths(params):
        if isinstance(leaf, QTensor):
            np.testing.assert_array_equal(leaf.codebook, [-1, 1])
            assert np.log2(leaf.scale) == np.round(np.log2(leaf.scale))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schemes": ("kmeans",)}, "--schemes must be of sign, static_binary, adaptive_binary, got 'kmeans'"),
        ({"from_bits": ("1",)}, "--from_bits must be 2 to 8, got '1'"),
        ({"mixed_bits": ("1",)}, "--mixed_bits must be between 1 and 4, got '1'"),
    ],
)
def test_wrong_settings_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 2}, "--scheme=static_binary has 1 bit a weight, give --bits=1"),
        ({"rounding": "compensated", "calibration_crops": 8}, "--scheme=static_binary needs --rounding=nearest"),
        ({"normalization": "restore"}, "knows no --normalization=restore"),
    ],
)
def test_binary_schemes_refuse_what_they_cannot_do(make_quantize_config, settings, message):
    config = make_quantize_config("unused", **{"bits": 1, "scheme": "static_binary"} | settings)
    with pytest.raises(ValueError, match=message):
        config.quantizer()


def test_a_single_binary_network_is_a_scheme_of_a_quantization():
    config = QuantizeConfig(scheme="static_binary", bits=1)
    settings = dataclasses.replace(config.finetune, rounding="nearest", per_channel=True)
    assert dataclasses.replace(config, finetune=settings).quantizer() == StaticBinary(channel_axes=(-1,))
