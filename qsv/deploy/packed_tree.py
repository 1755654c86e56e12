"""Any tree of parameters, quantized or not, as one small file: for models that qsv knows nothing of."""

import os
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from qsv.deploy.container import named_leaves, reading, store_leaves, write

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
    tensors, quantized = store_leaves(named_leaves(packed_params))
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "provenance": dict(provenance or {}),
        "quantized": quantized,
    }
    return write(path, description, tensors)


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
    with reading(path, expected_format=FORMAT, versions=(FORMAT_VERSION,)) as container:
        leaves = container.leaves(container.description["quantized"])
        return traverse_util.unflatten_dict(leaves, sep="/"), container.description["provenance"]
