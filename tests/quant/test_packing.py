"""Bit packing, bit by bit."""

import jax.numpy as jnp
import numpy as np
import pytest

import qsv
from qsv.quant import packed_size_bytes


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5, 2), (8,)])
def test_round_trip(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    packed = qsv.pack_bits(jnp.asarray(codes), bits=bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (packed_size_bytes(codes.size, bits=bits),)
    np.testing.assert_array_equal(qsv.unpack_bits(packed, bits=bits, shape=shape), codes)


def test_layout_is_little_endian():
    # 3-bit codes 1, 2, 7: bits 100 010 111 -> 0b11010001, 0b1.
    np.testing.assert_array_equal(qsv.pack_bits(jnp.array([1, 2, 7]), bits=3), [0b11010001, 0b1])


def test_bad_input():
    with pytest.raises(ValueError, match="1 to 8"):
        qsv.pack_bits(jnp.zeros(3, jnp.uint8), bits=9)
    with pytest.raises(ValueError, match=r"take \[2\] bytes"):
        qsv.unpack_bits(jnp.zeros(3, jnp.uint8), bits=4, shape=(4,))
