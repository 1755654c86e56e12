"""What a model makes of a test set: scores, error rates and their intervals."""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from experiments.speech import is_readable
from experiments.testing import TestConfig, TestSet, load_cohort
from qsv.data import Corpus, Utterance
from qsv.deploy import Embedder
from qsv.scoring import (
    CountedMetrics,
    ResampledMetrics,
    as_norm,
    cohort_statistics,
    cosine_scores,
    count_metrics,
    eer_of_rates,
    eer_threshold,
    listed_blocks,
    min_dcf_of_rates,
    pair_blocks,
    resample_metrics,
    speaker_means,
)

# From here on error rates get no intervals, and pairs aren't listed.
MANY_TRIALS = 5_000_000


class FileEmbedder(Protocol):
    """Whatever makes embeddings [n, embedding_size] of n utterances."""

    def embed_files(self, files: Sequence[Utterance]) -> np.ndarray: ...


def score(embedder: FileEmbedder, test_set: TestSet, *, cohort_embedder: FileEmbedder | None = None) -> np.ndarray:
    """Scores of all trials, [trials] float; every utterance is embedded once.

    The cohort is embedded by another embedder where one is given.
    An enrolment of several utterances is the mean of their embeddings, not brought to unit length before, as in
    WeSpeaker.
    """
    return score_embeddings(embed_trials(embedder, test_set), test_set, cohort_embedder or embedder)


def score_embeddings(embeddings: np.ndarray, test_set: TestSet, cohort_embedder: FileEmbedder) -> np.ndarray:
    """`score` of what `embed_trials` made."""
    config, trials = test_set.config, test_set.trials
    cohort, mean = embed_cohort(cohort_embedder, test_set.cohort, config)
    scores = cosine_scores(embeddings, trials.enrolment, trials.test, mean=mean)
    if not config.as_norm or cohort is None:
        return scores
    top_n = min(config.top_n, len(cohort))
    return as_norm(scores, embeddings, trials.enrolment, trials.test, cohort, top_n=top_n, mean=mean)


