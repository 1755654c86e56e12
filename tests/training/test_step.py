"""The sharded step: device counts agree, one compilation, quantized training learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import Network
from qsv.quant import ActivationQuantizer, AdaptiveBinary, Rule, fake_quantize, resolve
from qsv.training import (
    Optimizer,
    Regression,
    Task,
    TrainState,
    calibrate_activations,
    data_mesh,
    learning_rate_schedule,
    make_refresh,
    make_train_step,
    put_batch,
    put_replicated,
)


def run(task, state, loader, devices, num_steps):
    mesh = data_mesh(jax.devices()[:devices])
    step = make_train_step(task, mesh)
    state = put_replicated(state, mesh)
    losses = []
    for _ in range(num_steps):
        state, metrics = step(state, put_batch(next(loader), mesh))
        losses.append(float(metrics["train/loss"]))
    return state, losses


@pytest.mark.parametrize("bits", [None, 4])
def test_first_step_on_four_devices_equals_one(make_task, make_loader, bits):
    task, state = make_task(bits=bits)
    size = {"batch_size": 16, "samples": 16000}
    one, loss_one = run(task, state, make_loader(**size), 1, 1)
    four, loss_four = run(task, state, make_loader(**size), 4, 1)
    assert loss_four == pytest.approx(loss_one, rel=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_twenty_float64_steps_on_four_devices_equal_one(make_task, make_loader):
    with jax.enable_x64(True):
        task, state = make_task(spec_augment=False, dtype="float64")
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
        )
        one, losses_one = run(task, wide, make_loader(dtype=np.float64), 1, 20)
        four, losses_four = run(task, wide, make_loader(dtype=np.float64), 4, 20)
        np.testing.assert_allclose(losses_four, losses_one, rtol=1e-8)
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_quantized_training_learns_and_compiles_once(make_task, make_loader):
    task, state = make_task(bits=4, num_steps=60, optimizer=Optimizer("adamw"))
    mesh = data_mesh(jax.devices()[:1])
    step, refresh = make_train_step(task, mesh), make_refresh(task.plan, mesh)
    state, loader, losses = put_replicated(state, mesh), make_loader(), []
    first_scale = float(state.qstate["embedding/kernel"].scale)
    for number in range(60):
        state, metrics = step(state, put_batch(next(loader), mesh))
        losses.append(float(metrics["train/loss"]))
        if number % 10 == 9:
            state = refresh(state)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert step.func._cache_size() == 1
    assert float(state.qstate["embedding/kernel"].scale) != first_scale
    quantized = fake_quantize(task.plan, state.params, state.qstate)
    assert len(np.unique(quantized["embedding"]["kernel"])) <= 16


def test_frozen_statistics_stay(make_task, make_loader):
    task, state = make_task()
    before = jax.tree.map(np.asarray, state.batch_stats)
    frozen, _ = run(dataclasses.replace(task, train_statistics=False), state, make_loader(), 1, 2)
    moved, _ = run(task, state, make_loader(), 1, 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), frozen.batch_stats, before))
    assert not np.array_equal(moved.batch_stats["stem"]["norm"]["mean"], before["stem"]["norm"]["mean"])


def test_backward_passes_of_quantizers_are_annealed_over_the_training(make_task, make_loader):
    task, state = make_task(quantizer=AdaptiveBinary(), spec_augment=False)
    mesh, batch = data_mesh(jax.devices()[:1]), next(make_loader())

    def gradient_norm(task, step):
        # The margin rises from step 2 on only.
        started = put_replicated(dataclasses.replace(state, step=jnp.asarray(step, jnp.int32)), mesh)
        return float(make_train_step(task, mesh)(started, put_batch(batch, mesh))[1]["train/gradient_norm"])

    annealed = dataclasses.replace(task, anneal_steps=2)
    assert gradient_norm(annealed, 0) == pytest.approx(gradient_norm(task, 0), rel=1e-5)
    assert gradient_norm(annealed, 1) != pytest.approx(gradient_norm(task, 1), rel=0.05)


def test_bfloat16_computation_trains_float32_parameters(make_task, make_loader):
    task, state = make_task(dtype="bfloat16", optimizer=Optimizer("adamw"))
    wide_task, wide_state = make_task(optimizer=Optimizer("adamw"))
    _, wide = run(wide_task, wide_state, make_loader(), 1, 1)
    state, losses = run(task, state, make_loader(), 1, 1)
    assert losses[0] == pytest.approx(wide[0], rel=0.05) and losses[0] != wide[0]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_masks_differ_between_steps_and_follow_the_seed(make_task, make_loader):
    task, state = make_task()
    mesh = data_mesh(jax.devices()[:1])
    step, batch = make_train_step(task, mesh), put_batch(next(make_loader()), mesh)

    def loss(state):
        return float(step(put_replicated(state, mesh), batch)[1]["train/loss"])

    later = dataclasses.replace(state, step=jnp.int32(1))
    other = dataclasses.replace(state, key=jax.random.key_data(jax.random.key(99)))
    assert loss(state) == loss(state)
    assert len({loss(state), loss(later), loss(other)}) == 3


def test_a_batch_that_does_not_split_is_refused(make_loader):
    with pytest.raises(ValueError, match="batch of 6 .* 4 devices"):
        put_batch(next(make_loader(batch_size=6)), data_mesh(jax.devices()[:4]))


def test_state_is_a_pytree_that_rebuilds(make_task, assert_trees_equal):
    _, state = make_task(bits=3)
    again = state.with_trainable(state.trainable())
    assert isinstance(again, TrainState)
    assert_trees_equal(again, state)


def with_activations(task, state, bits):
    """The task with quantized inputs of all layers, ranges from a batch of noise."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    waveform = 0.2 * jax.random.normal(jax.random.key(5), (4, 3200))
    found = calibrate_activations(task.network, variables, [waveform], ActivationQuantizer(bits), method="min_max")
    task = dataclasses.replace(task, activations=found.quantizer)
    fresh = TrainState.create(
        params=state.params,
        head=state.head,
        batch_stats=state.batch_stats,
        transformation=task.transformation,
        seed=3,
        qstate=state.qstate,
        ranges=found.ranges,
    )
    return task, fresh


