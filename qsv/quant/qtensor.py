"""The quantized tensor: integer codes, a table of levels and a scale."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

MIN_BITS, MAX_BITS = 1, 8


def check_bits(bits: int, *, minimum: int = MIN_BITS, of: str = "bits") -> None:
    """Raise ValueError unless `bits` is an integer from `minimum` to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not minimum <= bits <= MAX_BITS:
        raise ValueError(f"{of} must be an integer from {minimum} to {MAX_BITS}, got {bits!r}")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "codebook", "scale"],
    meta_fields=["bits", "shape", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A weight tensor whose every value is `codebook[code] * scale`.

    Invariants: `codes < 2**bits`; the codebook ascends along its last axis; `codebook[..., 0]` and `scale`
    broadcast against the weight. A scheme with fewer levels than codes repeats its last level.

    Attributes:
        codes: uint8 of the weight's shape.
        codebook: `[2**bits]` float32, or `[..., 2**bits]` with the weight's axes (size one where shared).
        scale: float32, a scalar or with the weight's axes.
        bits: 1 to 8.
        shape: the weight's shape.
        dtype: name of the weight's dtype.
    """

    codes: jax.Array
    codebook: jax.Array
    scale: jax.Array
    bits: int
    shape: tuple[int, ...]
    dtype: str

    def dequantize(self) -> jax.Array:
        """The weight: `shape`, `dtype`; every value is one of the scaled levels."""
        return decode(self.codes, scaled_levels(self.codebook, self.scale)).astype(self.dtype)

    @property
    def storage_bits(self) -> int:
        """Bits that a file needs for it: packed codes, the codebook and the scale."""
        return self.code_bits + self.table_bits

    @property
    def code_bits(self) -> int:
        """Bits of the packed codes."""
        return self.codes.size * self.bits

    @property
    def table_bits(self) -> int:
        """Bits of the codebook and the scale."""
        return sum(8 * table.size * table.dtype.itemsize for table in (self.codebook, self.scale))


def scaled_levels(codebook: jax.Array, scale: jax.Array) -> jax.Array:
    """`[..., 2**bits]` levels in the weight's unit: the one place where a codebook meets its scale."""
    if scale.ndim == 0 or codebook.ndim == 0:
        return codebook * scale
    return codebook * scale[..., None]


def decode(codes: jax.Array, levels: jax.Array) -> jax.Array:
    """Look every code up.

    Args:
        codes: [*shape] unsigned integers.
        levels: `[2**bits]`, or `[..., 2**bits]` with the axes of `shape`, of size one where shared.

    Returns:
        [*shape] in the dtype of the levels.
    """
    if levels.ndim == 1:
        return levels[codes]
    return jnp.take_along_axis(levels, codes[..., None].astype(jnp.int32), axis=-1)[..., 0]
