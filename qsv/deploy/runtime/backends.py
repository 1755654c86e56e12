"""Programs that run an ONNX graph: onnxruntime, or OpenVINO, which is faster on processors that it knows well."""

import os
from collections.abc import Callable

import numpy as np

from qsv.deploy.runtime.model_file import ModelFileError

BACKENDS = ("onnxruntime", "openvino")

# The graph's input, [batch, samples] or [batch, frames, features] float32 -> [batch, embedding_size] float32
Runner = Callable[[np.ndarray], np.ndarray]

_OUTPUT = "embedding"
_ERRORS_ONLY = 3


def make_runner(path: str | os.PathLike[str], data: bytes, *, backend: str, threads: int) -> Runner:
    """A graph ready to run.

    Args:
        path: where it is from, for errors.
        data: the serialized model.
        backend: one of `BACKENDS`.
        threads: of one run; 0 for as many as there are cores.

    Raises:
        ValueError: the backend is unknown, or threads are negative.
        ImportError: the backend isn't installed; says how to do it.
        ModelFileError: it can't run the graph.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}")
    make = _onnxruntime if backend == "onnxruntime" else _openvino
    try:
        return make(data, threads)
    except ImportError as error:
        extra = "runtime" if backend == "onnxruntime" else "openvino"
        raise ImportError(f"{backend} isn't installed: pip install 'qsv[{extra}]'") from error
    except Exception as error:  # Neither has a base class of its errors.
        raise ModelFileError(path, f"{backend} can't run it: {error}") from error


def _onnxruntime(data: bytes, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda inputs: np.asarray(session.run([_OUTPUT], {given.name: inputs})[0])


def _openvino(data: bytes, threads: int) -> Runner:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = str(threads)
    compiled = core.compile_model(core.read_model(model=data, weights=b""), "CPU", settings)
    # Results are views of memory that the next run overwrites.
    return lambda inputs: np.array(compiled([inputs])[_OUTPUT])
