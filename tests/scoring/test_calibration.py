"""Calibration on data of known likelihood ratios, and the metrics by hand."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from qsv.scoring import (
    AffineCalibration,
    act_dcf,
    bayes_threshold,
    cllr,
    fit_calibration,
    min_cllr,
    min_dcf,
)


def gaussian_trials(rng, targets=4000, others=40000, *, distance=2.0):
    """Scores of unit deviation: their log-likelihood ratio is distance * score."""
    labels = np.arange(targets + others) < targets
    return rng.normal(size=labels.size) + np.where(labels, distance / 2, -distance / 2), labels


@pytest.mark.parametrize("p_target", [0.5, 0.05])
def test_the_likelihood_ratio_of_gaussians_is_found(p_target):
    scores, labels = gaussian_trials(np.random.default_rng(0))
    found = fit_calibration(3 * scores + 7, labels, p_target=p_target)
    assert found.slope == pytest.approx(2 / 3, rel=0.05)
    assert found.offset == pytest.approx(-7 * 2 / 3, abs=0.2)


def test_the_fit_is_the_minimum_of_its_loss():
    rng = np.random.default_rng(1)
    scores, labels = gaussian_trials(rng, 50, 200)
    found = fit_calibration(scores, labels, p_target=0.2)

    def loss(theta):
        z = theta[0] * scores + theta[1] + math.log(0.2 / 0.8)
        return 0.2 * np.logaddexp(0, -z[labels]).mean() + 0.8 * np.logaddexp(0, z[~labels]).mean()

    best = minimize(loss, [1.0, 0.0], tol=1e-12)
    assert (found.slope, found.offset) == pytest.approx(tuple(best.x), rel=1e-3, abs=1e-3)


def test_calibrated_scores_cost_little_more_than_the_best():
    scores, labels = gaussian_trials(np.random.default_rng(2))
    llrs = fit_calibration(scores, labels)(scores)
    assert min_cllr(scores, labels) <= cllr(llrs, labels) < 1.02 * min_cllr(scores, labels)
    assert cllr(llrs + 2, labels) > 1.2 * cllr(llrs, labels)
    assert min_dcf(llrs, labels) <= act_dcf(llrs, labels) < 1.1 * min_dcf(llrs, labels)


def test_classes_apart_keep_a_finite_slope():
    found = fit_calibration([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])
    assert 0 < found.slope < 1e4
    assert cllr(found([0.1, 0.2, 0.8, 0.9]), [0, 0, 1, 1]) < 1e-3


def test_metrics_by_hand():
    assert cllr([0.0, 0.0], [1, 0]) == pytest.approx(1)
    assert cllr([math.log(3), -math.log(3)], [1, 0]) == pytest.approx(math.log2(4 / 3))
    assert min_cllr([1.0, 2.0, 3.0], [0, 1, 1]) == 0
    assert min_cllr([5.0, 5.0, 5.0], [0, 1, 1]) == pytest.approx(1)
    # One pool of a target and a non-target, and a target above: llr 0 - log(2) and infinity.
    expected = (np.log2(1 + 2 ** np.array([1.0, -np.inf])).mean() + np.log2(1 + 0.5)) / 2
    assert min_cllr([2.0, 1.0, 3.0], [0, 1, 1]) == pytest.approx(expected)
    assert bayes_threshold(p_target=0.5) == 0
    assert bayes_threshold(p_target=0.2, c_miss=2) == pytest.approx(math.log(0.8 / 0.4))
    # Threshold log 4: one of two targets is missed, no false alarm.
    assert act_dcf([1.0, 2.0, 0.0], [1, 1, 0], p_target=0.2) == pytest.approx(0.5)


def test_calibration_is_of_any_shape():
    np.testing.assert_array_equal(AffineCalibration(2.0, 1.0)([[0.5], [1.0]]), [[2.0], [3.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_calibration([1.0, 1.0], [0, 1]), "all scores are equal"),
        (lambda: fit_calibration([2.0, 1.0, 0.5], [0, 1, 1]), "targets don't score higher"),
        (lambda: fit_calibration([1.0, 2.0], [0, 1], p_target=1.0), "p_target must be between 0 and 1"),
        (lambda: fit_calibration([1.0, 2.0], [1, 1]), "need both classes"),
        (lambda: bayes_threshold(p_target=0.0), "p_target must be in"),
        (lambda: cllr([np.nan, 1.0], [0, 1]), "not finite"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
