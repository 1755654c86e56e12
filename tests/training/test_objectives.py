"""Classification and distillation: hand-worked values, and training a quantized network against its float self."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.training import (
    Classification,
    Distillation,
    MarginSoftmax,
    Optimizer,
    Outputs,
    Regression,
    data_mesh,
    make_train_step,
    margin_schedule,
    put_batch,
    put_replicated,
)

STUDENT = Outputs(jnp.array([[1.0, 0.0], [0.0, 2.0]]), {"a": jnp.array([1.0, 3.0]), "b": jnp.array([[0.0]])})
TEACHER = Outputs(jnp.array([[1.0, 1.0], [0.0, 1.0]]), {"a": jnp.array([1.0, 1.0]), "b": jnp.array([[2.0]])})
COSINE = (np.sqrt(0.5) + 1) / 2


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        (Distillation(), 1 - COSINE),
        # Squared errors 0, 1, 0, 1 against the energies 1, 1, 0, 1.
        (Distillation(cosine_weight=0.0, mse_weight=3.0), 3 * 2 / 3),
        # Relative errors 4 / 2 of a and 4 / 4 of b.
        (Distillation(cosine_weight=0.0, feature_weight=0.5, features="[ab]"), 0.5 * (2 + 1) / 2),
        (Distillation(2.0, 3.0, 0.5, ".*"), 2 * (1 - COSINE) + 2 + 0.75),
    ],
)
def test_distillation_by_hand(objective, loss):
    measured, metrics = objective(STUDENT, TEACHER, jnp.zeros(2, int), {}, jnp.int32(0))
    assert float(measured) == pytest.approx(loss, rel=1e-6)
    assert float(metrics["train/cosine"]) == pytest.approx(COSINE, rel=1e-6)


def test_classification_takes_the_margin_of_its_step():
    loss = MarginSoftmax(2, scale=4.0)
    objective = Classification(loss, margin_schedule(final=0.3, rise_start=0, rise_end=10))
    for step in (0, 10):
        measured, metrics = objective(STUDENT, None, jnp.array([0, 1]), jnp.eye(2), jnp.int32(step))
        margin = metrics["train/margin_radians"]
        expected, _ = loss(STUDENT.embeddings, jnp.eye(2), jnp.array([0, 1]), margin)
        assert float(measured) == pytest.approx(float(expected), rel=1e-6)
    assert float(margin) == pytest.approx(0.3)


def test_regression_by_hand():
    loss, metrics = Regression()(Outputs(jnp.array([[1.0], [4.0]])), None, jnp.array([2.0, 1.0]), {}, jnp.int32(0))
    assert float(loss) == 5.0 and float(metrics["train/absolute_error"]) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cosine_weight": 0.0}, "all zero"),
        ({"mse_weight": -1.0}, "negative"),
        ({"feature_weight": 1.0}, "both a weight and a pattern"),
        ({"features": ".*"}, "both a weight and a pattern"),
    ],
)
def test_bad_weights_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)


@pytest.fixture
def distilled(make_task):
    """(objective, bits) -> task, state and teacher of a label-free training; statistics are frozen."""

    def make(objective, *, bits=2, **options):
        task, state = make_task(bits=bits, optimizer=Optimizer("adamw", weight_decay=0.0), peak=0.01, **options)
        task = dataclasses.replace(task, objective=objective, train_statistics=False)
        # The very arrays of the state, which each step donates.
        teacher = state.variables
        return task, dataclasses.replace(state, head={}, opt_state=_opt_state(task, state)), teacher

    return make


def _opt_state(task, state):
    return task.transformation.init(dataclasses.replace(state, head={}).trainable())


def losses_of(task, state, teacher, loader, *, devices=1, num_steps=1):
    mesh = data_mesh(jax.devices()[:devices])
    step, state, losses = make_train_step(task, mesh, teacher=teacher), put_replicated(state, mesh), []
    for _ in range(num_steps):
        state, metrics = step(state, put_batch(next(loader), mesh))
        losses.append({name: float(value) for name, value in metrics.items()})
    return state, losses


def test_a_network_agrees_with_itself(distilled, make_loader):
    task, state, teacher = distilled(Distillation(1.0, 1.0, 1.0, "stage[1-4]_block1"), bits=None)
    _, losses = losses_of(task, state, teacher, make_loader())
    assert losses[0]["train/loss"] == pytest.approx(0, abs=1e-6)
    assert losses[0]["train/cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "objective", [Distillation(), Distillation(1.0, 1.0, 1.0, "stage[1-4]_block1")], ids=["cosine", "all"]
)
def test_distillation_without_labels_approaches_the_teacher(distilled, make_loader, objective):
    task, state, teacher = distilled(objective, num_steps=60)
    before = jax.tree.map(np.asarray, teacher)
    state, losses = losses_of(task, state, teacher, make_loader(), num_steps=60)
    values = [loss["train/loss"] for loss in losses]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), teacher, before))
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), state.batch_stats, teacher["batch_stats"])
    )


def test_distillation_on_four_devices_equals_one(distilled, make_loader):
    with jax.enable_x64(True):
        task, state, _ = distilled(Distillation(1.0, 1.0, 1.0, "stage[1-4]_block1"), dtype="float64")
        wide = jax.tree.map(
            lambda leaf: leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, state
        )
        one, losses_one = losses_of(task, wide, wide.variables, make_loader(dtype=np.float64), num_steps=2)
        four, losses_four = losses_of(task, wide, wide.variables, make_loader(dtype=np.float64), devices=4, num_steps=2)
        for of_one, of_four in zip(losses_one, losses_four, strict=True):
            assert of_four == pytest.approx(of_one, rel=1e-8)
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8)


def test_teacher_and_objective_must_go_together(make_task, distilled):
    task, _ = make_task()
    with pytest.raises(ValueError, match="Classification needs no teacher"):
        make_train_step(task, data_mesh(), teacher={})
    with pytest.raises(ValueError, match="Distillation needs a teacher"):
        make_train_step(distilled(Distillation())[0], data_mesh())


def test_a_pattern_of_no_module_is_refused(distilled, make_loader):
    task, state, teacher = distilled(Distillation(feature_weight=1.0, features="layer[0-9]"))
    with pytest.raises(ValueError, match=r"no module of resnet10 has a path that matches 'layer\[0-9\]'"):
        losses_of(task, state, teacher, make_loader())
