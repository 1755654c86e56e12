"""Mixed precision from a float run to its packed file: sizes that are kept, runs that resume, what is refused."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from experiments import mixed_precision, sensitivity
from experiments.allocation import AllocationConfig, choose, kernels, plan_of
from experiments.finetuning import unquantized
from experiments.mixed_precision import MixedPrecisionConfig
from experiments.models import MODEL_FILE, load_float_model
from experiments.sensitivity import Measured, SensitivityConfig
from experiments.stages import StagesConfig
from experiments.testing import TestConfig
from qsv.deploy import load_packed, save
from qsv.precision import DistortionSensitivity, InfeasibleBudgetError, layer_choices
from qsv.quant import KMeans, Plan, QTensor, leaf_paths
from qsv.training.metrics import read_metrics

QUANTIZERS = {bits: KMeans(bits) for bits in range(1, 9)}


@pytest.fixture(scope="module")
def make_config(make_quantize_config, float_run):
    """Of a mixed-precision run of the float run, without fine-tuning unless `steps` are given."""

    def make(workdir, *, stages="ascending_bits", sensitivity="distortion", test_dir="", finetune=None, **allocation):
        return MixedPrecisionConfig(
            workdir=str(workdir),
            pretrained=str(float_run),
            allocation=AllocationConfig(**allocation),
            sensitivities=SensitivityConfig(sensitivity=sensitivity, sensitivity_crops=8, max_probes=8),
            stages=StagesConfig(stages=stages),
            finetune=make_quantize_config("unused", **finetune or {}).finetune,
            test=TestConfig(test_dir=str(test_dir)),
        )

    return make


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, make_config, speech) -> pathlib.Path:
    """Folder of a run with the traces of the training's loss, of several stages of two or three steps each."""
    workdir = tmp_path_factory.mktemp("mixed") / "run"
    finetune = {"steps": 9, "save_steps": 1, "calibration_crops": 16}
    mixed_precision.run(
        make_config(
            workdir,
            sensitivity="hessian",
            test_dir=speech.test,
            finetune=finetune,
            target_bits=3.0,
            candidate_bits=("2", "3", "4"),
        )
    )
    return workdir


@pytest.fixture(scope="module")
def measured(float_run) -> Measured:
    params = load_float_model(str(float_run)).params
    paths = kernels(QUANTIZERS[1], (), params)
    return Measured(tuple(layer_choices(params, paths, list(QUANTIZERS.values()), DistortionSensitivity(params))), {})


def bits_in_file(folder):
    leaves = leaf_paths(load_packed(folder / MODEL_FILE).packed_params)
    return {path: leaf.bits for path, leaf in leaves if isinstance(leaf, QTensor)}


def test_a_run_leaves_a_file_with_the_allocated_bits_and_says_why(trained_run):
    allocation = json.loads((trained_run / "allocation.json").read_text())
    assert allocation["bits"] == bits_in_file(trained_run)
    assert set(allocation["bits"].values()) == {2, 3, 4}
    assert 2.9 < allocation["average_bits"] <= 3.0
    report = (trained_run / "report.md").read_text()
    assert "target: 3 bits a weight" in report
    assert all(f"| {path} |" in report for path in allocation["bits"])
    assert (trained_run / "allocation.png").stat().st_size > 10_000
    results = json.loads((trained_run / "results.json").read_text())
    assert results["target_trials"] == 12
    assert results["stages"] == {"2_bits": 3, "3_bits": 3, "4_bits": 3}


def test_layers_are_quantized_in_the_order_of_their_bits(trained_run):
    folders = sorted(folder.name for folder in (trained_run / "stages").iterdir())
    assert folders == ["1_2_bits", "2_3_bits", "3_4_bits"]
    assert [line["step"] for line in read_metrics(trained_run / "stages" / folders[1])] == [1, 2, 3]


