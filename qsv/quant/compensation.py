"""Kernels that make up for errors: for those of the inputs, by a refit, and for those of rounding, row by row."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, cholesky, solve_triangular

from qsv.quant.qtensor import decode
from qsv.quant.quantizer import Quantizer, QuantizerState
from qsv.quant.straight_through import nearest_codes


@jax.jit
def refitted_weights(
    weights: jax.Array, second_moment: jax.Array, cross_moment: jax.Array, damping: jax.typing.ArrayLike = 0.2
) -> jax.Array:
    """The kernel that gives a layer's former outputs from inputs that have changed.

    With inputs x that were t, the minimum over V of E|x V - t W|^2 + l |V - W|^2:

        V = (E[x x^T] + l I)^-1 (E[x t^T] + l I) W

    Args:
        weights: [..., inputs, outputs] float, a kernel whose axes before the last count as inputs.
        second_moment: E[x x^T], [n, n] float32, n the product of all axes but the last, in C order.
        cross_moment: E[x t^T], [n, n] float32.
        damping: l relative to the mean of the diagonal of E[x x^T].

    Returns:
        [..., inputs, outputs] float32; the weights themselves where x is t.

    Source: least squares; used ahead of rounding in GPTAQ, Li et al. 2025 (arXiv 2504.02692).
    """
    rows = weights.astype(jnp.float32).reshape(-1, weights.shape[-1])
    mean = jnp.mean(jnp.diagonal(second_moment))
    ridge = jnp.where(mean > 0, damping * mean, 1.0) * jnp.eye(len(rows), dtype=rows.dtype)
    # What is solved for is the change alone, so that nothing changes where the inputs don't.
    change = cho_solve(cho_factor(second_moment + ridge), (cross_moment - second_moment) @ rows)
    return (rows + change).reshape(weights.shape)


@jax.jit
def nearest_in_cells(
    weights: jax.Array, rounded: jax.Array, state: QuantizerState, margin: jax.typing.ArrayLike = 0.1
) -> jax.Array:
    """The values nearest to some weights that a quantizer still rounds to chosen levels.

    Latent weights on their levels would have half a cell to go before any changes its code; these have not. The margin
    matters: codes that were chosen together lose to a few that change by themselves, and from weights anywhere in
    their cells the first steps change 2 % of them.

    Args:
        weights: [*shape] float.
        rounded: [*shape] the levels chosen for them, such as `compensated_rounding` gives.
        state: codebook and scale of the levels; of a quantizer without normalization.
        margin: distance kept from a cell's edge, relative to that of its level.

    Returns:
        [*shape] float; where a weight's nearest level is the chosen one, and it is not in the margin, the weight.
    """
    codebook = state.codebook
    codes = nearest_codes(rounded / state.scale, codebook)
    lower, upper = codebook[..., :-1], codebook[..., 1:]
    middles = (lower + upper) / 2
    infinite = jnp.full_like(codebook[..., :1], jnp.inf)
    # Repeats of a level share its cell; those of the top one have no upper edge.
    lows = jnp.concatenate([-infinite, jnp.where(lower < upper, middles, -jnp.inf)], axis=-1)
    highs = jnp.concatenate([jnp.where(lower < upper, middles, jnp.inf), infinite], axis=-1)
    level = decode(codes, codebook)
    low = decode(codes, jax.lax.cummax(lows, axis=codebook.ndim - 1))
    high = decode(codes, jax.lax.cummin(highs, axis=codebook.ndim - 1, reverse=True))
    low = jnp.where(jnp.isfinite(low), low + margin * (level - low), low)
    high = jnp.where(jnp.isfinite(high), high - margin * (high - level), high)
    return jnp.clip(weights / state.scale, low, high) * state.scale


def compensated_rounding(
    weights: jax.Array,
    second_moment: jax.Array,
    quantizer: Quantizer,
    state: QuantizerState,
    *,
    damping: float = 0.01,
) -> jax.Array:
    """Moves a weight to its levels so that the layer's output changes least, not the weight.

    With inputs x of second moment H = E[x x^T], the output error is tr((W - Q)^T H (W - Q)). Rows (inputs) are
    rounded one after the other, those of the largest moment first; after row i, with H^-1 = U^T U,

        W[j] += U[i, j] / U[i, i] (Q[i] - W[i])   for all rows j still to come.

    Args:
        weights: [..., inputs, outputs] float, a kernel whose axes before the last count as inputs.
        second_moment: [n, n] float32, n the product of all axes but the last, in C order.
        quantizer: what rounds; one without normalization, whose channel axes can only be the last.
        state: its codebook and scale, which stay.
        damping: added to the diagonal of H, relative to its mean.

    Returns:
        [..., inputs, outputs] float32, every value on a level, so that `quantizer.quantize` keeps it.

    Raises:
        ValueError: shapes don't fit, or the quantizer normalises or has a scale for each input.

    Source: GPTQ, Frantar et al. 2022 (arXiv 2210.17323), with its order by activations; the levels need not be
    uniform here, and there are no blocks, since the kernels of speaker networks are small.
    """
    size = weights.size // weights.shape[-1]
    if second_moment.shape != (size, size):
        raise ValueError(f"second_moment must be {(size, size)} for weights {weights.shape}, got {second_moment.shape}")
    channel_axes = {axis % weights.ndim for axis in getattr(quantizer, "channel_axes", ())}
    if channel_axes - {weights.ndim - 1}:
        raise ValueError(f"channel_axes may hold the last axis only, got {quantizer}")
    if getattr(quantizer, "normalization", "none") != "none" or getattr(quantizer, "balanced", False):
        raise ValueError(f"rows can't be normalised one by one, got {quantizer}")
    if damping <= 0:
        raise ValueError(f"damping must be positive, got {damping}")
    return _compensated(weights, second_moment, quantizer, state, damping)


@functools.partial(jax.jit, static_argnums=2)
def _compensated(
    weights: jax.Array, second_moment: jax.Array, quantizer: Quantizer, state: QuantizerState, damping: jax.Array
) -> jax.Array:
    rows = weights.astype(jnp.float32).reshape(-1, weights.shape[-1])
    moment = second_moment.astype(jnp.float32)
    mean = jnp.mean(jnp.diagonal(moment))
    # Inputs that are always zero would make H singular whatever the damping.
    moment = moment + jnp.diag(jnp.full(len(moment), jnp.where(mean > 0, damping * mean, 1.0)))
    order = jnp.argsort(-jnp.diagonal(moment), stable=True)
    upper = _upper_factor_of_inverse(moment[order][:, order])
    like_a_row = (1,) * (weights.ndim - 1) + (weights.shape[-1],)

    def round_row(index: jax.Array, rows: jax.Array) -> jax.Array:
        row = rows[index]
        rounded = quantizer.fake_quantize(row.reshape(like_a_row), state).reshape(row.shape)
        factors = upper[index] / upper[index, index]
        later = jnp.arange(len(rows)) > index
        moved = rows + jnp.where(later, factors, 0)[:, None] * (rounded - row)
        return moved.at[index].set(rounded)

    rounded = jax.lax.fori_loop(0, len(rows), round_row, rows[order])
    return jnp.zeros_like(rows).at[order].set(rounded).reshape(weights.shape)


def _upper_factor_of_inverse(matrix: jax.Array) -> jax.Array:
    """U, upper triangular, with `matrix^-1 = U^T U`."""
    # Where the reversed matrix is L L^T, that factor is L^-1 reversed back.
    lower = cholesky(matrix[::-1, ::-1], lower=True)
    inverse = solve_triangular(lower, jnp.eye(len(matrix), dtype=matrix.dtype), lower=True)
    return inverse[::-1, ::-1]
