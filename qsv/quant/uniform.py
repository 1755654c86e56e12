"""Uniform symmetric quantization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qsv.quant.qtensor import QTensor, check_bits
from qsv.quant.quantizer import (
    Normalization,
    QuantizerState,
    check_spec,
    fake_quantize_with,
    init_fixed,
    quantize_with,
)


def uniform_codebook(*, bits: int) -> jax.Array:
    """Levels {0, +-i / (2**(bits-1) - 1)}: equally spaced, symmetric, with a zero.

    Args:
        bits: 2 to 8.

    Returns:
        `[2**bits]` float32 ascending from -1 to 1: `2**bits - 1` distinct levels, the last one repeated.

    Raises:
        ValueError: bits out of range.
    """
    check_bits(bits, minimum=2, of="bits of a uniform codebook")
    largest = 2 ** (bits - 1) - 1
    return jnp.asarray(np.append(np.arange(-largest, largest + 1) / largest, 1.0), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform symmetric weights with a learnable clipping scale.

    Attributes:
        bits: 2 to 8.
        channel_axes: axes with a scale of their own for each index; () is one for the tensor, (-1,) one for each
            output channel of a Flax kernel.
        normalization: "none", "standardize" (before a batch normalisation only) or "restore".
        clip_gradient: whether weights beyond the scale get no gradient.

    Source: Li et al. 2020 (arXiv 1909.13144), uniform case; scale fitted by least squares at the start.
    """

    bits: int
    channel_axes: tuple[int, ...] = ()
    normalization: Normalization = "none"
    clip_gradient: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, minimum=2, of="Uniform bits")
        check_spec(self.channel_axes, self.normalization)

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """The fixed codebook and the scale of least squared error."""
        return init_fixed(weights, uniform_codebook(bits=self.bits), self.channel_axes, self.normalization, importance)

    def fake_quantize(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """Weights on their levels, straight through."""
        return fake_quantize_with(
            weights,
            state,
            channel_axes=self.channel_axes,
            normalization=self.normalization,
            clip_gradient=self.clip_gradient,
        )

    def quantize(self, weights: jax.Array, state: QuantizerState) -> QTensor:
        """Weights as codes."""
        return quantize_with(
            weights, state, bits=self.bits, channel_axes=self.channel_axes, normalization=self.normalization
        )

    def refresh(self, weights: jax.Array, state: QuantizerState) -> QuantizerState:
        """The state as it is: the codebook is fixed and the scale learnt."""
        return state