def test_a_run_resumes_in_the_middle_of_a_stage_to_the_same_file(trained_run, tmp_path, make_config, monkeypatch):
    workdir = tmp_path / "run"
    shutil.copytree(trained_run, workdir)
    (workdir / MODEL_FILE).unlink()
    shutil.rmtree(workdir / "stages" / "3_4_bits")
    shutil.rmtree(workdir / "stages" / "2_3_bits" / "checkpoints" / "3")
    monkeypatch.setattr(sensitivity, "_measure", None)
    mixed_precision.run(
        make_config(
            workdir,
            sensitivity="hessian",
            finetune={"steps": 9, "save_steps": 1, "calibration_crops": 16},
            target_bits=3.0,
            candidate_bits=("2", "3", "4"),
        )
    )
    steps = [line["step"] for line in read_metrics(workdir / "stages" / "2_3_bits")]
    assert steps == [1, 2, 3, 3]
    assert len(read_metrics(workdir / "stages" / "1_2_bits")) == 3
    assert (workdir / MODEL_FILE).read_bytes() == (trained_run / MODEL_FILE).read_bytes()


def test_other_bits_in_the_folder_of_a_run_are_refused(trained_run, tmp_path, make_config):
    workdir = tmp_path / "run"
    shutil.copytree(trained_run, workdir)
    finetune = {"steps": 9, "save_steps": 1, "calibration_crops": 16}
    settings = {"sensitivity": "hessian", "finetune": finetune, "candidate_bits": ("2", "3", "4")}
    with pytest.raises(ValueError, match=r"run was made with target_bits=3.0, not 2.5; choose another --workdir"):
        mixed_precision.run(make_config(workdir, target_bits=2.5, **settings))
    for name in ("run.json", "allocation.json", MODEL_FILE):
        assert (workdir / name).read_bytes() == (trained_run / name).read_bytes()


def test_stages_of_other_sensitivities_are_refused(trained_run, tmp_path, make_config):
    workdir = tmp_path / "run"
    shutil.copytree(trained_run, workdir)
    measured = json.loads((workdir / "sensitivity.json").read_text())
    allocation = json.loads((workdir / "allocation.json").read_text())
    for layer in measured["layers"]:
        for choice in layer["choices"]:
            choice["cost"] *= 1e6 if allocation["bits"][layer["path"]] == 2 else 1e-6
    (workdir / "sensitivity.json").write_text(json.dumps(measured))
    finetune = {"steps": 9, "save_steps": 1, "calibration_crops": 16}
    settings = {"sensitivity": "hessian", "finetune": finetune, "candidate_bits": ("2", "3", "4")}
    with pytest.raises(ValueError, match=r"stages/1_2_bits was made with .*KMeans\(bits=2\)"):
        mixed_precision.run(make_config(workdir, target_bits=3.0, **settings))
    assert (workdir / "allocation.json").read_bytes() == (trained_run / "allocation.json").read_bytes()


@pytest.mark.parametrize("target", [0.006, 0.009])
def test_the_file_is_not_larger_than_the_target(tmp_path, make_config, target):
    path = mixed_precision.run(make_config(tmp_path, target_mbytes=target, candidate_bits=("1", "2", "4", "8")))
    assert 0.97 * target <= path.stat().st_size / 1e6 <= target


def test_sensitivities_of_other_settings_are_refused(tmp_path, make_config):
    mixed_precision.run(make_config(tmp_path / "one", target_bits=4.0, candidate_bits=("2", "4")))
    config = make_config(tmp_path / "two", target_bits=4.0, candidate_bits=("4",))
    shared = dataclasses.replace(
        config.sensitivities, sensitivity_file=str(tmp_path / "one" / "sensitivity.json"), sensitivity_crops=9
    )
    with pytest.raises(ValueError, match=r"sensitivity.json was made with sensitivity_crops=8, not 9; quantizers="):
        mixed_precision.run(dataclasses.replace(config, sensitivities=shared))


