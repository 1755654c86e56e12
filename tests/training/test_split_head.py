"""A classifier split over devices: the same loss, gradients and training as a whole one, in a share of the memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from qsv.training import Checkpoints, MarginSoftmax, data_mesh, make_train_step, put_batch, put_state

DEVICES = 4


def split_loss(loss, embeddings, kernel, labels, margin):
    """(loss, accuracy) and gradients of both arrays, by four devices."""
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    rows, columns, whole = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()

    def of_part(embeddings, kernel, labels):
        call = jax.value_and_grad(
            lambda *arrays: loss(*arrays, labels, margin, class_axis="data"), argnums=(0, 1), has_aux=True
        )
        return call(embeddings, kernel)

    mapped = jax.shard_map(
        of_part, mesh=mesh, in_specs=(rows, columns, rows), out_specs=((whole, whole), (rows, columns))
    )
    return jax.jit(mapped)(embeddings, loss.padded(kernel), labels)


@pytest.mark.parametrize("speakers", [13, 128, 300])
@pytest.mark.parametrize("options", [{}, {"sub_centers": 3}, {"top_k": 5}, {"top_k": 5, "sub_centers": 2}])
def test_loss_and_gradients_are_those_of_the_whole(speakers, options):
    loss = MarginSoftmax(speakers, **options)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        kernel = loss.init(jax.random.key(0), 6).astype(jnp.float64)
        embeddings = jnp.asarray(rng.normal(size=(8, 6)))
        labels = jnp.asarray(rng.integers(0, speakers, 8))
        # One is nearest to its class, though not in its very direction, where the margin has a pole.
        embeddings = embeddings.at[0].set(kernel[:, labels[0] * loss.sub_centers] + 0.02 * embeddings[0])
        whole = jax.value_and_grad(lambda *arrays: loss(*arrays, labels, 0.2), argnums=(0, 1), has_aux=True)
        (expected, accuracy), gradients = whole(embeddings, kernel)
        (found, same), parts = split_loss(loss, embeddings, kernel, labels, 0.2)
        assert found == pytest.approx(float(expected), rel=1e-12) and same == accuracy >= 1 / 8
        np.testing.assert_allclose(parts[0], gradients[0], atol=1e-11)
        np.testing.assert_allclose(parts[1][:, : kernel.shape[1]], gradients[1], atol=1e-11)
        assert not np.any(parts[1][:, kernel.shape[1] :])


def test_a_hundred_thousand_classes_take_a_quarter_of_the_memory(make_task):
    loss = MarginSoftmax(100_000)
    kernel = loss.init(jax.random.key(0), 16)
    _, state = make_task()
    state = dataclasses.replace(state, head=loss.padded(kernel), opt_state={"moment": {"head": loss.padded(kernel)}})
    placed = put_state(state, data_mesh(jax.devices()[:DEVICES]), split_head=True)
    for leaf in (placed.head, placed.opt_state["moment"]["head"]):
        assert [shard.data.nbytes for shard in leaf.addressable_shards] == [leaf.nbytes // 4] * 4
        assert leaf.nbytes < 1.002 * kernel.nbytes
    embeddings = jax.random.normal(jax.random.key(1), (8, 16))
    labels = jnp.arange(8) * 12_345
    (found, _), _ = split_loss(loss, embeddings, kernel, labels, 0.2)
    assert found == pytest.approx(float(loss(embeddings, kernel, labels, 0.2)[0]), rel=1e-6)


def split(task, state):
    """The same task and state with a split head."""
    objective = dataclasses.replace(task.objective, class_axis="data")
    task = dataclasses.replace(task, objective=objective, split_head=True)
    state = dataclasses.replace(state, head=objective.loss.padded(state.head))
    return task, dataclasses.replace(state, opt_state=task.transformation.init(state.trainable()))


def trained(task, state, loader, steps=3):
    mesh = data_mesh(jax.devices()[:DEVICES])
    step, state = make_train_step(task, mesh), put_state(state, mesh, split_head=task.split_head)
    for _ in range(steps):
        state, metrics = step(state, put_batch(next(loader), mesh))
    return state, float(metrics["train/loss"])


def test_training_is_that_of_a_whole_head(make_task, make_loader, tmp_path):
    task, state = make_task()
    classes = state.head.shape[1]
    whole, expected = trained(task, state, make_loader())
    parts, found = trained(*split(task, state), make_loader())
    assert found == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(parts.head[:, :classes], whole.head, atol=1e-4)
    assert not np.any(parts.head[:, classes:])
    specs = {str(leaf.sharding.spec) for leaf in jax.tree.leaves(parts.opt_state) if leaf.shape == parts.head.shape}
    assert specs == {str(PartitionSpec(None, "data"))}

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(parts, {})
    other = data_mesh(jax.devices()[:2])
    restored, _ = checkpoints.restore(split(task, state)[1], other, split_head=True)
    checkpoints.close()
    np.testing.assert_array_equal(restored.head, parts.head)
    assert len(restored.head.addressable_shards) == 2


def test_a_number_of_devices_that_does_not_divide_is_refused(make_task):
    task, state = make_task()
    with pytest.raises(ValueError, match="divides 128, got 3"):
        make_train_step(split(task, state)[0], data_mesh(jax.devices()[:3]))
