import numpy as np
import pytest

from qsv.scoring import det_curve, eer, eer_of_rates, eer_threshold, min_dcf, min_dcf_of_rates

# Ascending: 1 n, 2 t, 3 n, 4 n, 5 t, 6 t
SCORES, LABELS = [5.0, 1.0, 3.0, 2.0, 4.0, 6.0], [1, 0, 0, 1, 0, 1]


def test_det_curve_by_hand():
    thresholds, p_miss, p_fa = det_curve(SCORES, LABELS)
    np.testing.assert_array_equal(thresholds, [1, 2, 3, 4, 5, 6, np.inf])
    np.testing.assert_allclose(p_miss, np.array([0, 0, 1, 1, 1, 2, 3]) / 3)
    np.testing.assert_allclose(p_fa, np.array([3, 2, 2, 1, 0, 0, 0]) / 3)


def test_det_curve_groups_equal_scores():
    thresholds, p_miss, p_fa = det_curve([2, 2, 2, 1, 3], [1, 0, 1, 0, 1])
    np.testing.assert_array_equal(thresholds, [1, 2, 3, np.inf])
    np.testing.assert_allclose(p_miss, [0, 0, 2 / 3, 1])
    np.testing.assert_array_equal(p_fa, [1, 0.5, 0, 0])


def test_eer_at_an_operating_point():
    """Between 3 and 4 one of three targets is missed and one of three non-targets accepted."""
    assert eer(SCORES, LABELS) == pytest.approx(1 / 3)
    assert eer_threshold(SCORES, LABELS) == pytest.approx(4.0)


def test_eer_between_operating_points():
    """Points (p_miss, p_fa): (0, 1) (0, 2/3) (1/2, 2/3) (1/2, 1/3): they cross where p_miss is 1/2."""
    scores, labels = [1, 2, 3, 4, 5], [0, 1, 0, 0, 1]
    assert eer(scores, labels) == pytest.approx(0.5)
    assert eer_threshold(scores, labels) == pytest.approx(3.5)


def test_eer_crosses_a_tie_on_a_slant():
    """The tie of two targets and a non-target leads from (0, 1/2) to (2/3, 0): p = 1/2 - 3/4 p gives 2/7."""
    assert eer([2, 2, 2, 1, 3], [1, 0, 1, 0, 1]) == pytest.approx(2 / 7)
    assert eer_threshold([2, 2, 2, 1, 3], [1, 0, 1, 0, 1]) == pytest.approx(2 + 3 / 7)


@pytest.mark.parametrize(
    ("scores", "expected", "threshold"),
    [([3, 4, 1, 2], 0.0, 3.0), ([1, 2, 3, 4], 1.0, 3.0), ([7, 7, 7, 7], 0.5, 7.0)],
    ids=["perfect", "reversed", "all equal"],
)
def test_eer_at_the_extremes(scores, expected, threshold):
    assert eer(scores, [1, 1, 0, 0]) == expected
    assert eer_threshold(scores, [1, 1, 0, 0]) == threshold


def test_eer_of_gaussians():
    """Two Gaussians two deviations apart have the EER Phi(-1)."""
    rng = np.random.default_rng(0)
    labels = np.arange(200_000) % 4 == 0
    scores = rng.normal(size=labels.size) + 2 * labels
    assert eer(scores, labels) == pytest.approx(0.158655, rel=0.02)
    assert eer_threshold(scores, labels) == pytest.approx(1.0, abs=0.02)


def test_eer_ignores_order_and_monotone_changes_of_the_scores():
    rng = np.random.default_rng(1)
    labels = rng.random(1000) < 0.3
    scores = np.round(rng.normal(size=1000) + labels, 1)
    shuffled = rng.permutation(1000)
    expected = eer(scores, labels)
    assert eer(scores[shuffled], labels[shuffled]) == expected
    assert eer(np.exp(scores), labels) == pytest.approx(expected, rel=1e-12)
    assert eer(-scores, ~labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("p_target", [0.01, 0.5, 0.9])
def test_min_dcf_by_hand(p_target):
    """Of the seven points, (0, 2/3), (1/3, 0) and the two trivial ones are on the hull."""
    normaliser = min(p_target, 1 - p_target)
    expected = min(2 / 3 * (1 - p_target) / normaliser, p_target / 3 / normaliser, 1.0)
    assert min_dcf(SCORES, LABELS, p_target=p_target) == pytest.approx(expected)


def test_min_dcf_costs():
    """A miss ten times as dear: 10 * 0.5 * p_miss + 0.5 * p_fa over 0.5, least at (0, 2/3)."""
    assert min_dcf(SCORES, LABELS, p_target=0.5, c_miss=10.0) == pytest.approx(2 / 3)
    assert min_dcf(SCORES, LABELS, p_target=0.5, c_fa=10.0) == pytest.approx(1 / 3)
    assert min_dcf([1, 2, 3, 4], [1, 1, 0, 0]) == 1.0
    assert min_dcf([3, 4, 1, 2], [1, 1, 0, 0]) == 0.0


def test_metrics_of_rates_equal_metrics_of_scores():
    _, p_miss, p_fa = det_curve(SCORES, LABELS)
    assert eer_of_rates(p_miss, p_fa) == eer(SCORES, LABELS)
    assert min_dcf_of_rates(p_miss, p_fa, p_target=0.3) == min_dcf(SCORES, LABELS, p_target=0.3)


@pytest.mark.parametrize("metric", [eer, eer_threshold, min_dcf, det_curve])
@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, np.nan, np.inf], [1, 0, 0], "2 of 3 scores are not finite, first trial 1: nan"),
        ([1, 2, 3], [1, 0], r"\(3,\) and \(2,\)"),
        ([[1, 2]], [[1, 0]], r"must be \[trials\]"),
        ([1, 2, 3], [1, 1, 1], "3 targets and 0 non-targets"),
        ([1, 2], [0, 0], "0 targets and 2 non-targets"),
        ([], [], "0 targets and 0 non-targets"),
        ([1, 2, 3], [1, 0, 2], "trial 2 has"),
    ],
)
def test_wrong_trials(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(scores, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p_target": 0.0}, "p_target"),
        ({"p_target": 1.0}, "p_target"),
        ({"c_miss": 0.0}, "c_miss=0.0"),
        ({"c_fa": -1.0}, "c_fa"),
    ],
)
def test_wrong_costs(options, message):
    with pytest.raises(ValueError, match=message):
        min_dcf(SCORES, LABELS, **options)
