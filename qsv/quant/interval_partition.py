"""Splits a sorted histogram into the intervals of least squared distortion, by dynamic programming."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

# Cells up to so many times the mean number of bins are considered, which bounds memory at 256 cells.
MAX_CELL_WIDTH = 16
# Squares of the largest point, and sums of those, stay finite in float32.
LARGEST_POINT = 1e17


def best_partition(masses: jax.Array, points: jax.Array, *, num_cells: int) -> jax.Array:
    """Bounds of the at most `num_cells` intervals of bins with the least squared distance to their means.

    With E_k(i) the least distortion of the bins from i on in at most k cells,

        E_k(i) = min_j cost(i, j) + E_{k-1}(j) .

    Exact up to rounding where no cell of the optimum holds more than 16 times `num_bins / num_cells` bins, so
    always for up to 16 cells. Time is O(num_bins^2 min(16, num_cells)), memory is
    O(num_bins^2 min(1, 16 / num_cells)), under `jax.vmap` too: it does one channel after the other.

    Args:
        masses: `[num_bins]` float32, 0 or more.
        points: `[num_bins]` float32, ascending where the mass is positive; clipped to +-1e17, so scale them.
        num_cells: how many intervals.

    Returns:
        `[num_cells + 1]` ascending integers from 0: cell k has the bins `bounds[k]` up to `bounds[k + 1]`.

    Source: Bruce, "Optimum quantization", MIT report 429, 1965; Wu, "Optimal quantization by matrix
    searching", 1991. We tabulate all costs instead of searching them: that vectorises.
    """
    block = min(masses.size, -(-MAX_CELL_WIDTH * masses.size // num_cells))
    points = jnp.clip(points, -LARGEST_POINT, LARGEST_POINT)
    bounds = sequential_vmap(partial(_best_bounds, num_cells=num_cells, block=block))(masses, points)
    return jnp.minimum(bounds, masses.size)


def _best_bounds(masses: jax.Array, points: jax.Array, *, num_cells: int, block: int) -> jax.Array:
    """Starts i are arranged `[num_blocks, block]`; ends j are counted from the first start of their block."""
    num_blocks = -(-masses.size // block)
    width = block + 1 if num_blocks == 1 else 2 * block
    size = num_blocks * block
    ends = jnp.arange(width)[:, None] + block * jnp.arange(num_blocks)
    padding = (0, size + width - masses.size)
    costs = _cell_costs(jnp.pad(masses, padding)[ends], jnp.pad(points, padding)[ends], block)

    def add_cell(remaining: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        best = jnp.min(costs + remaining[ends][:, :, None], axis=0).reshape(-1)
        return nothing_left.at[:size].set(best), remaining

    nothing_left = jnp.full(size + width, jnp.inf, jnp.float32).at[size].set(0.0)
    _, remaining = jax.lax.scan(add_cell, nothing_left, length=num_cells)

    def take_cell(start: jax.Array, remaining: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = jnp.minimum(start // block, num_blocks - 1)
        costs_here = costs[:, index, jnp.minimum(start - index * block, block - 1)]
        end = index * block + jnp.argmin(costs_here + remaining[ends[:, index]]).astype(start.dtype)
        end = jnp.where(start >= size, size, end)
        return end, end

    zero = jnp.zeros((), ends.dtype)
    _, bounds = jax.lax.scan(take_cell, zero, remaining, reverse=True)
    return jnp.concatenate([zero[None], bounds[::-1]])


def _cell_costs(masses: jax.Array, points: jax.Array, block: int) -> jax.Array:
    """Distortion `[width, num_blocks, block]` of the bins from every start to every end.

    Grows all cells by one bin at a time (Welford's update): differences of prefix sums cancel in float32.
    """
    starts = jnp.arange(block)
    State = tuple[jax.Array, jax.Array, jax.Array]

    def grow(state: State, step: State) -> tuple[State, jax.Array]:
        total, mean, cost = state
        end, mass, point = step
        mass = jnp.where(starts <= end, mass[:, None], 0.0)
        grown = total + mass
        fraction = mass / jnp.where(grown > 0, grown, 1.0)
        distance = point[:, None] - mean
        grown_cost = cost + distance * distance * total * fraction
        return (grown, mean + distance * fraction, grown_cost), jnp.where(starts <= end, cost, jnp.inf)

    zeros = jnp.zeros((masses.shape[1], block), jnp.float32)
    return jax.lax.scan(grow, (zeros, zeros, zeros), (jnp.arange(masses.shape[0]), masses, points))[1]
