"""Decoded audio kept in memory, so that training does not decode a file at every crop."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from concurrent import futures
from typing import Any

import numpy as np
import tqdm

from qsv.data.audio import AudioError, audio_duration_seconds, fit_length, read_audio, to_int16
from qsv.data.record import AudioPath

_HEADER_THREADS = 8
_QUIET_SECONDS = 5


class AudioCache:
    """Random access to pieces of a fixed set of audio files, the first of which are kept decoded as int16.

    Which files are kept is decided from their headers at construction, not by who comes first: a crop of a
    resampled or mp3 file differs slightly between decoding the whole and seeking into it, so a cache that
    filled in the order of use would make a training depend on timing and a resumed one differ.

    Args:
        paths: the files; the earlier ones are kept.
        sample_rate_hz: rate of all pieces.
        cache_bytes: bound of the memory of decoded audio.

    Attributes:
        num_samples: length of each readable file at `sample_rate_hz`, by its header.
        unreadable: what is wrong with each file whose header cannot be read.
    """

    def __init__(self, paths: Iterable[AudioPath], *, sample_rate_hz: int, cache_bytes: int) -> None:
        if cache_bytes < 0:
            raise ValueError(f"expected cache_bytes >= 0, got {cache_bytes}")
        self.sample_rate_hz = sample_rate_hz
        self.num_samples: dict[AudioPath, int] = {}
        self.unreadable: dict[AudioPath, str] = {}
        self._kept: set[AudioPath] = set()
        self._decoded: dict[AudioPath, np.ndarray | AudioError] = {}
        self._lock = threading.Lock()
        paths = list(dict.fromkeys(paths))
        with futures.ThreadPoolExecutor(_HEADER_THREADS) as executor:
            headers = executor.map(_header, paths, chunksize=64)
            shown = tqdm.tqdm(headers, "reading audio headers", len(paths), unit="file", delay=_QUIET_SECONDS)
            for path, duration_or_reason in zip(paths, shown, strict=True):
                if isinstance(duration_or_reason, str):
                    self.unreadable[path] = duration_or_reason
                else:
                    self.num_samples[path] = max(1, math.ceil(duration_or_reason * sample_rate_hz))
        for path, samples in self.num_samples.items():
            cache_bytes -= 2 * samples
            if cache_bytes < 0:
                break
            self._kept.add(path)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @property
    def cached_bytes(self) -> int:
        """Memory that decoded audio takes at the moment."""
        with self._lock:
            return sum(audio.nbytes for audio in self._decoded.values() if isinstance(audio, np.ndarray))

    def random_crop(self, path: AudioPath, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        """A piece at a random place; a file shorter than the piece is repeated to its length.

        Args:
            path: one of the files.
            num_samples: length of the piece at the cache's sample rate.
            rng: drawn from once, whatever the file's length.

        Returns:
            `[num_samples] int16`.

        Raises:
            AudioError: the file, or the part of it, cannot be read.
            FileNotFoundError: the file is gone.
        """
        place = rng.random()
        if path not in self._kept and num_samples < self.num_samples[path]:
            return self._read_piece(path, int(place * (self.num_samples[path] - num_samples + 1)), num_samples)
        whole = self._read_whole(path)
        if len(whole) < num_samples:
            return np.resize(whole, num_samples)
        start = int(place * (len(whole) - num_samples + 1))
        return whole[start : start + num_samples]

    def _read_whole(self, path: AudioPath) -> np.ndarray:
        """All of a file, from memory where it is kept; two threads may decode it at once, with one result."""
        with self._lock:
            audio = self._decoded.get(path)
        if audio is None:
            try:
                audio = to_int16(read_audio(path, sample_rate_hz=self.sample_rate_hz))
                audio.flags.writeable = False
            except AudioError as error:
                audio = AudioError(error.path, error.reason)
            if path in self._kept:
                with self._lock:
                    self._decoded[path] = audio
        if isinstance(audio, AudioError):
            raise AudioError(audio.path, audio.reason)
        return audio

    def _read_piece(self, path: AudioPath, start: int, num_samples: int) -> np.ndarray:
        """A piece by seeking."""
        piece = read_audio(
            path,
            sample_rate_hz=self.sample_rate_hz,
            start_seconds=start / self.sample_rate_hz,
            duration_seconds=num_samples / self.sample_rate_hz,
        )
        return to_int16(fit_length(piece, num_samples))


def _header(path: AudioPath) -> float | str:
    """The duration in seconds, or what is wrong with the file."""
    try:
        return audio_duration_seconds(path)
    except AudioError as error:
        return error.reason
    except OSError as error:
        return f"cannot be opened ({error.strerror or error})"
