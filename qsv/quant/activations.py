"""Quantization of what layers compute: 8-bit ranges, learnt or calibrated, and binary activation maps."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from qsv.quant.qtensor import check_bits
from qsv.quant.straight_through import sum_to_shape

RangeMethod = Literal["min_max", "percentile", "mse"]

# The narrowest range, in place of an empty one: of a layer whose input is always zero.
_SMALLEST_STEP = 1e-12
_HISTOGRAM_BINS = 2048
# Shares of the whole range that the search for the least squared error tries.
_SHRINKAGES = np.linspace(1.0, 0.1, 91)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["low", "high"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ActivationRange:
    """The range that the codes of an activation cover; both ends can be learnt.

    Attributes:
        low: float32, a scalar or with the activation's axes (size one where shared).
        high: like `low`; above it.
    """

    low: jax.Array
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class ActivationQuantizer:
    """Integer codes of evenly spaced levels, zero among them.

        affine:     s = (high - low) / n,           z = round(-low / s),   n = 2^bits - 1
                    code = clip(round(x / s) + z, 0, n)
        symmetric:  s = max(|low|, |high|) / n,     z = 0,                 n = 2^(bits-1) - 1
                    code = clip(round(x / s), -n, n)
        x_q = s (code - z)

    Attributes:
        bits: 2 to 8.
        symmetric: signed codes around zero; else unsigned ones, whose zero point is where zero falls. Affine codes of a
            range that starts at zero, such as after a ReLU, have the zero point 0.

    Source: Jacob et al. 2018 (arXiv 1712.05877), whose zero is exact too.
    """

    bits: int = 8
    symmetric: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits, minimum=2)

    def grid(self, own: ActivationRange) -> tuple[jax.Array, jax.Array]:
        """Scale s and zero point z (whole, float32) of a range; zero is taken into it."""
        low, high = jnp.minimum(own.low, 0.0), jnp.maximum(own.high, 0.0)
        if self.symmetric:
            scale = jnp.maximum(-low, high) / self.highest_code
            scale = jnp.maximum(scale, _SMALLEST_STEP)
            return scale, jnp.zeros_like(scale)
        scale = jnp.maximum((high - low) / self.highest_code, _SMALLEST_STEP)
        return scale, jnp.clip(jnp.round(-low / scale), 0, self.highest_code)

    @property
    def highest_code(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def lowest_code(self) -> int:
        """The smallest code; of symmetric ones the negative of the largest."""
        return -self.highest_code if self.symmetric else 0

    def quantize(self, values: jax.Array, own: ActivationRange) -> jax.Array:
        """Codes of values: int8 where symmetric, else uint8, of their shape."""
        scale, zero_point = self.grid(own)
        codes = jnp.clip(jnp.round(values / scale) + zero_point, self.lowest_code, self.highest_code)
        return codes.astype(jnp.int8 if self.symmetric else jnp.uint8)

    def dequantize(self, codes: jax.Array, own: ActivationRange) -> jax.Array:
        """Values of codes, float32."""
        scale, zero_point = self.grid(own)
        return (codes.astype(jnp.float32) - zero_point) * scale

    def fake_quantize(self, values: jax.Array, own: ActivationRange) -> jax.Array:
        """Values on their levels, equal to `dequantize(quantize(values))`, with gradients for values and range.

            dx    = g within the range, 0 outside
            dhigh = sum g * [1 above the range, (Q(u) - u) / n within],   u = x / s
            dlow  = sum g * [1 below it, -(Q(u) - u) / n within]

        Where symmetric, sum g * [sign(x) outside, (Q(u) - u) / n within] goes to the end of the larger magnitude,
        negated where that is the low one. An end at zero has no gradient: values of one sign keep all codes for it.

        Args:
            values: [*shape] float.
            own: its range, broadcasting against the values.

        Returns:
            [*shape] in the dtype of the values.

        Source: LSQ+, Bhalgat et al. 2020 (arXiv 2004.09576), for both ends of a range in place of scale and offset.
        """
        return _fake_quantize(self, values, jax.tree.map(lambda end: _varying_like(end, values), own))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["ranges"], meta_fields=["quantizer"])
@dataclasses.dataclass(frozen=True)
class QuantizedActivations:
    """What a network computes in codes; a pytree of the ranges.

    Attributes:
        quantizer: of all of them.
        ranges: {point: range}, a point being the path of a module, for its first input, or that and ":output", for its
            output (`qsv.models.activation_points` finds those of a network); all else stays float.
    """

    quantizer: ActivationQuantizer
    ranges: Mapping[str, ActivationRange]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quantize(spec: ActivationQuantizer, values: jax.Array, own: ActivationRange) -> jax.Array:
    wide = values.astype(jnp.float32)
    return spec.dequantize(spec.quantize(wide, own), own).astype(values.dtype)


def _fake_quantize_forward(
    spec: ActivationQuantizer, values: jax.Array, own: ActivationRange
) -> tuple[jax.Array, tuple[jax.Array, ActivationRange]]:
    return _fake_quantize(spec, values, own), (values, own)


def _fake_quantize_backward(
    spec: ActivationQuantizer, saved: tuple[jax.Array, ActivationRange], gradient: jax.Array
) -> tuple[jax.Array, ActivationRange]:
    values, own = saved
    wide, g = values.astype(jnp.float32), gradient.astype(jnp.float32)
    scale, zero_point = spec.grid(own)
    u = wide / scale
    codes = jnp.round(u) + zero_point
    below, above = codes < spec.lowest_code, codes > spec.highest_code
    inside = ~(below | above)
    residual = jnp.where(inside, jnp.round(u) - u, 0) / spec.highest_code
    if spec.symmetric:
        of_scale = g * jnp.where(inside, residual, jnp.sign(wide))
        larger = own.high >= -own.low
        to_high, to_low = jnp.where(larger, of_scale, 0), jnp.where(larger, 0, -of_scale)
    else:
        to_high = g * jnp.where(above, 1, residual)
        to_low = g * jnp.where(below, 1, -residual)
    # Of the clamp at zero in `grid`: after a ReLU the low end is zero and stays there, whatever rounding adds up to.
    to_low, to_high = jnp.where(own.low < 0, to_low, 0), jnp.where(own.high > 0, to_high, 0)
    ends = ActivationRange(
        sum_to_shape(to_low, own.low.shape).astype(own.low.dtype),
        sum_to_shape(to_high, own.high.shape).astype(own.high.dtype),
    )
    return jnp.where(inside, g, 0).astype(values.dtype), ends


_fake_quantize.defvjp(_fake_quantize_forward, _fake_quantize_backward)


def _varying_like(end: jax.Array, values: jax.Array) -> jax.Array:
    """Inside `jax.shard_map`, where each device has values of its own: so has each the range, and gradients add up."""
    end = jnp.asarray(end)
    missing = jax.typeof(values).manual_axis_type.varying - jax.typeof(end).manual_axis_type.varying
    return jax.lax.pcast(end, tuple(missing), to="varying") if missing else end


def calibrate_range(
    batches: Iterable[ArrayLike],
    quantizer: ActivationQuantizer,
    *,
    method: RangeMethod = "mse",
    percentile: float = 99.99,
    channel_axis: int | None = None,
) -> ActivationRange:
    """A range for activations like those given.

    Args:
        batches: [...] float arrays of what a layer computes; all are held at once.
        quantizer: whose codes will cover it.
        method: "min_max" takes all values in; "percentile" leaves the furthest out, as many at each end; "mse" takes
            the range of least squared error among shrunken ones.
        percentile: share of the values within the range in percent, for "percentile".
        channel_axis: axis with a range of its own for each place ("min_max" only); None for one range.

    Returns:
        The range, with the activation's axes where it is by channel; zero is in it.

    Raises:
        ValueError: no values, NaN or infinity among them, or settings that don't go together.
    """
    if method not in ("min_max", "percentile", "mse"):
        raise ValueError(f"method must be 'min_max', 'percentile' or 'mse', got {method!r}")
    if channel_axis is not None and method != "min_max":
        raise ValueError(f"ranges by channel need method='min_max', got {method!r}")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")
    kept = [np.asarray(batch, np.float32) for batch in batches]
    if not sum(batch.size for batch in kept):
        raise ValueError("a range needs at least one value")
    if not all(np.isfinite(batch).all() for batch in kept):
        raise ValueError("activations must be finite; some are NaN or infinite")
    if channel_axis is not None:
        return _channel_range(kept, channel_axis)
    low = min(0.0, *(float(batch.min()) for batch in kept if batch.size), 0.0)
    high = max(0.0, *(float(batch.max()) for batch in kept if batch.size), 0.0)
    if method != "min_max" and high > low:
        counts, edges = _histogram(kept, low, high)
        low, high = (
            _tails(counts, edges, percentile) if method == "percentile" else _least_error(counts, edges, quantizer)
        )
    return ActivationRange(jnp.float32(low), jnp.float32(high))


def _channel_range(batches: list[np.ndarray], channel_axis: int) -> ActivationRange:
    axis = channel_axis % batches[0].ndim
    others = tuple(other for other in range(batches[0].ndim) if other != axis)
    low = np.minimum(np.min([batch.min(axis=others, keepdims=True) for batch in batches], axis=0), 0)
    high = np.maximum(np.max([batch.max(axis=others, keepdims=True) for batch in batches], axis=0), 0)
    return ActivationRange(jnp.asarray(low), jnp.asarray(high))


def _histogram(batches: list[np.ndarray], low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    counts = sum(np.histogram(batch, _HISTOGRAM_BINS, (low, high))[0] for batch in batches)
    return np.asarray(counts), np.linspace(low, high, _HISTOGRAM_BINS + 1)


def _tails(counts: np.ndarray, edges: np.ndarray, percentile: float) -> tuple[float, float]:
    """The range without the same share of values at each end; an end at zero stays there."""
    shares = np.concatenate([[0.0], np.cumsum(counts) / counts.sum()])
    cut = (1 - percentile / 100) / 2
    low, high = np.interp([cut, 1 - cut], shares, edges)
    return min(float(low), 0.0), max(float(high), 0.0)


def _least_error(counts: np.ndarray, edges: np.ndarray, quantizer: ActivationQuantizer) -> tuple[float, float]:
    """The shrunken range whose codes have the least squared error over a histogram's middles."""
    middles = (edges[:-1] + edges[1:]) / 2
    best, least = (float(edges[0]), float(edges[-1])), math.inf
    for share in _SHRINKAGES:
        low, high = share * edges[0], share * edges[-1]
        if quantizer.symmetric:
            scale, zero_point = max(-low, high) / quantizer.highest_code, 0.0
        else:
            scale = (high - low) / quantizer.highest_code
            zero_point = np.round(-low / scale)
        codes = np.clip(np.round(middles / scale) + zero_point, quantizer.lowest_code, quantizer.highest_code)
        error = float(counts @ np.square((codes - zero_point) * scale - middles))
        if error < least:
            best, least = (float(low), float(high)), error
    return best


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def binary_activation(values: jax.Array, beta: float = 5.0, signed: bool = False) -> jax.Array:
    """A map of one bit a value: 1 where it is positive, else 0.

        dL/dx = g / (beta |x| + 1)^2

    Args:
        values: [*shape] float.
        beta: how narrow the surrogate derivative is; positive.
        signed: -1 in place of 0.

    Returns:
        [*shape] in the dtype of the values.

    Raises:
        ValueError: `beta` isn't positive.

    Source: Nilsson et al. 2024 (arXiv 2407.04578), with the surrogate of SuperSpike, Zenke & Ganguli 2018.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    return jnp.where(values > 0, 1, -1 if signed else 0).astype(values.dtype)


def _binary_forward(values: jax.Array, beta: float, signed: bool) -> tuple[jax.Array, jax.Array]:
    return binary_activation(values, beta, signed), values


def _binary_backward(beta: float, signed: bool, values: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    del signed  # The surrogate is that of a step, whatever its height.
    slope = jnp.square(beta * jnp.abs(values.astype(jnp.float32)) + 1)
    return ((gradient / slope).astype(values.dtype),)


binary_activation.defvjp(_binary_forward, _binary_backward)
