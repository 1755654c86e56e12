"""Programs that run an ONNX graph: onnxruntime, or OpenVINO, which is faster on processors that it knows well."""

import os
import pathlib
from collections.abc import Callable

import numpy as np

from qsv.deploy.runtime.model_file import ModelFileError

BACKENDS = ("onnxruntime", "openvino")

# The graph's input, [batch, samples] or [batch, frames, features] float32 -> [batch, embedding_size] float32
Runner = Callable[[np.ndarray], np.ndarray]

_OUTPUT = "embedding"
_ERRORS_ONLY = 3
_CPUINFO = pathlib.Path("/proc/cpuinfo")
# Instructions that add products of 8-bit numbers in 32 bits.
_VNNI = frozenset(("avx512_vnni", "avx_vnni"))


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
        ModelFileError: it can't run the graph; so does the runner for inputs with which it fails.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if threads < 0:
        raise ValueError(f"threads must be 0 or more, got {threads}")
    make = _onnxruntime if backend == "onnxruntime" else _openvino
    try:
        run = make(data, threads)
    except ImportError as error:
        extra = "runtime" if backend == "onnxruntime" else "openvino"
        raise ImportError(f"{backend} isn't installed: pip install 'qsv[{extra}]'") from error
    except Exception as error:  # Neither has a base class of its errors.
        raise ModelFileError(path, f"{backend} can't run it: {error}") from error

    def checked(inputs: np.ndarray) -> np.ndarray:
        try:
            return run(inputs)
        except Exception as error:
            raise ModelFileError(path, f"{backend} can't run it with inputs {inputs.shape}: {error}") from error

    return checked


def saturates(cpuinfo: pathlib.Path) -> bool:
    """Whether onnxruntime adds products of uint8 and int8 in 16 bits, which overflow, on a processor.

    Args:
        cpuinfo: Linux's /proc/cpuinfo; false for other systems, which have none, and for processors other than x86.

    Source: onnxruntime_session_options_config_keys.h on "session.x64quantprecision".
    """
    if not cpuinfo.exists():
        return False
    with cpuinfo.open() as lines:
        flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return bool(flags) and _VNNI.isdisjoint(flags)


def _onnxruntime(data: bytes, threads: int) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    disabled = []
    if saturates(_CPUINFO):
        # Kernels of uint8, slower but exact; making them fails where that pass has let two layers share zero points.
        options.add_session_config_entry("session.x64quantprecision", "1")
        disabled = ["CommonSubexpressionElimination"]
    session = onnxruntime.InferenceSession(
        data, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
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
