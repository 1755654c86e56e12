"""What one element of a training batch is: a random crop of an utterance, augmented, and its label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from qsv.data.audio import AudioError, to_float32, to_int16
from qsv.data.augmentation import Augmenter, change_speed
from qsv.data.bad_files import BadFiles
from qsv.data.cache import AudioCache
from qsv.data.corpora import Corpus, Utterance
from qsv.data.record import AudioPath

_REASON_BYTES = 200


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
        self._names: dict[AudioPath, str] = {}
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

    def load(self, index: np.int32, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A crop of one utterance and its label, in any process; where it cannot be read, with the reason.

        Returns:
            `{"waveform": [samples] int16, "label", "utterance": place among the utterances, "error": bytes}`.
        """
        utterance = self._utterances[int(index)]
        samples_read = max(1, round(self._num_samples * utterance.speed))
        error = ""
        try:
            waveform = self._audio.random_crop(utterance.path, samples_read, rng)
        except (AudioError, OSError) as caught:
            error = (caught.reason if isinstance(caught, AudioError) else str(caught)) or type(caught).__name__
            waveform = np.zeros(samples_read, np.int16)
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
        noted = {"utterance": np.asarray(index), "error": np.asarray(error.encode(), f"S{_REASON_BYTES}")}
        return {"waveform": waveform, "label": label, **noted}

    def is_readable(self, element: dict[str, np.ndarray]) -> bool:
        """Whether `load` could read; notes the file otherwise. In the process that trains."""
        reason = bytes(element["error"]).decode(errors="replace").rstrip("\0")
        if reason:
            self.bad_files.add(self._names[self._utterances[int(element["utterance"])].path], reason)
        return not reason


def crop_of(element: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What of `RandomCrops.load` a batch is made of."""
    return {"waveform": element["waveform"], "label": element["label"]}
