"""Rounding with error compensation: levels, errors of the output, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.quant import (
    AdditivePowerOfTwo,
    KMeans,
    PowerOfTwo,
    QuantizerState,
    Uniform,
    compensated_rounding,
    nearest_in_cells,
    project,
    refitted_weights,
)

QUANTIZERS = [KMeans(3), Uniform(3), KMeans(2, channel_axes=(-1,)), Uniform(4, channel_axes=(3,))]


@pytest.fixture
def layer():
    """A kernel [3, 3, 4, 6] and the second moment of strongly correlated inputs."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(36, 36)) * np.geomspace(1, 0.02, 36)
    inputs = rng.normal(size=(2000, 36)) @ mixing
    weights = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)
    return weights, jnp.asarray(inputs.T @ inputs / 2000, jnp.float32)


def output_error(weights, rounded, moment):
    error = np.asarray(rounded - weights, np.float64).reshape(36, -1)
    return np.trace(error.T @ np.asarray(moment, np.float64) @ error)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_every_value_is_on_a_level_and_the_output_changes_less(layer, quantizer):
    weights, moment = layer
    state = quantizer.init(weights)
    rounded = compensated_rounding(weights, moment, quantizer, state)
    np.testing.assert_array_equal(quantizer.fake_quantize(rounded, state), rounded)
    nearest = quantizer.fake_quantize(weights, state)
    assert output_error(weights, rounded, moment) < 0.6 * output_error(weights, nearest, moment)
    assert float(jnp.sum((rounded - weights) ** 2)) > float(jnp.sum((nearest - weights) ** 2))


def test_two_inputs_by_hand():
    # H = [[2, 1], [1, 2]]: the first row's error e is passed on as -H21 / H22 e, the least-squares answer.
    quantizer = Uniform(2)
    weights = jnp.array([[0.6], [0.2]])
    state = quantizer.init(jnp.array([[1.0], [-1.0]]))
    levels = np.asarray(state.codebook * state.scale)
    first = levels[np.argmin(np.abs(levels - 0.6))]
    second = 0.2 - 0.5 * (first - 0.6)
    second = levels[np.argmin(np.abs(levels - second))]
    rounded = compensated_rounding(weights, jnp.array([[2.0, 1.0], [1.0, 2.0]]), quantizer, state, damping=1e-6)
    np.testing.assert_allclose(rounded[:, 0], [first, second], atol=1e-6)


def test_independent_inputs_are_rounded_to_the_nearest_level(layer):
    weights, _ = layer
    state = KMeans(3).init(weights)
    moment = jnp.diag(jnp.linspace(0.1, 2, 36))
    rounded = compensated_rounding(weights, moment, KMeans(3), state)
    np.testing.assert_array_equal(rounded, KMeans(3).fake_quantize(weights, state))


@pytest.mark.parametrize("rank", [0, 1, 10])
def test_inputs_that_are_dependent_or_always_zero(layer, rank):
    weights, _ = layer
    inputs = np.random.default_rng(1).normal(size=(rank, 36))
    inputs[:, ::3] = 0
    state = KMeans(3).init(weights)
    rounded = compensated_rounding(weights, jnp.asarray(inputs.T @ inputs, jnp.float32), KMeans(3), state)
    assert np.isfinite(rounded).all()
    np.testing.assert_array_equal(KMeans(3).fake_quantize(rounded, state), rounded)


def test_jit_gives_the_same(layer):
    weights, moment = layer
    state = KMeans(3).init(weights)
    jitted = jax.jit(lambda w, h, s: compensated_rounding(w, h, KMeans(3), s))(weights, moment, state)
    np.testing.assert_array_equal(jitted, compensated_rounding(weights, moment, KMeans(3), state))


