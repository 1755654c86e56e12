"""Test speech, its trials, and what a model's scores of them say."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from experiments.configuration import require, setting
from experiments.speech import is_readable
from qsv.data import (
    Corpus,
    CorpusLayout,
    MissingUtterancesError,
    Trials,
    Utterance,
    all_pairs,
    check_trials,
    load_corpus,
    read_enrolments,
    read_trials,
)
from qsv.deploy import Embedder
from qsv.scoring import (
    ResampledMetrics,
    as_norm,
    cosine_scores,
    eer_of_rates,
    eer_threshold,
    min_dcf_of_rates,
    resample_metrics,
    speaker_means,
)


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """Trials and scoring."""

    # Not a test class of pytest's.
    __test__ = False

    test_dir: str = setting("", "Folder (or list file, see --test_layout) of the test speech.")
    test_layout: str = setting(
        "folder",
        "How --test_dir and --cohort_dir are laid out: folder is SPEAKER/**/UTT.{wav,flac,ogg,mp3}, voxceleb is "
        "VoxCeleb's, cn_celeb CN-Celeb's, list a file of `SPEAKER PATH` lines, prepared a corpus of "
        "experiments.prepare (FOLDER:SPLIT).",
        choices=[layout.value for layout in CorpusLayout],
    )
    trials: str = setting(
        "", "Trial list, lines of `LABEL ENROLMENT TEST`; every pair of the folder's utterances when absent."
    )
    enrolments: str = setting(
        "",
        "File of lines `NAME UTTERANCE...` where --trials has names of enrolments in place of utterances, such as "
        "CN-Celeb's enroll.map; the mean of their embeddings is compared.",
    )
    cohort_dir: str = setting(
        "", "Folder of other speakers' speech, for --subtract_mean and --as_norm; never the test speakers'."
    )
    subtract_mean: bool = setting(False, "Subtract the cohort's mean embedding before the cosine.")
    as_norm: bool = setting(False, "Normalise scores by the nearest cohort speakers (AS-norm).")
    top_n: int = setting(300, "Cohort speakers nearest to an utterance that AS-norm uses.", minimum=1)
    p_target: float = setting(0.01, "Prior of a target trial in minDCF.", minimum=0.0)
    resample: str = setting(
        "speakers",
        "What the bootstrap draws: speakers, since trials of one speaker are alike, or trials.",
        choices=["speakers", "trials"],
    )
    resamples: int = setting(1000, "Bootstrap resamples.", minimum=2)

    def __post_init__(self) -> None:
        if not 0 < self.p_target < 1:
            raise ValueError(f"--p_target must be between 0 and 1, got {self.p_target}")


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Trials with all that scoring needs to know of them.

    Attributes:
        corpus: has all utterances.
        trials: pairs of names.
        cohort: other speakers; None where scores aren't normalised.
        config: how to score.
        enrolments: {name: utterances} of the names that are none of an utterance.
    """

    __test__ = False

    corpus: Corpus
    trials: Trials
    cohort: Corpus | None
    config: TestConfig
    enrolments: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def speakers(self) -> np.ndarray:
        """Speaker of every name of the trials."""
        return np.array([self.corpus.utterance(self.made_of(name)[0]).speaker for name in self.trials.names])

    def made_of(self, name: str) -> tuple[str, ...]:
        """The utterances behind a name of the trials."""
        return self.enrolments.get(name, (name,))

    @functools.cached_property
    def utterances(self) -> list[Utterance]:
        """One utterance for every name of the trials.

        Raises:
            ValueError: an enrolment has several.
        """
        several = [name for name in self.trials.names if len(self.made_of(name)) > 1]
        if several:
            raise ValueError(f"this needs trials of single utterances; --enrolments has several for {several[0]}")
        return [self.corpus.utterance(self.made_of(name)[0]) for name in self.trials.names]


