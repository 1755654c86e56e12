"""Ranges of a network's activations, from speech."""

import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsv.models import Network, activation_points, at_points
from qsv.quant import ActivationQuantizer, QuantizedActivations, calibrate_range
from qsv.quant.activations import RangeMethod

# Enough for a percentile of 99.99; the smallest and the largest value are always kept.
_VALUES_PER_POINT = 2**18


def calibrate_activations(
    network: Network,
    variables: Any,
    waveforms: Iterable[Any],
    quantizer: ActivationQuantizer,
    *,
    method: RangeMethod = "mse",
    percentile: float = 99.99,
    pattern: str = ".*",
) -> QuantizedActivations:
    """A range for every point at which integer arithmetic of the convolutions and dense layers needs codes.

    Args:
        network: the network.
        variables: its `{"params", "batch_stats"}`, with quantized weights where these will be.
        waveforms: batches [batch, samples], float in [-1, 1]; full rows of any speech.
        quantizer: whose codes will cover the ranges.
        method: as in `calibrate_range`.
        percentile: as there.
        pattern: regular expression over whole paths of the layers; what others read and give stays float.

    Returns:
        One scalar range a point of `qsv.models.activation_points`, inputs first.

    Raises:
        ValueError: no batches, a pattern that fits no layer, or values that aren't finite.
    """
    points, expression = activation_points(network), re.compile(pattern)
    chosen = [path for path in points.inputs if expression.fullmatch(path)]
    if not chosen:
        raise ValueError(f"{pattern!r} fits no layer; there are {list(points.inputs)[:5]} ...")
    inputs = dict.fromkeys(points.inputs[path] for path in chosen)
    wanted = (*inputs, *(points.outputs[path] for path in chosen if path in points.outputs))
    seen: dict[str, list[np.ndarray]] = {point: [] for point in wanted}
    for waveform in waveforms:
        for point, values in _sampled(network, wanted, points.rectified, variables, jnp.asarray(waveform)).items():
            seen[point].append(np.asarray(values))
    if not seen[wanted[0]]:
        raise ValueError("ranges need at least one batch of speech")
    ranges = {
        point: calibrate_range(own, quantizer, method=method, percentile=percentile) for point, own in seen.items()
    }
    return QuantizedActivations(quantizer, ranges)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sampled(
    network: Network, points: tuple[str, ...], rectified: frozenset[str], variables: Any, waveform: jax.Array
) -> dict[str, jax.Array]:
    """Values at every point: some, evenly, with the smallest and the largest."""
    kept: dict[str, jax.Array] = {}

    def keep(point: str, values: jax.Array) -> jax.Array:
        flat = values.astype(jnp.float32).ravel()
        if point in rectified:
            flat = jnp.maximum(flat, 0)
        # An odd stride doesn't pick the same channel always.
        some = flat[:: (-(-flat.size // _VALUES_PER_POINT)) | 1]
        kept[point] = jnp.concatenate([some, jnp.stack([flat.min(), flat.max()])])
        return values

    features, _ = network.frontend(waveform)
    with at_points(points, keep):
        network.module().apply(variables, features)
    return kept
