"""Assignment and surrogate gradients, by exact value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.quant import nearest_codes, project

CODEBOOK = jnp.array([-1.0, -0.25, 0.5, 0.5])  # three levels, the last one repeated
WEIGHTS = jnp.array([-3.0, -1.0, -0.2, 0.9, 1.5])
SCALE = jnp.array(2.0)  # u = -1.5, -0.5, -0.1, 0.45, 0.75


def test_nearest_codes_by_hand_and_ties_go_up():
    np.testing.assert_array_equal(nearest_codes(WEIGHTS / SCALE, CODEBOOK), [0, 1, 1, 2, 2])
    np.testing.assert_array_equal(nearest_codes(jnp.array([-0.625, 0.125]), CODEBOOK), [1, 2])
    np.testing.assert_array_equal(nearest_codes(jnp.array([jnp.nan]), CODEBOOK), [0])


def test_forward_is_the_level_itself():
    values = project(WEIGHTS, CODEBOOK, SCALE)
    np.testing.assert_array_equal(values, [-2.0, -0.5, -0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("clip_gradient", "to_weights"), [(True, [0, 2.0, 3.0, 4.0, 0]), (False, [1.0, 2.0, 3.0, 4.0, 5.0])]
)
def test_reparameterized_clipping_gradients(clip_gradient, to_weights):
    cotangent = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])

    def value(weights, codebook, scale):
        return jnp.sum(cotangent * project(weights, codebook, scale, clip_gradient=clip_gradient))

    gradients = jax.grad(value, argnums=(0, 1, 2))(WEIGHTS, CODEBOOK, SCALE)
    np.testing.assert_array_equal(gradients[0], to_weights)
    np.testing.assert_array_equal(gradients[1], np.zeros(4))
    # Outside the codebook Q(u), inside Q(u) - u.
    by_weight = [-1.0, -0.25 + 0.5, -0.25 + 0.1, 0.5 - 0.45, 0.5]
    assert float(gradients[2]) == pytest.approx(np.dot(cotangent, by_weight), rel=1e-6)


def test_gradient_of_scales_per_channel():
    weights = jnp.stack([WEIGHTS, 2 * WEIGHTS], axis=1)
    scale = jnp.array([[2.0, 4.0]])
    gradient = jax.grad(lambda scale: jnp.sum(project(weights, CODEBOOK, scale)))(scale)
    assert gradient.shape == (1, 2)
    np.testing.assert_allclose(gradient, [[-0.35, -0.35]], rtol=1e-5)


def test_offset_moves_levels_and_assignment():
    shifted = project(WEIGHTS + 7, CODEBOOK, SCALE, jnp.array(7.0))
    np.testing.assert_array_equal(shifted, project(WEIGHTS, CODEBOOK, SCALE) + 7)


@pytest.mark.parametrize(
    "levels", [(-1.0, -1.0, 0.0, 1.0), (-1.0, 0.0, 0.0, 1.0), (-1.0, 0.0, 1.0, 1.0), (1.0,) * 4], ids=str
)
@pytest.mark.parametrize("times", [1, 16], ids=["compared", "searched"])
def test_repeated_levels_hide_no_other(levels, times):
    codebook = jnp.repeat(jnp.array(levels), times)
    values = jnp.array([-2.0, -1.0, -0.6, -0.4, 0.0, 0.4, 0.6, 1.0, 2.0])
    codes = np.asarray(nearest_codes(values, codebook))
    nearest = [min(levels, key=lambda level: abs(level - float(value))) for value in values]
    np.testing.assert_array_equal(codebook[codes], nearest)
    assert codes.max() == np.argmax(codebook)
    np.testing.assert_array_equal(nearest_codes(values[:, None], codebook[None, None])[:, 0], codes)


def test_large_codebooks_search_like_small_ones_compare():
    rng = np.random.default_rng(0)
    codebook = jnp.asarray(np.sort(rng.normal(size=256)), jnp.float32)
    values = jnp.asarray(rng.normal(size=(4, 500)), jnp.float32)
    brute = np.argmin(np.abs(np.asarray(values)[..., None] - np.asarray(codebook)), axis=-1)
    np.testing.assert_array_equal(nearest_codes(values, codebook), brute)
    per_row = jnp.stack([codebook, 2 * codebook, 3 * codebook, codebook + 1])[:, None]
    found = nearest_codes(values, per_row)
    for row in range(4):
        np.testing.assert_array_equal(found[row], nearest_codes(values[row], per_row[row, 0]))


def test_one_compilation_for_all_scales():
    traces = []

    @jax.jit
    def value(weights, scale):
        traces.append(1)
        return project(weights, CODEBOOK, scale)

    for scale in (0.5, 1.0, 2.0):
        value(WEIGHTS, jnp.float32(scale))
    assert len(traces) == 1
