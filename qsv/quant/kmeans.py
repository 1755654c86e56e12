"""K-means codebooks of one tensor: near-optimal, quick on a CPU, and pure enough to jit and vmap.

A codebook of `2**bits` levels minimises the squared distortion

    D(c) = sum_i a_i min_k (w_i - c_k)^2

with importances a_i, all 1 unless given.

Lloyd's iteration alone stalls far from the optimum on heavy-tailed weights, because no level ever travels
into the tail. In one dimension cells are intervals, so dynamic programming finds the best ones; run on a
histogram instead of on the weights it costs milliseconds, and a few Lloyd steps on all the weights remove the
histogram's rounding.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from qsv.quant.cell_sums import cell_sums, mean_deviations
from qsv.quant.importance import importance_of_each
from qsv.quant.weight_histogram import SAMPLE_SIZE, bin_edges, bin_means, histogram_codebook, sample_and_range

Method = Literal["optimal", "equal_mass"]

# Concrete tensors are padded to one of these sizes, or to a multiple of the last.
PADDED_SIZES = (2**12, 2**16, 2**18, 2**20)
BINS_PER_LEVEL = 8


def kmeans_codebook(
    weights: jax.typing.ArrayLike,
    *,
    bits: int,
    method: Method = "optimal",
    num_bins: int = 512,
    num_lloyd_steps: int = 5,
    central_fraction: float = 1.0,
    importance: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Fits the sorted levels of a k-means codebook to one tensor.

    "optimal": dynamic programming over a histogram whose bins follow density^(1/3), where the cells of a good
    quantizer lie (Panter and Dite), then `num_lloyd_steps` Lloyd steps on all weights.
    "equal_mass": the weights outside the central fraction are left out, the rest is split into `2**bits`
    intervals of equal mass, the levels are their means; then the same Lloyd steps on all weights. This sorts.

    Where the weights hold at most `2**bits` distinct values, both return exactly those values (the last one
    repeated). Non-finite weights are left out; a tensor without finite weights gives zeros.
    Call it under `jax.vmap` for one codebook per channel, under `jax.jit` for one compiled call.

    Args:
        weights: any shape, any real dtype; computed in float32.
        bits: 1 to 8.
        method: how the levels start.
        num_bins: bins of the histogram ("optimal"); raised to 8 a level where it is less.
        num_lloyd_steps: Lloyd steps after the start; 0 is allowed.
        central_fraction: share of the weights that "equal_mass" starts from, in (0, 1]; KMQAT's is 0.9.
        importance: 0 or more, broadcasts against the weights: what each one's squared error counts, such as the
            mean square of the input that it multiplies. The interval masses of "equal_mass" don't heed it.

    Returns:
        `[2**bits]` float32 levels, ascending, in the unit of the weights.

    Raises:
        ValueError: an argument is out of range, the weights are complex, or the importance doesn't broadcast.

    Source: "equal_mass" is the start of KMQAT (Wang et al., Interspeech 2023; Liu et al., TASLP 2024,
    arXiv 2406.05359), without its division by the largest level. "optimal" is the dynamic programme of Bruce,
    1965, and Wu, 1991, over bins; they use every sample.
    """
    if bits not in range(1, 9):
        raise ValueError(f"bits must be an integer from 1 to 8, got {bits!r}")
    if method not in ("optimal", "equal_mass"):
        raise ValueError(f"method must be 'optimal' or 'equal_mass', got {method!r}")
    if num_bins < 1:
        raise ValueError(f"num_bins must be positive, got {num_bins}")
    _check_num_steps("num_lloyd_steps", num_lloyd_steps)
    if not 0.0 < central_fraction <= 1.0:
        raise ValueError(f"central_fraction must be in (0, 1], got {central_fraction}")
    if method == "optimal" and central_fraction != 1.0:
        raise ValueError(f"central_fraction={central_fraction} needs method='equal_mass'; 'optimal' uses all weights")
    weights = _real_array(weights)
    levels = 2**bits
    if weights.size == 0:
        return jnp.zeros(levels, jnp.float32)
    values, masses = _prepare(weights), _prepare_importance(importance, weights)
    if method == "equal_mass":
        return _equal_mass(values, masses, levels=levels, central_fraction=central_fraction, num_steps=num_lloyd_steps)
    num_bins = max(num_bins, BINS_PER_LEVEL * levels)
    return _optimal(values, masses, weights.size, levels=levels, num_bins=num_bins, num_steps=num_lloyd_steps)


