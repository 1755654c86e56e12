"""Variables and training steps that the tests of several networks share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def random_variables():
    """Random weights, scales, biases and running statistics, so that padding that leaks is seen."""

    def make(model, mels=16):
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, mels)))
        rng = np.random.default_rng(7)

        def draw(path, leaf):
            fan_in = np.prod(leaf.shape[:-1])
            if path[-1].key == "kernel":
                return rng.normal(0, np.sqrt(2 / fan_in), leaf.shape).astype(np.float32)
            low, high = (0.8, 1.2) if path[-1].key in ("scale", "var") else (-0.2, 0.2)
            return rng.uniform(low, high, leaf.shape).astype(np.float32)

        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make


@pytest.fixture(scope="session")
def make_training():
    """Loss and batch statistics, and the gradients, of a training step of a network."""

    def make(model):
        def loss(params, batch_stats, features):
            variables = {"params": params, "batch_stats": batch_stats}
            embedding, updated = model.apply(variables, features, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(embedding)), (embedding, updated["batch_stats"])

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return make


@pytest.fixture(scope="session")
def check_padding():
    """Checks that padded frames, whatever is in them, change no embedding; and that they would without a mask."""

    def check(apply, variables, features, *, padding=31):
        frames = features.shape[1]
        alone = apply(variables, features)
        padded = jnp.pad(features, ((0, 0), (0, padding), (0, 0)), constant_values=3.0)
        mask = jnp.broadcast_to(jnp.arange(frames + padding) < frames, padded.shape[:2])
        norms = np.linalg.norm(alone, axis=1, keepdims=True)
        assert np.all(np.abs(apply(variables, padded, mask) - alone) <= 1e-5 * norms)
        leaked = apply(variables, padded, jnp.ones_like(mask))
        assert np.abs(leaked - alone).max() > 1e-3 * norms.max()

    return check
