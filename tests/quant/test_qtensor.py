"""Looking codes up in one table or in many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.quant.qtensor import decode


@pytest.mark.parametrize("axes", [(1, 1), (1, 30), (20, 1)], ids=str)
def test_tables_are_shared_along_axes_of_size_one_and_not_copied(axes):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (20, 30)).astype(np.uint8)
    levels = rng.normal(size=(*axes, 256)).astype(np.float32)
    whole = np.broadcast_to(levels, (20, 30, 256))
    expected = [[whole[row, column, codes[row, column]] for column in range(30)] for row in range(20)]
    np.testing.assert_array_equal(decode(jnp.asarray(codes), jnp.asarray(levels)), expected)
    assert "f32[20,30,256]" not in str(jax.make_jaxpr(decode)(codes, levels))


def test_one_table():
    np.testing.assert_array_equal(decode(jnp.array([[2, 0]], jnp.uint8), jnp.array([5.0, 6.0, 7.0, 8.0])), [[7.0, 5.0]])