def load_test_set(config: TestConfig) -> TestSet:
    """Read corpus and trials, and check them before anything is embedded.

    Raises:
        MissingUtterancesError: the trials name utterances that the folder doesn't have; carries all of them.
        ValueError: one class only, an empty folder, or a cohort that is asked for but not given.
    """
    require(test_dir=config.test_dir)
    layout = CorpusLayout(config.test_layout)
    corpus = load_corpus(config.test_dir, layout)
    if config.trials:
        trials = read_trials(config.trials)
        enrolments = _read_enrolments(config.enrolments, trials, corpus) if config.enrolments else {}
        check_trials(trials, {*enrolments, *(utterance.name for utterance in corpus.utterances)})
    elif config.enrolments:
        raise ValueError("--enrolments needs --trials that name them")
    else:
        trials, enrolments = all_pairs(corpus.utterances), {}
    cohort = None
    if config.as_norm or config.subtract_mean:
        require(cohort_dir=config.cohort_dir)
        cohort = load_corpus(config.cohort_dir, layout)
    test_set = TestSet(corpus, trials, cohort, config, enrolments)
    if config.resample == "speakers":
        _check_speakers(test_set)
    return test_set


def _read_enrolments(path: str, trials: Trials, corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """Those that the trials name; raises where the corpus lacks utterances, or an enrolment is of several speakers."""
    named = set(trials.names)
    enrolments = {name: own for name, own in read_enrolments(path).items() if name in named}
    needed = set(itertools.chain.from_iterable(enrolments.values()))
    missing = sorted(name for name in needed if name not in corpus)
    if missing:
        raise MissingUtterancesError(missing, len(needed))
    for name, own in enrolments.items():
        speakers = sorted({corpus.utterance(utterance).speaker for utterance in own})
        if len(speakers) > 1:
            raise ValueError(f"{path}: the enrolment {name} is of several speakers, {', '.join(speakers[:5])}")
    return enrolments


def _check_speakers(test_set: TestSet) -> None:
    """Raise ValueError where a label contradicts the folders' speakers: their bootstrap would be meaningless."""
    trials, speakers = test_set.trials, test_set.speakers
    same = speakers[trials.enrolment] == speakers[trials.test]
    wrong = np.flatnonzero(same != trials.labels)
    if wrong.size:
        first = wrong[0]
        raise ValueError(
            f"{wrong.size} trials contradict the speakers' folders, first {int(trials.labels[first])} "
            f"{trials.names[trials.enrolment[first]]} {trials.names[trials.test[first]]}; where folders aren't "
            "speakers, give --resample=trials"
        )


class FileEmbedder(Protocol):
    """Whatever makes embeddings [n, embedding_size] of n files."""

    def embed_files(self, files: Sequence[pathlib.Path]) -> np.ndarray: ...


def score(embedder: FileEmbedder, test_set: TestSet) -> np.ndarray:
    """Scores of all trials, [trials] float; every utterance is embedded once.

    An enrolment of several utterances is the mean of their embeddings, not brought to unit length before, as in
    WeSpeaker.
    """
    config, trials = test_set.config, test_set.trials
    embeddings = _embed(embedder, test_set)
    cohort = mean = None
    if test_set.cohort is not None:
        others = embedder.embed_files([utterance.path for utterance in test_set.cohort.utterances])
        cohort = speaker_means(others, [utterance.speaker for utterance in test_set.cohort.utterances])
        mean = others.mean(axis=0) if config.subtract_mean else None
    scores = cosine_scores(embeddings, trials.enrolment, trials.test, mean=mean)
    if not config.as_norm:
        return scores
    top_n = min(config.top_n, len(cohort))
    return as_norm(scores, embeddings, trials.enrolment, trials.test, cohort, top_n=top_n, mean=mean)


def _embed(embedder: FileEmbedder, test_set: TestSet) -> np.ndarray:
    """[names of the trials, embedding_size]."""
    made_of = [test_set.made_of(name) for name in test_set.trials.names]
    needed = list(dict.fromkeys(itertools.chain.from_iterable(made_of)))
    embeddings = embedder.embed_files([test_set.corpus.utterance(name).path for name in needed])
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
        JSON-compatible figures.
    """
    config, trials = test_set.config, test_set.trials
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
        "trials": len(trials.labels),
        "target_trials": targets,
        "non_target_trials": len(trials.labels) - targets,
        "utterances": len(trials.names),
        "speakers": len(set(test_set.speakers.tolist())),
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
