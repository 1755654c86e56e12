"""Trainings through their files: what they leave, how they resume, which input they refuse."""

import dataclasses
import json
import math
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile

from experiments import train
from qsv.data import BadFilesError
from qsv.deploy import load_packed
from qsv.training.metrics import read_metrics

NUM_STEPS, SAVE_STEPS = 60, 20


def losses(workdir):
    return [(line["step"], line["train/loss"]) for line in read_metrics(workdir)]


def test_a_run_leaves_model_head_checkpoints_metrics_and_its_record(float_run):
    assert {entry.name for entry in float_run.iterdir()} == {
        "checkpoints",
        "head.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
        "settings.json",
        "tensorboard",
    }
    assert (float_run / "checkpoints" / str(NUM_STEPS)).is_dir()
    metrics = read_metrics(float_run)
    assert [line["step"] for line in metrics] == list(range(1, NUM_STEPS + 1))
    chance_percent = 25
    assert np.mean([line["train/accuracy_percent"] for line in metrics[SAVE_STEPS:]]) > 1.6 * chance_percent
    record = json.loads((float_run / "run.json").read_text())
    assert (record["experiment"], record["speakers"], record["steps"]) == ("train", 4, NUM_STEPS)
    assert record["config"]["speech"]["crop_seconds"] == 0.3
    model = load_packed(float_run / "model.safetensors")
    assert model.network.arguments == {"width": 2, "embedding_size": 8}
    assert model.plan_description == {}
    assert -1 < model.threshold < 1


def test_a_killed_run_resumes_with_the_same_losses_to_the_last_bit(
    tmp_path, float_run, make_train_config, start_experiment, as_flags
):
    config = make_train_config(tmp_path)
    process = start_experiment("train", *as_flags(config), "--cpu_devices=4")
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and metrics.read_text().count("\n") > SAVE_STEPS):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step in four minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = losses(tmp_path)
    assert before[-1][0] < NUM_STEPS, "the run ended before it was killed"

    train.run(config)

    resumed = losses(tmp_path)[len(before) :]
    checkpoint = resumed[0][0] - 1
    assert checkpoint in range(SAVE_STEPS, NUM_STEPS, SAVE_STEPS)
    uninterrupted = losses(float_run)
    assert before == uninterrupted[: len(before)]
    assert resumed == uninterrupted[checkpoint:]
    for name in ("model.safetensors", "head.safetensors"):
        assert (tmp_path / name).read_bytes() == (float_run / name).read_bytes()


def test_a_finished_run_trains_no_further(tmp_path, float_run, make_train_config, capsys):
    workdir = tmp_path / "float"
    shutil.copytree(float_run, workdir)
    (workdir / "model.safetensors").unlink()
    train.run(make_train_config(workdir))
    assert f"resumed at step {NUM_STEPS}" in capsys.readouterr().out
    assert losses(workdir) == losses(float_run)
    assert (workdir / "model.safetensors").read_bytes() == (float_run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (None, {"epochs": 1.5}, r"epochs=5\.0, not 1\.5"),
        ("optimization", {"margin": 0.1}, r"margin=0\.2, not 0\.1"),
        ("speech", {"noise_dir": ()}, r"noise_dir=\['1 names \w+'\], not \[\]"),
    ],
)
def test_other_settings_in_the_folder_of_a_run_are_refused(
    tmp_path, float_run, make_train_config, part, changes, message
):
    workdir = tmp_path / "float"
    shutil.copytree(float_run, workdir)
    config = make_train_config(workdir)
    changes = {part: dataclasses.replace(getattr(config, part), **changes)} if part else changes
    with pytest.raises(ValueError, match=f"float was made with {message}; choose another --workdir, or delete it"):
        train.run(dataclasses.replace(config, **changes))
    assert (workdir / "run.json").read_bytes() == (float_run / "run.json").read_bytes()


