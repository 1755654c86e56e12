"""Second moments of what every kernel is multiplied with: how much its errors matter."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qsv.models import Network

# Axes of the kernel -> layouts of input, kernel and output.
_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


def input_second_moments(network: Network, variables: Any, waveforms: Iterable[Any]) -> dict[str, jax.Array]:
    """E[x x^T] of the inputs x of every convolution and dense layer, over the frames of some speech.

    An output error of a layer is then tr(E^T H E) for the error E of its kernel [n, outputs]: what
    `qsv.quant.compensated_rounding` makes small. No labels, no gradient.

    Args:
        network: the network; layers that aren't `nn.Conv` or `nn.Dense`, or have groups, are left out.
        variables: `{"params", "batch_stats"}` to run it with.
        waveforms: batches [batch, samples], float in [-1, 1] or int16, full rows.

    Returns:
        {path of a kernel in `params`: [n, n] float32}, n the product of the kernel's axes but the last, in C order.

    Raises:
        ValueError: no batches.
    """
    total: dict[str, jax.Array] = {}
    count = 0
    for waveform in waveforms:
        measured = _moments(network, variables, jnp.asarray(waveform))
        total = {path: total[path] + moment for path, moment in measured.items()} if total else measured
        count += 1
    if not count:
        raise ValueError("second moments of the inputs need at least one batch")
    return {path: moment / count for path, moment in total.items()}


@functools.partial(jax.jit, static_argnums=0)
def _moments(network: Network, variables: Any, waveform: jax.Array) -> dict[str, jax.Array]:
    """The moments of one batch."""
    if jnp.issubdtype(waveform.dtype, jnp.integer):
        waveform = waveform.astype(jnp.float32) / 32768
    features, _ = network.frontend(waveform)
    found: dict[str, jax.Array] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Conv | nn.Dense):
            rows = _inputs(layer, args[0])
            if rows is not None:
                found["/".join((*layer.path, "kernel"))] = rows.T @ rows / len(rows)
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        network.module().apply(variables, features)
    return found


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
