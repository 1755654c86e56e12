"""What packed files are made of: named arrays and a JSON description in safetensors, checked by a SHA-256."""

import base64
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.packed_tensor import FLOATS, PARTS, Tensors, checked_float, restore, store
from qsv.quant import QTensor

_KEY = "qsv"
# Far more than any network's description; a small file mustn't become a large memory.
_MAX_DESCRIPTION_BYTES = 2**26
_DTYPES: dict[str, Any] = {**FLOATS, "U8": np.uint8}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_READERS = {"qsv-packed": "qsv.deploy.load", "qsv-tree": "qsv.deploy.load_tree"}


@dataclasses.dataclass(frozen=True, eq=False)
class Container:
    """A file whose digest was right; what is in it may still not fit together.

    Attributes:
        description: the JSON value, with the arrays' names, types and shapes as "tensors".
        flat: {type: [n] all arrays of that type, end to end}.
    """

    description: dict[str, Any]
    flat: Tensors

    def shapes(self, quantized: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all leaves; `quantized` is {name: `bits`, `shape` and `dtype`} of the `QTensor`s."""
        floats = {name: tuple(shape) for name, _, shape, *_ in self.description["tensors"] if ":" not in name}
        return floats | {name: tuple(fields["shape"]) for name, fields in quantized.items()}

    def leaves(self, quantized: Mapping[str, Any]) -> dict[str, Any]:
        """{name: `QTensor` or array}; raises ValueError where the arrays aren't all and only those of the leaves."""
        tensors = _split(self.description["tensors"], self.flat)
        leaves: dict[str, Any] = {name: restore(name, fields, tensors) for name, fields in quantized.items()}
        leaves |= {name: _finite(name, array) for name, array in tensors.items() if ":" not in name}
        extra = {name for name in tensors if ":" in name} - {f"{name}:{part}" for name in quantized for part in PARTS}
        if extra:
            raise ValueError(f"has tensors that its description doesn't name: {sorted(extra)[:4]}")
        return leaves


def named_leaves(tree: Any, *, prefix: str = "") -> dict[str, Any]:
    """{prefix + path: leaf} of a tree of nested dicts; `QTensor`s stay, all else becomes NumPy."""
    leaves = {}
    for keys, leaf in traverse_util.flatten_dict(tree).items():
        if not isinstance(leaf, QTensor | np.ndarray | np.generic | jax.Array):
            raise ValueError(f"leaves must be arrays or QTensors, got {type(leaf).__name__} at {keys}")
        wrong = [key for key in keys if not isinstance(key, str) or "/" in key or ":" in key]
        if wrong:
            raise ValueError(f"keys of a tree must be strings without '/' and ':', got {wrong[0]!r} in {keys}")
        leaves[prefix + "/".join(keys)] = leaf if isinstance(leaf, QTensor) else np.asarray(leaf)
    return leaves


def store_leaves(leaves: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The arrays of all leaves, and {name: `bits`, `shape` and `dtype`} of the `QTensor`s."""
    tensors: Tensors = {}
    quantized: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            tensors |= store(name, leaf)
            quantized[name] = {"bits": leaf.bits, "shape": list(leaf.shape), "dtype": leaf.dtype}
        else:
            tensors[name] = checked_float(name, leaf)
    return tensors, quantized


def write(path: str | os.PathLike[str], description: Mapping[str, Any], tensors: Tensors) -> int:
    """Write a file, atomically.

    Args:
        path: the file.
        description: JSON values; "format" and "format_version" say who reads it.
        tensors: float and uint8 arrays by name.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: the description isn't JSON.
        OSError: the file can't be written.
    """
    whole = {"sha256": "", **description, "qsv_version": _qsv_version(), "tensors": _index(tensors)}
    flat = _joined(tensors)
    whole["sha256"] = _digest(to_json(whole), flat)
    compressed = zlib.compress(to_json(whole).encode(), level=9)
    data = safetensors.numpy.save(flat, {_KEY: base64.b64encode(compressed).decode()})
    write_atomically(path, data)
    return len(data)


def _decode(data: bytes, expected_format: str, versions: Sequence[int]) -> Container:
    """The container in the bytes of a file, its digest checked once its version is known."""
    flat, text = _read_safetensors(data)
    description = json.loads(text)
    found = description.get("format")
    if found != expected_format:
        hint = f"; {_READERS[found]} reads it" if found in _READERS else ""
        raise ValueError(f"expected format {expected_format!r}, got {found!r}{hint}")
    version = description["format_version"]
    if version not in versions:
        known = " and ".join(map(str, versions))
        raise ValueError(f"has format version {version!r}, this qsv reads {known}; install a newer qsv")
    digest = description["sha256"]
    if _digest(text.replace(digest, "", 1), flat) != digest:
        raise ValueError("is damaged: its SHA-256 doesn't match its content; copy or export it again")
    return Container(description, flat)


@contextlib.contextmanager
def reading(path: str | os.PathLike[str], *, expected_format: str, versions: Sequence[int]) -> Iterator[Container]:
    """The container in a file; whatever is wrong with it, found here or by the caller, raises ValueError with its name.

    Raises:
        FileNotFoundError: there is no such file.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        yield _decode(data, expected_format, versions)
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)}: its description lacks {error}") from error
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself that it is a packed file; it may still be damaged."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            return False
        try:
            metadata = json.loads(file.read(length))["__metadata__"]
        except (ValueError, KeyError, TypeError):
            return False
    return isinstance(metadata, dict) and _KEY in metadata


