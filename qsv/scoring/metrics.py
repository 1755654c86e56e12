"""Error rates of a list of scored trials: equal error rate, minimum detection cost, DET curve.

A trial is accepted where `score >= threshold`. Its operating points are the thresholds at every distinct
score, lowest first, and one above all scores; trials of equal score cross the threshold together, since no
threshold can tell them apart.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def eer(scores: ArrayLike, labels: ArrayLike) -> float:
    """Equal error rate: where misses and false alarms are equally frequent.

    Neighbouring operating points of the ROC are joined by straight lines, so trials of equal score make one
    slanted line; the EER is where p_miss = p_fa on that line. Hence all-equal scores give 0.5, and perfect
    ones 0.

    Args:
        scores: `[trials]`, higher means more likely the same speaker.
        labels: `[trials]` bool or 0/1, true for target trials.

    Returns:
        The EER as a fraction, not in percent.

    Raises:
        ValueError: shapes differ, a score is not finite, a label is not 0 or 1, or one class is missing.
    """
    _, p_miss, p_fa = det_curve(scores, labels)
    return float(eer_of_rates(p_miss, p_fa))


def eer_threshold(scores: ArrayLike, labels: ArrayLike) -> float:
    """Threshold at the equal error rate, interpolated between the thresholds of the same two operating
    points.

    Where all scores are equal it is that score. Arguments and errors are those of `eer`.
    """
    return eer_and_threshold(*det_curve(scores, labels))[1]


def min_dcf(
    scores: ArrayLike, labels: ArrayLike, *, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """Minimum detection cost over all thresholds, normalised as in the NIST evaluations.

        min_t [ c_miss p_target p_miss(t) + c_fa (1 - p_target) p_fa(t) ] / min(c_miss p_target, c_fa (1 -
        p_target))

    Args:
        scores: `[trials]`, higher means more likely the same speaker.
        labels: `[trials]` bool or 0/1, true for target trials.
        p_target: prior probability of a target trial.
        c_miss: cost of a miss.
        c_fa: cost of a false alarm.

    Returns:
        The cost, at most 1: that of accepting or rejecting everything.

    Raises:
        ValueError: as `eer`; or the prior is not between 0 and 1, or a cost is not positive.

    Source: NIST Speaker Recognition Evaluation plans (SRE 2016, section 3.1).
    """
    _, p_miss, p_fa = det_curve(scores, labels)
    return float(min_dcf_of_rates(p_miss, p_fa, p_target=p_target, c_miss=c_miss, c_fa=c_fa))


def det_curve(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """All operating points, by ascending threshold; O(n log n).

    Args:
        scores: `[trials]`, higher means more likely the same speaker.
        labels: `[trials]` bool or 0/1, true for target trials.

    Returns:
        `(thresholds, p_miss, p_fa)`, each `[distinct scores + 1]` float64. The first point accepts
        everything; the last has the threshold infinity and accepts nothing.

    Raises:
        ValueError: as `eer`.
    """
    scores, labels = checked_trials(scores, labels)
    order = np.argsort(scores, kind="stable")
    starts = group_starts(scores[order])
    p_miss, p_fa = rates(labels[order].astype(np.float64), (~labels[order]).astype(np.float64), starts)
    return np.append(scores[order][starts], np.inf), p_miss, p_fa


def eer_of_rates(p_miss: Floats, p_fa: Floats) -> float:
    """`eer` from operating points `[points]` by ascending threshold, which run from (0, 1) to (1, 0)."""
    after, fraction = _crossing(p_miss, p_fa)
    return float((1.0 - fraction) * p_miss[after - 1] + fraction * p_miss[after])


def eer_and_threshold(thresholds: Floats, p_miss: Floats, p_fa: Floats) -> tuple[float, float]:
    """`eer` and `eer_threshold` from operating points `[points]` by ascending threshold, as `det_curve` gives them."""
    after, fraction = _crossing(p_miss, p_fa)
    lower, upper = thresholds[after - 1], thresholds[after]
    threshold = lower if np.isinf(upper) else (1.0 - fraction) * lower + fraction * upper
    return eer_of_rates(p_miss, p_fa), float(threshold)


def min_dcf_of_rates(
    p_miss: Floats, p_fa: Floats, *, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> float:
    """`min_dcf` from operating points `[points]`."""
    return float(np.min(detection_cost(p_miss, p_fa, p_target=p_target, c_miss=c_miss, c_fa=c_fa)))


def detection_cost(
    p_miss: Floats, p_fa: Floats, *, p_target: float = 0.01, c_miss: float = 1.0, c_fa: float = 1.0
) -> Floats:
    """Normalised detection cost of every operating point; see `min_dcf`."""
    if not 0.0 < p_target < 1.0:
        raise ValueError(f"p_target must be between 0 and 1, got {p_target}")
    if not (c_miss > 0.0 and c_fa > 0.0):
        raise ValueError(f"costs must be positive, got c_miss={c_miss}, c_fa={c_fa}")
    weight_miss, weight_fa = c_miss * p_target, c_fa * (1.0 - p_target)
    return (weight_miss * p_miss + weight_fa * p_fa) / min(weight_miss, weight_fa)


def checked_trials(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores as float64 and labels as bool, both `[trials]`; raises what `eer` documents."""
    scores, labels = np.asarray(scores, np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be [trials] both, got {scores.shape} and {labels.shape}")
    finite = np.isfinite(scores)
    if not finite.all():
        count, first = np.count_nonzero(~finite), np.argmin(finite)
        raise ValueError(f"{count} of {scores.size} scores are not finite, first trial {first}: {scores[first]}")
    allowed = np.isin(labels, (0, 1))
    if not allowed.all():
        first = np.argmin(allowed)
        raise ValueError(f"labels must be 0 or 1, trial {first} has {labels[first]!r}")
    labels = labels.astype(bool)
    targets = np.count_nonzero(labels)
    if targets in (0, labels.size):
        raise ValueError(f"need both classes, got {targets} targets and {labels.size - targets} non-targets")
    return scores, labels


def group_starts(ordered: Floats) -> NDArray[np.intp]:
    """Index of the first trial of every distinct score, `[distinct scores]`, from ascending scores."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def run_starts(ordered: Floats, labels: NDArray[np.bool_]) -> NDArray[np.intp]:
    """`group_starts` of the scores, but for those that join trials of one class to more of the same.

    The operating points left out lie on straight lines between their neighbours, whatever the trials' weights, so that
    neither EER nor detection cost change.
    """
    starts = group_starts(ordered)
    sizes = np.diff(np.append(starts, ordered.size))
    targets = np.add.reduceat(labels.astype(np.intp), starts)
    pure = (targets == 0) | (targets == sizes)
    joins = pure[1:] & pure[:-1] & ((targets[1:] == 0) == (targets[:-1] == 0))
    return starts[np.concatenate([[True], ~joins])]


def rates(targets: Floats, non_targets: Floats, starts: NDArray[np.intp]) -> tuple[Floats, Floats]:
    """Miss and false-alarm rates `[starts + 1]` from weights `[trials]` of each class, by ascending score.

    A trial has weight 0 in the other class. Each class must have some weight.
    """
    missed, rejected = (
        np.concatenate([[0.0], np.cumsum(np.add.reduceat(weights, starts))]) for weights in (targets, non_targets)
    )
    return missed / missed[-1], (rejected[-1] - rejected) / rejected[-1]


def _crossing(p_miss: Floats, p_fa: Floats) -> tuple[int, float]:
    """First operating point with p_miss >= p_fa, and the fraction of the way to it where both are equal."""
    difference = p_miss - p_fa
    after = int(np.argmax(difference >= 0.0))
    before = difference[after - 1]
    return after, float(-before / (difference[after] - before))
