"""Moments of what a kernel is multiplied with: how much its errors matter, and what it must make up for."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Neighbouring rows are alike: beyond so many for each input of a kernel, only every so-many-th row is used ...
_ROWS_PER_INPUT = 200
# ... of only as many examples as have a few times that many.
_POSITIONS_PER_ROW = 8
_EXAMPLES_AT_ONCE = 32


class LayerMoments(NamedTuple):
    """Moments of the inputs x [n] of a kernel, n the product of its axes but the last, in C order.

    Attributes:
        mean: E[x], [n] float32.
        second: E[x x^T], [n, n] float32.
        target_mean: E[t] of the inputs t that the layer has in the float network, [n] float32.
        cross: E[x t^T], [n, n] float32.
        rows: how many inputs these are means of, float32.
    """

    mean: jax.Array
    second: jax.Array
    target_mean: jax.Array
    cross: jax.Array
    rows: jax.Array


def layer_moments(layer: nn.Conv | nn.Dense | None, inputs: jax.Array, targets: jax.Array) -> LayerMoments | None:
    """The moments of a layer's inputs, over all positions of a convolution.

    Args:
        layer: an unbound layer; None for a plain product with a kernel.
        inputs: [examples, ..., channels], as the layer is called with.
        targets: the same in the float network.

    Returns:
        The moments; None for convolutions with groups, whose inputs differ from group to group.
    """
    if isinstance(layer, nn.Conv) and layer.feature_group_count != 1:
        return None
    positions, size = jax.eval_shape(functools.partial(_rows, layer), inputs).shape
    wanted = _ROWS_PER_INPUT * size
    skipped = max(positions // (_POSITIONS_PER_ROW * wanted), 1)
    # An odd stride visits every frequency and frame of the even shapes that crops have.
    stride = positions // skipped // wanted | 1
    step = _EXAMPLES_AT_ONCE * skipped
    batches = (slice(start, start + step, skipped) for start in range(0, len(inputs), step))
    return _mean(_sums(layer, stride, inputs[some], targets[some]) for some in batches)


def _mean(sums: Iterable[LayerMoments]) -> LayerMoments:
    total = functools.reduce(functools.partial(jax.tree.map, jnp.add), sums)
    return jax.tree.map(lambda moment: moment / total.rows, total)._replace(rows=total.rows)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(layer: nn.Conv | nn.Dense | None, stride: int, inputs: jax.Array, targets: jax.Array) -> LayerMoments:
    """Sums, in place of means, over every `stride`-th row of some examples."""
    x, t = (_rows(layer, values)[::stride].astype(jnp.float32) for values in (inputs, targets))
    second, cross = jnp.split(x.T @ jnp.concatenate([x, t], axis=1), 2, axis=1)
    return LayerMoments(jnp.sum(x, axis=0), second, jnp.sum(t, axis=0), cross, jnp.float32(len(x)))


def _rows(layer: nn.Conv | nn.Dense | None, x: jax.Array) -> jax.Array:
    """[positions, n] what the kernel, flattened to [n, outputs], is multiplied with."""
    if not isinstance(layer, nn.Conv):
        return x.reshape(-1, x.shape[-1])
    kernel = tuple(int(size) for size in np.atleast_1d(layer.kernel_size))
    strides, dilations = (_per_axis(value, len(kernel)) for value in (layer.strides, layer.kernel_dilation))
    reach = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    padded = jnp.pad(x, ((0, 0), *_padding(layer.padding, x.shape[1:-1], reach, strides), (0, 0)))
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        windows = [
            slice(index * dilation, size - span + index * dilation + 1, stride)
            for index, dilation, size, span, stride in zip(
                tap, dilations, padded.shape[1:-1], reach, strides, strict=True
            )
        ]
        taps.append(padded[:, *windows])
    rows = jnp.concatenate(taps, axis=-1)
    return rows.reshape(-1, rows.shape[-1])


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    return (1,) * axes if value is None else tuple(int(v) for v in np.broadcast_to(value, (axes,)))


def _padding(
    padding: Any, sizes: tuple[int, ...], reach: tuple[int, ...], strides: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(low, high) for each axis of a convolution, of the forms that `nn.Conv` takes."""
    if isinstance(padding, str):
        return list(lax.padtype_to_pads(sizes, reach, strides, padding))
    pairs = [padding] * len(sizes) if isinstance(padding, int) else padding
    return [(pair, pair) if isinstance(pair, int) else tuple(pair) for pair in pairs]
