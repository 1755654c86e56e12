"""Trainings of several processes: the same losses as one process, and resuming with another number of them."""

import signal
import socket
import time

import numpy as np
import pytest

from experiments.models import MODEL_FILE
from qsv.deploy import load
from qsv.training.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 40


def free_port():
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return own.getsockname()[1]


@pytest.fixture
def train(start_experiment, make_speech_config):
    """Runs so many processes of one training, which share four devices; returns its losses."""

    def run(workdir, processes, *, kill_after=None):
        speech = make_speech_config()
        arguments = [f"--workdir={workdir}", "--model=resnet10", "--width=4", "--embedding_size=8", "--batch_size=8"]
        arguments += [f"--data_dir={speech.data_dir[0]}", f"--noise_dir={speech.noise_dir[0]}", "--crop_seconds=0.3"]
        arguments += [f"--epochs={STEPS / per_epoch(speech)}", "--log_steps=1", "--save_steps=4", "--spec_augment"]
        arguments += [f"--cpu_devices={4 // processes}"]
        if processes > 1:
            arguments += [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
        started = [start_experiment("train", *arguments, f"--process={index}") for index in range(processes)]
        while kill_after is not None and not (workdir / "checkpoints" / str(kill_after)).exists():
            assert all(process.poll() is None for process in started)
            time.sleep(0.01)
        for process in started:
            if kill_after is not None:
                process.kill()
            _, errors = process.communicate(timeout=500)
            assert process.returncode == (0 if kill_after is None else -signal.SIGKILL), errors[-3000:]
        return {line["step"]: line["train/loss"] for line in read_metrics(workdir)}

    return run


def per_epoch(speech):
    from experiments.speech import make_loader, training_corpus

    loader = make_loader(speech, training_corpus(speech), seed=0, sample_rate_hz=16000)
    return max(1, loader.num_crops // 8)


def test_two_processes_train_as_one_does(tmp_path, train):
    one, two = train(tmp_path / "one", 1), train(tmp_path / "two", 2)
    assert list(one) == list(two) == list(range(1, STEPS + 1))
    assert two[1] == pytest.approx(one[1], rel=1e-6)
    # Rounding differs between the two sums, and grows.
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=5e-2)
    single, double = (load(tmp_path / name / MODEL_FILE) for name in ("one", "two"))
    waveform = 0.1 * np.random.default_rng(0).normal(size=8000).astype(np.float32)
    first, second = (own(waveform, 16000) for own in (single, double))
    assert first @ second / np.linalg.norm(first) / np.linalg.norm(second) > 0.999


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_goes_on_with_another_number_of_processes(tmp_path, train, before, after):
    whole = train(tmp_path / "whole", 1)
    train(tmp_path / "parts", before, kill_after=8)
    parts = train(tmp_path / "parts", after)
    assert sorted(parts) == list(range(1, STEPS + 1))
    assert parts[9] == pytest.approx(whole[9], rel=1e-2)
