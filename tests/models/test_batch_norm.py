"""Batch normalisation equals Linen's, with shared statistics too."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from qsv.models.batch_norm import BatchNorm, channel_moments


def operands(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal([1.0, -2.0, 0.0], [0.5, 1.0, 3.0], (4, 7, 3)), dtype)
    variables = {
        "params": {"scale": jnp.array([1.5, -0.5, 2.0]), "bias": jnp.array([0.1, 0.2, -3.0])},
        "batch_stats": {"mean": jnp.array([0.9, -1.0, 0.5]), "var": jnp.array([0.3, 2.0, 7.0])},
    }
    return x, variables


def linen(train, **options):
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, **options)


@pytest.mark.parametrize("train", [False, True])
def test_value_gradients_and_statistics_are_linens(train):
    x, variables = operands()
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    def loss(apply, params, x):
        y, updated = apply({**variables, "params": params}, x)
        return jnp.sum(weights * y), updated

    def ours(variables, x):
        return BatchNorm().apply(variables, x, train=train, mutable=["batch_stats"])

    def theirs(variables, x):
        return linen(train).apply(variables, x, mutable=["batch_stats"])

    results = [
        jax.value_and_grad(functools.partial(loss, apply), argnums=(0, 1), has_aux=True)(variables["params"], x)
        for apply in (ours, theirs)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *results)
    moved = results[0][0][1]["batch_stats"]["mean"] != variables["batch_stats"]["mean"]
    assert np.all(moved == train)


def test_without_scale_and_bias_it_has_no_parameters():
    x, _ = operands()
    norm = BatchNorm(use_scale=False, use_bias=False)
    variables = norm.init(jax.random.key(0), x, train=False)
    assert set(variables) == {"batch_stats"}
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(jnp.mean(y, (0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(jnp.var(y, (0, 1)), 1, rtol=1e-4)


def test_moments_by_hand_and_of_concatenated_channels():
    x, _ = operands()
    moments = channel_moments(jnp.array([[1.0, 5.0], [3.0, 5.0]]))
    np.testing.assert_array_equal(moments, [[2.0, 5.0], [1.0, 0.0]])
    parts = [channel_moments(x[..., :1]), channel_moments(x[..., 1:])]
    np.testing.assert_allclose(jnp.concatenate(parts, axis=-1), channel_moments(x), rtol=1e-6)


def test_given_moments_are_used():
    x, variables = operands()
    moments = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    y, updated = BatchNorm().apply(variables, x, train=True, moments=moments, mutable=["batch_stats"])
    stats = {"mean": moments[0], "var": moments[1]}
    expected = linen(False).apply({**variables, "batch_stats": stats}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 * variables["batch_stats"]["var"] + 0.1 * moments[1])


def test_statistics_of_a_split_batch_are_of_the_whole():
    x, variables = operands()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()

    def apply(axis, x):
        return BatchNorm(batch_axis=axis).apply(variables, x, train=True, mutable=["batch_stats"])

    mapped = jax.shard_map(functools.partial(apply, "data"), mesh=mesh, in_specs=split, out_specs=(split, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), mapped(x), apply(None, x))


def test_bfloat16_in_and_out_with_float32_statistics():
    x, variables = operands(jnp.bfloat16)
    y, updated = BatchNorm(jnp.bfloat16).apply(variables, x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    wide, _ = BatchNorm().apply(variables, x.astype(jnp.float32), train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


def test_constant_channel_has_finite_gradients():
    _, variables = operands()
    x = jnp.full((2, 5, 3), 3.3)

    def loss(x):
        return jnp.sum(BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])[0] ** 3)

    assert np.all(np.isfinite(jax.grad(loss)(x)))
