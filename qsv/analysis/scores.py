"""Score drift and decision flips between a float network and a quantized one, on the same trials."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsv.scoring import eer_threshold
from qsv.scoring.metrics import Floats, checked_trials

_QUANTILES = (0.5, 0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class Drift:
    """How scores moved: statistics of `quantized - reference` over some trials.

    Attributes:
        trials: how many.
        mean: of the drift; a shift that a new threshold undoes.
        deviation: population standard deviation of the drift.
        median: of its magnitude, like the two below.
        quantile_90: nine of ten trials moved less.
        quantile_99: all but one of a hundred moved less.
    """

    trials: int
    mean: float
    deviation: float
    median: float
    quantile_90: float
    quantile_99: float

    @classmethod
    def of(cls, drift: Floats) -> "Drift":
        """Statistics of drifts `[trials]`; NaN where there are none."""
        if not drift.size:
            return cls(0, *[float("nan")] * 5)
        quantiles = [float(value) for value in np.quantile(np.abs(drift), _QUANTILES)]
        return cls(drift.size, float(drift.mean()), float(drift.std()), *quantiles)


def score_drift(reference: ArrayLike, scores: ArrayLike, labels: ArrayLike) -> dict[str, Drift]:
    """Drift over all trials and over each class.

    Args:
        reference: `[trials]` scores of the float network.
        scores: `[trials]` of the quantized one.
        labels: `[trials]` bool or 0/1, true for target trials.

    Returns:
        {"all", "target", "non-target": statistics}.

    Raises:
        ValueError: as `qsv.scoring.eer`, for either list of scores.
    """
    reference, scores, labels = _checked(reference, scores, labels)
    drift = scores - reference
    return {"all": Drift.of(drift), "target": Drift.of(drift[labels]), "non-target": Drift.of(drift[~labels])}


def drift_by_distance(
    reference: ArrayLike,
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: float | None = None,
    num_bins: int = 5,
) -> list[tuple[float, float, Drift]]:
    """Drift over trials by the distance of their reference score from the threshold.

    Args:
        reference: as for `score_drift`, and so are the next two.
        scores: as there.
        labels: as there.
        threshold: of the decision; that of the reference's EER when None.
        num_bins: bins, each of about as many trials, nearest first.

    Returns:
        (lower edge, upper edge, statistics) of every bin.

    Raises:
        ValueError: as `score_drift`; fewer than one bin.
    """
    reference, scores, labels = _checked(reference, scores, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    threshold = eer_threshold(reference, labels) if threshold is None else threshold
    distances, drift = np.abs(reference - threshold), scores - reference
    edges = np.quantile(distances, np.linspace(0, 1, num_bins + 1))
    places = np.clip(np.searchsorted(edges, distances, side="right") - 1, 0, num_bins - 1)
    return [(float(edges[one]), float(edges[one + 1]), Drift.of(drift[places == one])) for one in range(num_bins)]


@dataclasses.dataclass(frozen=True)
class DecisionFlips:
    """Trials that two networks decide differently.

    Attributes:
        trials: how many there are of the class or classes.
        harmful: the reference was right, the other is wrong.
        beneficial: the reverse.
    """

    trials: int
    harmful: int
    beneficial: int


def decision_flips(
    reference: ArrayLike,
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: float | None = None,
    own_threshold: float | None = None,
) -> dict[str, DecisionFlips]:
    """Flips over all trials and over each class.

    Args:
        reference: as for `score_drift`, and so are the next two.
        scores: as there.
        labels: as there.
        threshold: of the reference's decision, that of its EER when None.
        own_threshold: of the quantized network's decision, `threshold` when None: a network that takes the float one's
            place in a running system. `eer_threshold(scores, labels)` instead is one that was calibrated anew.

    Returns:
        {"all", "target", "non-target": flips}.

    Raises:
        ValueError: as `score_drift`.
    """
    reference, scores, labels = _checked(reference, scores, labels)
    threshold = eer_threshold(reference, labels) if threshold is None else threshold
    harmful, beneficial = _flips(reference, scores, labels, threshold, own_threshold)

    def over(trials: NDArray[np.bool_]) -> DecisionFlips:
        counts = (int(np.count_nonzero(flips[trials])) for flips in (harmful, beneficial))
        return DecisionFlips(int(np.count_nonzero(trials)), *counts)

    return {"all": over(np.ones_like(labels)), "target": over(labels), "non-target": over(~labels)}


def flip_density(
    reference: ArrayLike,
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    threshold: float | None = None,
    own_threshold: float | None = None,
    num_bins: int = 40,
) -> dict[str, Any]:
    """Where on the reference's scale of scores the flips lie.

    Args:
        reference: as for `decision_flips`, and so are all but the last.
        scores: as there.
        labels: as there.
        threshold: as there.
        own_threshold: as there.
        num_bins: bins of equal width over the reference's scores.

    Returns:
        {"edges": `[bins + 1]`, "trials", "harmful", "beneficial": `[bins]` counts}.

    Raises:
        ValueError: as `score_drift`; fewer than one bin.
    """
    reference, scores, labels = _checked(reference, scores, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    threshold = eer_threshold(reference, labels) if threshold is None else threshold
    harmful, beneficial = _flips(reference, scores, labels, threshold, own_threshold)
    counts, edges = np.histogram(reference, num_bins)
    return {
        "edges": edges,
        "trials": counts,
        "harmful": np.histogram(reference[harmful], edges)[0],
        "beneficial": np.histogram(reference[beneficial], edges)[0],
    }


def _flips(
    reference: Floats, scores: Floats, labels: NDArray[np.bool_], threshold: float, own_threshold: float | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Harmful and beneficial ones, `[trials]` each."""
    before = (reference >= threshold) == labels
    after = (scores >= (threshold if own_threshold is None else own_threshold)) == labels
    return before & ~after, ~before & after


def _checked(reference: ArrayLike, scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    before, checked = checked_trials(reference, labels)
    after, _ = checked_trials(scores, labels)
    return before, after, checked
