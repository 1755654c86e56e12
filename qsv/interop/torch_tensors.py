"""Tensors of PyTorch's files, described by strided views of storages, as NumPy arrays."""

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

import ml_dtypes
import numpy as np

from qsv.interop.data_pickle import Global

ByteOrder = Literal["little", "big"]

# PyTorch's name -> NumPy's type
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    **{f"float{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"complex{bits}": np.dtype(f"complex{bits}") for bits in (64, 128)},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": np.dtype(np.bool_),
}

_SCALARS = (str, bytes, bool, int, float, complex)
_MAX_DIMENSIONS = 32
_MAX_DEPTH = 64
# Tensors may share a storage, but a small file mustn't become a large memory.
_MAX_COPIES = 4


@dataclasses.dataclass(frozen=True)
class Storage:
    """What a pickle says of a storage.

    Attributes:
        dtype: a key of `DTYPES`.
        key: what the file calls it.
        numel: elements of that dtype.
    """

    dtype: str
    key: str
    numel: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.numel * DTYPES[self.dtype].itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a pickle says of a tensor; `with_arrays` checks it.

    Attributes:
        storage: where its elements are.
        dtype: a key of `DTYPES`.
        offset: of its first element, in elements, as the strides are.
        shape: its axes.
        strides: steps between the elements of each axis.
    """

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def check(self, name: str) -> None:
        """Raises ValueError unless every element lies in the storage, and there aren't more than it has."""
        for axes in (self.shape, self.strides):
            if type(axes) is not tuple or len(axes) > _MAX_DIMENSIONS:
                raise ValueError(f"shape and strides of {name} must be tuples of at most {_MAX_DIMENSIONS} integers")
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"offset, shape and strides of {name} must be integers from 0 on")
        if len(self.shape) != len(self.strides):
            raise ValueError(f"{name} has {len(self.shape)} axes, but {len(self.strides)} strides")
        available = self.storage.num_bytes // DTYPES[self.dtype].itemsize
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.size and (last >= available or self.size > available):
            raise ValueError(
                f"{name} with shape {self.shape}, strides {self.strides} and offset {self.offset} doesn't fit its "
                f"storage of {available} elements"
            )

    def of(self, elements: np.ndarray) -> np.ndarray:
        """The tensor as a view of its storage's elements, after `check`."""
        if not self.size:
            return np.empty(self.shape, elements.dtype)
        strides = [stride * elements.itemsize for stride in self.strides]
        # Not `as_strided`, which knows NumPy's own types only.
        raw = elements.view(np.uint8)
        return np.ndarray(self.shape, elements.dtype, raw, self.offset * elements.itemsize, strides)


def with_arrays(value: Any, raw_bytes: Callable[[Storage], bytes | memoryview], order: ByteOrder) -> Any:
    """A tree of containers, scalars and `Tensor` with arrays for its tensors.

    Args:
        value: what a pickle holds.
        raw_bytes: content of a storage; called once for each.
        order: byte order of the content.

    Returns:
        Plain dicts, lists, tuples and scalars, globals as their names, and for every tensor a NumPy array in C
        order. Tensors that are the same view of a storage share an array.

    Raises:
        ValueError: a tensor doesn't lie within its storage, a storage isn't of the size that was said, or the value
            is nested too deeply or in itself.
    """
    names: dict[Tensor, str] = {}

    def note(tensor: Tensor, name: str) -> None:
        tensor.check(name)
        names.setdefault(tensor, name)

    _Copier(note).copy(value)
    by_storage: dict[Storage, list[Tensor]] = {}
    for tensor in names:
        by_storage.setdefault(tensor.storage, []).append(tensor)
    arrays: dict[Tensor, np.ndarray] = {}
    for storage, tensors in by_storage.items():
        key = storage.key[:80]
        wanted = sum(tensor.size * DTYPES[tensor.dtype].itemsize for tensor in tensors)
        if wanted > _MAX_COPIES * storage.num_bytes:
            raise ValueError(f"the tensors in storage {key} claim {wanted:,} bytes, it has {storage.num_bytes:,}")
        raw = raw_bytes(storage)
        if len(raw) != storage.num_bytes:
            raise ValueError(f"storage {key} should have {storage.num_bytes:,} bytes, it has {len(raw):,}")
        elements = {dtype: elements_of(raw, DTYPES[dtype], order) for dtype in {tensor.dtype for tensor in tensors}}
        arrays |= {tensor: np.array(tensor.of(elements[tensor.dtype]), order="C") for tensor in tensors}
    return _Copier(lambda tensor, name: arrays[tensor]).copy(value)


def elements_of(raw: bytes | memoryview, dtype: np.dtype, order: ByteOrder) -> np.ndarray:
    """The elements of raw bytes.

    Args:
        raw: bytes; what is left over at the end of the last whole element is left out.
        dtype: one of `DTYPES`.
        order: byte order of the bytes.

    Returns:
        [n] of the dtype in this machine's byte order, read-only.
    """
    raw = memoryview(raw)[: len(raw) // dtype.itemsize * dtype.itemsize]
    if order != sys.byteorder:
        # Types of ml_dtypes can't be swapped, but integers of their size can.
        unit = dtype.itemsize // (2 if dtype.kind == "c" else 1)
        raw = np.frombuffer(raw, f"u{unit}").byteswap().view(np.uint8).data
    if dtype == np.bool_:
        return np.frombuffer(raw, np.uint8) != 0
    return np.frombuffer(raw, dtype)


class _Copier:
    """Copies a value into plain containers; `leaf` makes something of (tensor, where it is)."""

    def __init__(self, leaf: Callable[[Tensor, str], Any]) -> None:
        self.leaf = leaf
        self.begun: set[int] = set()
        self.copies: dict[int, Any] = {}

    def copy(self, value: Any, name: str = "", depth: int = 0) -> Any:
        if isinstance(value, Tensor):
            return self.leaf(value, name)
        if isinstance(value, Global):
            return value.name
        if value is None or isinstance(value, _SCALARS):
            return value
        if not isinstance(value, dict | list | tuple):
            kind = type(value).__name__.strip("_").lower()
            raise ValueError(f"{name or 'its content'} is a bare {kind}; save tensors and plain numbers instead")
        # Once for each identity: lists that hold a list several times that holds another ... would take forever.
        if id(value) not in self.copies:
            if depth > _MAX_DEPTH or id(value) in self.begun:
                raise ValueError(f"{name} is nested in itself or more than {_MAX_DEPTH} levels deep")
            self.begun.add(id(value))
            self.copies[id(value)] = self._container(value, name, depth + 1)
        return self.copies[id(value)]

    def _container(self, value: Any, name: str, depth: int) -> Any:
        below = f"{name}." if name else ""
        if isinstance(value, dict):
            return {key: self.copy(item, below + _shown(key), depth) for key, item in value.items()}
        items = [self.copy(item, f"{below}{index}", depth) for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)


def _shown(key: Any) -> str:
    return key[:80] if isinstance(key, str) else repr(key)[:80]
