"""Batches of random crops for training, resumable at any step."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import grain
import numpy as np
from absl import flags

from qsv.data.augmentation import Augmenter
from qsv.data.cache import AudioCache
from qsv.data.corpora import Corpus
from qsv.data.crops import UNREADABLE, RandomCrops

_STATE_VERSION = 3
_ENDLESS = 2**60


class TrainingLoader(Iterator[dict[str, np.ndarray]]):
    """Endless batches of random crops; made by `training_loader`, which see.

    Attributes:
        num_crops: crops that one pass over the corpus gives.
        steps_per_epoch: batches in one pass over the corpus.
    """

    def __init__(
        self, batches_from: Callable[[int], grain.IterDataset], crops: RandomCrops, steps: int, key: int
    ) -> None:
        self.num_crops = len(crops.places)
        self.steps_per_epoch = steps
        self._batches_from = batches_from
        self._crops = crops
        self._key = key
        self._returned = 0
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            self._iterator = iter(self._batches_from(self._returned))
        batch = dict(next(self._iterator))
        self._crops.note(batch.pop(UNREADABLE))
        self._returned += 1
        return batch

    @property
    def bad_files(self) -> tuple[tuple[str, str], ...]:
        """Name and reason of every unreadable file met so far, sorted."""
        return self._crops.bad_files.sorted()

    def get_state(self) -> dict[str, Any]:
        """Where the loader stands, JSON-serializable and the same in all processes of a training."""
        return {"version": _STATE_VERSION, "key": self._key, "batches": self._returned}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where another loader of the same corpus and settings stood, of however many processes.

        Raises:
            ValueError: the state is of another corpus, seed, batch size or crop, where going on would repeat or skip
                data silently.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"expected a loader state of version {_STATE_VERSION}, got {state.get('version')}")
        if state["key"] != self._key:
            raise ValueError(
                "the loader state belongs to another corpus, seed, batch size, crop length or number of crops; make "
                "the loader with the settings of the run that is resumed"
            )
        self.close()
        self._returned = state["batches"]

    def close(self) -> None:
        """Stops the reading threads and processes."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


