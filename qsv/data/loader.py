"""Batches of random crops for training, resumable at any step, and of whole utterances for evaluation."""

from __future__ import annotations

import collections
import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, Literal, NamedTuple

import grain
import numpy as np
from absl import flags

from qsv.data.audio import audio_duration_seconds, read_audio
from qsv.data.augmentation import Augmenter, change_speed
from qsv.data.cache import AudioCache
from qsv.data.corpora import Corpus, Utterance
from qsv.data.crops import UNREADABLE, RandomCrops
from qsv.data.record import AudioPath

_STATE_VERSION = 3
_SHORTEST_PADDED_SECONDS = 0.5
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


class EvaluationBatch(NamedTuple):
    """Whole utterances, padded to one length."""

    indices: np.ndarray
    """`[n] int32`: places of the first n rows in the sequence that was asked for; rows beyond n are fill."""
    waveform: np.ndarray
    """`[batch, samples] float32`, zero beyond each row's length."""
    lengths: np.ndarray
    """`[batch] int32`, samples."""


@dataclasses.dataclass(frozen=True)
class _Piece:
    """What evaluation reads of one file, and how long it becomes at most."""

    path: AudioPath
    speed: float
    num_samples: int


def evaluation_batches(
    utterances: Sequence[Utterance | tuple[str, AudioPath]],
    *,
    batch_size: int,
    max_seconds: float | None = None,
    sample_rate_hz: int = 16000,
    num_threads: int = 2,
    prefetch_batches: int = 2,
    length_ratio: float = 1.25,
) -> Iterator[EvaluationBatch]:
    """Batches of whole utterances, longest first, in few distinct shapes.

    Utterances are sorted by length, so that little is padded, and the padded lengths are
    `0.5 s * length_ratio**k`, so that a jitted model compiles some fifteen times for a corpus of 1..20 s.
    The longest come first: a batch that does not fit in memory fails at once.

    Args:
        utterances: utterances, or pairs of a name and a path.
        batch_size: rows in every batch; the last one is filled up by repeating its first row.
        max_seconds: only so much of each utterance's beginning; None for all.
        sample_rate_hz: rate of the waveforms.
        num_threads: threads that decode ahead.
        prefetch_batches: how many batches ahead.
        length_ratio: ratio of successive padded lengths.

    Yields:
        `EvaluationBatch(indices, waveform, lengths)`.

    Raises:
        ValueError: a setting is out of range, or there is nothing to read.
        AudioError: a file cannot be read: an evaluation that left it out would not be one of the same trials.
        FileNotFoundError: a file is missing.
    """
    if batch_size < 1 or num_threads < 1 or prefetch_batches < 1 or length_ratio <= 1:
        raise ValueError(
            "expected batch_size, num_threads, prefetch_batches >= 1 and length_ratio > 1, got "
            f"{batch_size}, {num_threads}, {prefetch_batches} and {length_ratio}"
        )
    if max_seconds is not None and max_seconds <= 0:
        raise ValueError(f"expected max_seconds > 0 or None, got {max_seconds}")
    if not len(utterances):
        raise ValueError("no utterances to evaluate")
    return _evaluation_batches(
        utterances, batch_size, max_seconds, sample_rate_hz, num_threads, prefetch_batches, length_ratio
    )


def _evaluation_batches(
    utterances: Sequence[Utterance | tuple[str, AudioPath]],
    batch_size: int,
    max_seconds: float | None,
    sample_rate_hz: int,
    num_threads: int,
    prefetch_batches: int,
    length_ratio: float,
) -> Iterator[EvaluationBatch]:
    """`evaluation_batches` after its checks, which a generator would put off to the first batch."""
    with futures.ThreadPoolExecutor(num_threads) as executor:

        def measure(utterance: Utterance | tuple[str, AudioPath]) -> _Piece:
            if isinstance(utterance, Utterance):
                path, speed = utterance.path, utterance.speed
            else:
                path, speed = utterance[1], 1.0
            seconds = min(audio_duration_seconds(path) / speed, max_seconds or math.inf)
            return _Piece(path, speed, max(1, math.ceil(seconds * sample_rate_hz)))

        def read(piece: _Piece) -> np.ndarray:
            seconds = None if max_seconds is None else max_seconds * piece.speed
            waveform = read_audio(piece.path, sample_rate_hz=sample_rate_hz, duration_seconds=seconds)
            if piece.speed != 1:
                waveform = change_speed(waveform, piece.speed)
            return waveform[: piece.num_samples]

        pieces = list(executor.map(measure, utterances))
        order = np.argsort([-piece.num_samples for piece in pieces], kind="stable").astype(np.int32)
        waiting: collections.deque[tuple[np.ndarray, list[futures.Future[np.ndarray]]]] = collections.deque()
        try:
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                waiting.append((indices, [executor.submit(read, pieces[index]) for index in indices]))
                if len(waiting) > prefetch_batches:
                    yield _padded(*waiting.popleft(), batch_size, sample_rate_hz, length_ratio)
            while waiting:
                yield _padded(*waiting.popleft(), batch_size, sample_rate_hz, length_ratio)
        finally:
            # Also where the consumer stops early: nothing that is no longer wanted is decoded.
            for _, reads in waiting:
                for pending in reads:
                    pending.cancel()


def _padded(
    indices: np.ndarray,
    reads: list[futures.Future[np.ndarray]],
    batch_size: int,
    sample_rate_hz: int,
    length_ratio: float,
) -> EvaluationBatch:
    """Stacks waveforms, zero padded to the next length of the grid."""
    waveforms = [pending.result() for pending in reads]
    waveforms += waveforms[:1] * (batch_size - len(waveforms))
    lengths = np.array([len(waveform) for waveform in waveforms], np.int32)
    shortest = _SHORTEST_PADDED_SECONDS * sample_rate_hz
    # The small slack keeps a length that lies on the grid from being rounded up to the next.
    exponent = math.ceil(math.log(max(1.0, lengths.max() / shortest), length_ratio) - 1e-9)
    padded = np.zeros((batch_size, math.ceil(shortest * length_ratio**exponent)), np.float32)
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return EvaluationBatch(indices, padded, lengths)


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