@pytest.fixture
def corpus_with(tmp_path, speech, make_voice):
    """A copy of the training speech to which unreadable files of the given kinds are added."""

    def make(*kinds):
        folder = tmp_path / "speech"
        shutil.copytree(speech.train, folder)
        speaker = folder / "train0"
        samples = make_voice(90, np.random.default_rng(4)).astype(np.float32)
        if "empty" in kinds:
            (speaker / "empty.wav").touch()
        if "truncated" in kinds:
            path = speaker / "truncated.flac"
            soundfile.write(path, samples, 16000)
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if "nan" in kinds:
            samples[100] = math.nan
            soundfile.write(speaker / "nan.wav", samples, 16000, subtype="FLOAT")
        return (str(folder),)

    return make


def test_unreadable_files_are_skipped_and_counted(tmp_path, corpus_with, make_train_config, capsys):
    folder = corpus_with("empty", "truncated", "nan")
    path = train.run(make_train_config(tmp_path / "run", data_dir=folder))
    output = capsys.readouterr().out
    assert "skipped 3 unreadable files" in output
    assert "train0/empty.wav: is empty" in output
    assert "train0/nan.wav: sample 100 is nan" in output
    assert "train0/truncated.flac: cannot be decoded" in output
    assert load_packed(path).threshold is not None


@pytest.mark.parametrize("kind", ["empty", "nan"])
def test_without_tolerance_an_unreadable_file_stops_the_run_and_is_named(
    tmp_path, corpus_with, make_train_config, kind
):
    config = make_train_config(tmp_path / "run", max_bad_files=1, data_dir=corpus_with(kind))
    strict = dataclasses.replace(config, speech=dataclasses.replace(config.speech, max_bad_files=0))
    with pytest.raises(BadFilesError, match=f"train0/{kind}.wav: "):
        train.run(strict)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_missing_settings_are_named(make_train_config):
    with pytest.raises(ValueError, match="--workdir must be given"):
        train.run(train.TrainConfig())
    with pytest.raises(ValueError, match="--data_dir must be given"):
        train.run(make_train_config("unused", steps=0, data_dir=()))


def test_a_missing_corpus_is_named_before_anything_is_written(tmp_path, make_train_config):
    config = make_train_config(tmp_path / "run", steps=0, data_dir=(str(tmp_path / "nowhere"),))
    with pytest.raises(FileNotFoundError, match="no corpus folder .*nowhere"):
        train.run(config)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_split_over_the_devices_is_refused(tmp_path, make_train_config):
    config = make_train_config(tmp_path / "run", steps=0, batch_size=3)
    with pytest.raises(ValueError, match="batch of 3 .* doesn't split over 4 devices"):
        train.run(config)


def test_a_training_goes_on_from_a_float_model_whose_network_and_classifier_it_takes(
    tmp_path, make_train_config, float_run
):
    config = dataclasses.replace(make_train_config(tmp_path, steps=1), pretrained=str(float_run), model="resnet18")
    train.run(config)
    assert json.loads((tmp_path / "run.json").read_text())["network"] == "resnet10"
    assert load_packed(tmp_path / "model.safetensors").network == load_packed(float_run / "model.safetensors").network
    (first,) = read_metrics(tmp_path)
    began = read_metrics(float_run)[0]
    assert first["train/loss"] < 0.9 * began["train/loss"]


def test_pretrained_must_be_float(tmp_path, make_train_config, post_training_run):
    config = make_train_config(tmp_path / "run", steps=0)
    with pytest.raises(ValueError, match="is already quantized"):
        train.run(dataclasses.replace(config, pretrained=str(post_training_run)))


def test_an_error_is_one_line_and_exit_status_1(run_experiment, tmp_path):
    status, output, errors = run_experiment("train", f"--data_dir={tmp_path}")
    assert (status, output) == (1, "")
    assert errors.splitlines()[-1] == "error: --workdir must be given; see --help"
    assert "Traceback" not in errors


def test_arguments_that_are_no_flags_are_refused(run_experiment, tmp_path):
    status, _, errors = run_experiment("train", "data", f"--workdir={tmp_path}")
    assert status == 2
    assert "error: unexpected arguments ['data']" in errors
