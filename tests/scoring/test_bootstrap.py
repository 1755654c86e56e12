import functools

import numpy as np
import pytest

from qsv.scoring import (
    Interval,
    bootstrap,
    eer,
    eer_of_rates,
    min_dcf,
    min_dcf_of_rates,
    paired_bootstrap,
    resample_metrics,
)
from qsv.scoring.bootstrap import _SortedTrials, _Units


def corpus(rng, num_speakers=40, speaker_spread=1.0):
    """Every pair of two recordings each; how well a speaker's targets score depends on the speaker."""
    speakers = np.repeat(np.arange(num_speakers), 4)
    enrolment, test = np.triu_indices(speakers.size, 1)
    enrolment_speakers, test_speakers = speakers[enrolment], speakers[test]
    labels = enrolment_speakers == test_speakers
    ease = speaker_spread * rng.normal(size=num_speakers)
    scores = rng.normal(size=labels.size) + labels * (2.5 + ease[enrolment_speakers])
    return scores, labels, {"enrolment_speakers": enrolment_speakers, "test_speakers": test_speakers}


def p_miss_at_zero(p_miss, p_fa):
    """Miss rate at the operating point above the lowest scores: a plain proportion where those are a tie."""
    return p_miss[1]


def test_weights_by_hand():
    """m is (2, 0, 1): aa 2 (not 4), ab 0, ac 2, cc 1, bb 0, ca 2."""
    labels = np.array([True, False, False, True, True, False])
    units = _Units.of(labels, list("aaacbc"), list("abccba"), "speakers")
    drawn = next(counts for counts in units.draws(seed=0) if list(counts) == [2, 0, 1])
    ascending = _SortedTrials.of(np.arange(6), labels, units)
    np.testing.assert_array_equal(ascending.weights(drawn), [2, 0, 2, 1, 0, 2])
    descending = _SortedTrials.of(-np.arange(6), labels, units)
    np.testing.assert_array_equal(descending.weights(drawn), [2, 0, 1, 2, 0, 2])


def test_weighted_metrics_equal_repeating_the_trials():
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.normal(size=300), 1), rng.random(300) < 0.4
    weights = rng.integers(0, 4, 300)
    repeated = np.repeat(scores, weights), np.repeat(labels, weights)
    system = _SortedTrials.of(scores, labels, _Units.of(labels, None, None, "trials"))
    metrics = [eer_of_rates, functools.partial(min_dcf_of_rates, p_target=0.1)]
    found = system.measure(metrics, system.weights(weights.astype(float)))
    assert found == pytest.approx([eer(*repeated), min_dcf(*repeated, p_target=0.1)])


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_points_on_straight_lines_do_not_count(decimals):
    rng = np.random.default_rng(0)
    for size in (2, 3, 10, 300):
        scores, labels = np.round(rng.normal(size=size), decimals), np.arange(size) % 3 == 0
        system = _SortedTrials.of(scores, labels, _Units.of(labels, None, None, "trials"))
        found = system.measure([eer_of_rates, min_dcf_of_rates], np.ones(size))
        assert found == pytest.approx([eer(scores, labels), min_dcf(scores, labels)])


def test_one_pass_gives_what_many_give():
    rng = np.random.default_rng(0)
    scores, labels, speakers = corpus(rng, num_speakers=10)
    worse = scores + rng.normal(size=scores.size)
    options = {"num_resamples": 50, **speakers}
    together = resample_metrics([worse, scores], labels, metrics=[eer_of_rates, min_dcf_of_rates], **options)
    assert together.samples.shape == (50, 2, 2)
    assert together.interval() == bootstrap(worse, labels, **options)
    assert together.interval(metric=1, system=1) == bootstrap(scores, labels, metric=min_dcf_of_rates, **options)
    assert together.difference() == paired_bootstrap(scores, worse, labels, **options)
    assert together.ratio() == paired_bootstrap(scores, worse, labels, comparison="ratio", **options)


def test_averaged_systems_differ_as_their_means_do():
    rng = np.random.default_rng(0)
    scores, labels, speakers = corpus(rng, num_speakers=10)
    noisy = [scores + rng.normal(size=scores.size) for _ in range(4)]
    each = resample_metrics(noisy, labels, metrics=[eer_of_rates], num_resamples=50, **speakers)
    pairs = each.averaged([range(2), range(2, 4)])
    assert pairs.estimates[:, 0] == pytest.approx([each.estimates[:2].mean(), each.estimates[2:].mean()])
    difference = (each.samples[:, :2] - each.samples[:, 2:]).mean(axis=(1, 2))
    low, high = np.quantile(difference, [0.025, 0.975])
    assert (pairs.difference().low, pairs.difference().high) == pytest.approx((low, high))
    assert pairs.difference().standard_error < each.difference(reference=2).standard_error


def test_trials_give_the_standard_error_of_a_proportion():
    """Of 400 targets a quarter scores 0, below the rest: sqrt(1/4 * 3/4 / 400)."""
    scores = np.concatenate([np.zeros(100), np.ones(300), np.ones(5000)])
    labels = np.arange(scores.size) < 400
    interval = bootstrap(scores, labels, metric=p_miss_at_zero, resample="trials", num_resamples=2000)
    assert interval.estimate == 0.25
    assert interval.standard_error == pytest.approx(np.sqrt(3 / 16 / 400), rel=0.1)
    assert interval.low == pytest.approx(0.25 - 1.96 * interval.standard_error, abs=0.006)
    assert interval.high == pytest.approx(0.25 + 1.96 * interval.standard_error, abs=0.006)


