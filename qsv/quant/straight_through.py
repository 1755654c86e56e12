"""Nearest-level assignment, and its straight-through estimator."""

import functools

import jax
import jax.numpy as jnp

from qsv.quant.qtensor import decode, scaled_levels

# Up to so many levels a chain of comparisons, which vectorises, is faster than a binary search.
_MOST_COMPARED_LEVELS = 32


def nearest_codes(values: jax.Array, codebook: jax.Array) -> jax.Array:
    """Index of the level nearest to each value; halfway counts for the upper level.

    Args:
        values: [*shape] float.
        codebook: `[levels]` ascending, at most 256, or `[..., levels]` whose leading axes broadcast against `shape`.

    Returns:
        [*shape] uint8. A repeated last level is never used, and NaN gives code 0. Repeats of another level may be.
    """
    if values.size == 0:
        return jnp.zeros(values.shape, jnp.uint8)
    # Doubling the values instead of halving the sums keeps the smallest power of two from underflowing.
    values, middle = 2 * values, _doubled_middles(codebook)
    if middle.shape[-1] < _MOST_COMPARED_LEVELS:
        codes = jnp.zeros(values.shape, jnp.uint8)
        for index in range(middle.shape[-1]):
            codes = codes + (values >= middle[..., index]).astype(jnp.uint8)
        return codes
    if middle.ndim == 1:
        found = jnp.searchsorted(middle, values, side="right", method="scan_unrolled")
        return jnp.where(jnp.isnan(values), 0, found).astype(jnp.uint8)
    axes = [axis for axis in range(values.ndim) if middle.shape[axis] > 1]
    grouped = jnp.moveaxis(values, axes, range(len(axes)))
    search = functools.partial(jnp.searchsorted, side="right", method="scan_unrolled")
    flat = grouped.reshape(middle[..., 0].size, -1)
    codes = jax.vmap(search)(middle.reshape(-1, middle.shape[-1]), flat).reshape(grouped.shape)
    codes = jnp.where(jnp.isnan(grouped), 0, codes)
    return jnp.moveaxis(codes, range(len(axes)), axes).astype(jnp.uint8)


def project(
    weights: jax.Array,
    codebook: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    clip_gradient: bool = True,
) -> jax.Array:
    """Replace every weight by its nearest level, with the reparameterized clipping function's gradients.

        w_q = scale * Q(u) + offset,   u = (w - offset) / scale

        dL/dw     = g  (with clip_gradient: 0 where u lies outside the codebook)
        dL/dscale = sum g * [Q(u) where u lies outside the codebook, else Q(u) - u]

    The forward value is the level itself, bit for bit. The codebook and the offset get no gradient: they are
    statistics of the weights. Where the codebook is symmetric, Q(u) outside of it is sign(u).

    Args:
        weights: [*shape] float.
        codebook: `[levels]`, or `[..., levels]` whose leading axes broadcast against `shape`; ascending.
        scale: positive; a scalar, or broadcasts against `shape`.
        offset: like `scale`; None is none.
        clip_gradient: whether weights outside the codebook get no gradient.

    Returns:
        [*shape] in the dtype of the weights.

    Source: Li et al. 2020, Additive Powers-of-Two Quantization (arXiv 1909.13144), eq. 6 to 8. They have a
    symmetric codebook only.
    """
    offset = jnp.zeros((), codebook.dtype) if offset is None else offset
    return _project(weights, codebook, scale, offset, clip_gradient)


def shifted_levels(codebook: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """`[..., levels]` scaled levels plus an offset."""
    # Without the barrier a compiler may fuse this to a multiply-add that rounds differently from an eager call.
    levels = jax.lax.optimization_barrier(scaled_levels(codebook, scale))
    return levels + (offset if offset.ndim == 0 else offset[..., None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _project(
    weights: jax.Array, codebook: jax.Array, scale: jax.Array, offset: jax.Array, clip_gradient: bool
) -> jax.Array:
    wide = weights.astype(codebook.dtype)
    codes = nearest_codes((wide - offset) / scale, codebook)
    return _select(codes, shifted_levels(codebook, scale, offset)).astype(weights.dtype)


def _project_forward(
    weights: jax.Array, codebook: jax.Array, scale: jax.Array, offset: jax.Array, clip_gradient: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _project(weights, codebook, scale, offset, clip_gradient), (weights, codebook, scale, offset)


def _project_backward(
    clip_gradient: bool, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    weights, codebook, scale, offset = residuals
    wide = cotangent.astype(codebook.dtype)
    unit = (weights.astype(codebook.dtype) - offset) / scale
    outside = (unit < codebook[..., 0]) | (unit > codebook[..., -1])
    level = _select(nearest_codes(unit, codebook), codebook)
    toward_scale = wide * jnp.where(outside, level, level - unit)
    toward_weights = jnp.where(outside, 0, wide) if clip_gradient else wide
    return (
        toward_weights.astype(weights.dtype),
        jnp.zeros_like(codebook),
        sum_to_shape(toward_scale, scale.shape).astype(scale.dtype),
        jnp.zeros_like(offset),
    )


_project.defvjp(_project_forward, _project_backward)


def _select(codes: jax.Array, levels: jax.Array) -> jax.Array:
    """`decode`, by a chain of selects where that vectorises better than a gather; the same bits."""
    if levels.shape[-1] > _MOST_COMPARED_LEVELS:
        return decode(codes, levels)
    values = jnp.broadcast_to(levels[..., 0], codes.shape)
    for index in range(1, levels.shape[-1]):
        values = jnp.where(codes >= index, levels[..., index], values)
    return values


def _doubled_middles(codebook: jax.Array) -> jax.Array:
    """[..., levels - 1] twice the thresholds between neighbouring levels, ascending; infinite from the top level on."""
    lower, upper = codebook[..., :-1], codebook[..., 1:]
    return jnp.where(lower < codebook[..., -1:], lower + upper, jnp.inf)


def sum_to_shape(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sum over the axes along which an array of `shape` was broadcast."""
    if not shape:
        return jnp.sum(array)
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and array.shape[axis] != 1)
    return jnp.sum(array, axis=axes, keepdims=True)
