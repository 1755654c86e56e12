"""The weights of an ONNX file, without running its graph."""

import os
import pathlib
from typing import Any

import numpy as np


def read_onnx_weights(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The constant tensors of a graph as a state dict.

    Right operands of matrix products are transposed, so that dense kernels are [out, in] as in PyTorch's files;
    kernels of convolutions are so already.

    Args:
        path: the file. Tensors outside of it are not read.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the package onnx isn't installed; `pip install 'qsv[export]'` does it.
        ValueError: it isn't ONNX, is damaged, or keeps its tensors elsewhere; the error names the file.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        import onnx
    except ImportError as error:
        raise ImportError("reading ONNX files needs the package onnx: pip install 'qsv[export]'") from error
    try:
        graph = onnx.load_model_from_string(data).graph
        if not graph.initializer:
            raise ValueError("has no constant tensors, or is no ONNX file")
        return _weights(graph, onnx)
    # Whatever a file made by somebody else holds, the caller gets one type of error.
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _weights(graph: Any, onnx: Any) -> dict[str, np.ndarray]:
    products = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    weights = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError(f"keeps {tensor.name} in another file; save it as one file first")
        array = onnx.numpy_helper.to_array(tensor)
        weights[tensor.name] = array.T if tensor.name in products and array.ndim == 2 else array
    return weights
