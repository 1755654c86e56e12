"""Confidence intervals of error rates, and of the difference between two systems, by the bootstrap.

Trials are not independent: every speaker is in many of them. Resampling trials as if they were gives
intervals that are far too narrow. Here the speakers are resampled instead: with speaker s drawn m_s times, a
non-target trial of speakers a and b weighs m_a m_b, and a target trial of speaker a weighs m_a. (m_a^2 would
compare the copies of one speaker with each other as if they were new recordings; here, copies never meet in a
trial.)

Two systems scored on the same trials are compared within each resample, which cancels what they share.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsv.scoring.metrics import checked_trials, eer_of_rates, rates, run_starts

Floats = NDArray[np.float64]
Metric = Callable[[Floats, Floats], float]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure measured on all trials, and where it may lie.

    Attributes:
        estimate: the figure on the trials as they are.
        low: lower end of the interval.
        high: upper end.
        standard_error: standard deviation over the resamples.
        confidence: share of the resamples between low and high.
    """

    estimate: float
    low: float
    high: float
    standard_error: float
    confidence: float


def bootstrap(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    enrolment_speakers: ArrayLike | None = None,
    test_speakers: ArrayLike | None = None,
    metric: Metric = eer_of_rates,
    resample: Literal["speakers", "trials"] = "speakers",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of one system's EER, minDCF or other metric of the operating points.

    >>> from functools import partial
    >>> from qsv.scoring import min_dcf_of_rates
    >>> interval = bootstrap([3., 1., 2., 0.], [1, 1, 0, 0], metric=partial(min_dcf_of_rates, p_target=0.5),
    ...                      resample="trials", num_resamples=100)
    >>> interval.estimate
    0.5

    Args:
        scores: `[trials]`, higher means more likely the same speaker.
        labels: `[trials]` bool or 0/1, true for target trials.
        enrolment_speakers: `[trials]` names or numbers, the speaker on one side; required to resample
            speakers.
        test_speakers: `[trials]` that on the other side, the same one exactly where the label is true.
        metric: function of `(p_miss, p_fa)`, each `[points]` float64 by ascending threshold, such as
            `eer_of_rates` or `functools.partial(min_dcf_of_rates, p_target=0.05)`.
        resample: what is drawn with replacement; "trials" takes trials for independent.
        num_resamples: resamples with trials of both classes; others are drawn again.
        confidence: share of the resamples inside the interval, which leaves out as many below as above.
        seed: of `numpy.random.default_rng`.

    Returns:
        The interval; the estimate is the metric on the trials as they are.

    Raises:
        ValueError: as `eer`; or the speakers are missing or contradict the labels; or an option is out of
            range.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007 (weights are products);
    Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems: the subsets bootstrap", CVIU
    93, 2004 (people, not trials, are resampled).
    """
    resampled = resample_metrics(
        [scores],
        labels,
        metrics=[metric],
        enrolment_speakers=enrolment_speakers,
        test_speakers=test_speakers,
        resample=resample,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )
    return resampled.interval()


def paired_bootstrap(
    reference_scores: ArrayLike,
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    enrolment_speakers: ArrayLike | None = None,
    test_speakers: ArrayLike | None = None,
    metric: Metric = eer_of_rates,
    comparison: Literal["difference", "ratio"] = "difference",
    resample: Literal["speakers", "trials"] = "speakers",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of how much a system's metric differs from a reference's on the same trials.

    Both see the same resamples. A difference whose interval holds 0 (a ratio: 1) may be chance.

    Args:
        reference_scores: `[trials]` of the reference, such as the float network.
        scores: `[trials]` of the system compared with it, in the same order.
        labels: as in `bootstrap`, and so are the other options.
        enrolment_speakers: as in `bootstrap`.
        test_speakers: as in `bootstrap`.
        metric: as in `bootstrap`.
        comparison: "difference" is metric(scores) - metric(reference_scores), "ratio" is their quotient.
        resample: as in `bootstrap`.
        num_resamples: as in `bootstrap`.
        confidence: as in `bootstrap`.
        seed: as in `bootstrap`.

    Returns:
        The interval of the difference or ratio.

    Raises:
        ValueError: as `bootstrap`; or a ratio is asked for and the reference's metric is 0 in some resample.
    """
    if comparison not in ("difference", "ratio"):
        raise ValueError(f"comparison must be 'difference' or 'ratio', got {comparison!r}")
    resampled = resample_metrics(
        [scores, reference_scores],
        labels,
        metrics=[metric],
        enrolment_speakers=enrolment_speakers,
        test_speakers=test_speakers,
        resample=resample,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )
    return resampled.difference() if comparison == "difference" else resampled.ratio()


@dataclasses.dataclass(frozen=True)
class ResampledMetrics:
    """Several metrics of several systems on the same resamples of the same trials.

    Attributes:
        estimates: [systems, metrics] float64, on the trials as they are.
        samples: [resamples, systems, metrics] float64.
        confidence: share of the resamples inside each interval.
    """

    estimates: Floats
    samples: Floats
    confidence: float

    def interval(self, metric: int = 0, system: int = 0) -> Interval:
        """The interval of one system's metric, as `bootstrap` gives it."""
        return self._interval(self.estimates[system, metric], self.samples[:, system, metric])

    def difference(self, metric: int = 0, system: int = 0, reference: int = 1) -> Interval:
        """The interval of how much a metric of a system exceeds a reference's."""
        estimate = self.estimates[system, metric] - self.estimates[reference, metric]
        return self._interval(estimate, self.samples[:, system, metric] - self.samples[:, reference, metric])

    def ratio(self, metric: int = 0, system: int = 0, reference: int = 1) -> Interval:
        """The interval of the quotient; raises ValueError where the reference's metric is 0 in some resample."""
        before = self.samples[:, reference, metric]
        if self.estimates[reference, metric] == 0 or not before.all():
            raise ValueError("the reference's metric is 0 in a resample, use comparison='difference'")
        estimate = self.estimates[system, metric] / self.estimates[reference, metric]
        return self._interval(estimate, self.samples[:, system, metric] / before)

    def averaged(self, groups: Sequence[Sequence[int]]) -> "ResampledMetrics":
        """Systems averaged in groups, such as the trainings of one kind that differ in their seed.

        The intervals are then over trials or speakers, not over what the group varies.
        """
        estimates = [self.estimates[list(group)].mean(axis=0) for group in groups]
        samples = [self.samples[:, list(group)].mean(axis=1) for group in groups]
        return ResampledMetrics(np.asarray(estimates), np.stack(samples, axis=1), self.confidence)

    def _interval(self, estimate: float, samples: Floats) -> Interval:
        low, high = np.quantile(samples, [(1.0 - self.confidence) / 2.0, (1.0 + self.confidence) / 2.0])
        return Interval(float(estimate), float(low), float(high), float(np.std(samples, ddof=1)), self.confidence)


def resample_metrics(
    systems: Sequence[ArrayLike],
    labels: ArrayLike,
    *,
    metrics: Sequence[Metric] = (eer_of_rates,),
    enrolment_speakers: ArrayLike | None = None,
    test_speakers: ArrayLike | None = None,
    resample: Literal["speakers", "trials"] = "speakers",
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ResampledMetrics:
    """Measure all systems by all metrics on each resample: one pass where `bootstrap` would make one for each.

    Args:
        systems: `[trials]` scores of each, in the same order.
        labels: as in `bootstrap`, and so are the other options.
        metrics: as `bootstrap`'s metric.
        enrolment_speakers: as in `bootstrap`.
        test_speakers: as in `bootstrap`.
        resample: as in `bootstrap`.
        num_resamples: as in `bootstrap`.
        confidence: as in `bootstrap`.
        seed: as in `bootstrap`.

    Raises:
        ValueError: as `bootstrap`.
    """
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be 2 or more, got {num_resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    _, checked = checked_trials(systems[0], labels)
    units = _Units.of(checked, enrolment_speakers, test_speakers, resample)
    ordered = [_SortedTrials.of(scores, checked, units) for scores in systems]
    samples = []
    for drawn in units.draws(seed):
        weights = [system.weights(drawn) for system in ordered]
        # Resamples without trials of both classes are drawn again.
        if np.any(weights[0][ordered[0].labels]) and np.any(weights[0][~ordered[0].labels]):
            samples.append([system.measure(metrics, own) for system, own in zip(ordered, weights, strict=True)])
        if len(samples) == num_resamples:
            break
    estimates = [system.measure(metrics, np.ones(checked.size)) for system in ordered]
    return ResampledMetrics(np.asarray(estimates), np.asarray(samples), confidence)


@dataclasses.dataclass(frozen=True)
class _Units:
    """What is drawn with replacement, speakers or trials; each trial has one or two.

    Attributes:
        count: units.
        enrolment: `[trials]` unit on one side.
        test: `[trials]` that on the other side; None where trials are drawn.
    """

    count: int
    enrolment: NDArray[np.intp]
    test: NDArray[np.intp] | None

    @classmethod
    def of(
        cls,
        labels: NDArray[np.bool_],
        enrolment_speakers: ArrayLike | None,
        test_speakers: ArrayLike | None,
        resample: str,
    ) -> "_Units":
        if resample not in ("speakers", "trials"):
            raise ValueError(f"resample must be 'speakers' or 'trials', got {resample!r}")
        if resample == "trials":
            return cls(labels.size, np.arange(labels.size), None)
        if enrolment_speakers is None or test_speakers is None:
            raise ValueError("resample='speakers' needs enrolment_speakers and test_speakers")
        sides = np.asarray(enrolment_speakers), np.asarray(test_speakers)
        if any(side.shape != labels.shape for side in sides):
            raise ValueError(f"speakers must be {labels.shape}, got {sides[0].shape} and {sides[1].shape}")
        names, numbers = np.unique(np.concatenate(sides), return_inverse=True)
        enrolment, test = np.split(numbers, 2)
        wrong = (enrolment == test) != labels
        if wrong.any():
            first = np.argmax(wrong)
            raise ValueError(
                f"{np.count_nonzero(wrong)} labels contradict their speakers, the first is trial {first}: "
                f"label {int(labels[first])}, speakers {sides[0][first]} and {sides[1][first]}"
            )
        return cls(names.size, enrolment, test)

    def draws(self, seed: int) -> Iterator[Floats]:
        """Yields how often each unit is drawn, `[units]`, without end.

        Enough of them have trials of both classes: a target and a non-target trial need three speakers at most, in a
        fifth of all draws.
        """
        generator = np.random.default_rng(seed)
        while True:
            drawn = generator.integers(self.count, size=self.count)
            yield np.bincount(drawn, minlength=self.count).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class _SortedTrials:
    """One system's trials by ascending score, sorted once for all resamples.

    Attributes:
        labels: `[trials]`.
        starts: as `run_starts` gives them.
        enrolment: `[trials]` unit on one side.
        test: `[trials]` that on the other side of a non-target trial, and one of weight 1 for a target trial; None
            where trials are drawn.
    """

    labels: NDArray[np.bool_]
    starts: NDArray[np.intp]
    enrolment: NDArray[np.intp]
    test: NDArray[np.intp] | None

    @classmethod
    def of(cls, scores: ArrayLike, labels: NDArray[np.bool_], units: _Units) -> "_SortedTrials":
        scores, _ = checked_trials(scores, labels)
        order = np.argsort(scores, kind="stable")
        test = None if units.test is None else np.where(labels, units.count, units.test)[order]
        return cls(labels[order], run_starts(scores[order], labels[order]), units.enrolment[order], test)

    def weights(self, drawn: Floats) -> Floats:
        """`[trials]` from how often each unit was drawn."""
        own = drawn[self.enrolment]
        return own if self.test is None else own * np.append(drawn, 1.0)[self.test]

    def measure(self, metrics: Sequence[Metric], weights: Floats) -> list[float]:
        """The metrics of weighted trials."""
        targets = np.where(self.labels, weights, 0.0)
        operating_points = rates(targets, weights - targets, self.starts)
        return [float(metric(*operating_points)) for metric in metrics]
