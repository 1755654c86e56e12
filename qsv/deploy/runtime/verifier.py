"""Enrolment, verification and identification of speakers."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from qsv.deploy.runtime.embedder import OnnxEmbedder
from qsv.deploy.runtime.store import StoreError, VoicePrint, VoicePrintStore


@dataclasses.dataclass(frozen=True)
class Enrolment:
    """What an enrolment made.

    Attributes:
        name: of the speaker.
        added: utterances of this enrolment.
        utterances: of the whole voice print.
        least_score: smallest cosine of an added utterance with the rest of the voice print; None for a single one.
            A small one says that a recording is of somebody else.
        warnings: about the recordings.
    """

    name: str
    added: int
    utterances: int
    least_score: float | None
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Verification:
    """A decision on one recording.

    Attributes:
        name: of the claimed speaker.
        score: cosine of the recording's embedding with the voice print, -1 to 1.
        threshold: from which on it is accepted.
        accepted: whether the recording is taken for the speaker's.
        warnings: about the recording.
    """

    name: str
    score: float
    threshold: float
    accepted: bool
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A speaker whom a recording may be of; fields as in `Verification`."""

    name: str
    score: float
    accepted: bool


class SpeakerVerifier:
    """A model, a store of voice prints and a threshold.

    A voice print is the mean direction of a speaker's embeddings, and a score its cosine with a recording's embedding.

    Args:
        embedder: the model.
        store: of voice prints.
        threshold: score from which on a recording is accepted; None takes the model's own, calibrated one, if it has
            one.

    Raises:
        ValueError: the threshold is no cosine.
    """

    def __init__(self, embedder: OnnxEmbedder, store: VoicePrintStore, *, threshold: float | None = None) -> None:
        chosen = embedder.threshold if threshold is None else threshold
        if chosen is not None and not -1 <= chosen <= 1:
            raise ValueError(f"a threshold of cosines must be in [-1, 1], got {chosen}")
        self.embedder, self.store, self.threshold = embedder, store, chosen

    def enrol(self, name: str, paths: Sequence[str | os.PathLike[str]], *, replace: bool = False) -> Enrolment:
        """Add recordings to a speaker's voice print; all of them, or none where one can't be used.

        Args:
            name: of the speaker.
            paths: recordings of that speaker.
            replace: forget what was enrolled before.

        Raises:
            FileNotFoundError, AudioError: a recording can't be used.
            ValueError: there are none, or the name is empty.
            StoreError: the speaker was enrolled by another model, or the store can't be written.
        """
        if not paths:
            raise ValueError("give at least one recording to enrol")
        embedded = [self.embedder.embed_file(path) for path in paths]
        embeddings = np.stack([embedding for embedding, _ in embedded])
        warnings = [f"{path} {text}" for path, (_, texts) in zip(paths, embedded, strict=True) for text in texts]
        made = self.store.enrol(name, self.embedder.digest, embeddings, replace=replace)
        return Enrolment(name, len(paths), len(made.embeddings), _least_score(made, len(paths)), tuple(warnings))

    def verify(self, name: str, path: str | os.PathLike[str]) -> Verification:
        """Decide whether a recording is of an enrolled speaker.

        Raises:
            ValueError: there is no threshold.
            UnknownSpeakerError: nobody of that name is enrolled.
            StoreError: the speaker was enrolled by another model.
            FileNotFoundError, AudioError: the recording can't be used.
        """
        threshold = self._threshold()
        voice_print = self.store.voice_print(name)
        if voice_print.model != self.embedder.digest:
            raise StoreError(f"{name!r} was enrolled by another model than {self.embedder.path}; enrol again")
        embedding, warnings = self.embedder.embed_file(path)
        score = float(voice_print.direction @ _unit(embedding))
        texts = tuple(f"{path} {text}" for text in warnings)
        return Verification(name, score, threshold, score >= threshold, texts)

    def identify(self, path: str | os.PathLike[str]) -> list[Candidate]:
        """All speakers that this model enrolled, the likeliest first; none of them need be accepted.

        Raises:
            ValueError: there is no threshold.
            StoreError: this model enrolled nobody.
            FileNotFoundError, AudioError: the recording can't be used.
        """
        threshold = self._threshold()
        prints = [one for one in self.store.voice_prints() if one.model == self.embedder.digest]
        if not prints:
            raise StoreError(f"nobody is enrolled in {self.store.path} by {self.embedder.path}")
        embedding, _ = self.embedder.embed_file(path)
        scores = np.stack([one.direction for one in prints]) @ _unit(embedding)
        return [
            Candidate(prints[index].name, float(scores[index]), bool(scores[index] >= threshold))
            for index in np.argsort(-scores, kind="stable")
        ]

    def _threshold(self) -> float:
        if self.threshold is None:
            raise ValueError(f"{self.embedder.path} has no calibrated threshold; give one")
        return self.threshold


def _least_score(voice_print: VoicePrint, added: int) -> float | None:
    embeddings = voice_print.embeddings
    if len(embeddings) < 2:
        return None
    others = embeddings.sum(axis=0) - embeddings[-added:]
    lengths = np.maximum(np.linalg.norm(others, axis=1), 1e-12)
    return float(np.min(np.sum(embeddings[-added:] * others, axis=1) / lengths))


def _unit(embedding: np.ndarray) -> np.ndarray:
    return embedding / max(float(np.linalg.norm(embedding)), 1e-12)
