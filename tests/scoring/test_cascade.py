"""The cascade by hand, and its bounds on random scores."""

import numpy as np
import pytest

from qsv.scoring import (
    AffineCalibration,
    Cascade,
    bounds_for_escalation,
    bounds_for_flips,
    eer,
    fit_calibration,
    run_cascade,
)

PLAIN = AffineCalibration(1.0, 0.0)


@pytest.fixture(scope="module")
def trials():
    """Scores of three stages, each less noisy than the one before: (scores, labels)."""
    rng = np.random.default_rng(0)
    labels = np.arange(6000) < 1000
    clean = rng.normal(size=labels.size) + 4.0 * labels
    return np.stack([clean + noise * rng.normal(size=labels.size) for noise in (1.0, 0.3, 0.0)]), labels


@pytest.fixture(scope="module")
def calibrations(trials):
    scores, labels = trials
    return [fit_calibration(own, labels) for own in scores]


def test_a_stage_settles_what_is_further_than_its_bound():
    cascade = Cascade((PLAIN, AffineCalibration(2.0, 0.0), PLAIN), (2.0, 1.0), threshold=1.0)
    scores = [[3.5, 3.0, -1.5, 0.9, 0.9], [0.0, 1.1, 9.0, 0.5, 0.6], [7.0, 7.0, 7.0, 0.5, 1.0]]
    outcome = run_cascade(cascade, scores)
    assert outcome.stages.tolist() == [0, 1, 0, 2, 2]
    assert outcome.llrs.tolist() == [3.5, 2.2, -1.5, 0.5, 1.0]
    assert outcome.accepted.tolist() == [True, True, False, False, True]
    np.testing.assert_allclose(outcome.settled, [0.4, 0.2, 0.4])
    np.testing.assert_allclose(outcome.reached, [1.0, 0.6, 0.4])


def test_an_utterance_is_embedded_once_at_each_precision():
    cascade = Cascade((PLAIN, PLAIN), (1.0,))
    outcome = run_cascade(cascade, [[5.0, 0.5, 0.2, -5.0], [1.0, 1.0, 1.0, 1.0]])
    enrolment, test = [0, 0, 0, 3], [1, 2, 4, 5]
    assert outcome.embedded(enrolment, test).tolist() == [6, 3]
    assert outcome.expected_cost([1.0, 10.0], enrolment, test) == pytest.approx((6 + 30) / 60)
    with pytest.raises(ValueError, match="costs must be of the 2 stages, got 1"):
        outcome.expected_cost([1.0], enrolment, test)


def test_the_ends_are_the_first_and_the_last_stage(trials, calibrations):
    scores, _ = trials
    first = run_cascade(Cascade(tuple(calibrations), (0.0, 0.0)), scores)
    last = run_cascade(Cascade(tuple(calibrations), (np.inf, np.inf)), scores)
    np.testing.assert_array_equal(first.llrs, calibrations[0](scores[0]))
    np.testing.assert_array_equal(last.llrs, calibrations[2](scores[2]))


@pytest.mark.parametrize("max_harmful", [0.0, 0.002, 0.05])
def test_flips_stay_within_their_budget_and_the_bounds_are_no_larger_than_they_must(trials, calibrations, max_harmful):
    scores, labels = trials
    bounds = bounds_for_flips(calibrations, scores, labels, max_harmful=max_harmful)

    def harmful(bounds):
        outcome = run_cascade(Cascade(tuple(calibrations), bounds), scores)
        flipped = ((calibrations[-1](scores[-1]) >= 0) == labels) & (outcome.accepted != labels)
        return [np.mean(flipped[labels]), np.mean(flipped[~labels])]

    assert max(harmful(bounds)) <= max_harmful
    if bounds[0] > 0:
        assert max(harmful((0.99 * bounds[0], bounds[1]))) > max_harmful / 2


def test_a_cascade_is_nearly_as_good_as_its_last_stage_and_cheaper(trials, calibrations):
    scores, labels = trials
    bounds = bounds_for_flips(calibrations, scores, labels, max_harmful=0.005)
    outcome = run_cascade(Cascade(tuple(calibrations), bounds), scores)
    assert outcome.settled[0] > 0.3
    # No more can be lost than the flips that were allowed.
    assert eer(outcome.llrs, labels) <= eer(scores[2], labels) + 0.005 < 0.8 * eer(scores[0], labels)


@pytest.mark.parametrize("max_escalated", [0.0, 0.2, 1.0])
def test_no_more_go_on_than_may(trials, calibrations, max_escalated):
    scores, _ = trials
    bounds = bounds_for_escalation(calibrations, scores, max_escalated=max_escalated)
    reached = run_cascade(Cascade(tuple(calibrations), bounds), scores).reached
    assert reached[1] <= max_escalated
    assert reached[1] == pytest.approx(max_escalated, abs=1e-3)
    assert reached[2] == pytest.approx(max_escalated**2, abs=1e-3)


def test_each_stage_has_its_own_share(trials, calibrations):
    scores, _ = trials
    bounds = bounds_for_escalation(calibrations, scores, max_escalated=(0.4, 0.1))
    reached = run_cascade(Cascade(tuple(calibrations), bounds), scores).reached
    np.testing.assert_allclose(reached, [1, 0.4, 0.04], atol=1e-3)


def test_a_share_of_nothing_passes_no_trial_on():
    (bound,) = bounds_for_escalation([PLAIN, PLAIN], [[1.0, 3.0], [0.0, 0.0]], max_escalated=0.0)
    assert bound == 0


def test_equal_scores_go_on_together_or_not_at_all():
    scores = [[1.0, 1.0, 1.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
    (bound,) = bounds_for_escalation([PLAIN, PLAIN], scores, max_escalated=0.5)
    assert run_cascade(Cascade((PLAIN, PLAIN), (bound,)), scores).reached[1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Cascade((PLAIN,), ()), "two stages or more"),
        (lambda: Cascade((PLAIN, PLAIN), (1.0, 1.0)), "a bound for each but the last"),
        (lambda: Cascade((PLAIN, PLAIN), (-1.0,)), "bounds can't be negative or NaN"),
        (lambda: Cascade((PLAIN, PLAIN), (float("nan"),)), "bounds can't be negative or NaN"),
        (lambda: run_cascade(Cascade((PLAIN, PLAIN), (1.0,)), [[1.0]]), r"scores must be \[2 stages, trials\]"),
        (lambda: bounds_for_flips([PLAIN, PLAIN], [[1.0], [1.0]], [1, 0], max_harmful=0), r"labels must be \[trials\]"),
        (lambda: bounds_for_flips([PLAIN, PLAIN], [[1.0], [1.0]], [1], max_harmful=-1), "max_harmful can't be"),
        (lambda: bounds_for_escalation([PLAIN, PLAIN], [[1.0], [1.0]], max_escalated=2), "max_escalated must be"),
        (lambda: bounds_for_escalation([PLAIN, PLAIN], [[1.0], [1.0]], max_escalated=(0.1, 0.1)), "1 or 1 of them"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
