"""The training step: one pure function, jitted over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from qsv.frontend import SpecAugment
from qsv.models import Network
from qsv.quant import Plan, fake_quantize, refresh, with_scales
from qsv.training.losses import MarginSoftmax
from qsv.training.sharding import along_batch, replicated
from qsv.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_BATCH_AXIS = "data"
_INT16_SCALE = 32768.0


@dataclasses.dataclass(frozen=True)
class Task:
    """What a step computes: all of it static, so one task is one compiled step.

    Attributes:
        network: the network and its front end.
        loss: the margin softmax.
        plan: quantizers of the parameters; all None in float.
        margin: step -> margin in radians.
        learning_rate: step -> learning rate (for the metrics; the transformation has its own).
        transformation: of `optax`, over `TrainState.trainable()`.
        spec_augment: masks on the features; None for none.
        dtype: type of the network's computation, "float32" or "bfloat16".
        train_statistics: whether batch normalisation uses and updates batch statistics; False freezes it.
    """

    network: Network
    loss: MarginSoftmax
    plan: Plan
    margin: optax.Schedule
    learning_rate: optax.Schedule
    transformation: optax.GradientTransformation
    spec_augment: SpecAugment | None = None
    dtype: str = "float32"
    train_statistics: bool = True


def make_train_step(task: Task, mesh: Mesh) -> TrainStep:
    """The jitted step of a task.

    Returns:
        (state, batch) -> (state, metrics). The batch is `{"waveform": [batch, samples] int16, "label": [batch]
        int32}`, split along the mesh; the state is on every device and is donated. Batch normalisation and loss see
        the whole batch, so the result doesn't depend on the number of devices. Metrics are scalars:
        train/loss, train/accuracy_percent, train/gradient_norm, train/learning_rate, train/margin_radians.
    """

    whole, part = PartitionSpec(), PartitionSpec(_BATCH_AXIS)

    # Mapped by hand, because auto-sharding would gather the batch for convolutions that walk over it.
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(whole, part), out_specs=whole)
    def differentiate(state: TrainState, batch: Batch) -> tuple[Any, Any]:
        margin = task.margin(state.step)

        def objective(trainable: dict[str, Any]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            embeddings, batch_stats = _embed(task, state, trainable, batch["waveform"])
            loss, accuracy = task.loss(embeddings, trainable["head"], batch["label"], margin)
            loss, accuracy = jax.lax.pmean((loss, accuracy), _BATCH_AXIS)
            return loss, (accuracy, batch_stats)

        return jax.value_and_grad(objective, has_aux=True)(state.trainable())

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        (loss, (accuracy, batch_stats)), gradient = differentiate(state, batch)
        trainable = state.trainable()
        updates, opt_state = task.transformation.update(gradient, state.opt_state, trainable)
        moved = state.with_trainable(optax.apply_updates(trainable, updates))
        moved = dataclasses.replace(moved, step=state.step + 1, batch_stats=batch_stats, opt_state=opt_state)
        metrics = {
            "train/loss": loss,
            "train/accuracy_percent": 100 * accuracy,
            "train/gradient_norm": optax.tree.norm(gradient),
            "train/learning_rate": task.learning_rate(state.step),
            "train/margin_radians": task.margin(state.step),
        }
        return moved, metrics

    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(everywhere, along_batch(mesh)),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def make_refresh(plan: Plan, mesh: Mesh) -> Callable[[TrainState], TrainState]:
    """The jitted codebook refresh: k-means codebooks follow the weights, fixed ones stay."""

    def refreshed(state: TrainState) -> TrainState:
        return dataclasses.replace(state, qstate=refresh(plan, state.params, state.qstate))

    return jax.jit(refreshed, out_shardings=replicated(mesh), donate_argnums=0)


def _embed(task: Task, state: TrainState, trainable: dict[str, Any], waveform: jax.Array) -> tuple[jax.Array, Any]:
    """Embeddings of a batch with the quantized parameters, and the updated running statistics."""
    # Integer samples take a quarter of the transfer; float ones are kept, in float64 tests too.
    if jnp.issubdtype(waveform.dtype, jnp.integer):
        waveform = waveform.astype(jnp.float32) / _INT16_SCALE
    features, _ = task.network.frontend(waveform)
    if task.spec_augment is not None:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        first = jax.lax.axis_index(_BATCH_AXIS) * len(features)
        features = task.spec_augment(key, features, first_example=first)
    params = fake_quantize(task.plan, trainable["params"], with_scales(state.qstate, trainable["scales"]))
    variables = {"params": params, "batch_stats": state.batch_stats}
    dtype = jnp.promote_types(task.dtype, jnp.float64) if waveform.dtype == jnp.float64 else task.dtype
    module = task.network.module(dtype=jnp.dtype(dtype), batch_axis=_BATCH_AXIS)
    if not task.train_statistics:
        frozen: Any = module.apply(variables, features)
        return frozen, state.batch_stats
    embeddings, updated = module.apply(variables, features, train=True, mutable=["batch_stats"])
    return embeddings, updated["batch_stats"]
