"""Scores to log-likelihood ratios, and how good these are."""

import dataclasses
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit, logit

from qsv.scoring.metrics import Floats, checked_trials, detection_cost

_MAX_STEPS = 100
_TOLERANCE = 1e-10
# Of the slope in units of the scores' deviation: keeps it finite where the classes don't overlap.
_RIDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class AffineCalibration:
    """`llr = slope * score + offset`, natural logarithm of the likelihood ratio of same and different speakers."""

    slope: float
    offset: float

    def __call__(self, scores: ArrayLike) -> Floats:
        """Log-likelihood ratios of scores of any shape."""
        return self.slope * np.asarray(scores, np.float64) + self.offset


def fit_calibration(scores: ArrayLike, labels: ArrayLike, *, p_target: float = 0.5) -> AffineCalibration:
    """The affine map that makes scores log-likelihood ratios, by logistic regression weighted to a prior.

        min  p/T sum_targets log(1 + e^-z) + (1 - p)/N sum_others log(1 + e^z),   z = llr + logit(p)

    Args:
        scores: `[trials]` of development speakers, of whom none is in a trial that is decided with the result.
        labels: `[trials]` bool or 0/1, true for target trials.
        p_target: prior of a target trial that the fit is best for; the map is of likelihood ratios whatever it is.

    Returns:
        The calibration.

    Raises:
        ValueError: as `eer`; the prior isn't between 0 and 1, all scores are equal, or targets don't score higher.

    Source: Bruemmer & du Preez 2006, "Application-independent evaluation of speaker detection"; a ridge of 1e-6 on the
    standardized slope is ours.
    """
    scores, labels = checked_trials(scores, labels)
    if not 0 < p_target < 1:
        raise ValueError(f"p_target must be between 0 and 1, got {p_target}")
    center, spread = float(scores.mean()), float(scores.std())
    if spread == 0:
        raise ValueError("all scores are equal; they can't be calibrated")
    prior = float(logit(p_target))
    x = np.stack([(scores - center) / spread, np.ones_like(scores)], axis=1)
    masses = np.where(labels, p_target / labels.sum(), (1 - p_target) / (~labels).sum())
    theta, ridge = np.zeros(2), np.diag([_RIDGE, 0.0])
    for _ in range(_MAX_STEPS):
        p = expit(x @ theta + prior)
        gradient = x.T @ (masses * (p - labels)) + ridge @ theta
        hessian = (x * (masses * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        # Newton's step, shortened while it doesn't lower the loss.
        scale, before = 1.0, _loss(x, theta, prior, labels, masses)
        while _loss(x, theta - scale * step, prior, labels, masses) > before and scale > 1e-6:
            scale /= 2
        theta = theta - scale * step
        if np.abs(scale * step).max() <= _TOLERANCE * max(np.abs(theta).max(), 1):
            break
    if theta[0] <= 0:
        raise ValueError("targets don't score higher than non-targets; such scores can't be calibrated")
    return AffineCalibration(float(theta[0] / spread), float(theta[1] - theta[0] * center / spread))


def cllr(llrs: ArrayLike, labels: ArrayLike) -> float:
    """Cost of log-likelihood ratios in bits: 0 is perfect, 1 that of a system that always says 0.

        (mean_targets log2(1 + e^-llr) + mean_others log2(1 + e^llr)) / 2

    Args:
        llrs: `[trials]`, natural logarithms.
        labels: `[trials]` bool or 0/1, true for target trials.

    Raises:
        ValueError: as `eer`.

    Source: Bruemmer & du Preez 2006, eq. 20.
    """
    llrs, labels = checked_trials(llrs, labels)
    return _cllr(llrs[labels], llrs[~labels])


def min_cllr(scores: ArrayLike, labels: ArrayLike) -> float:
    """The least Cllr that any rising map of the scores gives: what discrimination alone allows.

    Arguments and errors are those of `eer`.

    Source: Bruemmer & du Preez 2006, by the pool-adjacent-violators algorithm.
    """
    scores, labels = checked_trials(scores, labels)
    values, places, counts = np.unique(scores, return_inverse=True, return_counts=True)
    # Trials of equal score have one likelihood ratio.
    shares = np.bincount(places, weights=labels, minlength=values.size) / counts
    posterior = isotonic_regression(shares, weights=counts).x[places]
    with np.errstate(divide="ignore"):
        llrs = logit(np.clip(posterior, 0, 1)) - math.log(labels.sum() / (~labels).sum())
    return _cllr(llrs[labels], llrs[~labels])


def bayes_threshold(*, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """The log-likelihood ratio from which accepting costs least: `log(c_fa (1 - p) / (c_miss p))`."""
    if not (0 < p_target < 1 and c_miss > 0 and c_fa > 0):
        raise ValueError(f"p_target must be in (0, 1) and costs positive, got {p_target}, {c_miss} and {c_fa}")
    return math.log(c_fa * (1 - p_target) / (c_miss * p_target))


def act_dcf(
    llrs: ArrayLike, labels: ArrayLike, *, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Detection cost of deciding at the Bayes threshold, normalised as `min_dcf`, which it is never below.

    Args:
        llrs: `[trials]`, natural logarithms.
        labels: `[trials]` bool or 0/1, true for target trials.
        p_target: prior probability of a target trial.
        c_miss: cost of a miss.
        c_fa: cost of a false alarm.

    Raises:
        ValueError: as `min_dcf`.
    """
    llrs, labels = checked_trials(llrs, labels)
    accepted = llrs >= bayes_threshold(p_target=p_target, c_miss=c_miss, c_fa=c_fa)
    p_miss, p_fa = (np.asarray(np.mean(wrong)) for wrong in (~accepted[labels], accepted[~labels]))
    return float(detection_cost(p_miss, p_fa, p_target=p_target, c_miss=c_miss, c_fa=c_fa))


def _loss(x: Floats, theta: Floats, prior: float, labels: NDArray[np.bool_], masses: Floats) -> float:
    z = x @ theta + prior
    return float(np.sum(masses * np.logaddexp(0, np.where(labels, -z, z))) + _RIDGE * theta[0] ** 2 / 2)


def _cllr(targets: Floats, others: Floats) -> float:
    costs = [np.mean(np.logaddexp(0, values)) for values in (-targets, others)]
    return float(sum(costs) / (2 * math.log(2)))
