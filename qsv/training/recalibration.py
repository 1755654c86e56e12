"""Recalibration of batch-normalisation statistics to the weights they follow."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from qsv.models import Network
from qsv.models.batch_norm import MOMENTUM
from qsv.training.waveform import float_waveform

# In float32, rounding leaves a constant of 20 running deviations a variance below this share.
_DEAD_SHARE = 1e-4


def recalibrate_batch_stats(network: Network, params: Any, batch_stats: Any, waveforms: Iterable[jax.Array]) -> Any:
    """Running statistics as the plain average of the statistics of some batches.

    Quantized weights shift the activations' distribution; statistics measured with them undo the first two moments
    of that shift. No gradient, no labels.

    Args:
        network: the network.
        params: parameters to measure with, such as `fake_quantize(plan, params, qstate)`.
        batch_stats: a tree with the structure of the result; its values don't matter.
        waveforms: batches [batch, samples], float in [-1, 1] or int16, full rows.

    Returns:
        New batch statistics; `{}` for a network without batch normalisation, whose batches aren't read.

    Raises:
        ValueError: no batches.
    """
    if not jax.tree.leaves(batch_stats):
        return batch_stats
    total, count = jax.tree.map(jnp.zeros_like, batch_stats), 0
    for waveform in waveforms:
        measured = _statistics(network, params, batch_stats, jnp.asarray(waveform))
        total, count = jax.tree.map(jnp.add, total, measured), count + 1
    if not count:
        raise ValueError("batch-normalisation recalibration needs at least one batch")
    return jax.tree.map(lambda leaf: leaf / count, total)


def shifted_batch_stats(
    network: Network, float_params: Any, params: Any, batch_stats: Any, waveforms: Iterable[jax.Array]
) -> Any:
    """Running statistics moved by what quantization changes in those of some batches.

        mean' = mean + m_q - m_f,   var' = var v_q / v_f

    with m, v measured with the quantized and with the float parameters on the same batches. Unlike
    `recalibrate_batch_stats` it keeps what the float network learnt from its own training speech, which the batches
    at hand need not resemble.

    Args:
        network: the network.
        float_params: the parameters that `batch_stats` belong to.
        params: parameters to measure with, such as `fake_quantize(plan, params, qstate)`.
        batch_stats: the float network's running statistics.
        waveforms: batches [batch, samples], float in [-1, 1] or int16, full rows.

    Returns:
        New batch statistics; equal to the given ones where quantization changes nothing.

    Raises:
        ValueError: no batches.
    """
    batches = list(waveforms)
    before = recalibrate_batch_stats(network, float_params, batch_stats, batches)
    after = recalibrate_batch_stats(network, params, batch_stats, batches)

    def moved(path: Any, running: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
        return (shifted_mean if path[-1].key == "mean" else shifted_variance)(running, old, new)

    return jax.tree_util.tree_map_with_path(moved, batch_stats, before, after)


def shifted_mean(running: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """[channels] running means for activations whose mean on some speech was `old` and is `new`."""
    return running + (new - old)


def shifted_variance(running: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """[channels] running variances likewise; a channel that was or is dead on this speech keeps its own.

    Dead is one whose variance is next to none of the running one: what rounding leaves of a constant's. Ratios of
    such would make a constant large, since it is divided by the new deviation, or silence a channel that is alive.
    """
    alive = jnp.minimum(old, new) > _DEAD_SHARE * running
    return jnp.where(alive, running * new / jnp.where(alive, old, 1), running)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(network: Network, params: Any, batch_stats: Any, waveform: jax.Array) -> Any:
    """The statistics of one batch, recovered from the update of zero running statistics."""
    features, _ = network.frontend(float_waveform(waveform))
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    module = network.module()
    _, updated = module.apply({"params": params, "batch_stats": zeros}, features, train=True, mutable=["batch_stats"])
    # A running statistic r becomes momentum * r + (1 - momentum) * batch statistic; r is zero here.
    return jax.tree.map(lambda leaf: leaf / (1 - MOMENTUM), updated["batch_stats"])
