"""What one element of a training batch is: a random crop of an utterance, augmented, and its label."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from qsv.data.audio import AudioError, to_float32, to_int16
from qsv.data.augmentation import Augmenter, change_speed
from qsv.data.bad_files import BadFiles, BadFilesError
from qsv.data.cache import AudioCache
from qsv.data.corpora import Corpus, Utterance
from qsv.data.record import AudioPath

# What of an element says which file could not be read, and why: bytes, empty where all could.
UNREADABLE = "unreadable"

_UNREADABLE_BYTES = 300
_TRIES = 20


class RandomCrops:
    """Random crops of a corpus, with their labels; can be pickled, for processes that load.

    Attributes:
        repeats: how many crops of each utterance one pass has.
        places: of the utterance of every crop of a pass, int32.
        bad_files: what couldn't be read so far, as far as this process knows.

    Raises:
        BadFilesError: no file can be read, or too many can't.
    """

    def __init__(
        self,
        corpus: Corpus,
        audio: AudioCache,
        num_samples: int,
        crops_per_utterance: Literal["duration"] | int,
        augment: Augmenter | None,
        max_bad_files: int,
        labels: Mapping[str, float] | None = None,
    ) -> None:
        self._corpus = corpus
        self._audio = audio
        self._num_samples = num_samples
        self._augment = augment
        self._labels = labels
        # A speed-perturbed copy shares its file, which is counted once, by the name of the first to use it.
        self._names: dict[AudioPath, str] = {}
        for utterance in corpus.utterances:
            self._names.setdefault(utterance.path, utterance.name)
        self.bad_files = BadFiles(max_bad_files, len(self._names))
        for path, reason in audio.unreadable.items():
            self.bad_files.add(self._names[path], reason)
        self.repeats = [self._count(utterance, crops_per_utterance) for utterance in corpus.utterances]
        self.places = np.repeat(np.arange(len(corpus), dtype=np.int32), self.repeats)

    def _count(self, utterance: Utterance, crops_per_utterance: Literal["duration"] | int) -> int:
        if utterance.path in self._audio.unreadable:
            return 0
        if crops_per_utterance != "duration":
            return crops_per_utterance
        return max(1, round(self._audio.num_samples[utterance.path] / utterance.speed / self._num_samples))

    def load(self, place: np.int32, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A crop of one utterance and its label; of another, drawn at random, where it can't be read.

        Returns:
            `{"waveform": [samples] int16, "label": int32 or float32, UNREADABLE: bytes}`.

        Raises:
            BadFilesError: many in a row can't be read.
        """
        unreadable = b""
        for _ in range(_TRIES):
            utterance = self._corpus.utterances[int(place)]
            try:
                waveform = self._crop(utterance, rng)
                break
            except (AudioError, OSError) as error:
                reason = error.reason if isinstance(error, AudioError) else str(error)
                unreadable = unreadable or f"{place}\t{reason}".encode()[:_UNREADABLE_BYTES]
                place = self.places[rng.integers(len(self.places))]
        else:
            raise BadFilesError(f"{_TRIES} files in a row can't be read, the last was {utterance.path}: {reason}")
        if self._labels is not None:
            label = np.asarray(self._labels[utterance.name], np.float32)
        else:
            label = np.asarray(self._corpus.label(utterance), np.int32)
        return {"waveform": waveform, "label": label, UNREADABLE: np.asarray(unreadable, f"S{_UNREADABLE_BYTES}")}

    def _crop(self, utterance: Utterance, rng: np.random.Generator) -> np.ndarray:
        waveform = self._audio.random_crop(utterance.path, max(1, round(self._num_samples * utterance.speed)), rng)
        if utterance.speed == 1 and self._augment is None:
            return waveform
        samples = to_float32(waveform)
        if utterance.speed != 1:
            samples = change_speed(samples, utterance.speed, num_samples=self._num_samples)
        if self._augment is not None:
            samples = self._augment.augment(samples, rng)
        return to_int16(samples)

    def note(self, unreadable: Iterable[bytes]) -> None:
        """Counts the files that the elements of a batch say couldn't be read; raises BadFilesError for too many."""
        for text in filter(None, unreadable):
            place, reason = bytes(text).decode(errors="replace").split("\t", 1)
            self.bad_files.add(self._names[self._corpus.utterances[int(place)].path], reason)
