"""Drift and flips by hand."""

import math

import numpy as np
import pytest

from qsv.analysis import decision_flips, drift_by_distance, flip_density, score_drift
from qsv.scoring import eer_threshold

LABELS = [1, 1, 1, 0, 0, 0]
REFERENCE = [3.0, 2.0, 0.5, 1.5, 0.0, -1.0]
QUANTIZED = [3.5, 0.5, 1.5, 0.5, 1.5, -1.0]


def test_drift_by_hand():
    drift = score_drift(REFERENCE, QUANTIZED, LABELS)
    assert (drift["target"].mean, drift["non-target"].mean) == pytest.approx((0.0, 0.5 / 3))
    assert drift["target"].deviation == pytest.approx(math.sqrt((0.25 + 2.25 + 1.0) / 3))
    assert (drift["all"].trials, drift["all"].median) == (6, pytest.approx(1.0))
    assert drift["target"].quantile_99 == pytest.approx(1.5, abs=0.02)


def test_flips_by_hand():
    # At 1: the reference is wrong in trials 2 and 3, the other in 1 and 4.
    flips = decision_flips(REFERENCE, QUANTIZED, LABELS, threshold=1.0)
    assert (flips["all"].harmful, flips["all"].beneficial) == (2, 2)
    assert (flips["target"].harmful, flips["target"].beneficial) == (1, 1)
    assert (flips["non-target"].harmful, flips["non-target"].beneficial, flips["non-target"].trials) == (1, 1, 3)
    # Its own threshold of 2 rejects trial 4 rightly, and trial 2 wrongly as before.
    own = decision_flips(REFERENCE, QUANTIZED, LABELS, threshold=1.0, own_threshold=2.0)
    assert (own["all"].harmful, own["all"].beneficial) == (1, 1)


def test_without_a_threshold_it_is_that_of_the_references_eer():
    rng = np.random.default_rng(0)
    labels = np.arange(500) < 100
    reference = rng.normal(size=500) + 2 * labels
    scores = reference + 0.3 * rng.normal(size=500)
    threshold = eer_threshold(reference, labels)
    assert decision_flips(reference, scores, labels) == decision_flips(reference, scores, labels, threshold=threshold)
    assert decision_flips(reference, reference, labels)["all"].harmful == 0


def test_bins_by_distance_hold_as_many_trials_each_nearest_first():
    rng = np.random.default_rng(0)
    labels = np.arange(1000) < 300
    reference = rng.normal(size=1000)
    # Only trials near the threshold of 0 move.
    scores = reference + np.where(np.abs(reference) < 0.2, 1.0, 0.0)
    bins = drift_by_distance(reference, scores, labels, threshold=0.0, num_bins=4)
    assert [drift.trials for *_, drift in bins] == [250] * 4
    assert [low for low, _, _ in bins][1:] == [high for _, high, _ in bins][:-1]
    assert bins[0][2].mean > 0.5
    assert bins[1][2].mean == bins[3][2].mean == 0


def test_flip_density_counts_every_flip_once_near_the_threshold():
    rng = np.random.default_rng(0)
    labels = np.arange(2000) < 400
    reference = rng.normal(size=2000) + 3 * labels
    scores = reference + 0.2 * rng.normal(size=2000)
    density = flip_density(reference, scores, labels, threshold=1.5, num_bins=30)
    flips = decision_flips(reference, scores, labels, threshold=1.5)["all"]
    assert density["harmful"].sum() == flips.harmful > 0
    assert density["beneficial"].sum() == flips.beneficial
    assert density["trials"].sum() == 2000
    middles = (density["edges"][1:] + density["edges"][:-1]) / 2
    assert np.all(np.abs(middles[density["harmful"] > 0] - 1.5) < 1.2)


def test_classes_without_trials_have_no_statistics():
    bins = drift_by_distance([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [0, 1, 1], threshold=0.0, num_bins=2)
    assert sum(drift.trials for *_, drift in bins) == 3
    assert any(math.isnan(drift.mean) for *_, drift in bins)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_drift([1.0, 2.0], [1.0], [0, 1]), "must be \\[trials\\]"),
        (lambda: score_drift([1.0, 2.0], [1.0, np.nan], [0, 1]), "not finite"),
        (lambda: decision_flips([1.0, 2.0], [1.0, 2.0], [1, 1]), "need both classes"),
        (lambda: drift_by_distance(REFERENCE, QUANTIZED, LABELS, num_bins=0), "num_bins must be at least 1"),
        (lambda: flip_density(REFERENCE, QUANTIZED, LABELS, num_bins=0), "num_bins must be at least 1"),
    ],
)
def test_wrong_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
