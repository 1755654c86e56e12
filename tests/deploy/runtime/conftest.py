"""A small sealed model, and recordings of two noisy 'voices'."""

import dataclasses
import pathlib

import jax
import numpy as np
import onnxruntime
import pytest
import soundfile

from qsv.deploy import load_packed, save
from qsv.deploy.onnx import export_onnx
from qsv.models import Network
from qsv.quant import KMeans, Rule, init, resolve

RATE_HZ = 16000


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model as a packed file and as ONNX files."""

    packed: pathlib.Path
    onnx: pathlib.Path
    features: pathlib.Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    network = Network("resnet10", {"width": 4, "embedding_size": 16})
    variables = network.init(jax.random.key(0))
    plan = resolve([Rule(".*/kernel", KMeans(4)), Rule(".*", None)], variables["params"])
    qstate = init(plan, variables["params"])
    made = Exported(folder / "model.safetensors", folder / "model.onnx", folder / "features.onnx")
    save(made.packed, network, plan, variables["params"], qstate, variables["batch_stats"], threshold=0.995)
    export_onnx(made.onnx, load_packed(made.packed))
    export_onnx(made.features, load_packed(made.packed), waveform=False)
    return made


def voice(kind: int, seed: int, seconds: float = 1.0) -> np.ndarray:
    """Noise of one of two colours, and a little that is different in each recording."""
    samples = int(seconds * RATE_HZ)
    own = np.convolve(np.random.default_rng(kind).normal(size=samples), ((1, 0.9), (1, -0.9))[kind], "same")
    return (0.1 * own + 0.001 * np.random.default_rng(10 + seed).normal(size=samples)).astype(np.float32)


@pytest.fixture(scope="session")
def recordings(tmp_path_factory) -> dict[str, pathlib.Path]:
    """`a0` to `a2` of one voice, `b0` and `b1` of another."""
    folder = tmp_path_factory.mktemp("recordings")
    paths = {name: folder / f"{name}.wav" for name in ("a0", "a1", "a2", "b0", "b1")}
    for i, (name, path) in enumerate(paths.items()):
        soundfile.write(path, voice("ab".index(name[0]), i), RATE_HZ)
    return paths


@pytest.fixture(scope="session", autouse=True)
def _quiet_runtime() -> None:
    onnxruntime.set_default_logger_severity(3)
