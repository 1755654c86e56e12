"""Power-of-two quantization: levels that a shift multiplies by."""

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


def power_of_two_codebook(*, bits: int) -> jax.Array:
    """Levels {0, +-2**-i}, i = 0 .. 2**(bits-1) - 2.

    Args:
        bits: 2 to 8. The smallest magnitude is 2**-126 at 8 bits, the last one float32 holds normalized.

    Returns:
        `[2**bits]` float32 ascending from -1 to 1: `2**bits - 1` distinct levels, the last one repeated.

    Raises:
        ValueError: bits out of range.

    Source: Li et al. 2022 (arXiv 2210.17326); Li et al. 2020 (arXiv 1909.13144), eq. 2.
    """
    check_bits(bits, minimum=2, of="bits of a power-of-two codebook")
    return _symmetric(2.0 ** -np.arange(2 ** (bits - 1) - 1))


def additive_power_of_two_codebook(*, bits: int) -> jax.Array:
    """Levels whose magnitudes are sums of powers of two, the largest scaled to 1.

    With B = bits - 1 magnitude bits and n = B // 2, term i of n is one of {0, 2**-(i+1), 2**-(n+i+1),
    2**-(2n+i+1)}. An odd B adds one term of {0, 2**-(2n+1)}, and each last power above moves one further down.

    Args:
        bits: 2 to 8.

    Returns:
        `[2**bits]` float32 ascending from -1 to 1: `2**bits - 1` distinct levels, the last one repeated.

    Raises:
        ValueError: bits out of range.

    Source: Li et al. 2020, Additive Powers-of-Two Quantization (arXiv 1909.13144), eq. 3 with k = 2. The odd counts
    follow the authors' published code (they list 3 and 5 magnitude bits; 1 and 7 are the same rule).
    """
    check_bits(bits, minimum=2, of="bits of an additive power-of-two codebook")
    count, odd = divmod(bits - 1, 2)
    magnitudes = np.zeros(1)
    for term in range(count):
        exponents = np.array([term + 1, count + term + 1, 2 * count + odd + term + 1])
        magnitudes = np.add.outer(magnitudes, np.append(0.0, 2.0**-exponents)).ravel()
    if odd:
        magnitudes = np.add.outer(magnitudes, [0.0, 2.0 ** -(2 * count + 1)]).ravel()
    positive = np.unique(magnitudes)[1:]
    return _symmetric(positive / positive[-1])


def _symmetric(magnitudes: np.ndarray) -> jax.Array:
    """Ascending {-m, 0, m} with the last level repeated."""
    ordered = np.sort(magnitudes)
    return jnp.asarray(np.concatenate([-ordered[::-1], [0.0], ordered, ordered[-1:]]), jnp.float32)


@dataclasses.dataclass(frozen=True)
class PowerOfTwo:
    """Power-of-two weights with a learnable clipping scale.

    Attributes:
        bits: 2 to 8.
        channel_axes: axes with a scale of their own for each index; () is one for the tensor.
        normalization: "none", "standardize" (before a batch normalisation only) or "restore".
        clip_gradient: whether weights beyond the scale get no gradient.

    Source: Li et al. 2022 (arXiv 2210.17326); the gradients of Li et al. 2020 (arXiv 1909.13144).
    """

    bits: int
    channel_axes: tuple[int, ...] = ()
    normalization: Normalization = "none"
    clip_gradient: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, minimum=2, of="PowerOfTwo bits")
        check_spec(self.channel_axes, self.normalization)

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """The fixed codebook and the scale of least squared error."""
        return init_fixed(
            weights, power_of_two_codebook(bits=self.bits), self.channel_axes, self.normalization, importance
        )

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


@dataclasses.dataclass(frozen=True)
class AdditivePowerOfTwo:
    """Sums of powers of two with a learnable clipping scale.

    Attributes:
        bits: 2 to 8.
        channel_axes: axes with a scale of their own for each index; () is one for the tensor.
        normalization: "none", "standardize" (before a batch normalisation only) or "restore".
        clip_gradient: whether weights beyond the scale get no gradient.

    Source: Li et al. 2020 (arXiv 1909.13144); weight normalization is an option here, not the default.
    """

    bits: int
    channel_axes: tuple[int, ...] = ()
    normalization: Normalization = "none"
    clip_gradient: bool = True

    def __post_init__(self) -> None:
        check_bits(self.bits, minimum=2, of="AdditivePowerOfTwo bits")
        check_spec(self.channel_axes, self.normalization)

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """The fixed codebook and the scale of least squared error."""
        return init_fixed(
            weights, additive_power_of_two_codebook(bits=self.bits), self.channel_axes, self.normalization, importance
        )

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
