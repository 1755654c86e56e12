"""Recalibration of batch-normalisation statistics to the weights they follow."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from qsv.models import Network


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
        New batch statistics.

    Raises:
        ValueError: no batches.
    """
    total, count = jax.tree.map(jnp.zeros_like, batch_stats), 0
    for waveform in waveforms:
        measured = _statistics(network, params, batch_stats, jnp.asarray(waveform))
        total, count = jax.tree.map(jnp.add, total, measured), count + 1
    if not count:
        raise ValueError("batch-normalisation recalibration needs at least one batch")
    return jax.tree.map(lambda leaf: leaf / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(network: Network, params: Any, batch_stats: Any, waveform: jax.Array) -> Any:
    """The statistics of one batch, recovered from the update of zero running statistics."""
    if jnp.issubdtype(waveform.dtype, jnp.integer):
        waveform = waveform.astype(jnp.float32) / 32768
    features, _ = network.frontend(waveform)
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    module = network.module()
    _, updated = module.apply({"params": params, "batch_stats": zeros}, features, train=True, mutable=["batch_stats"])
    # A running statistic r becomes momentum * r + (1 - momentum) * batch statistic; r is zero here.
    return jax.tree.map(lambda leaf: leaf / (1 - 0.9), updated["batch_stats"])
