"""Counted trials have the error rates of sorted ones, in blocks of any size and in bounded memory."""

import subprocess
import sys

import numpy as np
import pytest

from qsv.scoring import (
    as_norm,
    cohort_statistics,
    cosine_scores,
    count_metrics,
    eer,
    eer_threshold,
    listed_blocks,
    min_dcf,
    pair_blocks,
)


def normal(rng, n, labels):
    return rng.normal(size=n) + 2 * labels


SCORES = {
    "cosines": lambda rng, n, labels: np.tanh(0.3 * normal(rng, n, labels)),
    "small": lambda rng, n, labels: 1e-6 * normal(rng, n, labels),
    "normalised": lambda rng, n, labels: 7 * normal(rng, n, labels) - 30,
    "ties": lambda rng, n, labels: np.round(normal(rng, n, labels)),
    "one bin": lambda rng, n, labels: 1 + 1e-4 * normal(rng, n, labels),
    "all equal": lambda rng, n, labels: np.zeros(n),
    "signed zeros": lambda rng, n, labels: np.where(rng.random(n) < 0.5, 0.0, -0.0),
    "perfect": lambda rng, n, labels: labels + 0.1 * rng.random(n),
    "reversed": lambda rng, n, labels: -normal(rng, n, labels),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("p_target", [0.5, 0.01, 1e-4])
def test_rates_are_those_of_sorted_trials(kind, p_target):
    rng = np.random.default_rng(0)
    labels = rng.random(20_000) < 0.1
    scores = SCORES[kind](rng, labels.size, labels).astype(np.float32)
    counted = count_metrics(listed_blocks(scores, labels, block=3_333), p_target=p_target)
    assert counted.eer == pytest.approx(eer(scores, labels), abs=1e-15)
    assert counted.eer_threshold == eer_threshold(scores, labels)
    assert counted.min_dcf == pytest.approx(min_dcf(scores, labels, p_target=p_target), abs=1e-14)
    assert (counted.targets, counted.non_targets) == (labels.sum(), (~labels).sum())
    assert counted.thresholds[-1] == np.inf and (np.diff(counted.thresholds) > 0).all()
    assert counted.p_miss[0] == counted.p_fa[-1] == 0 and counted.p_miss[-1] == counted.p_fa[0] == 1


def test_a_cost_that_is_flat_over_many_bins():
    """Targets and non-targets alternate over all magnitudes, so that more bins are counted than one pass takes."""
    rng = np.random.default_rng(1)
    scores = np.exp(rng.uniform(-60, 60, 100_000)).astype(np.float32)
    labels = rng.random(scores.size) < 0.5
    counted = count_metrics(listed_blocks(scores, labels), p_target=0.5)
    assert counted.min_dcf == pytest.approx(min_dcf(scores, labels, p_target=0.5), abs=1e-14)
    assert counted.eer == pytest.approx(eer(scores, labels), abs=1e-15)


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("normalise", [False, True])
def test_pairs_are_those_of_a_list(block, normalise):
    rng = np.random.default_rng(2)
    speakers = rng.integers(0, 9, 60)
    embeddings = rng.normal(size=(60, 8)) + 2 * rng.normal(size=(9, 8))[speakers]
    cohort, mean = rng.normal(size=(40, 8)), rng.normal(size=8)
    first, second = np.triu_indices(60, k=1)
    labels = speakers[first] == speakers[second]
    scores = cosine_scores(embeddings, first, second, mean=mean)
    statistics = None
    if normalise:
        statistics = cohort_statistics(embeddings, cohort, top_n=20, mean=mean)
        scores = as_norm(scores, embeddings, first, second, cohort, top_n=20, mean=mean)
    blocks = pair_blocks(embeddings, speakers, mean=mean, cohort=statistics, block=block)
    parts = list(blocks())
    assert max(own.size for own, _ in parts) <= block**2
    found, sides = (np.concatenate(side) for side in zip(*parts, strict=True))
    assert sides.sum() == labels.sum()
    np.testing.assert_allclose(np.sort(found[sides]), np.sort(scores[labels]), atol=1e-5)
    np.testing.assert_allclose(np.sort(found[~sides]), np.sort(scores[~labels]), atol=1e-5)
    assert count_metrics(blocks).eer == pytest.approx(eer(scores, labels), abs=1e-3)


def test_wrong_blocks():
    scores, labels = np.array([0.1, np.nan, 0.3], np.float32), np.array([True, False, True])
    with pytest.raises(ValueError, match="score of trial 1 is not finite: nan"):
        count_metrics(listed_blocks(scores, labels, block=1))
    with pytest.raises(ValueError, match="2 targets and 0 non-targets"):
        count_metrics(listed_blocks(scores[::2], labels[::2]))
    with pytest.raises(ValueError, match=r"scores \[n\] and bool labels \[n\], got \(2,\) and \(3,\) bool"):
        count_metrics(lambda: [(scores[:2], labels)])
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        count_metrics(lambda: [one(0)], p_target=2)
    changing = iter(range(9))
    with pytest.raises(ValueError, match="other scores when they are asked for again"):
        count_metrics(lambda: [one(next(changing))])
    with pytest.raises(ValueError, match="2 speakers and a positive block"):
        pair_blocks(np.eye(2), ["a"])


def one(seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(100) % 2 == 0
    return (rng.normal(size=100) + labels).astype(np.float32), labels


LARGE = """
import resource, numpy as np
from qsv.scoring import count_metrics, pair_blocks
rng = np.random.default_rng(0)
speakers = rng.integers(0, 1_200, 14_143)
embeddings = (rng.normal(size=(14_143, 192)) + 0.6 * rng.normal(size=(1_200, 192))[speakers]).astype(np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counted = count_metrics(pair_blocks(embeddings, speakers))
print(counted.targets + counted.non_targets, counted.eer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_hundred_million_trials_in_bounded_memory():
    output = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True).stdout
    trials, error, kilobytes = output.split()
    assert int(trials) == 14_143 * 14_142 // 2 > 10**8
    assert 0 < float(error) < 0.2
    # The scores alone would be 400 MB.
    assert int(kilobytes) < 380_000
