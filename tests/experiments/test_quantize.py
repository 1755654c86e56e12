"""Quantizations through their files: what they leave, how they resume, which input they refuse."""

import dataclasses
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from experiments import calibration_file, quantize, running
from experiments.models import MODEL_FILE
from qsv.data import folder_corpus
from qsv.deploy import load, load_packed, save
from qsv.quant import QTensor, Rule, leaf_paths, resolve
from qsv.training.metrics import read_metrics


def quantized_paths(folder):
    leaves = leaf_paths(load_packed(folder / MODEL_FILE).packed_params)
    return {path: leaf.bits for path, leaf in leaves if isinstance(leaf, QTensor)}


def test_a_quantized_file_is_smaller_and_every_kernel_has_its_bits(float_run, quantized_run):
    assert (quantized_run / MODEL_FILE).stat().st_size < 0.6 * (float_run / MODEL_FILE).stat().st_size
    params = load_packed(float_run / MODEL_FILE).packed_params
    kernels = {path for path, _ in leaf_paths(params) if path.endswith("/kernel")}
    assert quantized_paths(quantized_run) == dict.fromkeys(kernels, 4)


def test_a_run_leaves_size_table_metrics_and_record(quantized_run):
    table = (quantized_run / "report.md").read_text()
    assert "stem/conv/kernel" in table
    assert "KMeans" in table
    values = [(line["step"], line["train/loss"]) for line in read_metrics(quantized_run)]
    assert [step for step, _ in values] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(loss) for _, loss in values)
    config = json.loads((quantized_run / "run.json").read_text())["config"]
    assert (config["scheme"], config["bits"], config["finetune"]["steps"]) == ("kmeans", 4, 6)
    assert load_packed(quantized_run / MODEL_FILE).threshold is not None


def test_fine_tuning_starts_from_the_float_runs_classifier(float_run, quantized_run):
    last = np.mean([line["train/loss"] for line in read_metrics(float_run)][-20:])
    fresh = read_metrics(float_run)[0]["train/loss"]
    assert read_metrics(quantized_run)[0]["train/loss"] < (last + fresh) / 2


def test_a_quantization_resumes_from_its_checkpoint_to_the_same_file(
    tmp_path, quantized_run, make_quantize_config, monkeypatch
):
    workdir = tmp_path / "kmeans_4"
    shutil.copytree(quantized_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / MODEL_FILE).unlink()
    # What it started from is read, not calibrated again.
    monkeypatch.setattr(calibration_file, "quantize_layers", None)
    quantize.run(make_quantize_config(workdir, steps=6, refresh_steps=3, calibration_crops=64, save_steps=3))
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert (workdir / MODEL_FILE).read_bytes() == (quantized_run / MODEL_FILE).read_bytes()


def test_other_settings_in_the_folder_of_a_run_are_refused(tmp_path, quantized_run, make_quantize_config):
    workdir = tmp_path / "kmeans_4"
    shutil.copytree(quantized_run, workdir)
    finetune = {"steps": 6, "refresh_steps": 3, "calibration_crops": 64}
    others = {
        "bits=4, not 3": make_quantize_config(workdir, bits=3, **finetune),
        "steps=6, not 5": make_quantize_config(workdir, **finetune | {"steps": 5}),
        "steps=6, not 9": make_quantize_config(workdir, **finetune | {"steps": 9}),
        "level_rate=0.0025, not 0.1": make_quantize_config(workdir, level_rate=0.1, **finetune),
    }
    for difference, config in others.items():
        with pytest.raises(ValueError, match=f"kmeans_4 was made with {difference}; choose another --workdir"):
            quantize.run(config)
    for name in (MODEL_FILE, "run.json"):
        assert (workdir / name).read_bytes() == (quantized_run / name).read_bytes()


