"""Rank correlation with its interval."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qsv.scoring.metrics import Floats


@dataclasses.dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation.

    Attributes:
        estimate: -1 to 1.
        low: end of the bootstrap's percentile interval.
        high: its other end.
        confidence: of the interval.
    """

    estimate: float
    low: float
    high: float
    confidence: float


def rank_correlation(
    x: ArrayLike, y: ArrayLike, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> RankCorrelation:
    """Whether what is large in one list of figures is large in another: of weight distortion and loss, say.

    Args:
        x: [n] figures, such as each layer's relative error.
        y: [n] others.
        confidence: of the interval, from pairs drawn with replacement.
        num_resamples: how many times.
        seed: of the draws.

    Raises:
        ValueError: fewer than three pairs, lengths that differ, or figures that are all equal.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 3:
        raise ValueError(f"a correlation needs two lists of at least three figures, got {x.shape} and {y.shape}")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("figures that are all equal have no correlation")
    drawn = np.random.default_rng(seed).integers(x.size, size=(num_resamples, x.size))
    resampled = [_spearman(x[index], y[index]) for index in drawn]
    # A resample of one pair, drawn again and again, has none.
    low, high = np.nanquantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return RankCorrelation(_spearman(x, y), float(low), float(high), confidence)


def _spearman(x: Floats, y: Floats) -> float:
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    return float(stats.spearmanr(x, y).statistic)
