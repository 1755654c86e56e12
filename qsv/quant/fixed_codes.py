"""Levels that are trained under codes that stay."""

import dataclasses

import jax
import jax.numpy as jnp

from qsv.quant.qtensor import QTensor
from qsv.quant.quantizer import Quantizer, QuantizerState


@dataclasses.dataclass(frozen=True)
class FixedCodes:
    """A quantizer whose scale is trained while no weight changes its code.

        w_q = scale * Q(u),   dL/dscale = sum g * Q(u),   dL/du = 0

    Its weights u are in units of the scale, `w / scale`: `fixed` and `released` take them there and back. Codes chosen
    together, as by `compensated_weights`, make up for each other's errors; a straight-through step that moves single
    weights across their cells' edges would undo that.

    Attributes:
        quantizer: whose levels they are; without normalization.
    """

    quantizer: Quantizer

    def __post_init__(self) -> None:
        if getattr(self.quantizer, "normalization", "none") != "none" or getattr(self.quantizer, "balanced", False):
            raise ValueError(f"the levels of {self.quantizer} depend on its weights; codes can't be fixed")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.quantizer.bits

    def fixed(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """Weights in units of their scale."""
        return weights / state.scale

    def released(self, units: jax.Array, state: QuantizerState) -> jax.Array:
        """Weights on their levels, for the quantizer itself: with any scale as far from other codes as they can be."""
        return self.fake_quantize(units, state)

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """The state that the quantizer has for weights in their own units."""
        return self.quantizer.init(weights, importance)

    def fake_quantize(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """Levels of weights in units of the scale; differentiable in the scale alone."""
        unit = dataclasses.replace(state, scale=jnp.ones_like(state.scale))
        levels = jax.lax.stop_gradient(self.quantizer.fake_quantize(weights, unit))
        return (levels * state.scale).astype(weights.dtype)

    def quantize(self, weights: jax.Array, state: QuantizerState) -> QTensor:
        """Codes of weights in units of the scale."""
        unit = dataclasses.replace(state, scale=jnp.ones_like(state.scale))
        return dataclasses.replace(self.quantizer.quantize(weights, unit), scale=state.scale)

    def refresh(self, weights: jax.Array, state: QuantizerState) -> QuantizerState:
        """The same state: a codebook that moved would change codes."""
        del weights
        return state
