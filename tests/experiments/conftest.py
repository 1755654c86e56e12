"""Synthetic speech, one tiny float training and one tiny 4-bit quantization that all tests here share."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import soundfile

from experiments import quantize, train
from experiments.finetune_config import FinetuneConfig
from experiments.optimization import OptimizationConfig
from experiments.speech import SpeechConfig, make_loader, training_corpus
from qsv.frontend import KaldiFbank
from qsv.interop import wespeaker
from qsv.models import Network
from qsv.quant import leaf_paths

REPOSITORY = pathlib.Path(__file__).parents[2]
SAMPLE_RATE_HZ = 16000
# All lengths lie between two steps of the padding grid, so that embedding compiles once for each batch size.
SHORTEST_SECONDS, LONGEST_SECONDS = 0.8, 0.95
NUM_STEPS, SAVE_STEPS = 60, 20


def voice(pitch_hz, rng, *, seconds=0.9, sample_rate_hz=SAMPLE_RATE_HZ):
    """Harmonics of a wavering pitch in syllables, all below 3.4 kHz: [samples] float."""
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    cycles = pitch_hz * (time + 0.02 * np.sin(2 * np.pi * (3 * time + rng.random())) / (2 * np.pi))
    partials = np.arange(1, int(3300 / pitch_hz) + 1)
    waves = np.sin(2 * np.pi * (partials[:, None] * cycles + rng.random(len(partials))[:, None]))
    syllables = 0.3 + 0.7 * np.abs(np.sin(2 * np.pi * (2.5 * time + rng.random())))
    return 0.15 * syllables * (waves / partials[:, None]).sum(axis=0)


def write_speakers(folder, pitches_hz, utterances, seed):
    """`FOLDER/SPEAKER/UTT.wav` of one voice for each pitch, in a little noise."""
    rng = np.random.default_rng(seed)
    for speaker, pitch_hz in enumerate(pitches_hz):
        own = folder / f"{folder.name}{speaker}"
        own.mkdir(parents=True)
        for number in range(utterances):
            speech = voice(pitch_hz, rng, seconds=rng.uniform(SHORTEST_SECONDS, LONGEST_SECONDS))
            speech = speech + 0.003 * rng.normal(size=len(speech))
            soundfile.write(own / f"{number}.wav", speech, SAMPLE_RATE_HZ, subtype="PCM_16")


@dataclasses.dataclass(frozen=True)
class Speech:
    """Folders of synthetic speakers, none of whom is in two of them."""

    train: pathlib.Path
    test: pathlib.Path
    noise: pathlib.Path


@pytest.fixture(scope="session")
def make_voice():
    return voice


def flags_of(config) -> list[str]:
    """The command line that describes a config."""
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            arguments += flags_of(value)
        elif field.name != "arguments":
            values = value if isinstance(value, tuple) else (value,)
            arguments += [f"--{field.name}={one}" for one in values]
    return arguments


@pytest.fixture(scope="session")
def as_flags():
    return flags_of


@pytest.fixture(scope="session")
def speech(tmp_path_factory) -> Speech:
    folder = tmp_path_factory.mktemp("speech")
    write_speakers(folder / "train", (90, 120, 160, 210), 4, seed=1)
    write_speakers(folder / "test", (100, 140, 185, 250), 3, seed=2)
    noise = folder / "noise"
    noise.mkdir()
    hum = 0.1 * np.random.default_rng(3).normal(size=SAMPLE_RATE_HZ)
    soundfile.write(noise / "hum.wav", hum, SAMPLE_RATE_HZ)
    return Speech(folder / "train", folder / "test", noise)


@pytest.fixture(scope="session")
def make_speech_config(speech):
    def make(**changes) -> SpeechConfig:
        settings = {"data_dir": (str(speech.train),), "noise_dir": (str(speech.noise),)}
        return SpeechConfig(**settings | {"crop_seconds": 0.3, "batch_size": 4} | changes)

    return make


@pytest.fixture(scope="session")
def make_train_config(make_speech_config):
    """Of a training of `NUM_STEPS`, whatever the corpus, so that all share one compiled step."""

    def make(workdir, *, steps=NUM_STEPS, **changes) -> train.TrainConfig:
        speech_config = make_speech_config(**changes)
        per_epoch = 1
        if steps:
            loader = make_loader(speech_config, training_corpus(speech_config), seed=0, sample_rate_hz=SAMPLE_RATE_HZ)
            per_epoch = loader.steps_per_epoch
            loader.close()
        return train.TrainConfig(
            workdir=str(workdir),
            model="resnet10",
            width=2,
            embedding_size=8,
            epochs=steps / per_epoch,
            log_steps=1,
            save_steps=SAVE_STEPS,
            speech=speech_config,
            optimization=OptimizationConfig(optimizer="adamw", learning_rate=5e-3, weight_decay=0.01),
        )

    return make


@pytest.fixture(scope="session")
def make_quantize_config(make_speech_config, float_run):
    """Of a quantization of the float run; without fine-tuning unless `steps` are given."""

    def make(workdir, *, pretrained=float_run, scheme="kmeans", bits=4, **finetune) -> quantize.QuantizeConfig:
        settings = {
            "loss": "margin",
            "frozen_statistics": False,
            "weighted_codebooks": False,
            "rounding": "nearest",
            "sequential": False,
            "bias_correction": False,
            "recalibration": "replace",
            "steps": 0,
            "calibration_crops": 0,
            "log_steps": 1,
            "speech": make_speech_config(),
        } | finetune
        return quantize.QuantizeConfig(
            workdir=str(workdir),
            pretrained=str(pretrained),
            scheme=scheme,
            bits=bits,
            finetune=FinetuneConfig(**settings),
        )

    return make


@pytest.fixture(scope="session")
def float_run(tmp_path_factory, make_train_config) -> pathlib.Path:
    """Folder of a finished float training."""
    workdir = tmp_path_factory.mktemp("runs") / "float"
    train.run(make_train_config(workdir))
    return workdir


@pytest.fixture(scope="session")
def quantized_run(tmp_path_factory, make_quantize_config) -> pathlib.Path:
    """Folder of a finished 4-bit k-means quantization with fine-tuning."""
    workdir = tmp_path_factory.mktemp("runs") / "kmeans_4"
    quantize.run(make_quantize_config(workdir, steps=6, refresh_steps=3, calibration_crops=64, save_steps=3))
    return workdir


@pytest.fixture(scope="session")
def post_training_run(tmp_path_factory, make_quantize_config) -> pathlib.Path:
    """Folder of a quantization that saw no speech, hence has no threshold."""
    workdir = tmp_path_factory.mktemp("runs") / "post_training"
    quantize.run(make_quantize_config(workdir))
    return workdir


@pytest.fixture(scope="session")
def wespeaker_checkpoint(tmp_path_factory) -> pathlib.Path:
    """A file of a narrow ResNet18 with WeSpeaker's names, of random weights."""
    network = Network("resnet18", {"width": 2, "embedding_size": 8}, KaldiFbank(window="hamming"))
    key_of = wespeaker.FAMILY.key_of(network)
    # PyTorch's layout: output channels first, kernel axes last.
    tensors = {
        key_of(path): np.ascontiguousarray(np.moveaxis(np.asarray(leaf), (-1, -2), (0, 1)) if leaf.ndim > 1 else leaf)
        for path, leaf in leaf_paths(network.init(jax.random.key(1)))
    }
    path = tmp_path_factory.mktemp("wespeaker") / "avg_model.safetensors"
    safetensors.numpy.save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def start_experiment():
    """Starts `python -m experiments.NAME ARGUMENTS` as users do, with this process's programs and its cache of them."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "True",
        # Present, so that the process doesn't start itself again to set it.
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }

    def start(name, *arguments) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", f"experiments.{name}", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@pytest.fixture(scope="session")
def run_experiment(start_experiment):
    """(exit status, standard output, standard error) of an experiment's process."""

    def run(name, *arguments) -> tuple[int, str, str]:
        process = start_experiment(name, *arguments)
        output, errors = process.communicate(timeout=300)
        return process.returncode, output, errors

    return run
