"""Batches in parts, and activations computed anew in place of kept: the same training in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qsv.training import data_mesh, make_train_step, put_batch, put_state

BATCH = 16


def in_float64(state):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
    )


def trained(task, state, loader, *, devices=1, steps=3):
    """The state after some steps, and their losses."""
    mesh = data_mesh(jax.devices()[:devices])
    step, state, losses = make_train_step(task, mesh), put_state(state, mesh, split_head=task.split_head), []
    for _ in range(steps):
        state, metrics = step(state, put_batch(next(loader), mesh))
        losses.append(float(metrics["train/loss"]))
    return jax.device_get(state), losses


def assert_close(first, second, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def double(make_task, **options):
    task, state = make_task(dtype="float64", **options)
    return task, in_float64(state)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_with_frozen_statistics_parts_make_the_whole(make_task, make_loader, devices):
    with jax.enable_x64(True):
        task, state = double(make_task, spec_augment=False)
        task = dataclasses.replace(task, train_statistics=False)
        sizes = {"batch_size": BATCH, "dtype": np.float64}
        whole, losses = trained(task, state, make_loader(**sizes))
        in_parts = dataclasses.replace(task, parts=4)
        parts, same = trained(in_parts, state, make_loader(**sizes), devices=devices)
    np.testing.assert_allclose(same, losses, rtol=1e-9)
    assert_close(parts.params, whole.params)
    assert_close(parts.opt_state, whole.opt_state)
    assert_close(parts.batch_stats, state.batch_stats)


@pytest.mark.parametrize("split", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_are_the_same_on_any_number_of_devices(make_task, make_loader, split):
    """With masks on features, batch statistics and quantized weights; the head whole or split."""
    with jax.enable_x64(True):
        task, state = double(make_task, bits=4)
        task = dataclasses.replace(task, parts=2)
        one, losses = trained(task, state, make_loader(batch_size=BATCH, dtype=np.float64))
        if split:
            objective = dataclasses.replace(task.objective, class_axis="data")
            task = dataclasses.replace(task, objective=objective, split_head=True)
            state = dataclasses.replace(state, head=objective.loss.padded(state.head))
            state = dataclasses.replace(state, opt_state=task.transformation.init(state.trainable()))
        four, same = trained(task, state, make_loader(batch_size=BATCH, dtype=np.float64), devices=4)
    np.testing.assert_allclose(same, losses, rtol=1e-8)
    for name in ("params", "batch_stats", "qstate"):
        assert_close(getattr(four, name), getattr(one, name), 1e-8)


@pytest.mark.slow
def test_statistics_follow_part_after_part(make_task, make_loader):
    """Two parts move running means by momentum twice: what two steps of half the batch without a rate do."""
    with jax.enable_x64(True):
        task, state = double(make_task, spec_augment=False)
        task = dataclasses.replace(task, transformation=optax.sgd(0.0))
        state = dataclasses.replace(state, opt_state=task.transformation.init(state.trainable()))
        batch = next(make_loader(batch_size=BATCH, dtype=np.float64))
        halves = iter([{name: rows[start::2] for name, rows in batch.items()} for start in (0, 1)])
        twice, _ = trained(task, state, halves, steps=2)
        parts, _ = trained(dataclasses.replace(task, parts=2), state, iter([batch]), steps=1)
    assert_close(parts.batch_stats, twice.batch_stats)
    leaves = (jax.tree.leaves(tree.batch_stats) for tree in (parts, state))
    assert min(np.abs(after - before).max() for after, before in zip(*leaves, strict=True)) > 0


@pytest.mark.parametrize("bits", [pytest.param(None, marks=pytest.mark.slow), 4])
def test_what_is_computed_anew_is_the_same(make_task, make_loader, bits):
    with jax.enable_x64(True):
        task, state = double(make_task, bits=bits)
        kept, losses = trained(task, state, make_loader(dtype=np.float64), devices=2)
        anew, same = trained(dataclasses.replace(task, recompute=True), state, make_loader(dtype=np.float64), devices=2)
    np.testing.assert_allclose(same, losses, rtol=1e-9)
    assert_close(anew.params, kept.params)


def program_bytes(task, state, loader):
    """What a compiled step needs beside its arguments."""
    mesh = data_mesh(jax.devices()[:1])
    step = make_train_step(task, mesh).func
    batch = put_batch(next(loader), mesh)
    return step.lower(None, put_state(state, mesh), batch).compile().memory_analysis().temp_size_in_bytes


def test_parts_take_less_memory(make_task, make_loader):
    task, state = make_task()
    sizes = {"batch_size": 64, "samples": 16000}
    whole = program_bytes(task, state, make_loader(**sizes))
    assert program_bytes(dataclasses.replace(task, parts=8), state, make_loader(**sizes)) < whole / 3


def test_what_does_not_split_is_refused(make_task, make_loader):
    task, state = make_task()
    with pytest.raises(ValueError, match="parts=0"):
        dataclasses.replace(task, parts=0)
    with pytest.raises(ValueError, match="batch of 4 on each device doesn't split into 3 parts"):
        trained(dataclasses.replace(task, parts=3), state, make_loader(batch_size=8), devices=2)
