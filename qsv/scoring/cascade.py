"""The multi-precision cascade on stored scores: cheap stages decide what they are sure of, dear ones the rest."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsv.scoring.calibration import AffineCalibration
from qsv.scoring.metrics import Floats


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Calibrations and bounds of stages, cheapest first.

    Stage k settles a trial where its log-likelihood ratio is further than `bounds[k]` from the threshold; the last
    stage settles all that reach it.

    Attributes:
        calibrations: of every stage, fitted on speakers who are in no trial.
        bounds: of every stage but the last; 0 settles everything, infinity nothing.
        threshold: log-likelihood ratio from which a trial is accepted.

    Raises:
        ValueError: there are fewer than two stages, or not one bound fewer, or a bound is negative or NaN.
    """

    calibrations: tuple[AffineCalibration, ...]
    bounds: tuple[float, ...]
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if len(self.calibrations) < 2 or len(self.bounds) != len(self.calibrations) - 1:
            raise ValueError(
                "a cascade needs two stages or more, and a bound for each but the last, got "
                f"{len(self.calibrations)} calibrations and {len(self.bounds)} bounds"
            )
        if not all(bound >= 0 for bound in self.bounds):
            raise ValueError(f"bounds can't be negative or NaN, got {self.bounds}")

    def settles(self, stage: int, llrs: ArrayLike) -> NDArray[np.bool_]:
        """Whether a stage decides trials of these log-likelihood ratios."""
        if stage == len(self.bounds):
            return np.ones(np.shape(llrs), bool)
        return np.abs(np.asarray(llrs, np.float64) - self.threshold) > self.bounds[stage]


@dataclasses.dataclass(frozen=True, eq=False)
class CascadeOutcome:
    """What a cascade makes of trials.

    Attributes:
        llrs: `[trials]` log-likelihood ratio of the stage that settled each; the score of the cascade.
        accepted: `[trials]` bool.
        stages: `[trials]` the stage that settled each, from 0.
        num_stages: how many there are.
    """

    llrs: Floats
    accepted: NDArray[np.bool_]
    stages: NDArray[np.intp]
    num_stages: int

    @property
    def settled(self) -> Floats:
        """`[stages]` share of the trials that each settled."""
        return np.bincount(self.stages, minlength=self.num_stages) / max(self.stages.size, 1)

    @property
    def reached(self) -> Floats:
        """`[stages]` share of the trials that reached each."""
        return np.cumsum(self.settled[::-1])[::-1]

    def embedded(self, *trial_utterances: ArrayLike) -> NDArray[np.intp]:
        """`[stages]` how many utterances each stage embeds: once each, however many of their trials reach it.

        Args:
            trial_utterances: arrays `[trials]` of integers, such as each trial's enrolment and test utterance.
        """
        return np.array(
            [
                np.unique(np.concatenate([np.asarray(own)[self.stages >= stage] for own in trial_utterances])).size
                for stage in range(self.num_stages)
            ]
        )

    def expected_cost(self, costs: Sequence[float], *trial_utterances: ArrayLike) -> float:
        """Cost of all embeddings over that of every utterance at the last stage.

        Args:
            costs: `[stages]` of one embedding, such as bit operations.
            trial_utterances: as for `embedded`.
        """
        if len(costs) != self.num_stages:
            raise ValueError(f"costs must be of the {self.num_stages} stages, got {len(costs)}")
        counts = self.embedded(*trial_utterances)
        return float(np.dot(counts, costs) / (counts[0] * costs[-1]))


def run_cascade(cascade: Cascade, scores: ArrayLike) -> CascadeOutcome:
    """Decide trials from stored scores of every stage.

    Args:
        cascade: calibrations and bounds.
        scores: `[stages, trials]`, of each stage's network.

    Returns:
        The outcome; equal to that of a runtime which computes a stage's scores only for trials that reach it.

    Raises:
        ValueError: another number of stages.
    """
    llrs = _llrs(cascade.calibrations, scores)
    settled = np.stack([cascade.settles(stage, own) for stage, own in enumerate(llrs)])
    stages = np.argmax(settled, axis=0)
    final = llrs[stages, np.arange(llrs.shape[1])]
    return CascadeOutcome(final, final >= cascade.threshold, stages, len(llrs))


