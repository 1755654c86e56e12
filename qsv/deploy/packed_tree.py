"""Any tree of parameters, quantized or not, as one small file: for models that qsv knows nothing of."""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.container import decode, encode, named_leaves, reading, store_leaves
from qsv.quant import QTensor

FORMAT = "qsv-tree"
FORMAT_VERSION = 1


def save_tree(path: str | os.PathLike[str], packed_params: Any, *, provenance: Mapping[str, Any] | None = None) -> int:
    """Write a tree of parameters with bit-packed codes, atomically: what `qsv.quantize` made of any model.

    The file is laid out like `qsv.deploy.packed_file`'s, with full paths for names and no network.

    Args:
        path: the file; one that exists is replaced, a missing folder is made.
        packed_params: nested dicts with `QTensor`s and arrays of float32, bfloat16 or float16.
        provenance: JSON-compatible notes, such as how to build the model.

    Returns:
        Size of the file in bytes.

    Raises:
        ValueError: a leaf is something else or isn't finite, or a key has a "/" or ":".
        OSError: the file can't be written; an old one is untouched.
    """
    leaves = traverse_util.flatten_dict(packed_params)
    for keys, leaf in leaves.items():
        if not isinstance(leaf, QTensor | np.ndarray | np.generic | jax.Array):
            raise ValueError(f"leaves must be arrays or QTensors, got {type(leaf).__name__} at {keys}")
    tensors, quantized = store_leaves(named_leaves(packed_params))
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "provenance": dict(provenance or {}),
        "quantized": quantized,
    }
    data = encode(description, tensors)
    write_atomically(path, data)
    return len(data)


def load_tree(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `save_tree` wrote and check all of it.

    Args:
        path: the file.

    Returns:
        The tree, NumPy and bit for bit as it was saved (`qsv.dequantize` makes floats of it), and the provenance.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't such a file, is damaged, or needs a newer qsv; the error says file and cause.
    """
    with reading(path) as data:
        container = decode(data, expected_format=FORMAT)
        version = container.description["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"has format version {version!r}, this qsv reads {FORMAT_VERSION}; install a newer qsv")
        leaves = container.leaves(container.description["quantized"])
        return traverse_util.unflatten_dict(leaves, sep="/"), container.description["provenance"]