def is_constant(array: np.ndarray) -> bool:
    """Whether a float tensor of several values has one value everywhere, to the last bit."""
    if array.size < 2 or array.dtype == np.uint8:
        return False
    values = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    return bool(np.all(values == values[0]))


def to_json(value: Any) -> str:
    """JSON text without blanks; raises ValueError for what isn't JSON."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, default=_plain_scalar)
    except (TypeError, ValueError) as error:
        raise ValueError(f"network arguments and provenance must be JSON values: {error}") from error


def _read_safetensors(data: bytes) -> tuple[Tensors, str]:
    """The flat tensors, and the text of the description."""
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"isn't a whole safetensors file ({error})") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    compressed = header.get("__metadata__", {}).get(_KEY)
    if compressed is None:
        raise ValueError(f"is a safetensors file without the metadata {_KEY!r}; expected one from qsv.deploy.save")
    flat = {}
    for name, entry in entries:
        if name not in _DTYPES or entry["dtype"] != name or len(entry["shape"]) != 1:
            raise ValueError(
                f"{name} is {entry['dtype']} {entry['shape']}, expected flat tensors called by their types, "
                f"{', '.join(_DTYPES)}"
            )
        flat[name] = np.frombuffer(entry["data"], _DTYPES[name])
    inflater = zlib.decompressobj()
    text = inflater.decompress(base64.b64decode(compressed, validate=True), _MAX_DESCRIPTION_BYTES)
    if not inflater.eof:
        raise ValueError(f"its description is cut off, or longer than {_MAX_DESCRIPTION_BYTES:,} bytes")
    return flat, text.decode()


def _index(tensors: Tensors) -> list[list[Any]]:
    """[name, type, shape] of every tensor, and its value where it has only one."""
    return [
        [name, _DTYPE_NAMES[array.dtype], list(array.shape), *([float(array.flat[0])] if is_constant(array) else [])]
        for name, array in tensors.items()
    ]


def _joined(tensors: Tensors) -> Tensors:
    """One flat tensor for each type, of those that aren't constant."""
    parts: dict[str, list[np.ndarray]] = {}
    for array in tensors.values():
        if not is_constant(array):
            parts.setdefault(_DTYPE_NAMES[array.dtype], []).append(array.reshape(-1))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _split(index: list[list[Any]], flat: Tensors) -> Tensors:
    """The tensors that `_joined` joined; raises ValueError unless the index fits the flat tensors exactly."""
    tensors: Tensors = {}
    used = dict.fromkeys(flat, 0)
    for name, dtype, shape, *value in index:
        if name in tensors or dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} is described twice or as {dtype} {shape}, expected one of {', '.join(_DTYPES)}")
        if value:
            # A view of one number, so that a small file can't fill the memory.
            tensors[name] = np.broadcast_to(np.asarray(value[0], _DTYPES[dtype]), shape)
            continue
        first, size = used.get(dtype, 0), math.prod(shape)
        used[dtype] = first + size
        if used[dtype] > len(flat.get(dtype, ())):
            raise ValueError(f"{name} of shape {tuple(shape)} lies past the end of the {dtype} tensor")
        tensors[name] = flat[dtype][first : first + size].reshape(shape) if size else np.empty(shape, _DTYPES[dtype])
    for dtype, size in used.items():
        if size != len(flat.get(dtype, ())):
            raise ValueError(f"the {dtype} tensor has {len(flat[dtype])} values, its description names {size}")
    return tensors


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    """The array, a view of one number left as it is; raises ValueError unless it is finite and float."""
    if array.size and not any(array.strides):
        checked_float(name, array.flat[0])
        return array
    return checked_float(name, array)


def _digest(text: str, flat: Tensors) -> str:
    """Hex digits of the SHA-256 over the description, then every flat tensor's name, shape and content."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(flat):
        digest.update(to_json([name, list(flat[name].shape)]).encode())
        digest.update(flat[name].tobytes())
    return digest.hexdigest()


def _plain_scalar(value: Any) -> Any:
    """NumPy and JAX scalars, which metrics often are, as numbers."""
    if isinstance(value, np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    raise TypeError(f"got {value!r}")


def _qsv_version() -> str:
    try:
        return importlib.metadata.version("qsv")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