def bounds_for_flips(
    calibrations: Sequence[AffineCalibration],
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    max_harmful: float,
    threshold: float = 0.0,
) -> tuple[float, ...]:
    """The smallest bounds with which decisions hardly get worse than the last stage's.

    A harmful flip is a trial that the last stage decides rightly and the cascade wrongly. Stages share the budget
    evenly; each is chosen on the trials that reach it.

    Args:
        calibrations: of every stage.
        scores: `[stages, trials]` of development speakers who are in no trial that is decided with the result.
        labels: `[trials]` bool, true for target trials.
        max_harmful: harmful flips over trials, in each class (of which false alarms have many more).
        threshold: log-likelihood ratio of the decision.

    Returns:
        A bound for every stage but the last.
    """
    llrs, labels = _llrs(calibrations, scores), np.asarray(labels, bool)
    if labels.shape != llrs.shape[1:]:
        raise ValueError(f"labels must be [trials], got {labels.shape} for scores {llrs.shape}")
    if not max_harmful >= 0:
        raise ValueError(f"max_harmful can't be negative, got {max_harmful}")
    right = (llrs[-1] >= threshold) == labels
    remaining = np.ones(labels.size, bool)
    bounds = []
    for own in llrs[:-1]:
        harmful = remaining & right & ((own >= threshold) != labels)
        distances = np.abs(own - threshold)
        bound = 0.0
        for of_class in (labels, ~labels):
            allowed = int(max_harmful / (len(llrs) - 1) * of_class.sum())
            # The furthest flips but for those that are allowed must not be settled, hence not exceed the bound.
            furthest = np.sort(distances[harmful & of_class])[::-1]
            if furthest.size > allowed:
                bound = max(bound, float(furthest[allowed]))
        bounds.append(bound)
        remaining &= distances <= bound
    return tuple(bounds)


def bounds_for_escalation(
    calibrations: Sequence[AffineCalibration],
    scores: ArrayLike,
    *,
    max_escalated: ArrayLike,
    threshold: float = 0.0,
) -> tuple[float, ...]:
    """The largest bounds with which few enough trials go on from each stage.

    Args:
        calibrations: of every stage.
        scores: `[stages, trials]` of development speakers.
        max_escalated: largest share of a stage's trials that it may pass on, 0 to 1; one for all stages, or
            `[stages - 1]`. With 0 a stage settles all trials, those of other speakers too.
        threshold: log-likelihood ratio of the decision.

    Returns:
        A bound for every stage but the last.

    Raises:
        ValueError: another number of stages, or a share that is not in [0, 1].
    """
    given = np.asarray(max_escalated, np.float64)
    if given.shape not in ((), (len(calibrations) - 1,)) or not np.all((given >= 0) & (given <= 1)):
        raise ValueError(f"max_escalated must be in [0, 1], 1 or {len(calibrations) - 1} of them, got {given}")
    llrs = _llrs(calibrations, scores)
    remaining = np.ones(llrs.shape[1], bool)
    bounds = []
    for own, share in zip(llrs[:-1], np.broadcast_to(given, len(llrs) - 1), strict=True):
        distances = np.abs(own - threshold)
        here = np.sort(distances[remaining])
        count = int(share * here.size)
        if count == here.size:
            bound = np.inf
        else:
            # All distances up to the bound go on, equal ones together; just below the first that must not.
            bound = max(float(np.nextafter(here[count], -np.inf)), 0.0) if count else 0.0
        bounds.append(bound)
        remaining &= distances <= bound
    return tuple(bounds)


def _llrs(calibrations: Sequence[AffineCalibration], scores: ArrayLike) -> Floats:
    """`[stages, trials]`."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or len(scores) != len(calibrations):
        raise ValueError(f"scores must be [{len(calibrations)} stages, trials], got {scores.shape}")
    return np.stack([calibration(own) for calibration, own in zip(calibrations, scores, strict=True)])
