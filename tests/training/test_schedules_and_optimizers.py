"""Schedules at hand-computed steps, and which leaves decay, move and freeze."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qsv.quant import ActivationRange
from qsv.training import Optimizer, learning_rate_schedule, margin_schedule


def test_exponential_schedule():
    schedule = learning_rate_schedule("exponential", peak=0.1, final=0.001, num_steps=100, warmup_steps=10)
    assert float(schedule(50)) == pytest.approx(0.01, rel=1e-5)
    assert float(schedule(100)) == pytest.approx(0.001, rel=1e-5)
    assert float(schedule(0)) == pytest.approx(0.1 * 0.1, rel=1e-5)
    assert float(schedule(1000)) == pytest.approx(0.001, rel=1e-5)


def test_cosine_and_constant_schedules():
    cosine = learning_rate_schedule("cosine", peak=0.1, final=0.02, num_steps=100)
    assert [round(float(cosine(step)), 6) for step in (0, 50, 100)] == [0.1, 0.06, 0.02]
    assert float(learning_rate_schedule("constant", peak=0.1, final=0.1, num_steps=10)(7)) == pytest.approx(0.1)


def test_margin_schedule():
    schedule = margin_schedule(final=0.2, rise_start=10, rise_end=20)
    assert float(schedule(10)) == 0 and float(schedule(0)) == 0
    assert float(schedule(15)) == pytest.approx(0.2 * (1 - 1000**-0.5), rel=1e-5)
    assert float(schedule(20)) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learning_rate_schedule("linear", peak=1.0, final=0.1, num_steps=9), "linear"),
        (lambda: learning_rate_schedule("cosine", peak=0.1, final=1.0, num_steps=9), "final <= peak"),
        (lambda: learning_rate_schedule("cosine", peak=1, final=1, num_steps=9, warmup_steps=10), "warm-up"),
        (lambda: margin_schedule(final=0.2, rise_start=5, rise_end=4), "start <= end"),
        (lambda: Optimizer("lion"), "lion"),
        (lambda: Optimizer(weight_decay=-1.0), "weight_decay"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def trainable():
    return {
        "params": {"conv": {"kernel": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(2)}},
        "head": jnp.ones((2, 3)),
        "scales": {"conv/kernel": jnp.ones(())},
        "ranges": {"conv": ActivationRange(jnp.zeros(()), jnp.ones(()))},
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_kernels_decay_and_scales_wait(name):
    optimizer = Optimizer(name, momentum=0.0, weight_decay=0.5, scale_rate=0.1, scale_start=1)
    transformation = optimizer.transformation(optax.constant_schedule(0.1))
    tree = trainable()
    state = transformation.init(tree)
    zero = jax.tree.map(jnp.zeros_like, tree)
    updates, state = transformation.update(zero, state, tree)
    np.testing.assert_allclose(updates["params"]["conv"]["kernel"], -0.05)
    np.testing.assert_allclose(updates["head"], -0.05)
    assert not np.any(updates["params"]["norm"]["scale"])
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = transformation.update(ones, state, tree)
    # The second step moves the scales; AdamW's bias-corrected step after one zero gradient is below its rate.
    assert -0.011 < float(updates["scales"]["conv/kernel"]) < 0
    assert updates["ranges"]["conv"].high == updates["scales"]["conv/kernel"]
    updates, _ = transformation.update(ones, transformation.init(tree), tree)
    assert float(updates["scales"]["conv/kernel"]) == float(updates["ranges"]["conv"].high) == 0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_factors_scale_the_updates_of_their_parameters_alone(name):
    optimizer, schedule, tree = Optimizer(name, weight_decay=0.1), optax.constant_schedule(0.1), trainable()
    ones = jax.tree.map(jnp.ones_like, tree)
    plain, scaled = (
        transformation.update(ones, transformation.init(tree), tree)[0]
        for transformation in (
            optimizer.transformation(schedule),
            optimizer.transformation(schedule, factors={"conv/kernel": 3.0}),
        )
    )
    kernel = scaled["params"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel, 3 * plain["params"]["conv"]["kernel"], rtol=1e-6)
    scaled["params"]["conv"]["kernel"] = plain["params"]["conv"]["kernel"]
    jax.tree.map(np.testing.assert_array_equal, scaled, plain)


def test_sgd_is_nesterov_with_coupled_decay():
    """Two steps by hand: v = m v + g, update = -lr (g + m v)."""
    transformation = Optimizer(weight_decay=0.1).transformation(optax.constant_schedule(1.0))
    tree = trainable()
    state = transformation.init(tree)
    ones = jax.tree.map(jnp.ones_like, tree)
    first, state = transformation.update(ones, state, tree)
    np.testing.assert_allclose(first["head"], -(1.1 + 0.9 * 1.1), rtol=1e-6)
    second, _ = transformation.update(ones, state, tree)
    np.testing.assert_allclose(second["head"], -(1.1 + 0.9 * (0.9 * 1.1 + 1.1)), rtol=1e-6)


def test_clipping_by_global_norm():
    transformation = Optimizer(momentum=0.0, weight_decay=0.0, clip_norm=1.0).transformation(
        optax.constant_schedule(1.0)
    )
    tree = trainable()
    updates, _ = transformation.update(jax.tree.map(lambda x: 100 * x, tree), transformation.init(tree), tree)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)
