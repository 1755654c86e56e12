"""Quantizations through their files: what they leave, how they resume, which input they refuse."""

import dataclasses
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from experiments import quantize
from experiments.models import MODEL_FILE
from qsv.deploy import load, load_packed
from qsv.quant import QTensor, leaf_paths
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
    table = (quantized_run / "size.md").read_text()
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


def test_a_quantization_resumes_from_its_checkpoint_to_the_same_file(tmp_path, quantized_run, make_quantize_config):
    workdir = tmp_path / "kmeans_4"
    shutil.copytree(quantized_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / MODEL_FILE).unlink()
    quantize.run(make_quantize_config(workdir, steps=6, refresh_steps=3, recalibration_batches=2, save_steps=3))
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4, 5, 6, 4, 5, 6]
    assert (workdir / MODEL_FILE).read_bytes() == (quantized_run / MODEL_FILE).read_bytes()


@pytest.fixture
def heads(monkeypatch):
    """The classifiers that fine-tunings start from; they make no step."""
    found = []

    def fit(state, *arguments, **options):
        found.append(np.asarray(state.head))
        return state

    monkeypatch.setattr(quantize, "fit", fit)
    return found


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
        model = shutil.copy(pathlib.Path(config.model) / MODEL_FILE, tmp_path / "float")
        quantize.run(dataclasses.replace(config, finetune=finetune, model=str(model)))
    single, double = heads
    # The loss takes the columns of a speaker to be neighbours.
    np.testing.assert_array_equal(double[:, ::2], single)
    np.testing.assert_array_equal(double[:, 1::2], single)


def test_post_training_quantization_needs_no_speech(tmp_path, make_quantize_config, make_speech_config):
    config = make_quantize_config(tmp_path, scheme="uniform", bits=2, speech=make_speech_config(data_dir=()))
    model = load_packed(quantize.run(config))
    assert model.threshold is None
    assert set(model.plan_description.values()) == {"Uniform(bits=2)"}


def test_float_layers_stay_float(tmp_path, make_quantize_config, post_training_run):
    quantize.run(make_quantize_config(tmp_path, float_layers=("stem/.*", "embedding/kernel")))
    everywhere = quantized_paths(post_training_run)
    kept = {path for path in everywhere if path.startswith("stem/") or path == "embedding/kernel"}
    assert len(kept) == 2
    assert quantized_paths(tmp_path) == {path: 4 for path in everywhere if path not in kept}


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
    with pytest.raises(ValueError, match="--workdir, --model must be given"):
        quantize.run(quantize.QuantizeConfig())
    with pytest.raises(ValueError, match="--data_dir must be given"):
        quantize.run(make_quantize_config(tmp_path, steps=1, speech=make_speech_config(data_dir=())))


def test_a_quantized_model_is_not_quantized_again(tmp_path, make_quantize_config, post_training_run):
    with pytest.raises(ValueError, match="model.safetensors is already quantized"):
        quantize.run(make_quantize_config(tmp_path, model=post_training_run))


def test_the_float_model_is_never_overwritten(float_run, make_quantize_config):
    with pytest.raises(ValueError, match="would overwrite --model"):
        quantize.run(make_quantize_config(float_run))


def test_excluded_speakers_that_are_unknown_are_named(tmp_path, make_quantize_config, make_speech_config):
    excluded = tmp_path / "excluded.txt"
    excluded.write_text("train0\nnobody\n")
    speech = make_speech_config(exclude_speakers=str(excluded))
    with pytest.raises(ValueError, match=r"excluded.txt: speakers \['nobody'\] are in none of"):
        quantize.run(make_quantize_config(tmp_path, steps=1, speech=speech))
