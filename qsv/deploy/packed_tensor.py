"""One weight of the packed file: a `QTensor` as the three arrays that are stored, and back."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qsv.quant import QTensor, packed_size_bytes

Tensors = dict[str, np.ndarray]

PARTS = ("codes", "codebook", "scale")
# safetensors' name -> type of floats that a file may hold
FLOATS: dict[str, Any] = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}


def store(name: str, weight: QTensor) -> Tensors:
    """The arrays of a weight.

    Args:
        name: of the weight in the file.
        weight: its tables must be float32, so that decoding gives the same bits everywhere.

    Returns:
        `{name:codes}` [ceil(size * bits / 8)] uint8, `{name:codebook}` and `{name:scale}` float32.

    Raises:
        ValueError: the weight breaks an invariant of `QTensor`, or its tables aren't finite float32.
    """
    _check_dtype(name, weight.dtype)
    shape, codes = tuple(weight.shape), np.asarray(weight.codes)
    codebook = checked_float(f"{name}:codebook", weight.codebook)
    scale = checked_float(f"{name}:scale", weight.scale)
    _check_tables(name, shape, weight.bits, codebook, scale)
    if codes.shape != shape or codes.dtype != np.uint8 or np.any(codes >= 2**weight.bits):
        raise ValueError(
            f"codes of {name} must be uint8 {shape} below {2**weight.bits}, "
            f"got {codes.dtype} {codes.shape} up to {codes.max(initial=0)}"
        )
    arrays = (pack_on_host(codes, bits=weight.bits), codebook, scale)
    return {f"{name}:{part}": array for part, array in zip(PARTS, arrays, strict=True)}


def restore(name: str, fields: Mapping[str, Any], tensors: Tensors) -> QTensor:
    """The weight that `store` took apart.

    Args:
        name: of the weight in the file.
        fields: its `bits`, `shape` and `dtype`.
        tensors: the file's, by name.

    Returns:
        The same QTensor bit for bit; its arrays are NumPy, which decode without compiling for every shape.

    Raises:
        ValueError: an array is missing, or doesn't fit the shape and bits.
    """
    absent = [part for part in PARTS if f"{name}:{part}" not in tensors]
    if absent:
        raise ValueError(f"{name} lacks its {' and '.join(absent)}")
    bits, shape = fields["bits"], tuple(fields["shape"])
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"{name} has {bits!r} bits, expected 1 to 8")
    _check_dtype(name, fields["dtype"])
    packed, codebook, scale = (tensors[f"{name}:{part}"] for part in PARTS)
    expected = packed_size_bytes(math.prod(shape), bits=bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{name} of shape {shape} needs [{expected}] bytes of {bits}-bit codes, got {packed.dtype} {packed.shape}"
        )
    _check_tables(name, shape, bits, codebook, scale)
    codes: Any = unpack_on_host(packed, bits=bits, shape=shape)
    tables: tuple[Any, Any] = (codebook, scale)
    return QTensor(codes, *tables, bits, shape, fields["dtype"])


def checked_float(name: str, leaf: Any) -> np.ndarray:
    """The leaf as an array in C order; raises ValueError unless it is finite and of a type in `FLOATS`."""
    array = np.asarray(leaf, order="C")
    if array.dtype not in [np.dtype(dtype) for dtype in FLOATS.values()]:
        raise ValueError(f"{name} is {array.dtype}, expected float32, bfloat16 or float16")
    if not np.all(np.isfinite(array.astype(np.float32))):
        raise ValueError(f"{name} holds NaN or infinity; such a network gives no embeddings")
    return array


def pack_on_host(codes: np.ndarray, *, bits: int) -> np.ndarray:
    """`qsv.quant.pack_bits` in NumPy: nothing is compiled for the many shapes of a network."""
    stream = np.unpackbits(codes.reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")


def unpack_on_host(packed: np.ndarray, *, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """`qsv.quant.unpack_bits` in NumPy."""
    stream = np.unpackbits(packed, count=math.prod(shape) * bits, bitorder="little")
    return np.packbits(stream.reshape(-1, bits), axis=1, bitorder="little").reshape(shape)


def _check_dtype(name: str, dtype: str) -> None:
    if dtype not in [np.dtype(known).name for known in FLOATS.values()]:
        raise ValueError(f"{name} is a weight of type {dtype}, expected float32, bfloat16 or float16")


def _check_tables(name: str, shape: tuple[int, ...], bits: int, codebook: np.ndarray, scale: np.ndarray) -> None:
    """Raises unless codebook and scale are float32 and fit the weight."""
    for table, array in (("codebook", codebook), ("scale", scale)):
        if array.dtype != np.float32:
            raise ValueError(f"{table} of {name} is {array.dtype}, expected float32")
    if codebook.shape[-1:] != (2**bits,):
        raise ValueError(f"codebook of {name} must have {2**bits} levels, got shape {codebook.shape}")
    for table, axes in (("codebook", codebook.shape[:-1]), ("scale", scale.shape)):
        fits = len(axes) == len(shape) and all(a in (1, size) for a, size in zip(axes, shape, strict=True))
        if axes and not fits:
            raise ValueError(f"{table} of {name} has axes {axes}, which don't broadcast against {shape}")
