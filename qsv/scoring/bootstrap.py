"""Confidence intervals of error rates, and of the difference between two systems, by the bootstrap.

Trials are not independent: every speaker is in many of them. Resampling trials as if they were gives
intervals that are far too narrow. Here the speakers are resampled instead: with speaker s drawn m_s times, a
non-target trial of speakers a and b weighs m_a m_b, and a target trial of speaker a weighs m_a. (m_a^2 would
compare the copies of one speaker with each other as if they were new recordings; here, copies never meet in a
trial.)

Two systems scored on the same trials are compared within each resample, which cancels what they share.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsv.scoring.metrics import checked_trials, eer_of_rates, group_starts, rates

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
    _check_options(num_resamples, confidence)
    system = _SortedTrials.of(scores, labels)
    draws = _Resampler.of(system.labels, enrolment_speakers, test_speakers, resample)
    samples = [system.measure(metric, weights) for weights in draws.weights(num_resamples, seed)]
    return _interval(system.measure(metric, None), np.asarray(samples), confidence)


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
    _check_options(num_resamples, confidence)
    if comparison not in ("difference", "ratio"):
        raise ValueError(f"comparison must be 'difference' or 'ratio', got {comparison!r}")
    reference, system = _SortedTrials.of(reference_scores, labels), _SortedTrials.of(scores, labels)
    draws = _Resampler.of(system.labels, enrolment_speakers, test_speakers, resample)

    def compare(weights: Floats | None) -> float:
        before, after = reference.measure(metric, weights), system.measure(metric, weights)
        if comparison == "difference":
            return after - before
        if before == 0.0:
            raise ValueError("the reference's metric is 0 in a resample, use comparison='difference'")
        return after / before

    samples = [compare(weights) for weights in draws.weights(num_resamples, seed)]
    return _interval(compare(None), np.asarray(samples), confidence)


def _check_options(num_resamples: int, confidence: float) -> None:
    if num_resamples < 2:
        raise ValueError(f"num_resamples must be 2 or more, got {num_resamples}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def _interval(estimate: float, samples: Floats, confidence: float) -> Interval:
    low, high = np.quantile(samples, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return Interval(estimate, float(low), float(high), float(np.std(samples, ddof=1)), confidence)


@dataclasses.dataclass(frozen=True)
class _SortedTrials:
    """One system's trials, sorted once for all resamples."""

    labels: NDArray[np.bool_]
    order: NDArray[np.intp]
    ordered_labels: NDArray[np.bool_]
    starts: NDArray[np.intp]

    @classmethod
    def of(cls, scores: ArrayLike, labels: ArrayLike) -> "_SortedTrials":
        scores, labels = checked_trials(scores, labels)
        order = np.argsort(scores, kind="stable")
        return cls(labels, order, labels[order], group_starts(scores[order]))

    def measure(self, metric: Metric, weights: Floats | None) -> float:
        """The metric with weights `[trials]` in the original order; None for all 1."""
        ordered = np.ones(self.order.size) if weights is None else weights[self.order]
        targets = np.where(self.ordered_labels, ordered, 0.0)
        return float(metric(*rates(targets, ordered - targets, self.starts)))


@dataclasses.dataclass(frozen=True)
class _Resampler:
    """Draws weights of trials; units are what is drawn, speakers or trials, and each trial has one or two."""

    labels: NDArray[np.bool_]
    num_units: int
    enrolment: NDArray[np.intp] | None
    test: NDArray[np.intp] | None

    @classmethod
    def of(
        cls,
        labels: NDArray[np.bool_],
        enrolment_speakers: ArrayLike | None,
        test_speakers: ArrayLike | None,
        resample: str,
    ) -> "_Resampler":
        if resample not in ("speakers", "trials"):
            raise ValueError(f"resample must be 'speakers' or 'trials', got {resample!r}")
        if resample == "trials":
            return cls(labels, labels.size, None, None)
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
        return cls(labels, names.size, enrolment, test)

    def weights(self, num_resamples: int, seed: int) -> Iterator[Floats]:
        """Yields weights `[trials]` of so many resamples that have trials of both classes."""
        generator = np.random.default_rng(seed)
        accepted = 0
        # This ends: a target and a non-target trial need three speakers at most, in a fifth of all draws.
        while accepted < num_resamples:
            drawn = generator.integers(self.num_units, size=self.num_units)
            weights = np.bincount(drawn, minlength=self.num_units).astype(np.float64)
            if self.enrolment is not None and self.test is not None:
                other = np.where(self.labels, 1.0, weights[self.test])
                weights = weights[self.enrolment] * other
            if np.any(weights[self.labels]) and np.any(weights[~self.labels]):
                accepted += 1
                yield weights
