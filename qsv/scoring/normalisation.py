"""Adaptive symmetric score normalisation (AS-norm)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsv.scoring.cosine import checked_pairs, unit_embeddings


def as_norm(
    scores: ArrayLike,
    embeddings: ArrayLike,
    enrolment: ArrayLike,
    test: ArrayLike,
    cohort: ArrayLike,
    *,
    top_n: int = 300,
    mean: ArrayLike | None = None,
    block: int = 1024,
) -> NDArray[np.float64]:
    """Scores in standard deviations above what each side gets against its most similar impostors.

        s' = ((s - mu_e) / sigma_e + (s - mu_t) / sigma_t) / 2

    where mu_e and sigma_e are the mean and the population standard deviation of the `top_n` highest cosines
    of the enrolment utterance with the cohort, and mu_t and sigma_t those of the test utterance.

    Args:
        scores: `[trials]` cosine scores, computed with the same mean.
        embeddings: `[utterances, dimensions]`, one of each utterance.
        enrolment: `[trials]` integers, the embedding on one side of each trial.
        test: `[trials]` integers, that on the other side.
        cohort: `[cohort, dimensions]`, usually the `speaker_means` of the training set; none of its speakers
            may be in a trial.
        top_n: how many of the cohort count for an utterance.
        mean: `[dimensions]` subtracted from embeddings and cohort.
        block: utterances compared with the cohort at a time; `block * cohort` cosines are held.

    Returns:
        `[trials]` float64.

    Raises:
        ValueError: as `cosine_scores`; or `top_n` is below 2 or above the size of the cohort, or the
            highest cohort scores of an utterance are all the same.

    Source: Matejka et al., "Analysis of score normalization in multilingual speaker recognition", Interspeech
    2017 (adaptive s-norm, each side choosing its own cohort); WeSpeaker, `wespeaker/bin/score_norm.py`, which
    silently uses a cohort smaller than `top_n` as it is.
    """
    embeddings = np.asarray(embeddings)
    enrolment, test = checked_pairs(enrolment, test, len(embeddings))
    scores = np.asarray(scores, np.float64)
    if scores.shape != enrolment.shape:
        raise ValueError(f"scores must be [trials] = {enrolment.shape}, got shape {scores.shape}")
    used, positions = np.unique(np.concatenate([enrolment, test]), return_inverse=True)
    means, deviations = cohort_statistics(embeddings, cohort, top_n=top_n, mean=mean, block=block, rows=used)
    enrolment_side, test_side = np.split(positions, 2)
    normalised = (scores - means[enrolment_side]) / deviations[enrolment_side]
    normalised += (scores - means[test_side]) / deviations[test_side]
    return normalised / 2.0


def cohort_statistics(
    embeddings: ArrayLike,
    cohort: ArrayLike,
    *,
    top_n: int = 300,
    mean: ArrayLike | None = None,
    block: int = 1024,
    rows: NDArray[np.intp] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What `as_norm` needs to know of each embedding: mu and sigma of its highest cosines with the cohort.

    Args:
        embeddings: as in `as_norm`, and so are the other arguments.
        cohort: see there.
        top_n: see there.
        mean: see there.
        block: see there.
        rows: `[n]` which embeddings; None for all.

    Returns:
        `(mu, sigma)`, `[n]` each.

    Raises:
        ValueError: as `as_norm`.
    """
    units, impostors = unit_embeddings(embeddings, mean=mean), _unit_cohort(cohort, mean)
    if impostors.shape[1] != units.shape[1]:
        raise ValueError(f"cohort has {impostors.shape[1]} dimensions, embeddings have {units.shape[1]}")
    if not 2 <= top_n <= len(impostors):
        raise ValueError(f"top_n must be from 2 to the size of the cohort, {len(impostors)}, got {top_n}")
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    return _cohort_statistics(units, np.arange(len(units)) if rows is None else rows, impostors, top_n, block)


def speaker_means(embeddings: ArrayLike, speakers: ArrayLike) -> NDArray[np.floating]:
    """Mean embedding of every speaker: the cohort of `as_norm`.

    Args:
        embeddings: `[utterances, dimensions]`, as the network gives them, not scaled to unit length.
        speakers: `[utterances]` names or numbers.

    Returns:
        `[speakers, dimensions]` in the dtype of the embeddings, in the order of `np.unique(speakers)`.

    Raises:
        ValueError: shapes do not fit.
    """
    embeddings, speakers = np.asarray(embeddings), np.asarray(speakers)
    if embeddings.ndim != 2 or speakers.shape != embeddings.shape[:1]:
        raise ValueError(
            "embeddings must be [utterances, dimensions] and speakers [utterances], "
            f"got {embeddings.shape} and {speakers.shape}"
        )
    names, counts = np.unique(speakers, return_counts=True)
    if names.size == 0:
        return embeddings
    ordered = embeddings[np.argsort(speakers, kind="stable")]
    sums = np.add.reduceat(ordered, np.cumsum(counts) - counts, axis=0, dtype=np.float64)
    return (sums / counts[:, None]).astype(embeddings.dtype)


def _unit_cohort(cohort: ArrayLike, mean: ArrayLike | None) -> NDArray[np.floating]:
    try:
        return unit_embeddings(cohort, mean=mean)
    except ValueError as error:
        raise ValueError(f"in the cohort: {error}") from error


def _cohort_statistics(
    units: NDArray[np.floating],
    used: NDArray[np.intp],
    impostors: NDArray[np.floating],
    top_n: int,
    block: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and population standard deviation `[used]` of the highest cohort scores of the utterances used."""
    means, deviations = np.empty(used.size), np.empty(used.size)
    cut = len(impostors) - top_n
    for start in range(0, used.size, block):
        rows = slice(start, start + block)
        cosines = units[used[rows]] @ impostors.T
        cosines.partition(cut, axis=1)
        highest = cosines[:, cut:]
        means[rows] = highest.mean(axis=1, dtype=np.float64)
        deviations[rows] = highest.std(axis=1, dtype=np.float64)
    # Equal cosines of unit vectors still differ by rounding.
    if not (deviations > np.finfo(units.dtype).eps).all():
        first = used[np.argmin(deviations)]
        raise ValueError(f"embedding {first} scores the same with all top {top_n} of the cohort; are they copies?")
    return means, deviations