def test_the_run_of_another_network_is_refused(tmp_path, float_run, quantized_run, make_quantize_config, monkeypatch):
    workdir, pretrained = tmp_path / "kmeans_4", tmp_path / "float"
    shutil.copytree(quantized_run, workdir)
    shutil.copytree(float_run, pretrained)
    finetune = {"steps": 6, "refresh_steps": 3, "calibration_crops": 64}
    # The same network elsewhere is the same.
    monkeypatch.chdir(tmp_path)
    quantize.prepare(make_quantize_config(workdir, pretrained="float", **finetune))
    model = load_packed(pretrained / MODEL_FILE)
    plan = resolve([Rule(".*", None)], model.packed_params)
    save(pretrained / MODEL_FILE, model.network, plan, model.packed_params, {}, model.batch_stats, threshold=0.5)
    with pytest.raises(ValueError, match=r"kmeans_4 was made with pretrained='\w+', not '\w+'; choose another"):
        quantize.prepare(make_quantize_config(workdir, pretrained="float", **finetune))


def test_a_damaged_calibration_is_named(tmp_path, quantized_run, make_quantize_config):
    workdir = tmp_path / "kmeans_4"
    shutil.copytree(quantized_run, workdir)
    path = workdir / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="calibration.safetensors is damaged, delete it"):
        quantize.prepare(make_quantize_config(workdir, steps=6, refresh_steps=3, calibration_crops=64))


def test_codes_cannot_be_released_in_the_middle_of_a_run(tmp_path, make_quantize_config):
    """A checkpoint of fixed codes has weights in units of their scales."""
    settings = {"loss": "distill", "calibration_crops": 8, "rounding": "compensated", "steps": 2}
    quantize.run(make_quantize_config(tmp_path, **settings))
    with pytest.raises(ValueError, match="was made with keep_codes_from_bits=4, not 0; choose another --workdir"):
        quantize.run(make_quantize_config(tmp_path, keep_codes_from_bits=0, **settings))


@pytest.fixture
def heads(monkeypatch):
    """The classifiers that fine-tunings start from; they make no step."""
    found = []

    def fit(state, *arguments, **options):
        found.append(np.asarray(state.head))
        return state

    monkeypatch.setattr(running, "fit", fit)
    return found


def test_a_checkpoint_and_a_folder_of_speech_are_all_it_takes(tmp_path, run_experiment, wespeaker_checkpoint, speech):
    settings = ["--steps=3", "--crop_seconds=0.3", "--batch_size=4", "--refresh_steps=2", f"--workdir={tmp_path}"]
    status, output, errors = run_experiment(
        "quantize",
        f"--pretrained={wespeaker_checkpoint}",
        "--bits=4",
        f"--data_dir={speech.train / 'train0'}",
        *settings,
    )
    assert status == 0, errors
    assert "cosine with the float embedding over 4 whole utterances" in output
    model = load_packed(tmp_path / MODEL_FILE)
    assert model.network.name == "resnet18" and model.network.frontend.window == "hamming"
    assert set(quantized_paths(tmp_path).values()) == {4}
    assert model.threshold is None
    losses = [line["train/loss"] for line in read_metrics(tmp_path)]
    report = (tmp_path / "report.md").read_text()
    assert "3 steps, loss distill" in report and "threshold: none calibrated" in report and losses


def test_distillation_resumes_to_the_same_file(tmp_path, make_quantize_config):
    def config(name):
        finetune = {"loss": "distill", "frozen_statistics": True, "mse_weight": 0.5, "steps": 4, "save_steps": 2}
        return make_quantize_config(tmp_path / name, refresh_steps=2, **finetune)

    whole = quantize.run(config("whole"))
    shutil.copytree(whole.parent, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    assert quantize.run(config("again")).read_bytes() == whole.read_bytes()
    assert load_packed(whole).threshold is not None


def test_distillation_keeps_the_float_statistics(tmp_path, float_run, make_quantize_config):
    config = make_quantize_config(tmp_path, loss="distill", frozen_statistics=True, steps=1)
    path = quantize.run(dataclasses.replace(config, compact=False))
    before, after = (leaf_paths(load_packed(file).batch_stats) for file in (float_run / MODEL_FILE, path))
    for (name, old), (_, new) in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new, err_msg=name)