def test_speakers_give_the_standard_error_of_their_means():
    """All targets of a speaker miss or none: the rate is a proportion of 50 speakers, not of 500 trials."""
    speakers = np.arange(50)
    targets, others = np.repeat(speakers, 10), np.roll(speakers, 1)
    enrolment, test = np.concatenate([targets, speakers]), np.concatenate([targets, others])
    labels = enrolment == test
    scores = np.where(labels & (enrolment < 10), 0.0, 1.0)
    options = {"metric": p_miss_at_zero, "num_resamples": 2000}
    interval = bootstrap(scores, labels, enrolment_speakers=enrolment, test_speakers=test, **options)
    assert interval.estimate == pytest.approx(0.2)
    assert interval.standard_error == pytest.approx(np.sqrt(0.2 * 0.8 / 50), rel=0.1)
    independent = bootstrap(scores, labels, resample="trials", **options)
    assert independent.standard_error == pytest.approx(np.sqrt(0.2 * 0.8 / 500), rel=0.1)


def test_estimate_and_seed():
    scores, labels, speakers = corpus(np.random.default_rng(2))
    one = bootstrap(scores, labels, num_resamples=50, seed=3, **speakers)
    assert isinstance(one, Interval) and one.estimate == eer(scores, labels) and one.confidence == 0.95
    assert one.low < one.estimate < one.high
    assert one == bootstrap(scores, labels, num_resamples=50, seed=3, **speakers)
    assert one != bootstrap(scores, labels, num_resamples=50, seed=4, **speakers)
    narrow = bootstrap(scores, labels, num_resamples=50, seed=3, confidence=0.5, **speakers)
    assert one.low < narrow.low < narrow.high < one.high


def test_order_of_the_trials_is_no_matter():
    rng = np.random.default_rng(4)
    scores, labels, speakers = corpus(rng, num_speakers=10)
    names = {side: np.array([f"speaker{number}" for number in numbers]) for side, numbers in speakers.items()}
    shuffled = rng.permutation(labels.size)
    one = bootstrap(scores, labels, num_resamples=30, **speakers)
    other = bootstrap(
        scores[shuffled],
        labels[shuffled],
        num_resamples=30,
        **{side: values[shuffled] for side, values in names.items()},
    )
    assert one.low == pytest.approx(other.low) and one.high == pytest.approx(other.high)


@pytest.mark.parametrize("resample", ["speakers", "trials"])
def test_pairing_cancels_what_two_systems_share(resample):
    rng = np.random.default_rng(5)
    scores, labels, speakers = corpus(rng)
    worse = scores + 0.05 * rng.normal(size=scores.size)
    options = {**speakers, "resample": resample, "num_resamples": 200}
    difference = paired_bootstrap(scores, worse, labels, **options)
    assert difference.estimate == pytest.approx(eer(worse, labels) - eer(scores, labels))
    assert difference.standard_error < 0.5 * bootstrap(worse, labels, **options).standard_error
    same = paired_bootstrap(scores, 2 * scores + 1, labels, **options)
    assert same == Interval(0.0, 0.0, 0.0, 0.0, 0.95)
    ratio = paired_bootstrap(scores, worse, labels, comparison="ratio", **options)
    assert ratio.estimate == pytest.approx(eer(worse, labels) / eer(scores, labels))
    assert ratio.low < ratio.estimate < ratio.high


@pytest.mark.slow
def test_coverage():
    """Of 200 corpora of other speakers, about 95 % of the intervals hold the EER of endless speakers."""
    scores, labels, _ = corpus(np.random.default_rng(6), num_speakers=1000)
    truth, hits = eer(scores, labels), 0
    for seed in range(200):
        scores, labels, speakers = corpus(np.random.default_rng([7, seed]))
        interval = bootstrap(scores, labels, num_resamples=200, **speakers)
        hits += interval.low <= truth <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_resamples_without_a_class_are_drawn_again():
    """Half of all draws are aa or bb, which have no non-target trial."""
    speakers = {"enrolment_speakers": ["a", "b", "a"], "test_speakers": ["a", "b", "b"]}
    interval = bootstrap([3.0, 1.0, 2.0], [1, 1, 0], num_resamples=20, **speakers)
    assert interval.estimate == interval.low == interval.high == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs enrolment_speakers and test_speakers"),
        ({"enrolment_speakers": ["a", "b"], "test_speakers": ["a", "b"]}, r"must be \(3,\), got \(2,\)"),
        (
            {"enrolment_speakers": ["a", "b", "a"], "test_speakers": ["a", "c", "b"]},
            "1 labels contradict their speakers, the first is trial 1: label 1, speakers b and c",
        ),
        ({"resample": "pairs"}, "resample must be"),
        ({"resample": "trials", "confidence": 1.0}, "confidence"),
        ({"resample": "trials", "num_resamples": 1}, "num_resamples"),
    ],
)
def test_wrong_arguments(options, message):
    for call in (bootstrap, functools.partial(paired_bootstrap, [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match=message):
            call([3.0, 1.0, 2.0], [1, 1, 0], **options)


def test_wrong_comparisons():
    trials = [3.0, 4.0, 1.0, 2.0], [3.0, 1.0, 4.0, 2.0], [1, 1, 0, 0]
    with pytest.raises(ValueError, match="comparison must be"):
        paired_bootstrap(*trials, resample="trials", comparison="quotient")
    with pytest.raises(ValueError, match="use comparison='difference'"):
        paired_bootstrap(*trials, resample="trials", comparison="ratio")