def embed_cohort(
    embedder: FileEmbedder, cohort: Corpus | None, config: TestConfig
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(mean embedding of every speaker, mean of all embeddings) of a cohort, as far as they are wanted."""
    if cohort is None:
        return None, None
    others = embedder.embed_files(cohort.utterances)
    means = speaker_means(others, [utterance.speaker for utterance in cohort.utterances])
    return means, others.mean(axis=0) if config.subtract_mean else None


def embed_trials(embedder: FileEmbedder, test_set: TestSet) -> np.ndarray:
    """[names of the trials, embedding_size]; every utterance is embedded once."""
    made_of = [test_set.made_of(name) for name in test_set.trials.names]
    needed = list(dict.fromkeys(itertools.chain.from_iterable(made_of)))
    embeddings = embedder.embed_files([test_set.corpus.utterance(name) for name in needed])
    places = {name: place for place, name in enumerate(needed)}
    return np.stack([embeddings[[places[name] for name in own]].mean(axis=0) for own in made_of])


def measure(scores: np.ndarray, test_set: TestSet, reference: np.ndarray | None = None) -> dict[str, Any]:
    """EER and minDCF with bootstrap intervals, and the counts behind them.

    Args:
        scores: [trials].
        test_set: the trials.
        reference: [trials] of another model on the same trials; adds the difference of the EERs, and their ratio
            unless the reference makes no error in some resample.

    Returns:
        JSON-compatible figures. More than `MANY_TRIALS` get no intervals, which would take hours.
    """
    config, trials = test_set.config, test_set.trials
    if len(trials) > MANY_TRIALS:
        return _measure_many(scores, test_set, reference)
    resampled = resample([scores] if reference is None else [scores, reference], test_set)
    error, detection = resampled.interval(0), resampled.interval(1)
    targets = int(np.count_nonzero(trials.labels))
    figures = {
        "eer_percent": 100 * error.estimate,
        "eer_percent_interval": [100 * error.low, 100 * error.high],
        "eer_threshold": eer_threshold(scores, trials.labels),
        "min_dcf": detection.estimate,
        "min_dcf_interval": [detection.low, detection.high],
        "p_target": config.p_target,
        "confidence": error.confidence,
        "resampled": config.resample,
        **_counts(targets, len(trials) - targets, test_set.speakers),
    }
    if reference is not None:
        difference = resampled.difference()
        figures |= {
            "eer_percent_difference": 100 * difference.estimate,
            "eer_percent_difference_interval": [100 * difference.low, 100 * difference.high],
        }
        # Undefined where the reference makes no error in some resample; all else was checked just above.
        with contextlib.suppress(ValueError):
            ratio = resampled.ratio()
            figures |= {"eer_ratio": ratio.estimate, "eer_ratio_interval": [ratio.low, ratio.high]}
    return figures


def measure_pairs(
    embedder: FileEmbedder, corpus: Corpus, config: TestConfig, cohort_embedder: FileEmbedder
) -> dict[str, Any]:
    """`measure` of all pairs of a corpus of any size, without intervals; no list of trials or scores is held."""
    embeddings = embedder.embed_files(corpus.utterances)
    speakers = np.array([utterance.speaker for utterance in corpus.utterances])
    cohort, mean = embed_cohort(cohort_embedder, load_cohort(config), config)
    statistics = None
    if config.as_norm and cohort is not None:
        statistics = cohort_statistics(embeddings, cohort, top_n=min(config.top_n, len(cohort)), mean=mean)
    counted = count_metrics(pair_blocks(embeddings, speakers, mean=mean, cohort=statistics), p_target=config.p_target)
    return _counted_figures(counted, config, speakers)


def _measure_many(scores: np.ndarray, test_set: TestSet, reference: np.ndarray | None) -> dict[str, Any]:
    """`measure` without intervals."""
    labels, cost = test_set.trials.labels, {"p_target": test_set.config.p_target}
    figures = _counted_figures(count_metrics(listed_blocks(scores, labels), **cost), test_set.config, test_set.speakers)
    if reference is not None:
        before = count_metrics(listed_blocks(reference, labels), **cost)
        figures["eer_percent_difference"] = figures["eer_percent"] - 100 * before.eer
    return figures


def _counted_figures(counted: CountedMetrics, config: TestConfig, speakers: np.ndarray) -> dict[str, Any]:
    return {
        "eer_percent": 100 * counted.eer,
        "eer_threshold": counted.eer_threshold,
        "min_dcf": counted.min_dcf,
        "p_target": config.p_target,
        **_counts(counted.targets, counted.non_targets, speakers),
    }


def _counts(targets: int, non_targets: int, speakers: np.ndarray) -> dict[str, int]:
    return {
        "trials": targets + non_targets,
        "target_trials": targets,
        "non_target_trials": non_targets,
        "utterances": len(speakers),
        "speakers": len(set(speakers.tolist())),
    }


def resample(systems: Sequence[np.ndarray], test_set: TestSet) -> ResampledMetrics:
    """EER and minDCF of scores [trials] each, on the bootstrap's resamples that the flags ask for."""
    config, trials = test_set.config, test_set.trials
    options: dict[str, Any] = {"resample": config.resample, "num_resamples": config.resamples}
    if config.resample == "speakers":
        options["enrolment_speakers"] = test_set.speakers[trials.enrolment]
        options["test_speakers"] = test_set.speakers[trials.test]
    cost = functools.partial(min_dcf_of_rates, p_target=config.p_target)
    return resample_metrics(systems, trials.labels, metrics=[eer_of_rates, cost], **options)


def calibrated_threshold(embedder: Embedder, corpus: Corpus, *, max_utterances: int = 400) -> float | None:
    """Threshold at the EER of pairs of training utterances, evenly picked; None where they are of one class.

    The network has seen these speakers, so unknown ones score a little lower than this threshold expects.
    """
    own = [utterance for utterance in corpus.utterances if utterance.speed == 1.0]
    evenly = own[:: -(-len(own) // max_utterances)]
    chosen = [utterance for utterance in evenly if is_readable(utterance, embedder.network.frontend)]
    numbers = {name: number for number, name in enumerate(sorted({u.speaker for u in chosen}))}
    speakers = np.array([numbers[utterance.speaker] for utterance in chosen])
    first, second = np.triu_indices(len(chosen), k=1)
    labels = speakers[first] == speakers[second]
    if labels.all() or not labels.any():
        return None
    embeddings = embedder.embed_files(chosen)
    return eer_threshold(cosine_scores(embeddings, first, second), labels)
