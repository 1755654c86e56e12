"""Moments of what every kernel is multiplied with: how much its errors matter."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qsv.models import LAYER_INPUTS, Network
from qsv.training.waveform import float_waveform

# Axes of the kernel -> layouts of input, kernel and output.
_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "second"], meta_fields=["bias"])
@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs x [n] of a kernel, n the product of its axes but the last, in C order.

    Attributes:
        mean: E[x], [n] float32.
        second: E[x x^T], [n, n] float32.
        bias: path of the bias that is added to x's product with the kernel; None where there is none.
    """

    mean: jax.Array
    second: jax.Array
    bias: str | None


def input_moments(network: Network, variables: Any, waveforms: Iterable[Any]) -> dict[str, InputMoments]:
    """The moments of the inputs of every kernel, over the frames of some speech.

    An output error of a layer is then tr(E^T H E) for the error E of its kernel [n, outputs] and H the second
    moment: what `qsv.quant.compensated_rounding` makes small. No labels, no gradient.

    Args:
        network: the network. Kernels of convolutions with groups are left out.
        variables: `{"params", "batch_stats"}` to run it with.
        waveforms: batches [batch, samples], float in [-1, 1] or int16, full rows.

    Returns:
        {path of a kernel in `params`: moments}.

    Raises:
        ValueError: no batches.
    """
    total: dict[str, InputMoments] = {}
    count = 0
    for waveform in waveforms:
        measured = _moments(network, variables, jnp.asarray(waveform))
        total = jax.tree.map(jnp.add, total, measured) if total else measured
        count += 1
    if not count:
        raise ValueError("moments of the inputs need at least one batch")
    return jax.tree.map(lambda moment: moment / count, total)


@functools.partial(jax.jit, static_argnums=0)
def _moments(network: Network, variables: Any, waveform: jax.Array) -> dict[str, InputMoments]:
    """The moments of one batch."""
    features, _ = network.frontend(float_waveform(waveform))
    found: dict[str, InputMoments] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Conv | nn.Dense):
            rows = _inputs(layer, args[0])
            if rows is not None:
                path = "/".join(layer.path)
                found[f"{path}/kernel"] = _moments_of(rows, f"{path}/bias" if layer.use_bias else None)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        _, recorded = network.module().apply(variables, features, mutable=[LAYER_INPUTS])
    # Of layers that aren't modules of Flax's own, the models record the inputs themselves.
    for layer, inputs in recorded.get(LAYER_INPUTS, {}).items():
        for name, x in inputs.items():
            found[f"{layer}/{name}/kernel"] = _moments_of(x.reshape(-1, x.shape[-1]), f"{layer}/hidden/bias")
    return found


def _moments_of(rows: jax.Array, bias: str | None) -> InputMoments:
    return InputMoments(jnp.mean(rows, axis=0), rows.T @ rows / len(rows), bias)


def _inputs(layer: nn.Conv | nn.Dense, x: jax.Array) -> jax.Array | None:
    """[positions, n] what the kernel, flattened to [n, outputs], is multiplied with; None for grouped convolutions."""
    channels = x.shape[-1]
    if isinstance(layer, nn.Dense):
        return x.reshape(-1, channels)
    if layer.feature_group_count != 1:
        return None
    kernel = tuple(np.atleast_1d(layer.kernel_size))
    patches = lax.conv_general_dilated_patches(
        x,
        kernel,
        _per_axis(layer.strides, len(kernel)),
        _padding(layer.padding, len(kernel)),
        rhs_dilation=_per_axis(layer.kernel_dilation, len(kernel)),
        dimension_numbers=_LAYOUTS[len(kernel)],
    )
    # JAX lists the taps of each channel; a kernel lists the channels of each tap.
    taps = patches.reshape(-1, channels, math.prod(kernel))
    return taps.swapaxes(1, 2).reshape(len(taps), -1)


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return (1,) * axes if value is None else tuple(int(v) for v in np.broadcast_to(value, (axes,)))


def _padding(padding: Any, axes: int) -> Any:
    if isinstance(padding, str):
        return padding
    pairs = [padding] * axes if isinstance(padding, int) else padding
    return [(pair, pair) if isinstance(pair, int) else tuple(pair) for pair in pairs]