@pytest.mark.usefixtures("optimized_programs")
def test_ranges_of_activations_are_learnt_alike_on_any_number_of_devices(make_task, make_loader):
    task, state = with_activations(*make_task(bits=4, optimizer=Optimizer("adamw"), peak=0.01), bits=4)
    before = jax.device_get(state.ranges)
    size = {"batch_size": 16, "samples": 16000}
    one, loss_one = run(task, jax.tree.map(jnp.copy, state), make_loader(**size), 1, 1)
    four, loss_four = run(task, state, make_loader(**size), 4, 1)
    assert loss_four == pytest.approx(loss_one, rel=1e-4)
    moved = 0
    for path, own in four.ranges.items():
        # Adam's first step has the learning rate's length, whatever the gradient.
        moved += float(own.high) != before[path].high
        assert float(own.high) == pytest.approx(float(one.ranges[path].high), abs=1e-5), path
    assert moved > len(before) / 2


def test_dropout_is_the_same_on_any_number_of_devices(make_loader):
    network = dataclasses.replace(Network.of_size("dnsmos"), arguments={"dropout": 0.3})
    params = network.init(jax.random.key(0))["params"]
    learning_rate = learning_rate_schedule("cosine", peak=1e-3, final=1e-4, num_steps=2)
    task = Task(
        network=network,
        objective=Regression(),
        plan=resolve([Rule(".*", None)], params),
        learning_rate=learning_rate,
        transformation=Optimizer("sgd").transformation(learning_rate),
    )
    losses = []
    for devices in (1, 4):
        state = TrainState.create(params=params, head={}, batch_stats={}, transformation=task.transformation, seed=1)
        losses.append(run(task, jax.tree.map(jnp.copy, state), make_loader(batch_size=8, samples=6400), devices, 2)[1])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    still = dataclasses.replace(task, train_statistics=False)
    without = run(still, state, make_loader(batch_size=8, samples=6400), 1, 1)[1]
    assert abs(without[0] - losses[0][0]) > 1e-6
