"""Ranges of what a network's layers are given, from speech."""

import functools
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsv.models import Network, on_layer_inputs
from qsv.models.layer_inputs import OnInput
from qsv.quant import ActivationQuantizer, QuantizedActivations, calibrate_range
from qsv.quant.activations import RangeMethod

# Enough for a percentile of 99.99; the smallest and the largest value are always kept.
_VALUES_PER_LAYER = 2**18


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
    """A range for the input of every convolution and dense layer.

    Args:
        network: the network.
        variables: its `{"params", "batch_stats"}`, with quantized weights where these will be.
        waveforms: batches [batch, samples], float in [-1, 1]; full rows of any speech.
        quantizer: whose codes will cover the ranges.
        method: as in `calibrate_range`.
        percentile: as there.
        pattern: regular expression over whole paths of the layers; others stay float.

    Returns:
        One scalar range a layer, in the order of computation.

    Raises:
        ValueError: no batches, a pattern that fits no layer, or values that aren't finite.
    """
    expression = re.compile(pattern)
    seen: dict[str, list[np.ndarray]] = {}
    count = 0
    for waveform in waveforms:
        count += 1
        for path, values in _sampled_inputs(network, variables, jnp.asarray(waveform)).items():
            seen.setdefault(path, []).append(np.asarray(values))
    if not count:
        raise ValueError("ranges need at least one batch of speech")
    order = _layer_order(network, variables, jnp.asarray(waveform))
    chosen = [path for path in order if expression.fullmatch(path)]
    if not chosen:
        raise ValueError(f"{pattern!r} fits no layer; there are {order[:5]} ...")
    ranges = {path: calibrate_range(seen[path], quantizer, method=method, percentile=percentile) for path in chosen}
    return QuantizedActivations(quantizer, ranges)


@functools.partial(jax.jit, static_argnums=0)
def _sampled_inputs(network: Network, variables: Any, waveform: jax.Array) -> dict[str, jax.Array]:
    """Values of every layer's input: some, evenly, with the smallest and the largest."""
    kept: dict[str, jax.Array] = {}

    def keep(path: str, values: jax.Array) -> jax.Array:
        flat = values.astype(jnp.float32).ravel()
        # An odd stride doesn't pick the same channel always.
        some = flat[:: (-(-flat.size // _VALUES_PER_LAYER)) | 1]
        kept[path] = jnp.concatenate([some, jnp.stack([flat.min(), flat.max()])])
        return values

    _apply(network, variables, waveform, keep)
    return kept


def _layer_order(network: Network, variables: Any, waveform: jax.Array) -> list[str]:
    paths: list[str] = []

    def note(path: str, values: jax.Array) -> jax.Array:
        paths.append(path)
        return values

    jax.eval_shape(lambda: _apply(network, variables, waveform, note))
    return list(dict.fromkeys(paths))


def _apply(network: Network, variables: Any, waveform: jax.Array, on_input: OnInput) -> Any:
    features, _ = network.frontend(waveform)
    with on_layer_inputs(on_input):
        return network.module().apply(variables, features)
