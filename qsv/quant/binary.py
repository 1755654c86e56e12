"""One-bit quantization: a set of two levels for every layer, or one fitted to each."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from qsv.quant.importance import importance_of_each
from qsv.quant.qtensor import QTensor, scaled_levels
from qsv.quant.quantizer import QuantizerState, check_spec, reduced_axes, state_of_levels, weight_statistics
from qsv.quant.straight_through import sum_to_shape

# "ede": the derivative of k tanh(t x). "clipped": 1 within [-1, 1], 0 outside.
Backward = Literal["ede", "clipped"]
BinaryScale = Literal["one", "power_of_two"]

# IR-Net's, as powers of ten, for the first and the last step.
_FIRST_EXPONENT, _LAST_EXPONENT = -1.0, 1.0


def error_decay(progress: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The shape of the backward pass at some point of a training.

        t = 10^(-1 + 2 progress),   k = max(1/t, 1)

    Early on the derivative k t (1 - tanh^2(t x)) is about 1 everywhere, so that every weight learns; at the end it is
    near that of sign(x).

    Args:
        progress: share of the training that is done, 0 to 1.

    Returns:
        t and k, float32.

    Source: IR-Net's error decay estimator, Qin et al. 2020 (arXiv 1909.10788), eq. 9 and 10.
    """
    exponent = _FIRST_EXPONENT + (_LAST_EXPONENT - _FIRST_EXPONENT) * jnp.clip(jnp.asarray(progress, jnp.float32), 0, 1)
    t = 10.0**exponent
    return t, jnp.maximum(1 / t, 1)