def test_sensitivities_are_of_one_network_speech_and_loss(tmp_path, make_config, float_run, speech, monkeypatch):
    """But of any seed: the models of a study share them."""
    kept = tmp_path / "sensitivity.json"

    def measured(settings, pretrained=float_run):
        network = unquantized(settings.finetune, load_float_model(str(pretrained)))
        return sensitivity.sensitivities(
            settings.sensitivities, settings.finetune, network, ["embedding/kernel"], [KMeans(2)], file=kept
        )

    def with_loss(settings, **changes):
        optimization = dataclasses.replace(settings.finetune.optimization, **changes)
        return dataclasses.replace(settings, finetune=dataclasses.replace(settings.finetune, optimization=optimization))

    monkeypatch.setattr(sensitivity, "_measure", lambda *arguments: Measured((), {}))
    one = make_config(tmp_path, sensitivity="gauss_newton", finetune={"calibration_crops": 4})
    measured(one)
    measured(dataclasses.replace(one, finetune=dataclasses.replace(one.finetune, seed=5)))
    measured(with_loss(one, learning_rate=1.0))
    with pytest.raises(ValueError, match=r"sensitivity.json was made with margin=0.2, not 0.3"):
        measured(with_loss(one, margin=0.3))
    other = dataclasses.replace(one.finetune.speech, data_dir=(str(speech.test),))
    with pytest.raises(ValueError, match=r"sensitivity.json was made with data_dir=\['16 names .*'\], not \['12 names"):
        measured(dataclasses.replace(one, finetune=dataclasses.replace(one.finetune, speech=other)))
    model = load_packed(float_run / MODEL_FILE)
    plan = Plan(tuple((path, None) for path, _ in leaf_paths(model.packed_params)))
    save(tmp_path / MODEL_FILE, model.network, plan, model.packed_params, {}, model.batch_stats, threshold=0.5)
    with pytest.raises(ValueError, match=r"sensitivity.json was made with pretrained="):
        measured(one, tmp_path)


def test_every_process_measures_the_drift_of_the_whole_batch(make_config, float_run, monkeypatch):
    config = make_config("unused", sensitivity="drift", finetune={"calibration_crops": 4})
    network = unquantized(config.finetune, load_float_model(str(float_run)))
    one, *_ = sensitivity._batches(config.sensitivities, config.finetune, network)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    another, *_ = sensitivity._batches(config.sensitivities, config.finetune, network)
    np.testing.assert_array_equal(another["waveform"], one["waveform"])


def test_ties_and_pins_are_kept(float_run, measured):
    model = load_float_model(str(float_run))
    config = AllocationConfig(target_bits=6.0, tie=(".*/conv1/.*",), pin=("8:stem/.*", "7:embedding/kernel"))
    bits = choose(config, model, QUANTIZERS, measured).bits
    assert len({width for path, width in bits.items() if "/conv1/" in path}) == 1
    assert bits["stem/conv/kernel"] == 8
    assert bits["embedding/kernel"] == 7
    with pytest.raises(ValueError, match="--pin: 'nothing' matches none of the kernels"):
        choose(AllocationConfig(target_bits=3.0, pin=("2:nothing",)), model, QUANTIZERS, measured)


def test_targets_that_cannot_be_met_say_by_how_much(float_run, measured):
    model = load_float_model(str(float_run))
    with pytest.raises(InfeasibleBudgetError, match="below the least that can be"):
        choose(AllocationConfig(target_bits=0.5), model, QUANTIZERS, measured)
    with pytest.raises(ValueError, match=r"what isn't quantized alone takes [\d,]+ bytes"):
        choose(AllocationConfig(target_mbytes=0.001), model, QUANTIZERS, measured)
    with pytest.raises(ValueError, match="--target_mbytes, --target_bits or --target_gbops must be given"):
        choose(AllocationConfig(), model, QUANTIZERS, measured)
    with pytest.raises(ValueError, match="needs --sensitivity=gauss_newton or hessian"):
        choose(AllocationConfig(target_bits=3.0, search="four_section"), model, QUANTIZERS, measured)
    with pytest.raises(ValueError, match="knows neither --tie nor --pin"):
        choose(AllocationConfig(target_bits=3.0, search="four_section", tie=(".*",)), model, QUANTIZERS, measured)


def test_float_layers_stay_float(float_run):
    params = load_float_model(str(float_run)).params
    every, fewer = (set(kernels(QUANTIZERS[4], kept, params)) for kept in ((), ("stem/.*",)))
    assert every - fewer == {"stem/conv/kernel"}
    plan = plan_of(dict.fromkeys(fewer, 2), QUANTIZERS, load_float_model(str(float_run)))
    assert plan["stem/conv/kernel"] is None
    assert set(plan.quantized.values()) == {KMeans(2)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidate_bits": ("two",)}, "--candidate_bits must be a whole number, got 'two'"),
        ({"pin": ("stem/.*",)}, "--pin must be BITS:PATTERN"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AllocationConfig(target_bits=3.0, **settings)


def test_the_command_line_names_what_is_missing(run_experiment, float_run, tmp_path):
    status, _, errors = run_experiment("mixed_precision", f"--pretrained={float_run}", f"--workdir={tmp_path}")
    assert status == 1
    assert errors.strip() == "error: --target_mbytes, --target_bits or --target_gbops must be given; see --help"
