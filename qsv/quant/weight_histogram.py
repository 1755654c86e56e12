"""A histogram of one tensor's weights whose bins lie where a good codebook's cells do, and its best codebook.

Only a sample of the weights is sorted, to place the bins: XLA's sort is slow on a CPU.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qsv.quant.cell_sums import cell_sums, mean_deviations
from qsv.quant.interval_partition import best_partition

SAMPLE_SIZE = 4096
SAMPLE_INTERVALS = 256
# Share of the bins placed by mass; the rest follow density^(1/3), all of which one far outlier would attract.
MASS_SHARE = 0.25
# Weyl sequence: multiples of the golden ratio modulo 2**32 visit a tensor evenly, whatever its axes are.
GOLDEN_RATIO_32 = 2654435769


@jax.jit
def sample_and_range(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An even, sorted sample of the first `count` values, NaN last; the lowest and highest of them all."""
    sample = values
    if values.size > SAMPLE_SIZE:
        # The upper 24 bits are exact in float32.
        fractions = (jnp.arange(SAMPLE_SIZE, dtype=jnp.uint32) * jnp.uint32(GOLDEN_RATIO_32)) >> 8
        indices = (fractions.astype(jnp.float32) * (count / jnp.float32(2**24))).astype(jnp.int32)
        sample = values[jnp.minimum(indices, count - 1)]
    return jnp.sort(sample), jnp.nanmin(values), jnp.nanmax(values)


@jax.jit
def bin_means(
    values: jax.Array, masses: jax.Array | None, edges: jax.Array, origins: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Masses and means of the bins between the inner edges; an empty bin's mean is its origin."""
    totals, sums = cell_sums(values, values, masses, edges, origins)
    means = origins + mean_deviations(totals, sums)
    return totals, jnp.where(jnp.isfinite(means), means, origins)


@partial(jax.jit, static_argnames="num_bins")
def bin_edges(sample: jax.Array, low: jax.Array, high: jax.Array, *, num_bins: int) -> tuple[jax.Array, jax.Array]:
    """Inner edges `[num_bins - 1]` of bins that share out the sample's density^(1/3), and its mass, evenly.

    A sample of no more values than bins gets a bin for every value. Second, `[num_bins]`, every bin's edge
    nearer to the median: sums of distances from the other one lose the bulk beside an outlier.
    """
    count = jnp.isfinite(sample).sum()
    positions = jnp.linspace(0.0, 1.0, SAMPLE_INTERVALS + 1) * jnp.maximum(count - 1, 0)
    nodes = jnp.concatenate([low[None], sample[positions.astype(jnp.int32)], high[None]])
    # Beyond the ends of the sample lies about one value in `sample.size`.
    ends = jnp.array([1.0 / sample.size])
    masses = jnp.concatenate([ends, jnp.full(SAMPLE_INTERVALS, 1.0 / SAMPLE_INTERVALS), ends])
    largest = jnp.maximum(jnp.maximum(-low, high), jnp.finfo(jnp.float32).tiny)
    roots = jnp.cbrt(masses * jnp.diff(nodes / largest) ** 2)
    shares = (1.0 - MASS_SHARE) * roots / jnp.maximum(roots.sum(), jnp.finfo(jnp.float32).tiny)
    cumulative = jnp.concatenate([jnp.zeros(1), jnp.cumsum(shares + MASS_SHARE * masses / masses.sum())])
    wanted = jnp.arange(1, num_bins) * (cumulative[-1] / num_bins)
    # Bins of no width lie between the values, not at the end: no cell of the partition spans very many bins.
    each = sample[jnp.arange(1, num_bins) * jnp.minimum(count, num_bins) // num_bins]
    edges = jnp.where(count <= num_bins, each, jnp.interp(wanted, cumulative, nodes)).astype(jnp.float32)
    lower, upper = jnp.concatenate([edges[:1], edges]), jnp.concatenate([edges, edges[-1:]])
    return edges, jnp.where(lower >= _median(sample), lower, upper)


def _median(sample: jax.Array) -> jax.Array:
    return sample[jnp.maximum(jnp.isfinite(sample).sum() - 1, 0) // 2]


def _spread(sample: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Median of the sample and geometric mean of the distances from it, which hardly notices an outlier."""
    median = _median(sample)
    distances = jnp.abs(sample - median)
    used = (distances > 0) & jnp.isfinite(distances)
    logarithms = jnp.where(used, jnp.log(distances), 0.0)
    return median, jnp.exp(logarithms.sum() / jnp.maximum(used.sum(), 1))


@partial(jax.jit, static_argnames="levels")
def histogram_codebook(sample: jax.Array, totals: jax.Array, means: jax.Array, *, levels: int) -> jax.Array:
    """Means of the `levels` intervals of bins with the least distortion."""
    median, spread = _spread(sample)
    everything = totals.sum()
    masses = totals.astype(jnp.float32) / jnp.where(everything > 0, everything, 1)
    bounds = best_partition(masses, (means - median) / spread, num_cells=levels)

    bins = jnp.arange(masses.size)
    inside = (bins >= bounds[:-1, None]) & (bins < bounds[1:, None]) & (masses > 0)
    cell_masses = jnp.where(inside, masses, 0.0)
    cells = cell_masses.sum(axis=1)
    origins = jnp.max(jnp.where(inside, means, -jnp.inf), axis=1)
    deviations = jnp.where(inside, means - origins[:, None], 0.0)
    centroids = origins + mean_deviations(cells, (cell_masses * deviations).sum(axis=1))
    # An empty cell repeats the level below it, or else the first.
    return jnp.maximum(jax.lax.cummax(centroids), jnp.min(jnp.where(cells > 0, centroids, jnp.inf)))
