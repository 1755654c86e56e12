"""Moments of the inputs of kernels."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from qsv.models.ge2e import lstm, lstm_sequences
from qsv.training.layer_moments import layer_moments


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(4), (40, 6)),
        (nn.Dense(4), (40, 5, 6)),
        (nn.Conv(4, (3,), padding=((2, 2),), kernel_dilation=2), (40, 8, 6)),
        (nn.Conv(4, (5,), padding="SAME"), (40, 8, 6)),
        (nn.Conv(4, (3, 3), strides=(2, 1), padding=1), (40, 9, 8, 6)),
        (nn.Conv(4, (1, 1), strides=2), (40, 9, 8, 6)),
    ],
)
def test_moments_predict_the_outputs(layer, shape, rng):
    inputs, targets = rng.normal(0.5, 1, (2, *shape)).astype(np.float32)
    variables = layer.init(jax.random.key(0), inputs)
    kernel = np.asarray(variables["params"]["kernel"], np.float64).reshape(-1, 4)
    found, expected = (
        np.asarray(layer.apply(variables, x)).reshape(-1, 4) - variables["params"]["bias"] for x in (inputs, targets)
    )
    moments = layer_moments(layer, inputs, targets)
    np.testing.assert_allclose(moments.mean @ kernel, found.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments.target_mean @ kernel, expected.mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(kernel.T @ moments.second @ kernel, found.T @ found / len(found), rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(kernel.T @ moments.cross @ kernel, found.T @ expected / len(found), rtol=2e-3, atol=1e-3)


def test_many_rows_are_sampled_evenly(rng):
    layer = nn.Dense(2)
    inputs = (rng.normal(size=(50, 200, 3)) + np.arange(50)[:, None, None]).astype(np.float32)
    moments = layer_moments(layer, inputs, inputs)
    np.testing.assert_allclose(moments.mean, inputs.mean(axis=(0, 1)), rtol=0.05)


def test_convolutions_with_groups_have_none(rng):
    layer = nn.Conv(4, (3,), feature_group_count=2)
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    assert layer_moments(layer, x, x) is None


def test_examples_are_averaged_in_batches_of_any_size(rng):
    x = rng.normal(size=(71, 2, 3)).astype(np.float32)
    moments = layer_moments(None, x, x)
    rows = x.reshape(-1, 3)
    assert moments.rows == len(rows)
    np.testing.assert_allclose(moments.second, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.cross, moments.second)


def test_lstm_sequences_end_in_what_the_lstm_gives(rng):
    def layer(size):
        return tuple(rng.normal(0, 0.5, shape).astype(np.float32) for shape in ((size, 24), (6, 24), (24,)))

    layers = [layer(40), layer(6)]
    sequence = rng.normal(size=(7, 3, 40)).astype(np.float32)
    expected = [lstm(sequence[:count], layers[:1]) for count in range(1, 8)]
    first, second = lstm_sequences(sequence, layers)
    np.testing.assert_allclose(first, expected, atol=1e-6)
    np.testing.assert_allclose(second[-1], lstm(sequence, layers), atol=1e-6)
