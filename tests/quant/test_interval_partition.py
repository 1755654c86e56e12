import itertools

import jax
import numpy as np
import pytest

from qsv.quant.interval_partition import best_partition


def cost(masses, points, bounds):
    total = 0.0
    for first, last in itertools.pairwise(bounds):
        mass, point = masses[first:last].astype(np.float64), points[first:last].astype(np.float64)
        if mass.sum() > 0:
            total += np.sum(mass * (point - np.average(point, weights=mass)) ** 2)
    return total


def histogram(rng, num_bins):
    return rng.integers(0, 5, num_bins).astype(np.float32), np.sort(rng.normal(size=num_bins)).astype(np.float32)


@pytest.mark.parametrize("num_cells", [1, 2, 3, 4])
def test_equals_trying_all_partitions(num_cells):
    masses, points = histogram(np.random.default_rng(0), 12)
    every = itertools.combinations(range(13), num_cells - 1)
    least = min(cost(masses, points, (0, *inner, 12)) for inner in every)
    bounds = np.asarray(best_partition(masses, points, num_cells=num_cells))
    assert bounds[0] == 0 and bounds[-1] == 12 and np.all(np.diff(bounds) >= 0)
    assert cost(masses, points, bounds) == pytest.approx(least, rel=1e-4)


def exact_cost(masses, points, num_cells):
    """The dynamic programme in its plainest form, in float64."""
    num_bins = masses.size
    costs = [[cost(masses, points, (i, j)) for j in range(num_bins + 1)] for i in range(num_bins)]
    best = [0.0] + [np.inf] * num_bins
    for _ in range(num_cells):
        best = [min([best[j], *(best[i] + costs[i][j] for i in range(j))]) for j in range(num_bins + 1)]
    return best[-1]


@pytest.mark.parametrize("num_bins", [96, 100])
def test_cells_of_bounded_width_in_blocks(num_bins):
    """With 64 cells a cell may hold 16 * 100 / 64 = 25 bins, so the table is in several blocks."""
    masses, points = histogram(np.random.default_rng(1), num_bins)
    bounds = np.asarray(best_partition(masses, points, num_cells=64))
    assert bounds.shape == (65,) and bounds[-1] == num_bins
    assert cost(masses, points, bounds) == pytest.approx(exact_cost(masses, points, 64), rel=1e-3)


def test_more_cells_than_bins_and_no_mass():
    points = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(np.unique(best_partition(np.ones(3, np.float32), points, num_cells=8)), range(4))
    assert best_partition(np.zeros(3, np.float32), points, num_cells=2)[-1] == 3


def test_far_points_stay_finite_and_apart():
    points = np.array([-1e30, 0, 1, 10, 11, 1e25], np.float32)
    bounds = best_partition(np.ones(6, np.float32), points, num_cells=4)
    np.testing.assert_array_equal(bounds, [0, 1, 3, 5, 6])


def test_vmap_equals_one_by_one():
    histograms = [histogram(np.random.default_rng(seed), 40) for seed in range(3)]
    masses, points = (np.stack(parts) for parts in zip(*histograms, strict=True))
    together = jax.jit(jax.vmap(lambda m, p: best_partition(m, p, num_cells=5)))(masses, points)
    for row, bounds in enumerate(together):
        np.testing.assert_array_equal(best_partition(masses[row], points[row], num_cells=5), bounds)
