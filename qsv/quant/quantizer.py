"""What a quantizer is, and the steps that all of them share."""

import dataclasses
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from qsv.quant.importance import importance_of_each
from qsv.quant.qtensor import QTensor
from qsv.quant.straight_through import nearest_codes, project, shifted_levels

# "none": quantize the weights as they are. "standardize": (w - mean) / std, never undone, as APoT trains; only right
# for a layer whose scale and mean a batch normalisation absorbs. "restore": standardized for the assignment,
# and the levels carry std and mean back; right for every layer.
Normalization = Literal["none", "standardize", "restore"]

_MAX_FIT_SAMPLES = 2**16
_SCALE_CANDIDATES = 80


@partial(jax.tree_util.register_dataclass, data_fields=["codebook", "scale", "surrogate"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class QuantizerState:
    """What a quantizer has fitted to one tensor; a pytree.

    Attributes:
        codebook: `[2**bits]` float32 ascending, or `[..., 2**bits]` with the weight's axes; within [-1, 1].
            Fixed by the scheme, or refreshed from the weights.
        scale: float32, positive; a scalar or with the weight's axes. Learnable.
        surrogate: traced scalars that shape a quantizer's backward pass and follow a schedule; most have none.
    """

    codebook: jax.Array
    scale: jax.Array
    surrogate: tuple[jax.Array, ...] = ()


@runtime_checkable
class Quantizer(Protocol):
    """A frozen, hashable specification with pure methods; `w` is one weight tensor of any shape.

    `fake_quantize(w, state)` equals `quantize(w, state).dequantize()` bit for bit.
    """

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """Fit codebook and scale.

        Args:
            weights: [*shape] float.
            importance: what each weight's squared error counts, 0 or more; broadcasts against the weights. None is
                1 for all.
        """
        ...

    def fake_quantize(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """The weights moved to their levels; differentiable in the weights and in `state.scale`."""
        ...

    def quantize(self, weights: jax.Array, state: QuantizerState) -> QTensor:
        """The weights as codes."""
        ...

    def refresh(self, weights: jax.Array, state: QuantizerState) -> QuantizerState:
        """Fit the codebook anew to weights that have moved."""
        ...


def check_spec(channel_axes: tuple[int, ...], normalization: str) -> None:
    """Raise ValueError on options that no tensor could satisfy."""
    if not isinstance(channel_axes, tuple) or not all(isinstance(axis, int) for axis in channel_axes):
        raise ValueError(f"channel_axes must be a tuple of integers such as (-1,), got {channel_axes!r}")
    if normalization not in ("none", "standardize", "restore"):
        raise ValueError(f"normalization must be 'none', 'standardize' or 'restore', got {normalization!r}")


def state_of_levels(levels: jax.Array, scales: jax.typing.ArrayLike = 1) -> QuantizerState:
    """Levels as a codebook in [-1, 1] and its scale times `scales`; levels of zero keep a scale of 1."""
    largest = jnp.max(jnp.abs(levels), axis=-1)
    scale = jnp.where(largest > 0, largest, 1)
    return QuantizerState(levels / scale[..., None], scale * scales)


def init_fixed(
    weights: jax.Array,
    codebook: jax.Array,
    channel_axes: tuple[int, ...],
    normalization: Normalization,
    importance: jax.Array | None,
) -> QuantizerState:
    """A fixed codebook with the scale of least squared error."""
    values = standardized(weights, channel_axes, normalization)
    return QuantizerState(codebook, fit_scale(values, codebook, channel_axes=channel_axes, importance=importance))


def standardized(weights: jax.Array, channel_axes: tuple[int, ...], normalization: Normalization) -> jax.Array:
    """The weights in the unit in which the scale and codebook are fitted."""
    if normalization == "none":
        return weights
    mean, deviation = weight_statistics(weights, channel_axes)
    return (weights.astype(mean.dtype) - mean) / deviation


def fake_quantize_with(
    weights: jax.Array,
    state: QuantizerState,
    *,
    channel_axes: tuple[int, ...],
    normalization: Normalization,
    clip_gradient: bool,
) -> jax.Array:
    """Straight-through projection of the (normalised) weights on the state's levels."""
    values, scale, offset = normalized(weights, state, channel_axes, normalization)
    return project(values, state.codebook, scale, offset, clip_gradient=clip_gradient).astype(weights.dtype)


def quantize_with(
    weights: jax.Array,
    state: QuantizerState,
    *,
    bits: int,
    channel_axes: tuple[int, ...],
    normalization: Normalization,
) -> QTensor:
    """Codes of the (normalised) weights; an offset is folded into the table."""
    values, scale, offset = normalized(weights, state, channel_axes, normalization)
    values = values.astype(state.codebook.dtype)
    codebook = state.codebook
    if offset is None:
        codes = nearest_codes(values / scale, codebook)
    else:
        codes = nearest_codes((values - offset) / scale, codebook)
        codebook, scale = shifted_levels(codebook, scale, offset), jnp.ones((), codebook.dtype)
    return QTensor(codes, codebook, scale, bits, tuple(weights.shape), jnp.dtype(weights.dtype).name)


def normalized(
    weights: jax.Array, state: QuantizerState, channel_axes: tuple[int, ...], normalization: Normalization
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The values to project and the scale and offset of their levels; statistics are detached."""
    if normalization == "none":
        return weights, state.scale, None
    if normalization == "standardize":
        return standardized(weights, channel_axes, normalization), state.scale, None
    mean, deviation = weight_statistics(weights, channel_axes)
    return weights, state.scale * deviation, mean


def weight_statistics(weights: jax.Array, channel_axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and population deviation (1 where it is 0) of each channel or of the tensor, without a gradient."""
    wide = jax.lax.stop_gradient(weights).astype(jnp.promote_types(weights.dtype, jnp.float32))
    if wide.size == 0:
        return jnp.zeros((), wide.dtype), jnp.ones((), wide.dtype)
    axes = reduced_axes(wide.ndim, channel_axes)
    mean = jnp.mean(wide, axis=axes, keepdims=bool(channel_axes))
    deviation = jnp.std(wide, axis=axes, keepdims=bool(channel_axes))
    return mean, jnp.where(deviation > 0, deviation, 1)


def reduced_axes(ndim: int, channel_axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that share one scale: all but the channel axes."""
    if not all(-ndim <= axis < ndim for axis in channel_axes):
        raise ValueError(f"channel_axes {channel_axes} don't fit a weight of {ndim} axes")
    kept = {axis % ndim for axis in channel_axes}
    return tuple(axis for axis in range(ndim) if axis not in kept)


def grouped(weights: jax.Array, channel_axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """[channels, values] float32 or wider, and the shape with which a value a channel broadcasts back."""
    wide = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    shared = reduced_axes(wide.ndim, channel_axes)
    if not channel_axes:
        return wide.reshape(1, -1), ()
    kept = [axis for axis in range(wide.ndim) if axis not in shared]
    shape = tuple(size if axis in kept else 1 for axis, size in enumerate(wide.shape))
    rows = jnp.moveaxis(wide, kept, range(len(kept)))
    count = 1
    for axis in kept:
        count *= wide.shape[axis]
    return rows.reshape(count, wide.size // max(count, 1)), shape


def grouped_like(importance: jax.Array, weights: jax.Array, channel_axes: tuple[int, ...]) -> jax.Array:
    """The importance of every weight, [channels, values] as `grouped` arranges them; even where none matters."""
    rows = grouped(importance_of_each(importance, weights), channel_axes)[0]
    return jnp.where(jnp.any(rows > 0, axis=1, keepdims=True), rows, 1)


def fit_scale(
    weights: jax.Array,
    codebook: jax.Array,
    *,
    channel_axes: tuple[int, ...] = (),
    importance: jax.Array | None = None,
) -> jax.Array:
    """The scale of least squared error for a fixed codebook, by search over fractions of max|w|.

    Args:
        weights: [*shape] float.
        codebook: `[levels]` ascending, largest magnitude 1.
        channel_axes: axes with a scale of their own for each index; () is one for the tensor.
        importance: what each weight's squared error counts; broadcasts against the weights. None is 1 for all.

    Returns:
        A scalar, or the weight's axes with size one where shared; positive (1 where all weights are zero).
        The error is measured on at most 65,536 weights a channel, evenly spaced.
    """
    rows, shape = grouped(weights, channel_axes)
    if rows.size == 0:
        return jnp.ones(shape, rows.dtype)
    largest = jnp.max(jnp.abs(rows), axis=1)
    # An odd stride visits every index of the power-of-two axes that kernels have.
    stride = rows.shape[1] // _MAX_FIT_SAMPLES
    stride = max(stride | 1 if stride else 1, 1)
    sample = rows[:, ::stride]
    masses = 1.0 if importance is None else grouped_like(importance, weights, channel_axes)[:, ::stride]

    def squared_error(scale: jax.Array) -> jax.Array:
        safe = jnp.where(scale > 0, scale, 1)[:, None]
        levels = codebook[nearest_codes(sample / safe, codebook)] * safe
        return jnp.sum(masses * jnp.square(sample - levels), axis=1)

    # The smallest fraction suits a tensor whose largest weight is a far outlier.
    fractions = jnp.geomspace(0.01, 1.0, _SCALE_CANDIDATES, dtype=rows.dtype)
    errors = jax.lax.map(lambda fraction: squared_error(fraction * largest), fractions)
    best = fractions[jnp.argmin(errors, axis=0)] * largest
    return jnp.where(best > 0, best, 1).reshape(shape)
