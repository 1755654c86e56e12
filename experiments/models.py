"""Finding a model by what users name: a run's folder or a model file."""

import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from qsv.deploy import PackedModel, load_packed
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


def load_float_model(name: str) -> PackedModel:
    """A model whose every tensor is float, as training starts from.

    Raises:
        ValueError: the file holds quantized tensors.
    """
    path = model_file(name)
    model = load_packed(path)
    quantized = [name for name, leaf in leaf_paths(model.packed_params) if isinstance(leaf, QTensor)]
    if quantized:
        raise ValueError(f"{path} is already quantized ({quantized[0]}, ...); start from its float model")
    return model


def write_head(workdir: pathlib.Path, kernel: np.ndarray, speakers: tuple[str, ...]) -> None:
    """Write a run's classifier with its speakers' names, for a later fine-tuning."""
    metadata = {"speakers": "\n".join(speakers)}
    safetensors.numpy.save_file({"kernel": kernel}, workdir / HEAD_FILE, metadata)


def read_head(name: str, speakers: tuple[str, ...], *, sub_centers: int) -> np.ndarray | None:
    """The classifier beside a model, [embedding_size, speakers * sub_centers] float32; None without one of these."""
    path = model_file(name).parent / HEAD_FILE
    if not path.exists():
        return None
    with safetensors.safe_open(path, "np") as file:
        if file.metadata()["speakers"] != "\n".join(speakers):
            return None
        kernel = file.get_tensor("kernel")
    return kernel if kernel.shape[1] == len(speakers) * sub_centers else None
