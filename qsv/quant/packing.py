"""Bit packing of codes: 1 to 8 bits each, without gaps."""

import jax
import jax.numpy as jnp

from qsv.quant.qtensor import check_bits


def packed_size_bytes(count: int, *, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def pack_bits(codes: jax.Array, *, bits: int) -> jax.Array:
    """Pack codes into bytes, least significant bit first.

    Args:
        codes: any shape, unsigned integers below `2**bits`; read in C order. Higher bits are dropped.
        bits: 1 to 8.

    Returns:
        `[ceil(codes.size * bits / 8)]` uint8; code i occupies bits i * bits and up of this little-endian stream.

    Raises:
        ValueError: bits out of range.
    """
    check_bits(bits)
    flat = jnp.asarray(codes, jnp.uint8).reshape(-1, 1)
    stream = (flat >> jnp.arange(bits, dtype=jnp.uint8)) & jnp.uint8(1)
    return jnp.packbits(stream.reshape(-1), bitorder="little")


def unpack_bits(packed: jax.Array, *, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """The codes that `pack_bits` packed.

    Args:
        packed: [bytes] uint8.
        bits: 1 to 8.
        shape: shape of the codes.

    Returns:
        [*shape] uint8.

    Raises:
        ValueError: bits out of range, or a number of bytes that doesn't fit the shape.
    """
    check_bits(bits)
    count = 1
    for size in shape:
        count *= size
    expected = packed_size_bytes(count, bits=bits)
    if packed.shape != (expected,):
        raise ValueError(f"{count} codes of {bits} bits take [{expected}] bytes, got an array of shape {packed.shape}")
    stream = jnp.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    weights = jnp.uint8(1) << jnp.arange(bits, dtype=jnp.uint8)
    return jnp.sum(stream * weights, axis=1, dtype=jnp.uint8).reshape(shape)
