"""The comparison of bit widths, over models that are there already."""

import dataclasses
import json
import pathlib
import shutil

import jax
import pytest

from experiments import bit_widths, quantize, running
from experiments.configuration import write_json
from experiments.finetune_config import FinetuneConfig
from experiments.run_settings import SETTINGS_FILE, shaping_settings
from experiments.testing import TestConfig


@pytest.fixture
def make_config(float_run, speech, make_quantize_config):
    """With the settings of `quantized_run`."""

    def make(workdir, **changes):
        settings = {
            "pretrained": str(float_run),
            "schemes": ("kmeans",),
            "bit_widths": ("4",),
            "finetune": make_quantize_config("unused", steps=6, refresh_steps=3, calibration_crops=64).finetune,
            "test": TestConfig(test_dir=str(speech.test), resamples=20),
        }
        return bit_widths.BitWidthsConfig(workdir=str(workdir), **settings | changes)

    return make


@pytest.fixture
def put(quantized_run):
    """Lays a model where a config wants one, as if it had been made so."""

    def copy(config):
        shutil.copytree(quantized_run, config.workdir)
        write_json(pathlib.Path(config.workdir) / SETTINGS_FILE, shaping_settings(config))

    return copy


@pytest.fixture
def no_training(monkeypatch):
    """Fails the test when something is quantized."""

    def refuse(config):
        raise AssertionError(f"{config.scheme} {config.bits} was quantized")

    monkeypatch.setattr(quantize, "prepare", refuse)


