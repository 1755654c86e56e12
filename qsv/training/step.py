"""The training step: one pure function, jitted over a mesh."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from qsv.frontend import SpecAugment
from qsv.models import Network, quantized_activations, recomputed_blocks
from qsv.quant import (
    ActivationQuantizer,
    Plan,
    QuantizedActivations,
    anneal,
    fake_quantize,
    leaf_paths,
    refresh,
    with_scales,
)
from qsv.training.losses import SPLIT_CLASSES
from qsv.training.objectives import Metrics, Objective, Outputs
from qsv.training.sharding import put_replicated, replicated, state_shardings
from qsv.training.state import TrainState
from qsv.training.waveform import float_waveform

Batch = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_BATCH_AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Task:
    """What a step computes: all of it static, so one task is one compiled step.

    Attributes:
        network: the network and its front end.
        objective: what is minimised.
        plan: quantizers of the parameters; all None in float.
        learning_rate: step -> learning rate (for the metrics; the transformation has its own).
        transformation: of `optax`, over `TrainState.trainable()`.
        spec_augment: masks on the features; None for none.
        dtype: type of the network's computation, "float32" or "bfloat16".
        train_statistics: whether batch normalisation uses and updates batch statistics, and values are dropped out;
            False freezes the ones and keeps the others.
        activations: codes of the inputs of layers that the state has ranges for; None where these are float.
        anneal_steps: steps over which the quantizers' backward passes change (`qsv.quant.anneal`); 0 for never.
        split_head: whether the head's classes are split over the devices, as the objective then has to know.
        parts: pieces of a batch that a device takes one after the other (gradient accumulation): so much less memory
            for activations. Batch normalisation sees one piece at a time, over all devices.
        recompute: whether the backward pass computes anew what is inside of the network's blocks, in place of keeping
            it from the forward pass: less memory for more time.

    Raises:
        ValueError: `parts` is below 1.
    """

    network: Network
    objective: Objective
    plan: Plan
    learning_rate: optax.Schedule
    transformation: optax.GradientTransformation
    spec_augment: SpecAugment | None = None
    dtype: str = "float32"
    train_statistics: bool = True
    activations: ActivationQuantizer | None = None
    anneal_steps: int = 0
    split_head: bool = False
    parts: int = 1
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"a batch has one part or more, got parts={self.parts}")


def make_train_step(task: Task, mesh: Mesh, *, teacher: Any = None) -> TrainStep:
    """The jitted step of a task.

    Args:
        task: what to compute.
        mesh: the devices.
        teacher: `{"params", "batch_stats"}` of the float network, where the objective uses it.

    Returns:
        (state, batch) -> (state, metrics). The batch is `{"waveform": [batch, samples] int16, "label": [batch]}`, split
        along the mesh; the state is where `put_state` puts it and is donated. Batch normalisation, dropout and loss see
        the whole batch (or its part, see `Task`), so the result doesn't depend on the number of devices. Metrics are
        scalars: train/loss, train/gradient_norm, train/learning_rate and those of the objective. A batch that doesn't
        split into the parts is refused by ValueError.

    Raises:
        ValueError: the objective uses a teacher and there is none, or the reverse; a head that so many devices can't
            share.
    """
    if task.objective.uses_teacher != (teacher is not None):
        needed = "a teacher" if task.objective.uses_teacher else "no teacher"
        raise ValueError(f"{type(task.objective).__name__} needs {needed}")
    if task.split_head and SPLIT_CLASSES % mesh.size:
        raise ValueError(f"a head can be split over devices whose number divides {SPLIT_CLASSES}, got {mesh.size}")
    whole: Any = PartitionSpec()
    part: Any = PartitionSpec(_BATCH_AXIS)
    head: Any = PartitionSpec(None, _BATCH_AXIS) if task.split_head else whole
    state_specs = TrainState(
        step=whole, params=whole, head=head, batch_stats=whole, opt_state=whole, qstate=whole, key=whole, ranges=whole
    )
    gradient_specs = {"params": whole, "head": head, "scales": whole, "ranges": whole}

    # Mapped by hand, because auto-sharding would gather the batch for convolutions that walk over it.
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(state_specs, part, whole), out_specs=(whole, gradient_specs))
    def differentiate(state: TrainState, batch: Batch, teacher: Any) -> tuple[Any, Any]:
        if task.parts == 1:
            return _differentiate_part(task, state, state.trainable(), batch, jnp.zeros((), jnp.int32), teacher)
        return _differentiate_parts(task, state, batch, teacher)

    def step(teacher: Any, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        # The optimizer's state has no part in it, and may be split.
        (loss, (metrics, batch_stats)), gradient = differentiate(
            dataclasses.replace(state, opt_state=()), batch, teacher
        )
        trainable = state.trainable()
        updates, opt_state = task.transformation.update(gradient, state.opt_state, trainable)
        moved = state.with_trainable(optax.apply_updates(trainable, updates))
        moved = dataclasses.replace(moved, step=state.step + 1, batch_stats=batch_stats, opt_state=opt_state)
        places = state_shardings(moved, mesh, split_head=task.split_head)
        moved = jax.lax.with_sharding_constraint(moved, places)
        metrics = {
            "train/loss": loss,
            **metrics,
            "train/gradient_norm": _norm(gradient),
            "train/learning_rate": task.learning_rate(state.step),
        }
        return moved, jax.lax.with_sharding_constraint(metrics, replicated(mesh))

    return functools.partial(jax.jit(step, donate_argnums=1), put_replicated(teacher, mesh))


def make_refresh(plan: Plan, mesh: Mesh) -> Callable[[TrainState], TrainState]:
    """The jitted codebook refresh: k-means codebooks follow the weights, fixed ones stay."""

    def refreshed(state: TrainState) -> TrainState:
        return dataclasses.replace(state, qstate=refresh(plan, state.params, state.qstate))

    return jax.jit(refreshed, out_shardings=replicated(mesh), donate_argnums=0)


def _norm(gradient: Any) -> jax.Array:
    """`optax.tree.norm`, by the norms of the leaves: a plain sum of a thousand squares takes XLA minutes to fuse."""
    return jnp.linalg.norm(jnp.stack([jnp.linalg.norm(leaf.reshape(-1)) for leaf in jax.tree.leaves(gradient)]))


def _differentiate_part(
    task: Task, state: TrainState, trainable: dict[str, Any], batch: Batch, number: jax.Array, teacher: Any
) -> tuple[Any, Any]:
    """((loss, (metrics, running statistics)), gradient) of one part of a batch, by number."""
    features = _features(task, state, batch["waveform"], number)
    target = None if teacher is None else _apply(task, teacher, features)[0]
    dropout = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    if task.parts > 1:
        dropout = jax.random.fold_in(dropout, number)

    def objective(trainable: dict[str, Any]) -> tuple[jax.Array, tuple[Metrics, Any]]:
        qstate = with_scales(state.qstate, trainable["scales"])
        if task.anneal_steps:
            qstate = anneal(task.plan, qstate, state.step / task.anneal_steps)
        params = fake_quantize(task.plan, trainable["params"], qstate)
        variables = {"params": params, "batch_stats": state.batch_stats}
        activations = None
        if task.activations is not None:
            activations = QuantizedActivations(task.activations, trainable["ranges"])
        with quantized_activations(activations):
            outputs, batch_stats = _apply(task, variables, features, dropout if task.train_statistics else None)
        means = task.objective(outputs, target, batch["label"], trainable["head"], state.step, _BATCH_AXIS)
        loss, metrics = jax.lax.pmean(means, _BATCH_AXIS)
        return loss, (metrics, batch_stats)

    return jax.value_and_grad(objective, has_aux=True)(trainable)


def _differentiate_parts(task: Task, state: TrainState, batch: Batch, teacher: Any) -> tuple[Any, Any]:
    """The same of a whole batch, part after part: means, and running statistics after the last."""
    # Each device adds up gradients of its own, which are then exchanged once.
    own = {
        name: tree if name == "head" and task.split_head else jax.lax.pcast(tree, _BATCH_AXIS, to="varying")
        for name, tree in state.trainable().items()
    }

    def add(carry: tuple[Any, Any], part: tuple[jax.Array, Batch]) -> tuple[tuple[Any, Any], Any]:
        batch_stats, total = carry
        before = dataclasses.replace(state, batch_stats=batch_stats)
        (loss, (metrics, batch_stats)), gradient = _differentiate_part(task, before, own, part[1], part[0], teacher)
        return (batch_stats, jax.tree.map(jnp.add, total, gradient)), (loss, metrics)

    nothing = jax.tree.map(jnp.zeros_like, own)
    numbered = (jnp.arange(task.parts), jax.tree.map(lambda rows: _in_parts(rows, task.parts), batch))
    (batch_stats, total), outcomes = jax.lax.scan(add, (state.batch_stats, nothing), numbered)
    loss, metrics = jax.tree.map(lambda values: jnp.mean(values, axis=0), outcomes)
    gradient = {
        name: tree if name == "head" and task.split_head else jax.lax.psum(tree, _BATCH_AXIS)
        for name, tree in total.items()
    }
    return (loss, (metrics, batch_stats)), jax.tree.map(lambda sums: sums / task.parts, gradient)


def _in_parts(rows: jax.Array, parts: int) -> jax.Array:
    """[parts, rows / parts, ...] of a device's rows, every so many: the same parts for any number of devices."""
    if len(rows) % parts:
        raise ValueError(f"a batch of {len(rows)} on each device doesn't split into {parts} parts")
    return jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)


