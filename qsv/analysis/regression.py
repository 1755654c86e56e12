"""How well predicted scores follow labels, with intervals, and by how much one predictor is behind another."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qsv.scoring import Interval
from qsv.scoring.metrics import Floats


@dataclasses.dataclass(frozen=True)
class RegressionFigures:
    """A predictor's errors.

    Attributes:
        mse: mean squared error.
        pcc: Pearson's correlation coefficient; 0 for scores that are all equal.
        srcc: Spearman's rank correlation coefficient.
        pcc_difference: its PCC minus the first predictor's, on the same resamples; None for the first.
    """

    mse: Interval
    pcc: Interval
    srcc: Interval
    pcc_difference: Interval | None


def regression_figures(
    predictions: Mapping[str, ArrayLike],
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, RegressionFigures]:
    """Figures of several predictors on the same clips.

    Args:
        predictions: {predictor: [n] scores}; the first is what the others are compared with.
        labels: [n] numbers.
        groups: [n] what is drawn with replacement, such as the clips' speakers, since clips of one are alike; None
            draws clips.
        confidence: of the intervals.
        num_resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        ValueError: shapes differ, there are fewer than three clips, labels or scores are not finite, or all
            labels are equal.
    """
    labels = np.asarray(labels, np.float64)
    scores = {name: np.asarray(own, np.float64) for name, own in predictions.items()}
    for name, own in scores.items():
        if labels.ndim != 1 or own.shape != labels.shape or own.size < 3:
            raise ValueError(f"{name} needs a score for each of three labels or more, got {own.shape}, {labels.shape}")
        if not np.all(np.isfinite(own)) or not np.all(np.isfinite(labels)) or np.ptp(labels) == 0:
            raise ValueError(f"{name}: scores and labels must be finite, and labels not all equal")
    names, places = np.unique(np.arange(labels.size) if groups is None else np.asarray(groups), return_inverse=True)
    if places.size != labels.size:
        raise ValueError(f"groups must be as many as the {labels.size} labels, got {places.size}")
    members = [np.flatnonzero(places == group) for group in range(len(names))]
    rng = np.random.default_rng(seed)
    drawn = [np.arange(labels.size)]
    for _ in range(num_resamples):
        drawn.append(np.concatenate([members[group] for group in rng.integers(len(names), size=len(names))]))
    measured = np.array([[_figures(own[index], labels[index]) for index in drawn] for own in scores.values()])
    return {
        name: RegressionFigures(
            mse=_interval(figures[:, 0], confidence),
            pcc=_interval(figures[:, 1], confidence),
            srcc=_interval(figures[:, 2], confidence),
            pcc_difference=_interval(figures[:, 1] - measured[0, :, 1], confidence) if place else None,
        )
        for place, (name, figures) in enumerate(zip(scores, measured, strict=True))
    }


def _figures(scores: Floats, labels: Floats) -> tuple[float, float, float]:
    """MSE, PCC and SRCC; what is always the same follows nothing: correlations of 0."""
    error = float(np.mean(np.square(scores - labels)))
    if np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return error, 0.0, 0.0
    return error, float(np.corrcoef(scores, labels)[0, 1]), float(stats.spearmanr(scores, labels).statistic)


def _interval(figures: Floats, confidence: float) -> Interval:
    """Of the figure on all clips, the first, and those of the resamples."""
    low, high = np.quantile(figures[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(figures[0]), float(low), float(high), float(np.std(figures[1:])), confidence)