def lloyd_step(
    weights: jax.typing.ArrayLike,
    codebook: jax.typing.ArrayLike,
    *,
    num_steps: int = 1,
    importance: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """Moves every level to the mean of the weights nearest to it: the refresh of a codebook during training.

    A level that no weight is nearest to stays. A weight halfway between two levels counts for the upper one.

    Args:
        weights: any shape, any real dtype; non-finite weights are left out.
        codebook: `[levels]` ascending.
        num_steps: how many times.
        importance: as in `kmeans_codebook`; the means are weighted by it.

    Returns:
        `[levels]` float32, ascending; up to rounding, no more distortion than the codebook given.

    Raises:
        ValueError: the codebook is not one-dimensional, `num_steps` is negative, the weights are complex, or the
            importance doesn't broadcast.

    Source: Lloyd, IEEE Trans. Information Theory 28, 1982.
    """
    _check_num_steps("num_steps", num_steps)
    if jnp.ndim(codebook) != 1 or jnp.size(codebook) == 0:
        raise ValueError(f"codebook must be [levels], got shape {jnp.shape(codebook)}; vmap over its leading axes")
    weights = _real_array(weights)
    levels = jnp.asarray(codebook, jnp.float32)
    if weights.size == 0 or num_steps == 0:
        return levels
    return _lloyd(_prepare(weights), _prepare_importance(importance, weights), levels, num_steps=num_steps)


def _check_num_steps(name: str, value: int) -> None:
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, got {value}")


def _real_array(weights: jax.typing.ArrayLike) -> jax.Array:
    weights = jnp.asarray(weights)
    if jnp.iscomplexobj(weights):
        raise ValueError(f"weights must be real, got {weights.dtype}")
    return weights


def _prepare(weights: jax.Array) -> jax.Array:
    """Flattens to float32, NaN for what is not finite; pads concrete arrays, so that few sizes compile."""
    return _flatten(weights, size=_padded_size(weights))


def _prepare_importance(importance: jax.typing.ArrayLike | None, weights: jax.Array) -> jax.Array | None:
    """Importance of every prepared weight."""
    if importance is None:
        return None
    return _relative_masses(_flatten(importance_of_each(importance, weights), size=_padded_size(weights)))


@jax.jit
def _relative_masses(masses: jax.Array) -> jax.Array:
    """Masses of mean 1; weights of which none matters matter equally."""
    mean = jnp.nanmean(masses)
    return jnp.where(mean > 0, masses / jnp.where(mean > 0, mean, 1), 1)


def _padded_size(weights: jax.Array) -> int:
    if isinstance(weights, jax.core.Tracer):
        return weights.size
    return next((s for s in PADDED_SIZES if s >= weights.size), -(-weights.size // PADDED_SIZES[-1]) * PADDED_SIZES[-1])


@partial(jax.jit, static_argnames="size")
def _flatten(weights: jax.Array, *, size: int) -> jax.Array:
    values = weights.astype(jnp.float32).reshape(-1)
    values = jnp.where(jnp.isfinite(values), values, jnp.nan)
    return jnp.pad(values, (0, size - values.size), constant_values=jnp.nan)


@partial(jax.jit, static_argnames="num_steps")
def _lloyd(values: jax.Array, masses: jax.Array | None, codebook: jax.Array, *, num_steps: int) -> jax.Array:
    def step(codebook: jax.Array, _: None) -> tuple[jax.Array, None]:
        midpoints = 0.5 * codebook[:-1] + 0.5 * codebook[1:]
        moved = codebook + mean_deviations(*cell_sums(values, values, masses, midpoints, codebook))
        # Sums near float32's largest number may overflow; such a level stays.
        return jnp.where(jnp.isfinite(moved), moved, codebook), None

    return jnp.sort(jax.lax.scan(step, codebook, length=num_steps)[0])


@partial(jax.jit, static_argnames=("levels", "central_fraction", "num_steps"))
def _equal_mass(
    values: jax.Array, masses: jax.Array | None, *, levels: int, central_fraction: float, num_steps: int
) -> jax.Array:
    ordered = jnp.sort(values)  # NaN last
    count = jnp.isfinite(values).sum()
    # Positions are float32, so beyond 2**24 weights a bound may be a few weights off.
    kept = jnp.maximum(jnp.round(count * central_fraction), 1.0)
    first = jnp.floor((count - kept) / 2)
    bounds = first + jnp.round(jnp.arange(levels + 1) * (kept / levels))
    positions = jnp.arange(values.size, dtype=jnp.float32)
    positions = jnp.where((positions >= bounds[0]) & (positions < bounds[-1]), positions, jnp.nan)
    middles = jnp.clip((bounds[:-1] + bounds[1:]) / 2, 0, jnp.maximum(count - 1, 0)).astype(jnp.int32)
    origins = ordered[middles]
    start = origins + mean_deviations(*cell_sums(positions, ordered, None, bounds[1:-1], origins))
    start = jnp.sort(jnp.where(jnp.isfinite(start), start, origins))
    sample = ordered[(jnp.arange(SAMPLE_SIZE) * (values.size / SAMPLE_SIZE)).astype(jnp.int32)]
    return _or_distinct_values(values, sample, _lloyd(values, masses, start, num_steps=num_steps))


def _optimal(
    values: jax.Array, masses: jax.Array | None, count: int, *, levels: int, num_bins: int, num_steps: int
) -> jax.Array:
    # Compiled in parts: what takes long to compile sees arrays of one size, whatever the size of the tensor.
    sample, low, high = sample_and_range(values, count)
    edges, origins = bin_edges(sample, low, high, num_bins=num_bins)
    totals, means = bin_means(values, masses, edges, origins)
    start = histogram_codebook(sample, totals, means, levels=levels)
    return _or_distinct_values(values, sample, _lloyd(values, masses, start, num_steps=num_steps))


@jax.jit
def _or_distinct_values(values: jax.Array, sample: jax.Array, codebook: jax.Array) -> jax.Array:
    """The distinct finite values themselves, the last one repeated, if the codebook has a level for each."""
    levels = codebook.size
    new_in_sample = jnp.isfinite(sample[1:]) & (sample[1:] != sample[:-1])
    few = new_in_sample.sum() < levels

    def above(bound: jax.typing.ArrayLike) -> jax.Array:
        return jnp.min(jnp.where(values > bound, values, jnp.inf))

    def more(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        count, smallest, _ = state
        return few & (count < levels) & (smallest < jnp.inf)

    def take(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        count, smallest, found = state
        return count + 1, above(smallest), found.at[count].set(smallest)

    count, rest, found = jax.lax.while_loop(
        more, take, (jnp.int32(0), above(-jnp.inf), jnp.full_like(codebook, -jnp.inf))
    )
    distinct = jnp.where(count > 0, jax.lax.cummax(found), 0.0)
    return jnp.where(few & (rest == jnp.inf), distinct, codebook)
