"""K-means quantization: a codebook fitted to each tensor, refreshed while the weights move."""

import dataclasses

import jax
import jax.numpy as jnp

from qsv.quant.kmeans import Method, kmeans_codebook, lloyd_step
from qsv.quant.qtensor import QTensor, check_bits
from qsv.quant.quantizer import (
    Normalization,
    QuantizerState,
    check_spec,
    fake_quantize_with,
    grouped,
    grouped_like,
    quantize_with,
    standardized,
    state_of_levels,
)
from qsv.quant.straight_through import nearest_codes

# Rounds of codebook and scales by turns; more change the distortion by less than a percent.
_SHARED_FIT_ROUNDS = 4
# Steps of the int8 grid on either side of zero.
_GRID = 127
_TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclasses.dataclass(frozen=True)
class KMeans:
    """K-means weights: `2**bits` centroids for each tensor (or channel), scaled to [-1, 1].

    Attributes:
        bits: 1 to 8.
        channel_axes: axes with a codebook and scale of their own for each index; () is one for the tensor, as in the
            paper.
        share_codebook: whether the channels have scales of their own but one codebook, which takes far fewer bytes.
        integer_levels: whether centroids are whole multiples of the scale / 127, so that int8 arithmetic can have them.
        normalization: "none", "standardize" (before a batch normalisation only) or "restore".
        clip_gradient: whether weights beyond the outermost centroids get no gradient. Off by default, since half
            of the outermost cells' weights lie there.
        method: start of the codebook, "optimal" or the paper's "equal_mass".
        central_fraction: share of the weights "equal_mass" starts from; the paper's is 0.9.
        refresh_steps: Lloyd steps in each refresh.
        refresh_rate: weight of the new codebook in a refresh, in (0, 1]; below 1 it is a moving average.

    Source: KMQAT, Wang et al., Interspeech 2023, and Liu et al., TASLP 2024 (arXiv 2406.05359): partition, clustering,
    rescaling. The start is closer to the optimum than theirs unless method="equal_mass".
    """

    bits: int
    channel_axes: tuple[int, ...] = ()
    share_codebook: bool = False
    normalization: Normalization = "none"
    clip_gradient: bool = False
    method: Method = "optimal"
    central_fraction: float = 1.0
    refresh_steps: int = 1
    refresh_rate: float = 1.0
    integer_levels: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits, of="KMeans bits")
        check_spec(self.channel_axes, self.normalization)
        if self.share_codebook and not self.channel_axes:
            raise ValueError("share_codebook needs channel_axes, such as (-1,): one codebook is all that a tensor has")
        if self.refresh_steps < 1:
            raise ValueError(f"refresh_steps must be at least 1, got {self.refresh_steps}")
        if not 0 < self.refresh_rate <= 1:
            raise ValueError(f"refresh_rate must be in (0, 1], got {self.refresh_rate}")

    def init(self, weights: jax.Array, importance: jax.Array | None = None) -> QuantizerState:
        """Centroids of each channel or of the tensor, divided by their largest magnitude, the scale."""
        rows, shape = grouped(standardized(weights, self.channel_axes, self.normalization), self.channel_axes)
        masses = None if importance is None else grouped_like(importance, weights, self.channel_axes)
        if self.share_codebook:
            return self._on_grid(self._init_shared(rows, masses, shape))

        def fit(row: jax.Array, importance: jax.Array | None) -> jax.Array:
            return kmeans_codebook(
                row,
                bits=self.bits,
                method=self.method,
                central_fraction=self.central_fraction,
                importance=importance,
            )

        if shape:
            centroids = jax.vmap(fit)(rows, masses)
        else:
            centroids = fit(rows[0], None if masses is None else masses[0])[None]
        return self._on_grid(state_of_levels(centroids.reshape(*shape, 2**self.bits).astype(rows.dtype)))

    def fake_quantize(self, weights: jax.Array, state: QuantizerState) -> jax.Array:
        """Weights on their centroids, straight through."""
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
        """Lloyd steps from the present centroids on weights that have moved."""
        rows, shape = grouped(standardized(weights, self.channel_axes, self.normalization), self.channel_axes)
        if self.share_codebook:
            return self._on_grid(self._refresh_shared(rows, state))
        present = state.codebook * (state.scale[..., None] if shape else state.scale)
        levels = present.reshape(rows.shape[0], 2**self.bits)

        def refit(row: jax.Array, codebook: jax.Array) -> jax.Array:
            return lloyd_step(row, codebook, num_steps=self.refresh_steps)

        moved = jax.vmap(refit)(rows, levels) if shape else refit(rows[0], levels[0])[None]
        mixed = levels + self.refresh_rate * (moved.astype(levels.dtype) - levels)
        return self._on_grid(state_of_levels(mixed.reshape(present.shape)))

    def _on_grid(self, state: QuantizerState) -> QuantizerState:
        """The state with its levels on the int8 grid; what falls together there repeats the last level instead."""
        if not self.integer_levels:
            return state
        steps = jnp.round(state.codebook * _GRID)
        is_new = jnp.diff(steps, axis=-1, prepend=-jnp.inf) > 0
        distinct = jnp.sort(jnp.where(is_new, steps, jnp.inf), axis=-1)
        return QuantizerState(jnp.minimum(distinct, steps[..., -1:]) / _GRID, state.scale)

    def _init_shared(self, rows: jax.Array, masses: jax.Array | None, shape: tuple[int, ...]) -> QuantizerState:
        """A codebook of the channels over their scales, and the scales of least squared error, by turns."""
        masses = jnp.ones_like(rows) if masses is None else masses
        scales = jnp.sqrt(jnp.sum(masses * jnp.square(rows), axis=1) / jnp.maximum(jnp.sum(masses, axis=1), _TINY))
        scales = jnp.where(scales > 0, scales, 1)[:, None]
        for _ in range(_SHARED_FIT_ROUNDS):
            # An error of the codebook becomes one of the weights by way of the scale.
            codebook = kmeans_codebook(
                rows / scales,
                bits=self.bits,
                method=self.method,
                central_fraction=self.central_fraction,
                importance=masses * jnp.square(scales),
            )
            levels = codebook[nearest_codes(rows / scales, codebook)]
            squares = jnp.sum(masses * jnp.square(levels), axis=1, keepdims=True)
            fitted = jnp.sum(masses * levels * rows, axis=1, keepdims=True) / jnp.where(squares > 0, squares, 1)
            scales = jnp.where(fitted > 0, fitted, scales)
        return state_of_levels(codebook.astype(rows.dtype), scales.reshape(shape))

    def _refresh_shared(self, rows: jax.Array, state: QuantizerState) -> QuantizerState:
        """Lloyd steps on the channels over their scales, which stay but for what keeps the codebook within [-1, 1]."""
        scales = state.scale.reshape(-1, 1)
        moved = lloyd_step(rows / scales, state.codebook, num_steps=self.refresh_steps, importance=jnp.square(scales))
        mixed = state.codebook + self.refresh_rate * (moved.astype(state.codebook.dtype) - state.codebook)
        return state_of_levels(mixed, state.scale)