@pytest.mark.parametrize(("changes", "same"), [({}, True), ({"keep_codes_from_bits": 5}, False)])
def test_distillation_keeps_codes_that_were_chosen_together(tmp_path, make_quantize_config, changes, same):
    """From so many bits on; scales and what stays float are trained in any case."""
    settings = {"loss": "distill", "calibration_crops": 8, "rounding": "compensated", "level_rate": 0.5} | changes
    models = [
        load_packed(quantize.run(make_quantize_config(tmp_path / str(steps), steps=steps, **settings)))
        for steps in (0, 3)
    ]
    before, after = (dict(leaf_paths(model.packed_params)) for model in models)
    kernels = [path for path, leaf in before.items() if isinstance(leaf, QTensor)]
    assert all(np.array_equal(before[path].codes, after[path].codes) for path in kernels) == same
    assert not any(np.array_equal(before[path].scale, after[path].scale) for path in kernels)
    assert not np.array_equal(before["embedding/bias"], after["embedding/bias"])


def test_compensated_rounding_agrees_better_without_training(tmp_path, make_quantize_config, float_run, speech):
    cosines = {}
    reference = load(float_run / MODEL_FILE)
    for rounding in ("nearest", "compensated"):
        settings = {"rounding": rounding, "calibration_crops": 96, "recalibration": "shift", "loss": "distill"}
        path = quantize.run(make_quantize_config(tmp_path / rounding, bits=2, **settings))
        corpus = folder_corpus(speech.train)
        cosines[rounding] = quantize.measure_agreement(reference, load(path), corpus).cosines.mean()
    assert cosines["nearest"] < cosines["compensated"]


def test_the_work_folder_is_named_after_the_model(make_quantize_config):
    config = dataclasses.replace(make_quantize_config(""), pretrained="models/avg_model.pt")
    assert quantize.default_workdir(config) == "runs/avg_model_kmeans_4"
    config = dataclasses.replace(config, pretrained="runs/resnet/model.safetensors")
    assert quantize.default_workdir(config) == "runs/resnet_kmeans_4"


def test_other_speakers_start_from_their_mean_embeddings(
    tmp_path, heads, make_quantize_config, make_speech_config, float_run, speech
):
    shutil.copytree(speech.train, tmp_path / "speech")
    (tmp_path / "speech" / "train1" / "0.wav").write_bytes(b"")
    (tmp_path / "speech" / "unreadable").mkdir()
    (tmp_path / "speech" / "unreadable" / "0.wav").touch()
    config = make_speech_config(data_dir=(str(tmp_path / "speech"),))
    quantize.run(make_quantize_config(tmp_path / "run", steps=1, speech=config))
    embedder = load(float_run / MODEL_FILE)
    for speaker, paths in enumerate(sorted(folder.glob("[1-3].wav")) for folder in sorted(speech.train.iterdir())):
        embeddings = [embedder.embed_file(path) for path in paths]
        cosines = np.stack([e / np.linalg.norm(e) for e in embeddings]) @ heads[0][:, :4]
        assert (cosines.argmax(axis=1) == speaker).all()
    np.testing.assert_allclose(np.linalg.norm(heads[0], axis=0), [1, 1, 1, 1, 0], rtol=1e-6)


def test_sub_centers_start_side_by_side(tmp_path, heads, make_quantize_config, speech):
    for count in (1, 2):
        config = make_quantize_config(tmp_path / f"run{count}", steps=1)
        optimization = dataclasses.replace(config.finetune.optimization, sub_centers=count)
        finetune = dataclasses.replace(config.finetune, optimization=optimization)
        (tmp_path / "float").mkdir(exist_ok=True)
        model = shutil.copy(pathlib.Path(config.pretrained) / MODEL_FILE, tmp_path / "float")
        quantize.run(dataclasses.replace(config, finetune=finetune, pretrained=str(model)))
    single, double = heads
    # The loss takes the columns of a speaker to be neighbours.
    np.testing.assert_array_equal(double[:, ::2], single)
    np.testing.assert_allclose(double[:, 1::2], single, atol=0.02)
    # Equal ones would get equal gradients.
    assert (np.linalg.norm(double[:, 1::2] - single, axis=0) > 0.005).all()


