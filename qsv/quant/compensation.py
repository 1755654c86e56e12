"""Rounding with error compensation: each row's rounding error is made up for by the rows still to come."""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cholesky, solve_triangular

from qsv.quant.quantizer import Quantizer, QuantizerState


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
    if getattr(quantizer, "normalization", "none") != "none":
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