def _features(task: Task, state: TrainState, waveform: jax.Array, part: jax.Array) -> jax.Array:
    """Augmented features of one device's part of a batch."""
    features, _ = task.network.frontend(float_waveform(waveform))
    if task.spec_augment is None:
        return features
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    first = (part * jax.lax.axis_size(_BATCH_AXIS) + jax.lax.axis_index(_BATCH_AXIS)) * len(features)
    return task.spec_augment(key, features, first_example=first)


def _apply(task: Task, variables: Any, features: jax.Array, dropout: jax.Array | None = None) -> tuple[Outputs, Any]:
    """The network's outputs, and its running statistics after the batch: as in training where dropout has a key."""
    train = dropout is not None
    dtype = jnp.promote_types(task.dtype, jnp.float64) if features.dtype == jnp.float64 else task.dtype
    module = task.network.module(dtype=jnp.dtype(dtype), batch_axis=_BATCH_AXIS)
    pattern = re.compile(task.objective.features)

    def is_wanted(inner: Any, method: str) -> bool:
        return bool(pattern.pattern) and method == "__call__" and bool(pattern.fullmatch("/".join(inner.path)))

    with recomputed_blocks(task.recompute):
        embeddings, updated = module.apply(
            variables,
            features,
            train=train,
            mutable=["batch_stats"] if train else [],
            rngs=None if dropout is None else {"dropout": dropout},
            capture_intermediates=is_wanted,
        )
    inner = {path: leaf for path, leaf in leaf_paths(updated.get("intermediates", {}))}
    if pattern.pattern and not inner:
        raise ValueError(f"no module of {task.network.name} has a path that matches {pattern.pattern!r}")
    floats = {path: leaf for path, leaf in inner.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    # A network without batch normalisation updates nothing.
    return Outputs(embeddings, floats), updated.get("batch_stats", {}) if train else variables["batch_stats"]
