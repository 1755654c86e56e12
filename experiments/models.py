"""Finding a model by what users name: a run's folder, a model file or another toolkit's checkpoint."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from qsv.deploy import Embedder, is_packed, load, load_packed
from qsv.deploy.atomic_write import write_atomically
from qsv.interop import TORCH_SUFFIXES, import_checkpoint
from qsv.models import Network
from qsv.models.network import Use
from qsv.quant import QTensor, leaf_paths

MODEL_FILE, HEAD_FILE = "model.safetensors", "head.safetensors"


def model_file(name: str) -> pathlib.Path:
    """The file of a model given as a file or as the folder of a finished run.

    Raises:
        FileNotFoundError: neither is there; says what was looked for.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        path = path / MODEL_FILE
        if not path.exists():
            raise FileNotFoundError(f"{path} doesn't exist: the run in {name} isn't finished, or it is no run")
    if not path.exists():
        raise FileNotFoundError(f"no model file or run folder {name}")
    return path


def model_name(name: str) -> str:
    """What tables and plots call a model: its run's folder, or the file where that has a name of its own."""
    path = pathlib.Path(name)
    return path.resolve().parent.name if path.name == MODEL_FILE else path.stem


def model_digest(name: str) -> str:
    """SHA-256 of the file behind a model's name, whatever toolkit it is of."""
    with _file_behind(name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_bytes(name: str) -> int:
    """Size of that file."""
    return _file_behind(name).stat().st_size


def _file_behind(name: str) -> pathlib.Path:
    path = pathlib.Path(name)
    if path.is_file():
        return path
    return model_file(name) if _is_ours(name) else import_checkpoint(name).path


@dataclasses.dataclass(frozen=True)
class FloatModel:
    """A network in float, as training and quantization start from.

    Attributes:
        path: the file that it was read from.
        network: the model, its arguments and its front end.
        params: float parameters.
        batch_stats: running statistics.
        threshold: calibrated score of the decision, or None.
    """

    path: pathlib.Path
    network: Network
    params: Any
    batch_stats: Any
    threshold: float | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """`{"params", "batch_stats"}`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    def head(self, speakers: tuple[str, ...], *, sub_centers: int) -> np.ndarray | None:
        """The classifier beside the model, [embedding_size, speakers * sub_centers]; None without one of these."""
        return read_head(str(self.path), speakers, sub_centers=sub_centers)


def load_float_model(name: str, *, use: Use = "speaker") -> FloatModel:
    """A float model: a run's folder, a model file, or a checkpoint of another toolkit (see `qsv.interop`).

    Args:
        name: the folder or file.
        use: what its network must be for.

    Raises:
        FileNotFoundError: there is nothing of this name.
        ValueError: the file holds quantized tensors, is damaged, of no known kind, or its network is for another use.
    """
    if not _is_ours(name):
        imported = import_checkpoint(name)
        _check_use(name, imported.network, use)
        print(f"{name}: {imported.family}")
        variables = imported.variables
        return FloatModel(imported.path, imported.network, variables["params"], variables["batch_stats"])
    path = model_file(name)
    model = load_packed(path)
    _check_use(name, model.network, use)
    quantized = [name for name, leaf in leaf_paths(model.packed_params) if isinstance(leaf, QTensor)]
    if quantized:
        raise ValueError(f"{path} is already quantized ({quantized[0]}, ...); start from its float model")
    return FloatModel(path, model.network, model.packed_params, model.batch_stats, model.threshold)


def load_embedder(name: str, *, use: Use = "speaker") -> tuple[Embedder, int]:
    """The embedder of whatever `load_float_model` reads, or of a quantized model; and its file's bytes."""
    if _is_ours(name):
        path = model_file(name)
        embedder = load(path)
        _check_use(name, embedder.network, use)
        return embedder, path.stat().st_size
    model = load_float_model(name, use=use)
    return Embedder(model.network, model.variables), model.path.stat().st_size


def _check_use(name: str, network: Network, use: Use) -> None:
    needed = {"speaker": "speaker embeddings", "quality": "scores of speech quality"}[use]
    if network.use != use:
        raise ValueError(f"{name} is a {network.name}, which doesn't make {needed}")


def _is_ours(name: str) -> bool:
    """Whether a name is of one of our runs or files; what doesn't exist counts as ours."""
    path = pathlib.Path(name)
    if path.is_dir():
        foreign = any(file.suffix in TORCH_SUFFIXES for file in path.iterdir())
        return (path / MODEL_FILE).exists() or not foreign
    return not path.exists() or is_packed(path)


def write_head(workdir: pathlib.Path, kernel: np.ndarray, speakers: tuple[str, ...]) -> None:
    """Write a run's classifier with its speakers' names, for a later fine-tuning."""
    metadata = {"speakers": "\n".join(speakers)}
    # The format takes an array's memory as it lies, hence that of the whole for a part of it.
    tensors = {"kernel": np.ascontiguousarray(kernel)}
    write_atomically(workdir / HEAD_FILE, safetensors.numpy.save(tensors, metadata))


def read_head(name: str, speakers: tuple[str, ...], *, sub_centers: int) -> np.ndarray | None:
    """The classifier beside a model, [embedding_size, speakers * sub_centers] float32; None without one of these."""
    path = model_file(name).parent / HEAD_FILE
    if not path.exists():
        return None
    with open_tensors(path) as file:
        if file.metadata()["speakers"] != "\n".join(speakers):
            return None
        kernel = file.get_tensor("kernel")
    return kernel if kernel.shape[1] == len(speakers) * sub_centers else None


@contextlib.contextmanager
def open_tensors(path: pathlib.Path) -> Iterator[Any]:
    """A file of tensors that isn't of a model.

    Raises:
        ValueError: it is damaged; names it.
    """
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, delete it: {error}") from error