def test_models_that_are_there_are_measured_against_the_float_one(
    tmp_path, make_config, float_run, quantized_run, no_training, capsys
):
    shutil.copytree(quantized_run, tmp_path / "kmeans_4")
    results = bit_widths.run(make_config(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    float_row, row = results["rows"]
    assert (float_row["scheme"], float_row["bits"], row["scheme"], row["bits"]) == ("float", 32, "kmeans", 4)
    assert float_row["file_bytes"] == (float_run / "model.safetensors").stat().st_size
    assert row["compression_ratio"] == results["float_parameter_bytes"] / row["file_bytes"]
    assert row["eer_percent_difference"] == row["eer_percent"] - float_row["eer_percent"]
    assert "| kmeans | tensor | 4 | 6 |" in capsys.readouterr().out
    for plot in ("det.png", "error_against_size.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")


def test_each_test_of_the_same_models_has_plots_of_its_own(tmp_path, make_config, quantized_run, no_training):
    shutil.copytree(quantized_run, tmp_path / "kmeans_4")
    for name in ("an4", "emodb"):
        bit_widths.run(make_config(tmp_path, output=str(tmp_path / f"{name}.json")))
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {f"{name}_{plot}" for name in ("an4", "emodb") for plot in ("det.png", "error_against_size.png")}


def test_models_of_other_settings_are_refused(tmp_path, make_config, quantized_run, no_training):
    shutil.copytree(quantized_run, tmp_path / "kmeans_4")
    config = make_config(tmp_path)
    optimization = dataclasses.replace(config.finetune.optimization, margin=0.1)
    others = {
        "steps=6, not 7": dataclasses.replace(config, bit_widths=("4:7",)),
        "pin=\\[\\], not": dataclasses.replace(config, pin=("8:stem/.*",)),
        "margin=0.2, not 0.1": dataclasses.replace(
            config, finetune=dataclasses.replace(config.finetune, optimization=optimization)
        ),
    }
    for difference, other in others.items():
        with pytest.raises(ValueError, match=f"kmeans_4 was made with .*{difference}.*choose another --workdir"):
            bit_widths.run(other)


def test_a_longer_list_makes_what_is_missing_and_compiles_the_rest_once(
    tmp_path, make_config, quantized_run, put, monkeypatch
):
    shutil.copytree(quantized_run, tmp_path / "kmeans_4")
    monkeypatch.setattr(quantize, "prepare", lambda config: None)
    monkeypatch.setattr(quantize, "finish", lambda config, start: put(config))
    monkeypatch.setattr(running, "_MANY_MAPS", 10**9)
    monkeypatch.setattr(jax, "clear_caches", lambda: pytest.fail("programs were forgotten"))
    rows = bit_widths.run(make_config(tmp_path, schemes=("kmeans", "uniform"), bit_widths=("4", "3")))["rows"]
    made = {path.parent.name for path in tmp_path.glob("*/settings.json")}
    assert made == {"kmeans_4", "kmeans_3", "uniform_4", "uniform_3"} and len(rows) == 5


def test_models_that_are_not_there_are_made_with_the_given_settings(tmp_path, make_config, put, monkeypatch):
    made = []

    def copy(config, start):
        made.append(config)
        put(config)

    monkeypatch.setattr(quantize, "prepare", lambda config: None)
    monkeypatch.setattr(quantize, "finish", copy)
    finetune = FinetuneConfig(steps=7)
    bit_widths.run(make_config(tmp_path, schemes=("uniform", "kmeans"), bit_widths=("8", "3"), finetune=finetune))
    assert [(config.scheme, config.bits) for config in made] == [
        ("uniform", 8),
        ("uniform", 3),
        ("kmeans", 8),
        ("kmeans", 3),
    ]
    assert {config.finetune for config in made} == {finetune}
    assert {config.pretrained for config in made} == {make_config(tmp_path).pretrained}


def test_models_that_differ_in_their_training_alone_share_a_calibration(tmp_path, make_config, put, monkeypatch):
    calibrated, made = [], []

    def copy(config, start):
        made.append((start, config.bits, config.finetune.per_channel, config.finetune.steps))
        put(config)

    monkeypatch.setattr(quantize, "prepare", lambda config: calibrated.append(config) or len(calibrated))
    monkeypatch.setattr(quantize, "finish", copy)
    config = make_config(
        tmp_path, bit_widths=("8", "3"), channel_scales=True, post_training=True, finetune=FinetuneConfig(steps=7)
    )
    rows = bit_widths.run(config)["rows"]
    assert made == [
        (start, bits, per_channel, steps)
        for start, (per_channel, bits) in enumerate([(False, 8), (False, 3), (True, 8), (True, 3)], start=1)
        for steps in (0, 7)
    ]
    # A calibration for training needs its speech.
    assert {config.finetune.steps for config in calibrated} == {7}
    assert len(rows) == 9
    made.clear()
    bit_widths.run(config)
    assert not made


def test_bits_can_have_steps_of_their_own(make_config):
    config = make_config("unused", bit_widths=("8:50", "2"), post_training=True, finetune=FinetuneConfig(steps=7))
    assert [(model.bits, model.steps) for model in config.variants()] == [(8, 0), (2, 0), (8, 50), (2, 7)]
    assert len(make_config("unused", finetune=FinetuneConfig(steps=0), post_training=True).variants()) == 1


def test_pins_hold_for_all_models_and_are_in_the_table(tmp_path, make_config, put, no_training, capsys):
    config = make_config(tmp_path, pin=("8:stem/.*",))
    for model in config.variants():
        put(model.config())
    assert [model.config().pin for model in config.variants()] == [config.pin]
    assert bit_widths.run(config)["pinned"] == ["8:stem/.*"]
    assert "8 bits for `stem/.*` in all models; steps of fine-tuning" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'nothing' matches none of the kernels"):
        bit_widths.run(dataclasses.replace(config, pin=("8:nothing",)))


def test_bits_out_of_range_are_refused_before_anything_is_trained(tmp_path, make_config, no_training):
    with pytest.raises(ValueError, match="got 1"):
        bit_widths.run(make_config(tmp_path, schemes=("kmeans", "uniform"), bit_widths=("8", "1")))
    assert list(tmp_path.iterdir()) == []


def test_unknown_schemes_and_widths_are_refused(make_config):
    with pytest.raises(ValueError, match="--schemes must be of kmeans, .*, adaptive_binary, got 'ternary'"):
        make_config("unused", schemes=("ternary",))
    with pytest.raises(ValueError, match="--bit_widths must be BITS or BITS:STEPS, got 'four'"):
        make_config("unused", bit_widths=("four",))


def test_missing_settings_are_named():
    with pytest.raises(ValueError, match="--workdir, --pretrained, --test_dir must be given"):
        bit_widths.run(bit_widths.BitWidthsConfig())


def test_scales_and_training_make_folders_and_names_of_their_own(tmp_path, make_config):
    finetune = FinetuneConfig(steps=7)
    config = make_config(tmp_path, channel_scales=True, post_training=True, finetune=finetune)
    made = {one.folder.name: one for one in config.variants()}
    assert list(made) == ["kmeans_4_ptq", "kmeans_4", "kmeans_4_channel_ptq", "kmeans_4_channel"]
    settings = {(one.config().finetune.per_channel, one.config().finetune.steps) for one in made.values()}
    assert settings == {(False, 0), (False, 7), (True, 0), (True, 7)}
    assert len({one.name for one in made.values()}) == 4
    only_channels = make_config(tmp_path, finetune=FinetuneConfig(steps=7, per_channel=True))
    assert [one.folder.name for one in only_channels.variants()] == ["kmeans_4_channel"]
