"""Batches of whole utterances, in few distinct shapes."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np

from qsv.data.audio import AudioError, audio_duration_seconds, read_audio
from qsv.data.augmentation import change_speed
from qsv.data.bad_files import BadFiles
from qsv.data.corpora import Utterance
from qsv.data.record import AudioPath

_SHORTEST_PADDED_SECONDS = 0.5


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

    name: str
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
    bad_files: BadFiles | None = None,
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
        bad_files: notes the files that cannot be read, which are in no batch; None to stop at the first.

    Yields:
        `EvaluationBatch(indices, waveform, lengths)`.

    Raises:
        ValueError: a setting is out of range, or there is nothing to read.
        AudioError: a file cannot be read: an evaluation that left it out would not be one of the same trials.
        FileNotFoundError: a file is missing.
        BadFilesError: more files cannot be read than `bad_files` takes.
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
        utterances, batch_size, max_seconds, sample_rate_hz, num_threads, prefetch_batches, length_ratio, bad_files
    )


def _evaluation_batches(
    utterances: Sequence[Utterance | tuple[str, AudioPath]],
    batch_size: int,
    max_seconds: float | None,
    sample_rate_hz: int,
    num_threads: int,
    prefetch_batches: int,
    length_ratio: float,
    bad_files: BadFiles | None,
) -> Iterator[EvaluationBatch]:
    """`evaluation_batches` after its checks, which a generator would put off to the first batch."""
    with futures.ThreadPoolExecutor(num_threads) as executor:

        def attempt(name: str, path: AudioPath, read: Callable[[], Any]) -> Any:
            """What `read` returns; None where the file can't be read, which is noted."""
            try:
                return read()
            except (AudioError, OSError) as error:
                if bad_files is None:
                    raise
                bad_files.add(name, error.reason if isinstance(error, AudioError) else str(error))
                return None

        def measure(utterance: Utterance | tuple[str, AudioPath]) -> _Piece | None:
            if isinstance(utterance, Utterance):
                name, path, speed = utterance.name, utterance.path, utterance.speed
            else:
                name, path, speed = *utterance, 1.0
            found = attempt(name, path, lambda: audio_duration_seconds(path))
            if found is None:
                return None
            seconds = min(found / speed, max_seconds or math.inf)
            return _Piece(name, path, speed, max(1, math.ceil(seconds * sample_rate_hz)))

        def read(piece: _Piece) -> np.ndarray | None:
            return attempt(piece.name, piece.path, lambda: decode(piece))

        def decode(piece: _Piece) -> np.ndarray:
            seconds = None if max_seconds is None else max_seconds * piece.speed
            waveform = read_audio(piece.path, sample_rate_hz=sample_rate_hz, duration_seconds=seconds)
            if piece.speed != 1:
                waveform = change_speed(waveform, piece.speed)
            return waveform[: piece.num_samples]

        pieces = dict(enumerate(executor.map(measure, utterances)))
        readable = {index: piece for index, piece in pieces.items() if piece is not None}
        order = sorted(readable, key=lambda index: -readable[index].num_samples)
        waiting: collections.deque[tuple[list[int], list[futures.Future[np.ndarray | None]]]] = collections.deque()
        try:
            for start in range(0, len(order) + prefetch_batches * batch_size, batch_size):
                indices = order[start : start + batch_size]
                if indices:
                    waiting.append((indices, [executor.submit(read, readable[index]) for index in indices]))
                if len(waiting) > prefetch_batches or (waiting and not indices):
                    batch = _padded(*waiting.popleft(), batch_size, sample_rate_hz, length_ratio)
                    if batch is not None:
                        yield batch
        finally:
            # Also where the consumer stops early: nothing that is no longer wanted is decoded.
            for _, reads in waiting:
                for pending in reads:
                    pending.cancel()


def _padded(
    indices: list[int],
    reads: list[futures.Future[np.ndarray | None]],
    batch_size: int,
    sample_rate_hz: int,
    length_ratio: float,
) -> EvaluationBatch | None:
    """Stacks waveforms, zero padded to the next length of the grid; None where none could be read."""
    found = [pending.result() for pending in reads]
    waveforms = [waveform for waveform in found if waveform is not None]
    if not waveforms:
        return None
    places = np.array([index for index, waveform in zip(indices, found, strict=True) if waveform is not None], np.int32)
    waveforms += waveforms[:1] * (batch_size - len(waveforms))
    lengths = np.array([len(waveform) for waveform in waveforms], np.int32)
    shortest = _SHORTEST_PADDED_SECONDS * sample_rate_hz
    # The small slack keeps a length that lies on the grid from being rounded up to the next.
    exponent = math.ceil(math.log(max(1.0, lengths.max() / shortest), length_ratio) - 1e-9)
    padded = np.zeros((batch_size, math.ceil(shortest * length_ratio**exponent)), np.float32)
    for row, waveform in zip(padded, waveforms, strict=True):
        row[: len(waveform)] = waveform
    return EvaluationBatch(places, padded, lengths)
