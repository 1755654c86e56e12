"""Figures of predicted scores: by hand, against SciPy, clustered intervals."""

import numpy as np
import pytest
from scipy import stats

from qsv.analysis import regression_figures

RNG = np.random.default_rng(0)
LABELS = RNG.normal(size=200)
GOOD, BAD = LABELS + 0.3 * RNG.normal(size=200), LABELS + 2.0 * RNG.normal(size=200)


def test_figures_are_those_of_scipy():
    figures = regression_figures({"good": GOOD, "bad": BAD}, LABELS, num_resamples=50)
    for name, scores in (("good", GOOD), ("bad", BAD)):
        own = figures[name]
        assert own.mse.estimate == pytest.approx(np.mean((scores - LABELS) ** 2))
        assert own.pcc.estimate == pytest.approx(stats.pearsonr(scores, LABELS).statistic)
        assert own.srcc.estimate == pytest.approx(stats.spearmanr(scores, LABELS).statistic)
        for interval in (own.mse, own.pcc, own.srcc):
            assert interval.low < interval.estimate < interval.high
    assert figures["good"].pcc_difference is None
    difference = figures["bad"].pcc_difference
    assert difference.estimate == pytest.approx(figures["bad"].pcc.estimate - figures["good"].pcc.estimate)
    assert difference.high < 0


def test_an_interval_of_independent_pairs_is_fishers():
    own = regression_figures({"good": BAD}, LABELS, num_resamples=2000)["good"].pcc
    z, half = np.arctanh(own.estimate), 1.96 / np.sqrt(200 - 3)
    np.testing.assert_allclose([own.low, own.high], np.tanh([z - half, z + half]), atol=0.03)


def test_copies_of_a_clip_make_no_interval_narrower():
    alone = regression_figures({"a": BAD}, LABELS, num_resamples=500)["a"].pcc
    copied = regression_figures(
        {"a": np.repeat(BAD, 5)}, np.repeat(LABELS, 5), groups=np.repeat(np.arange(200), 5), num_resamples=500
    )["a"].pcc
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.15)


def test_equal_predictors_differ_by_nothing():
    difference = regression_figures({"a": GOOD, "b": GOOD}, LABELS, num_resamples=20)["b"].pcc_difference
    assert (difference.low, difference.estimate, difference.high) == (0, 0, 0)


def test_a_constant_predictor_follows_nothing():
    own = regression_figures({"a": np.ones(200)}, LABELS, num_resamples=20)["a"]
    assert own.pcc.estimate == own.srcc.estimate == 0
    assert own.mse.estimate == pytest.approx(np.mean((1 - LABELS) ** 2))


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "message"),
    [
        ([1, 2], [1, 2], None, "three labels"),
        ([1, 2, 3], [1, 2, 3, 4], None, "three labels"),
        ([1, 2, 3], [1, 1, 1], None, "not all equal"),
        ([1, 2, np.nan], [1, 2, 3], None, "finite"),
        ([1, 2, 3], [1, 2, 3], [0, 1], "as many as the 3 labels"),
    ],
)
def test_bad_input_is_refused(scores, labels, groups, message):
    with pytest.raises(ValueError, match=message):
        regression_figures({"a": scores}, labels, groups=groups)
