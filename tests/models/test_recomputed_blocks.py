"""Blocks computed anew in the backward pass: the same gradients from less that is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import Network, recomputed_blocks

SMALL = [
    ("resnet10", {"width": 4}),
    ("ecapa", {"channels": 32}),
    ("ge2e", {"hidden_size": 8}),
    pytest.param("df_resnet56", {"width": 4}, marks=pytest.mark.slow),
    pytest.param("resnet36", {"width": 4}, marks=pytest.mark.slow),
    pytest.param("eres2netv2", {"width": 8}, marks=pytest.mark.slow),
    pytest.param("campplus", {}, marks=pytest.mark.slow),
]


def backward(name, arguments, recomputed):
    """(gradient, updated statistics, bytes kept for the backward pass) of a small batch."""
    network = Network(name, arguments, Network.of_size(name).frontend)
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), network.init(jax.random.key(0)))
    features = jax.random.normal(jax.random.key(1), (4, 60, network.frontend.num_features))

    def loss(params):
        with recomputed_blocks(recomputed):
            outputs, updated = network.module(dtype=jnp.float64).apply(
                {**variables, "params": params},
                features,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(2)},
            )
        return jnp.sum(jnp.square(outputs)), updated

    _, pull_back, updated = jax.vjp(loss, variables["params"], has_aux=True)
    kept = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(pull_back) if isinstance(leaf, jax.Array)}
    return pull_back(jnp.ones(()))[0], updated, sum(kept.values())


@pytest.mark.parametrize(("name", "arguments"), SMALL)
def test_gradients_and_statistics_are_the_same(name, arguments):
    with jax.enable_x64(True):
        kept, statistics, many_bytes = backward(name, arguments, recomputed=False)
        anew, same, few_bytes = backward(name, arguments, recomputed=True)
    for first, second in ((anew, kept), (same, statistics)):
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)
    # GE2E's recurrent layers aren't submodules.
    assert few_bytes <= (1.0 if name == "ge2e" else 0.6) * many_bytes


def test_parameters_may_be_made_inside():
    network = Network("resnet10", {"width": 2, "embedding_size": 8})
    features = jnp.zeros((1, 16, network.frontend.num_features))
    with recomputed_blocks():
        inside = network.module().init(jax.random.key(0), features)
    outside = network.module().init(jax.random.key(0), features)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        np.testing.assert_array_equal(a, b)