def binarize(
    weights: jax.Array,
    levels: jax.Array,
    center: jax.typing.ArrayLike,
    spread: jax.typing.ArrayLike,
    *,
    backward: Backward = "ede",
    t: jax.typing.ArrayLike = 1.0,
    k: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    """The upper level where a weight is not below the centre, else the lower one.

        x = (w - center) / spread,   h = (upper - lower) / 2

        "ede":      dL/dw = g h / spread k t (1 - tanh^2(t x))
        "clipped":  dL/dw = g h / spread [|x| <= 1]
        dL/dupper = sum of g where w >= center,   dL/dlower = sum of g elsewhere

    Args:
        weights: [*shape] float.
        levels: `[2]` lower and upper, or `[..., 2]` whose leading axes broadcast against `shape`.
        center: scalar or broadcasting against `shape`; gets no gradient.
        spread: positive, like `center`.
        backward: the derivative that stands in for that of a step.
        t: steepness of "ede"; may be traced.
        k: height of "ede" times 1/t.

    Returns:
        [*shape] in the dtype of the weights; values are the levels, bit for bit.

    Source: IR-Net (arXiv 1909.10788), eq. 9 to 11. There centre and spread are functions of the weights, with
    gradients of their own; here they are constants.
    """
    _check_backward(backward)
    constants = [jnp.asarray(value, levels.dtype) for value in (center, spread, t, k)]
    return _binarize(backward, weights, levels, *constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _binarize(
    backward: Backward,
    weights: jax.Array,
    levels: jax.Array,
    center: jax.Array,
    spread: jax.Array,
    t: jax.Array,
    k: jax.Array,
) -> jax.Array:
    upper = weights.astype(levels.dtype) >= center
    return jnp.where(upper, levels[..., 1], levels[..., 0]).astype(weights.dtype)


def _binarize_forward(
    backward: Backward, weights: jax.Array, levels: jax.Array, *constants: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _binarize(backward, weights, levels, *constants), (weights, levels, *constants)


def _binarize_backward(
    backward: Backward, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    weights, levels, center, spread, t, k = residuals
    wide = cotangent.astype(levels.dtype)
    x = (weights.astype(levels.dtype) - center) / spread
    # 1 - tanh^2 without its cancellation where tanh is nearly 1.
    slope = k * t / jnp.square(jnp.cosh(t * x)) if backward == "ede" else jnp.abs(x) <= 1
    half = (levels[..., 1] - levels[..., 0]) / 2
    upper = x >= 0
    toward_levels = [sum_to_shape(jnp.where(upper == is_upper, wide, 0), half.shape) for is_upper in (False, True)]
    return (
        (wide * slope * half / spread).astype(weights.dtype),
        jnp.stack(toward_levels, axis=-1),
        *(jnp.zeros_like(constant) for constant in (center, spread, t, k)),
    )


_binarize.defvjp(_binarize_forward, _binarize_backward)


@dataclasses.dataclass(frozen=True)
class StaticBinary:
    """Binary weights from {-s, +s}, one set for every layer but for a power of two.

    The sign is that of the weight minus the mean (balanced), and the backward pass sees it over the standard deviation
    (standardized), both of the tensor's or channel's present weights.

    Attributes:
        scale: "power_of_two" is 2^round(log2 mean|w - mean|), so that the layer's output keeps its magnitude;
            "one" leaves that to a batch normalisation behind the layer, whose statistics must be taken anew.
        balanced: whether to subtract the mean; without, the sign is the weight's own.
        backward: "ede", annealed by `anneal`, or "clipped".
        channel_axes: axes with a mean and a scale of their own for each index; () is one for the tensor.

    Source: Liu et al. 2024 (arXiv 2406.05359); IR-Net, Qin et al. 2020 (arXiv 1909.10788), which takes its power of two
    from the standardized weights, where it nearly always is 1.
    """

    scale: BinaryScale = "power_of_two"
    balanced: bool = True
    backward: Backward = "ede"
    channel_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_spec(self.channel_axes, "none")
        if self.scale not in ("one", "power_of_two"):
            raise ValueError(f"scale must be 'one' or 'power_of_two', got {self.scale!r}")
        _check_backward(self.backward)

    @property
    def bits(self) -> int:
        """One."""
        return 1

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """{-1, +1} and the scale, which depends on no importance."""
        center, spread = self._statistics(weights)
        codebook = jnp.array([-1, 1], spread.dtype)
        if self.scale == "one":
            return QuantizerState(codebook, jnp.ones_like(spread), _surrogate(self.backward))
        axes = reduced_axes(weights.ndim, self.channel_axes)
        distance = jnp.abs(weights.astype(spread.dtype) - center)
        mean = jnp.mean(distance, axis=axes, keepdims=bool(self.channel_axes)) if weights.size else spread
        smallest = jnp.finfo(spread.dtype).tiny
        # exp2 isn't exact on every backend, and this must be a power of two.
        scale = jnp.ldexp(jnp.ones_like(mean), jnp.round(jnp.log2(jnp.maximum(mean, smallest))).astype(jnp.int32))
        return QuantizerState(codebook, scale, _surrogate(self.backward))

    def fake_quantize(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """Weights on their level; the scale gets no gradient."""
        center, spread = self._statistics(weights)
        levels = jax.lax.stop_gradient(_levels(state))
        return _with_surrogate(weights, levels, center, spread, self.backward, state)

    def quantize(self, weights: jax.Array, state: QuantizerState) -> QTensor:
        """Weights as codes."""
        center, _ = self._statistics(weights)
        return _coded(weights, center, state)

    def refresh(self, weights: jax.Array, state: QuantizerState) -> QuantizerState:
        """The scale of weights that have moved."""
        return dataclasses.replace(state, scale=self.init(weights).scale)

    def anneal(self, state: QuantizerState, progress: jax.typing.ArrayLike) -> QuantizerState:
        """The state at a share of the training, which shapes the backward pass."""
        return _annealed(state, progress)

    def _statistics(self, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        center, spread = weight_statistics(weights, self.channel_axes)
        return (center if self.balanced else jnp.zeros_like(center)), spread


@dataclasses.dataclass(frozen=True)
class AdaptiveBinary:
    """Binary weights from {b1, b2}, fitted to each layer.

        b1, b2 = mean(w) -+ std(w)

    Attributes:
        backward: "ede", annealed by `anneal`, or "clipped"; x is the distance from the middle of the levels over half
            of theirs, so that the gradient is k t (1 - tanh^2(t x)) of what comes in. (Where all weights are equal
            there is one level, and no gradient.)
        channel_axes: axes with levels of their own for each index; () is one pair for the tensor, as in the paper.
        refresh_rate: weight of the new levels in a refresh, in (0, 1].

    The levels' scale is learnable like that of all quantizers. (Levels of least squared error are nearer to each other,
    by 0.8 for a Gaussian; `KMeans(1)` has those.)

    Source: Liu et al. 2024 (arXiv 2406.05359); AdaBin, Tu et al. 2022 (arXiv 2208.08084), eq. 6 to 8, which fits the
    levels anew in every step.
    """

    backward: Backward = "ede"
    channel_axes: tuple[int, ...] = ()
    refresh_rate: float = 1.0

    def __post_init__(self) -> None:
        check_spec(self.channel_axes, "none")
        _check_backward(self.backward)
        if not 0 < self.refresh_rate <= 1:
            raise ValueError(f"refresh_rate must be in (0, 1], got {self.refresh_rate}")

    @property
    def bits(self) -> int:
        """One."""
        return 1

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """Levels around the mean, both weighted by the importance."""
        state = state_of_levels(_fitted_levels(weights, self.channel_axes, importance))
        return dataclasses.replace(state, surrogate=_surrogate(self.backward))

    def fake_quantize(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """Weights on the nearer level."""
        levels = _levels(state)
        center, half = _middle_and_half(levels)
        return _with_surrogate(weights, levels, center, jnp.where(half > 0, half, 1), self.backward, state)

    def quantize(self, weights: jax.Array, state: QuantizerState) -> QTensor:
        """Weights as codes."""
        center, _ = _middle_and_half(_levels(state))
        return _coded(weights, center, state)

    def refresh(self, weights: jax.Array, state: QuantizerState) -> QuantizerState:
        """Levels of weights that have moved."""
        present = _levels(state)
        fitted = _fitted_levels(weights, self.channel_axes, None)
        moved = state_of_levels(present + self.refresh_rate * (fitted - present))
        return dataclasses.replace(moved, surrogate=state.surrogate)

    def anneal(self, state: QuantizerState, progress: jax.typing.ArrayLike) -> QuantizerState:
        """The state at a share of the training, which shapes the backward pass."""
        return _annealed(state, progress)


def _check_backward(backward: str) -> None:
    if backward not in ("ede", "clipped"):
        raise ValueError(f"backward must be 'ede' or 'clipped', got {backward!r}")


def _surrogate(backward: Backward) -> tuple[jax.Array, ...]:
    """t and k of a training's first step."""
    return error_decay(0.0) if backward == "ede" else ()


def _annealed(state: QuantizerState, progress: jax.typing.ArrayLike) -> QuantizerState:
    return dataclasses.replace(state, surrogate=error_decay(progress)) if state.surrogate else state


def _with_surrogate(
    weights: jax.Array,
    levels: jax.Array,
    center: jax.Array,
    spread: jax.Array,
    backward: Backward,
    state: QuantizerState,
) -> jax.Array:
    t, k = state.surrogate or (1.0, 1.0)
    return binarize(weights, levels, center, jax.lax.stop_gradient(spread), backward=backward, t=t, k=k)


def _coded(weights: jax.Array, center: jax.Array, state: QuantizerState) -> QTensor:
    codes = (weights.astype(center.dtype) >= center).astype(jnp.uint8)
    return QTensor(codes, state.codebook, state.scale, 1, tuple(weights.shape), jnp.dtype(weights.dtype).name)


def _levels(state: QuantizerState) -> jax.Array:
    """[..., 2]; the same bits compiled and not, since nothing can be fused with the product."""
    return jax.lax.optimization_barrier(scaled_levels(state.codebook, state.scale))


def _middle_and_half(levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Without a gradient."""
    lower, upper = (jax.lax.stop_gradient(levels[..., index]) for index in (0, 1))
    return (lower + upper) / 2, (upper - lower) / 2


def _fitted_levels(weights: jax.Array, channel_axes: tuple[int, ...], importance: jax.Array | None) -> jax.Array:
    """[..., 2] mean -+ deviation."""
    wide = jax.lax.stop_gradient(weights).astype(jnp.promote_types(weights.dtype, jnp.float32))
    axes = reduced_axes(wide.ndim, channel_axes)
    masses = jnp.ones_like(wide) if importance is None else importance_of_each(importance, wide)

    def average(values: jax.Array) -> jax.Array:
        total = jnp.sum(masses, axis=axes, keepdims=bool(channel_axes))
        weighted = jnp.sum(masses * values, axis=axes, keepdims=bool(channel_axes))
        plain = jnp.mean(values, axis=axes, keepdims=bool(channel_axes)) if values.size else jnp.zeros_like(total)
        return jnp.where(total > 0, weighted / jnp.where(total > 0, total, 1), plain)

    mean = average(wide)
    deviation = jnp.sqrt(average(jnp.square(wide - mean)))
    return jnp.stack([mean - deviation, mean + deviation], axis=-1)
