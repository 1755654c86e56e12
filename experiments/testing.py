"""Test speech, its trials, and what a model's scores of them say."""

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import numpy as np

from experiments.configuration import require, setting
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
        "experiments.prepare (FOLDER:SPLIT or FOLDER:SPLIT+SPLIT).",
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


def load_test_set(config: TestConfig, corpus: Corpus | None = None) -> TestSet:
    """Read corpus (unless it is given) and trials, and check them before anything is embedded.

    Raises:
        MissingUtterancesError: the trials name utterances that the folder doesn't have; carries all of them.
        ValueError: one class only, an empty folder, or a cohort that is asked for but not given.
    """
    require(test_dir=config.test_dir)
    corpus = corpus or load_corpus(config.test_dir, CorpusLayout(config.test_layout))
    if config.trials:
        trials = read_trials(config.trials)
        enrolments = _read_enrolments(config.enrolments, trials, corpus) if config.enrolments else {}
        check_trials(trials, {*enrolments, *(utterance.name for utterance in corpus.utterances)})
    elif config.enrolments:
        raise ValueError("--enrolments needs --trials that name them")
    else:
        trials, enrolments = all_pairs(corpus.utterances), {}
    test_set = TestSet(corpus, trials, load_cohort(config), config, enrolments)
    if config.resample == "speakers":
        _check_speakers(test_set)
    return test_set


def load_cohort(config: TestConfig) -> Corpus | None:
    """The cohort's corpus where the flags want one."""
    if not (config.as_norm or config.subtract_mean):
        return None
    require(cohort_dir=config.cohort_dir)
    return load_corpus(config.cohort_dir, CorpusLayout(config.test_layout))


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