@pytest.mark.parametrize(
    ("quantizer", "size", "damping", "message"),
    [
        (KMeans(3), 35, 0.01, r"must be \(36, 36\) for weights"),
        (KMeans(3, channel_axes=(2,)), 36, 0.01, "last axis only"),
        (KMeans(3, normalization="restore"), 36, 0.01, "normalised one by one"),
        (KMeans(3), 36, 0.0, "damping must be positive"),
    ],
)
def test_bad_arguments_are_refused(layer, quantizer, size, damping, message):
    weights, _ = layer
    with pytest.raises(ValueError, match=message):
        compensated_rounding(weights, jnp.eye(size), quantizer, quantizer.init(weights), damping=damping)


def test_refitted_weights_undo_a_linear_change_of_the_inputs():
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(2000, 6)).astype(np.float32)
    inputs = targets @ (np.eye(6) + 0.2 * rng.normal(size=(6, 6))).astype(np.float32)
    kernel = rng.normal(size=(3, 2, 4)).astype(np.float32)
    second, cross = inputs.T @ inputs / 2000, inputs.T @ targets / 2000
    flat = kernel.reshape(6, 4)
    errors = []
    for damping in (1e-6, 0.2, 1e6):
        refitted = np.asarray(refitted_weights(kernel, second, cross, damping)).reshape(6, 4)
        errors.append(np.linalg.norm(inputs @ refitted - targets @ flat) / np.linalg.norm(targets @ flat))
    assert errors[0] < 1e-3 < errors[1] < 0.5 * errors[2]
    # The closed form, with the whole ridge.
    ridge = 0.2 * np.mean(np.diagonal(second)) * np.eye(6)
    expected = np.linalg.solve(second + ridge, (cross + ridge) @ flat)
    np.testing.assert_allclose(refitted_weights(kernel, second, cross).reshape(6, 4), expected, rtol=1e-4, atol=1e-5)


def test_weights_whose_inputs_have_not_changed_stay():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(5, 6)).astype(np.float32)
    inputs[:, 2] = 0
    kernel = rng.normal(size=(6, 4)).astype(np.float32)
    second = inputs.T @ inputs
    np.testing.assert_array_equal(refitted_weights(kernel, second, second), kernel)
    np.testing.assert_array_equal(refitted_weights(kernel, 0 * second, 0 * second), kernel)


@pytest.mark.parametrize(
    "quantizer",
    [
        KMeans(2),
        KMeans(1),
        KMeans(3, channel_axes=(-1,)),
        KMeans(2, channel_axes=(-1,), share_codebook=True),
        Uniform(2),
        Uniform(3),
        PowerOfTwo(3),
        AdditivePowerOfTwo(3, channel_axes=(-1,)),
    ],
)
def test_the_nearest_in_the_cells_keep_their_codes(quantizer):
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.3, (40, 5)).astype(np.float32)
    state = quantizer.init(weights)
    weights[:2] = [[3], [-3]]
    chosen = quantizer.fake_quantize(weights + rng.normal(0, 0.3, weights.shape).astype(np.float32), state)
    moved = nearest_in_cells(weights, chosen, state)
    np.testing.assert_array_equal(quantizer.fake_quantize(moved, state), chosen)
    assert np.all(np.abs(moved - weights) <= np.abs(chosen - weights) + 1e-6)
    own = np.asarray(quantizer.fake_quantize(weights, state) == chosen)
    inside = np.isclose(moved, weights, rtol=1e-5, atol=1e-7)
    assert 0.6 * own.sum() < (inside & own).sum() and not (inside & ~own).any()
    # The outermost cells are open.
    np.testing.assert_allclose(moved[:2], weights[:2], rtol=1e-6)


@pytest.mark.parametrize("levels", [(-1, -1, 0.5, 1), (-1, 0, 0, 1), (-1, 0, 1, 1), (0, 0, 0, 0)], ids=str)
def test_repeated_levels_share_a_cell(levels):
    codebook = jnp.array(levels, jnp.float32)
    weights = jnp.linspace(-2, 2, 41)
    rounded = project(weights, codebook, jnp.float32(1))
    kept = nearest_in_cells(weights, rounded, QuantizerState(codebook, jnp.float32(1)), margin=0)
    np.testing.assert_allclose(kept, weights, rtol=1e-6)