def test_post_training_quantization_needs_no_speech(tmp_path, float_run, make_quantize_config, make_speech_config):
    config = make_quantize_config(tmp_path, scheme="uniform", bits=2, speech=make_speech_config(data_dir=()))
    model = load_packed(quantize.run(config))
    # Nothing to calibrate on: the float network's.
    assert model.threshold == load_packed(float_run / MODEL_FILE).threshold is not None
    assert set(model.plan_description.values()) == {"Uniform(bits=2)"}


def test_float_layers_stay_float(tmp_path, make_quantize_config, post_training_run):
    quantize.run(make_quantize_config(tmp_path, float_layers=("stem/.*", "embedding/kernel")))
    everywhere = quantized_paths(post_training_run)
    kept = {path for path in everywhere if path.startswith("stem/") or path == "embedding/kernel"}
    assert len(kept) == 2
    assert quantized_paths(tmp_path) == {path: 4 for path in everywhere if path not in kept}


def test_pinned_kernels_have_their_own_bits(tmp_path, make_quantize_config, post_training_run):
    config = make_quantize_config(tmp_path)
    quantize.run(dataclasses.replace(config, pin=("2:stem/.*", "8:embedding/.*", "3:embedding/kernel")))
    own = {path: 2 for path in quantized_paths(post_training_run) if path.startswith("stem/")}
    assert own
    assert quantized_paths(tmp_path) == quantized_paths(post_training_run) | own | {"embedding/kernel": 3}


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ("8:nothing", "--pin: 'nothing' matches none of the kernels"),
        ("8:(", "no regular expression"),
        ("9:stem/.*", "1..8, got 9|1 to 8, got 9"),
        ("stem/.*", "--pin must be BITS:PATTERN"),
    ],
)
def test_pins_that_cannot_be_are_named(tmp_path, make_quantize_config, pin, message):
    with pytest.raises(ValueError, match=message):
        quantize.run(dataclasses.replace(make_quantize_config(tmp_path / "run"), pin=(pin,)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("scheme", "bits", "message"),
    [("uniform", 1, "2..8, got 1|2 to 8, got 1"), ("kmeans", 9, "1..8, got 9|1 to 8, got 9")],
)
def test_bits_out_of_range_are_refused(tmp_path, make_quantize_config, scheme, bits, message):
    with pytest.raises(ValueError, match=message):
        quantize.run(make_quantize_config(tmp_path / "run", scheme=scheme, bits=bits))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("pattern", "message"), [("nothing/.*", "nothing/.*decide no leaf"), ("(", "no regular expr")])
def test_float_layers_that_match_nothing_are_named(tmp_path, make_quantize_config, pattern, message):
    with pytest.raises(ValueError, match=message):
        quantize.run(make_quantize_config(tmp_path / "run", float_layers=(pattern,)))


def test_missing_settings_are_named(tmp_path, make_quantize_config, make_speech_config):
    with pytest.raises(ValueError, match="--pretrained must be given"):
        quantize.run(quantize.QuantizeConfig())
    with pytest.raises(ValueError, match="--data_dir must be given"):
        quantize.run(make_quantize_config(tmp_path, steps=1, speech=make_speech_config(data_dir=())))


def test_a_quantized_model_is_not_quantized_again(tmp_path, make_quantize_config, post_training_run):
    with pytest.raises(ValueError, match="model.safetensors is already quantized"):
        quantize.run(make_quantize_config(tmp_path, pretrained=post_training_run))


def test_the_float_model_is_never_overwritten(float_run, make_quantize_config):
    with pytest.raises(ValueError, match="would overwrite --pretrained"):
        quantize.run(make_quantize_config(float_run))


def test_excluded_speakers_that_are_unknown_are_named(tmp_path, make_quantize_config, make_speech_config):
    excluded = tmp_path / "excluded.txt"
    excluded.write_text("train0\nnobody\n")
    speech = make_speech_config(exclude_speakers=str(excluded))
    with pytest.raises(ValueError, match=r"excluded.txt: speakers \['nobody'\] are in none of"):
        quantize.run(make_quantize_config(tmp_path, steps=1, speech=speech))
