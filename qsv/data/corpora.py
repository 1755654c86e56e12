"""Corpora: which audio files there are and who speaks in them."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Sequence

from qsv.data.record import AudioPath


@dataclasses.dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of one speaker.

    Attributes:
        name: path below the corpus root with forward slashes; what trial lists call it.
        path: the audio file, a path or a `Record` of a prepared corpus.
        speaker: who speaks.
        speed: the file is played this many times faster; pitch and tempo both change.
    """

    name: str
    path: AudioPath
    speaker: str
    speed: float = 1.0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Utterances and the sorted names of their speakers; a speaker's place there is the class label.

    Raises:
        ValueError: no utterances, two of one name, or `speakers` is not the sorted set of their speakers.
    """

    utterances: tuple[Utterance, ...]
    speakers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.utterances:
            raise ValueError("a corpus needs at least one utterance")
        if self.speakers != tuple(sorted({utterance.speaker for utterance in self.utterances})):
            raise ValueError(
                "speakers must be the sorted distinct speakers of the utterances; use Corpus.of(utterances)"
            )
        if len({utterance.name for utterance in self.utterances}) != len(self.utterances):
            names = Counter(utterance.name for utterance in self.utterances)
            repeated = sorted(name for name, count in names.items() if count > 1)
            raise ValueError(f"{len(repeated)} utterance names are not unique; the first: {repeated[:5]}")

    @classmethod
    def of(cls, utterances: Iterable[Utterance]) -> Corpus:
        """The corpus of these utterances, in this order."""
        utterances = tuple(utterances)
        return cls(utterances, tuple(sorted({utterance.speaker for utterance in utterances})))

    def __len__(self) -> int:
        return len(self.utterances)

    def label(self, utterance: Utterance) -> int:
        """Class index of the utterance's speaker, in `range(len(speakers))`."""
        return self._labels[utterance.speaker]

    def utterance(self, name: str) -> Utterance:
        """The utterance of this name; KeyError where there is none."""
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @functools.cached_property
    def _labels(self) -> dict[str, int]:
        return {speaker: label for label, speaker in enumerate(self.speakers)}

    @functools.cached_property
    def _by_name(self) -> dict[str, Utterance]:
        return {utterance.name: utterance for utterance in self.utterances}


def concatenate(corpora: Sequence[Corpus], *, prefixes: Sequence[str] | None = None) -> Corpus:
    """All utterances of several corpora as one corpus.

    Args:
        corpora: the corpora.
        prefixes: one for each corpus, put before its speakers and names as `PREFIX/`; None to keep both.

    Raises:
        ValueError: a speaker is in two corpora and there are no prefixes, so that two people might become one
            class; the prefixes are not distinct, or not one for each corpus.
    """
    if prefixes is None:
        counts = Counter(speaker for corpus in corpora for speaker in corpus.speakers)
        shared = sorted(speaker for speaker, count in counts.items() if count > 1)
        if shared:
            raise ValueError(
                f"{len(shared)} speakers are in more than one corpus, such as {shared[:5]}; "
                "pass prefixes=('a', 'b', ...) to keep them apart"
            )
        return Corpus.of(utterance for corpus in corpora for utterance in corpus.utterances)
    if len(prefixes) != len(corpora) or len(set(prefixes)) != len(prefixes):
        raise ValueError(f"expected {len(corpora)} distinct prefixes, one for each corpus, got {list(prefixes)}")
    return Corpus.of(
        dataclasses.replace(utterance, name=f"{prefix}/{utterance.name}", speaker=f"{prefix}/{utterance.speaker}")
        for prefix, corpus in zip(prefixes, corpora, strict=True)
        for utterance in corpus.utterances
    )


def with_speed_perturbation(corpus: Corpus, factors: Sequence[float] = (0.9, 1.1)) -> Corpus:
    """Adds a copy of every utterance at each speed, spoken by a new speaker `SPEAKER|sp0.9`.

    Changing the speed changes the pitch too, hence the voice: WeSpeaker and Kaldi recipes count it as another
    speaker, which triples the classes.

    Raises:
        ValueError: a factor that is not positive, is 1, or comes twice; a corpus that was perturbed before.
    """
    if len(set(factors)) != len(factors) or any(factor <= 0 or factor == 1 for factor in factors):
        raise ValueError(f"expected distinct positive speed factors other than 1, got {tuple(factors)}")
    if any(utterance.speed != 1 for utterance in corpus.utterances):
        raise ValueError("the corpus has speed-perturbed utterances already")
    copies = (
        dataclasses.replace(
            utterance,
            name=f"{utterance.name}|sp{factor:g}",
            speaker=f"{utterance.speaker}|sp{factor:g}",
            speed=float(factor),
        )
        for factor in factors
        for utterance in corpus.utterances
    )
    return Corpus.of((*corpus.utterances, *copies))
