"""What one element of a training batch is: a random crop of an utterance, augmented, and its label."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from qsv.data.audio import AudioError, to_float32, to_int16
from qsv.data.augmentation import Augmenter, change_speed
from qsv.data.bad_files import BadFiles
from qsv.data.cache import AudioCache
from qsv.data.corpora import Corpus, Utterance


class RandomCrops:
    """Random crops of the utterances that one process reads, with their labels in the whole corpus."""

    def __init__(
        self,
        corpus: Corpus,
        utterances: Sequence[Utterance],
        audio: AudioCache,
        num_samples: int,
        augment: Augmenter | None,
        max_bad_files: int,
        labels: Mapping[str, float] | None = None,
    ) -> None:
        self._corpus = corpus
        self._utterances = utterances
        self._audio = audio
        self._num_samples = num_samples
        self._augment = augment
        self._labels = labels
        # A speed-perturbed copy shares its file, which is counted once, by the name of the first to use it.
        self._names: dict[pathlib.Path, str] = {}
        for utterance in corpus.utterances:
            self._names.setdefault(utterance.path, utterance.name)
        self.bad_files = BadFiles(max_bad_files, len(self._names))
        for path, reason in audio.unreadable.items():
            self.bad_files.add(self._names[path], reason)

    def count(self, utterance: Utterance, crops_per_utterance: Literal["duration"] | int) -> int:
        """How many crops of the utterance one pass has."""
        if utterance.path in self._audio.unreadable:
            return 0
        if crops_per_utterance != "duration":
            return crops_per_utterance
        return max(1, round(self._audio.num_samples[utterance.path] / utterance.speed / self._num_samples))

    def load(self, index: np.int32, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """A crop of one utterance and its label; None, which grain passes over, where it cannot be read."""
        utterance = self._utterances[int(index)]
        samples_read = max(1, round(self._num_samples * utterance.speed))
        try:
            waveform = self._audio.random_crop(utterance.path, samples_read, rng)
        except (AudioError, OSError) as error:
            reason = error.reason if isinstance(error, AudioError) else str(error)
            self.bad_files.add(self._names[utterance.path], reason)
            return None
        if utterance.speed != 1 or self._augment is not None:
            samples = to_float32(waveform)
            if utterance.speed != 1:
                samples = change_speed(samples, utterance.speed, num_samples=self._num_samples)
            if self._augment is not None:
                samples = self._augment.augment(samples, rng)
            waveform = to_int16(samples)
        if self._labels is not None:
            label = np.asarray(self._labels[utterance.name], np.float32)
        else:
            label = np.asarray(self._corpus.label(utterance), np.int32)
        return {"waveform": waveform, "label": label}