def training_loader(
    corpus: Corpus,
    *,
    batch_size: int,
    crop_seconds: float,
    seed: int,
    augment: Augmenter | None = None,
    sample_rate_hz: int = 16000,
    cache_bytes: int = 2**30,
    max_bad_files: int = 100,
    num_threads: int = 2,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    crops_per_utterance: Literal["duration"] | int = "duration",
    labels: Mapping[str, float] | None = None,
    shard: tuple[int, int] = (0, 1),
) -> TrainingLoader:
    """Endless shuffled batches of random crops of a corpus.

    Every pass visits each utterance `max(1, round(duration / crop_seconds))` times, at places drawn anew; an
    utterance shorter than the crop is repeated to its length. The batches depend on the seed, not on threads, processes
    or timing. Where a file can't be read, another, drawn at random, takes its place.

    Several processes of one training each get their rows of the same batches.

    Args:
        corpus: what to read. Speed-perturbed utterances (`with_speed_perturbation`) share the decoded audio.
        batch_size: crops in a batch, over all processes of the training.
        crop_seconds: length of a crop.
        seed: of the order, the places and the augmentation.
        augment: noise and reverberation; None for none.
        sample_rate_hz: rate of the crops; must be the augmenter's.
        cache_bytes: memory for decoded audio, over all processes; files beyond it are read by seeking. A resampled or
            mp3 file differs slightly between the two.
        max_bad_files: more unreadable files than this stop the loading.
        num_threads: threads that read and augment ahead, in each process; 0 to do it in `next`.
        num_workers: processes that do so, for more than Python's one core; 0 to do it in this one.
        prefetch_batches: how many batches ahead.
        crops_per_utterance: "duration" as above, or a number for all.
        labels: {utterance's name: number to predict}; None for its speaker's class.
        shard: (index, count): which of the processes of the training this is.

    Returns:
        An iterator of `{"waveform": [batch / count, samples] int16 of scale 32768, "label": [batch / count] int32}`,
        the label float32 where `labels` has it.

    Raises:
        ValueError: a setting is out of range, or an utterance has no label.
        BadFilesError: too many files have unreadable headers; also from `next`, when decoding finds too many.
    """
    _check_settings(batch_size, crop_seconds, sample_rate_hz, augment, crops_per_utterance)
    if num_workers < 0 or num_threads < 0:
        raise ValueError(f"expected num_workers and num_threads >= 0, got {num_workers} and {num_threads}")
    index, count = shard
    if not 0 <= index < count or batch_size % count:
        raise ValueError(f"expected shard (index, count) with index < count, which divides {batch_size}, got {shard}")
    if labels is not None:
        unlabelled = [utterance.name for utterance in corpus.utterances if utterance.name not in labels]
        if unlabelled:
            raise ValueError(f"{len(unlabelled)} utterances have no label, such as {unlabelled[0]}")
    crop_samples = round(crop_seconds * sample_rate_hz)
    paths = [utterance.path for utterance in corpus.utterances]
    audio = AudioCache(paths, sample_rate_hz=sample_rate_hz, cache_bytes=cache_bytes // max(1, num_workers))
    crops = RandomCrops(corpus, audio, crop_samples, crops_per_utterance, augment, max_bad_files, labels)
    if num_workers and not flags.FLAGS.is_parsed():
        # Grain reads flags of its own, whether or not the program has any.
        flags.FLAGS.mark_as_parsed()
    stream = grain.MapDataset.source(crops.places).seed(seed).shuffle().repeat().random_map(crops.load)
    own_size = batch_size // count

    def batches_from(start: int) -> grain.IterDataset:
        rows = grain.MapDataset.source(_Rows(stream, start, batch_size, index * own_size, own_size))
        loaded = rows.to_iter_dataset(grain.ReadOptions(num_threads, prefetched))
        if num_workers:
            # Before the batches, so that these don't depend on how many processes there are.
            per_worker = max(1, prefetch_batches * own_size // num_workers)
            loaded = loaded.mp_prefetch(grain.MultiprocessingOptions(num_workers, per_worker))
        return loaded.batch(own_size, drop_remainder=True)

    prefetched = max(num_threads, prefetch_batches * own_size) if num_threads else 0
    key = zlib.crc32(repr((seed, batch_size, crop_samples, sample_rate_hz)).encode())
    for utterance, times in zip(corpus.utterances, crops.repeats, strict=True):
        target = utterance.speaker if labels is None else repr(labels[utterance.name])
        key = zlib.crc32(f"{utterance.name}\0{target}\0{times}\0".encode(), key)
    return TrainingLoader(batches_from, crops, max(1, len(crops.places) // batch_size), key)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """One process's elements of a stream of batches, from a batch on."""

    stream: grain.MapDataset
    first_batch: int
    batch_size: int
    first_row: int
    rows: int

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: int) -> Any:
        batch, row = divmod(int(number), self.rows)
        return self.stream[(self.first_batch + batch) * self.batch_size + self.first_row + row]


def _check_settings(
    batch_size: int,
    crop_seconds: float,
    sample_rate_hz: int,
    augment: Augmenter | None,
    crops_per_utterance: Literal["duration"] | int,
) -> None:
    """Raises ValueError for settings of `training_loader` out of range."""
    if batch_size < 1 or round(crop_seconds * sample_rate_hz) < 1:
        raise ValueError(f"expected batch_size >= 1 and a positive crop, got {batch_size} and {crop_seconds} s")
    if crops_per_utterance != "duration" and (not isinstance(crops_per_utterance, int) or crops_per_utterance < 1):
        raise ValueError(f"expected crops_per_utterance 'duration' or at least 1, got {crops_per_utterance!r}")
    if augment is not None and augment.sample_rate_hz != sample_rate_hz:
        raise ValueError(f"the augmenter works at {augment.sample_rate_hz} Hz, the loader at {sample_rate_hz} Hz")
