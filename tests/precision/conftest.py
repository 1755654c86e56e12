"""A small smooth network, whose dense curvature can be computed."""

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="session")
def smooth_network():
    """Parameters, batches of inputs [4, 8, 5], their labels [4, 8] and outputs [8, 3] of a batch."""
    rng = np.random.default_rng(0)
    shapes = {"first": (5, 8), "second": (8, 6), "third": (6, 3)}
    params = {
        name: {"kernel": jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32), "bias": jnp.zeros(shape[-1])}
        for name, shape in shapes.items()
    }

    def outputs(params, x):
        for name in ("first", "second"):
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return x @ params["third"]["kernel"] + params["third"]["bias"]

    inputs = jnp.asarray(rng.normal(size=(4, 8, 5)), jnp.float32)
    return params, inputs, rng.integers(0, 3, (4, 8)), outputs
