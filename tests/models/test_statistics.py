"""Statistics pooling: values by hand, padding, silence and single frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models.statistics import mean_and_deviation


def test_by_hand():
    # Two channels, of which the second is silent; the last frame of the second row is padding.
    x = jnp.array([[[1.0, 4.0], [2.0, 4.0], [6.0, 4.0]], [[1.0, 5.0], [3.0, 5.0], [99.0, 99.0]]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    expected = [[3.0, 4.0, np.sqrt(7.0), 0.0], [2.0, 5.0, np.sqrt(2.0), 0.0]]
    np.testing.assert_allclose(mean_and_deviation(x, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(mean_and_deviation(x[1:, :2]), expected[1:], rtol=1e-6)
    with_offset = mean_and_deviation(x, mask, variance_offset=1e-2)
    np.testing.assert_allclose(with_offset[0, 2:], [np.sqrt(7.01), 0.1], rtol=1e-6)


@pytest.mark.parametrize(("offset", "deviation"), [(0.0, 0.01), (1e-8, 1e-4)])
def test_single_frame(offset, deviation):
    x = jnp.array([[[7.0], [8.0]]])
    mask = jnp.array([[True, False]])
    for pooled in (
        mean_and_deviation(x, mask, variance_offset=offset),
        mean_and_deviation(x[:, :1], variance_offset=offset),
    ):
        np.testing.assert_allclose(pooled, [[7.0, deviation]], rtol=1e-5)


def test_gradients_are_finite_where_nothing_varies():
    silent, single = jnp.ones((1, 5, 2)), jnp.ones((1, 1, 2))
    for x in (silent, single):
        gradient = jax.grad(lambda x: mean_and_deviation(x).sum())(x)
        np.testing.assert_allclose(gradient, 1 / x.shape[1], rtol=1e-6)


def test_bfloat16_is_pooled_in_float32():
    x = jax.random.normal(jax.random.key(0), (2, 300, 4), jnp.bfloat16) + 3
    pooled = mean_and_deviation(x)
    assert pooled.dtype == jnp.float32
    wide = np.asarray(x.astype(jnp.float32))
    np.testing.assert_allclose(pooled[:, :4], wide.mean(1), rtol=1e-5)
    np.testing.assert_allclose(pooled[:, 4:], wide.std(1, ddof=1), rtol=1e-5)
