"""Audio files to mono float waveforms at one sample rate, with errors that name the file."""

from __future__ import annotations

import functools
import io
import os
import struct
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from qsv.data.file_error import FileError
from qsv.data.record import Record

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")

# A float file above this was surely written in another scale (int16 units), not merely overdriven.
_LARGEST_PLAUSIBLE_PEAK = 8.0
_UNKNOWN_RIFF_SIZES = (0, 0xFFFFFFFF)


class AudioError(FileError):
    """An audio file that exists but cannot be used."""


def read_audio(
    path: str | os.PathLike[str],
    *,
    sample_rate_hz: int = 16000,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
    channel: int | None = None,
) -> np.ndarray:
    """Decodes an audio file, or a part of it, to a mono waveform.

    Args:
        path: wav, flac, ogg (Vorbis, Opus) or mp3 file.
        sample_rate_hz: rate of the returned waveform; a file of another rate is resampled with soxr (HQ).
        start_seconds: where to start; the file is sought, not read from its beginning.
        duration_seconds: how much to read; None for all. Less is returned where the file ends before.
        channel: the channel to take; None for the mean of all.

    Returns:
        `[samples] float32` in [-1, 1].

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: the file is empty, truncated, in no known format, or holds NaN or infinite samples.
            An Ogg file carries no length in its header: a truncated one reads as a shorter file.
    """
    if start_seconds < 0 or (duration_seconds is not None and duration_seconds <= 0):
        raise ValueError(
            "expected start_seconds >= 0 and duration_seconds > 0 or None, "
            f"got {start_seconds} and {duration_seconds} for {os.fspath(path)}"
        )
    if isinstance(path, Record):
        opening = functools.partial(_open_bytes, path.place, path.read_bytes())
    else:
        opening = functools.partial(_open, path)
    return _decode(path, opening, sample_rate_hz, start_seconds, duration_seconds, channel)


def decode_audio(
    data: bytes,
    name: str,
    *,
    sample_rate_hz: int = 16000,
    start_seconds: float = 0.0,
    duration_seconds: float | None = None,
) -> np.ndarray:
    """The same of a file's bytes, of any format; the name is for errors."""
    opening = functools.partial(_open_bytes, name, data)
    return _decode(name, opening, sample_rate_hz, start_seconds, duration_seconds, None)


def _decode(
    path: str | os.PathLike[str],
    opening: Callable[[], soundfile.SoundFile],
    sample_rate_hz: int,
    start_seconds: float,
    duration_seconds: float | None,
    channel: int | None,
) -> np.ndarray:
    """`read_audio` of what opens the file."""
    try:
        with opening() as sound:
            rate = sound.samplerate
            start = round(start_seconds * rate)
            if start >= sound.frames:
                raise AudioError(
                    path, f"starts reading at {start_seconds} s, but ends after {sound.frames / rate:.3f} s"
                )
            expected = sound.frames - start
            if duration_seconds is not None:
                expected = min(expected, max(1, round(duration_seconds * rate)))
            if start:
                sound.seek(start)
            waveform = sound.read(expected, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(path, f"cannot be decoded, perhaps truncated ({_cause(error)})") from error
    if len(waveform) < expected:
        raise AudioError(path, f"truncated: {expected} frames expected, {len(waveform)} decoded")
    if channel is not None and not 0 <= channel < waveform.shape[1]:
        raise AudioError(path, f"has {waveform.shape[1]} channels, channel {channel} was asked for")
    mono = waveform.mean(axis=1) if channel is None else waveform[:, channel]
    return _conditioned(path, mono, rate, sample_rate_hz)


def audio_duration_seconds(path: str | os.PathLike[str]) -> float:
    """Length of an audio file by its header, in seconds.

    Raises:
        FileNotFoundError: there is no such file.
        AudioError: the file is empty, visibly truncated, or in no known format.
    """
    if isinstance(path, Record):
        return path.num_samples / path.sample_rate_hz
    try:
        with _open(path) as file:
            return float(file.frames) / float(file.samplerate)
    except soundfile.SoundFileError as error:
        raise AudioError(path, f"cannot be decoded ({_cause(error)})") from error


def to_int16(waveform: np.ndarray) -> np.ndarray:
    """Float samples in [-1, 1] to int16 of scale 32768, saturating: exact for audio that was 16 bits."""
    return np.clip(np.rint(waveform * np.float32(32768)), -32768, 32767).astype(np.int16)


def to_float32(waveform: np.ndarray) -> np.ndarray:
    """Int16 samples to float32 in [-1, 1): the inverse of `to_int16`."""
    return waveform.astype(np.float32) * np.float32(1 / 32768)


def resample(waveform: np.ndarray, from_rate_hz: float, to_rate_hz: float, num_samples: int) -> np.ndarray:
    """Resamples `[n] float32` with soxr (HQ) to exactly `[num_samples]`."""
    return fit_length(soxr.resample(waveform, from_rate_hz, to_rate_hz, quality="HQ"), num_samples)


def fit_length(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Cuts the end off, or holds the last sample: for the sample or two that rounding between rates costs."""
    missing = num_samples - len(waveform)
    return np.pad(waveform, (0, missing), mode="edge") if missing > 0 else waveform[:num_samples]


def _open(path: str | os.PathLike[str]) -> soundfile.SoundFile:
    """Opens the file for reading after the checks that libsndfile does not make."""
    text = os.fspath(path)
    if not os.path.exists(text):
        raise FileNotFoundError(f"no audio file {text}")
    if os.path.isdir(text):
        raise AudioError(path, "is a folder; expected an audio file")
    if os.path.getsize(text) == 0:
        raise AudioError(path, "is empty (0 bytes)")
    if text.lower().endswith(".wav"):
        with open(text, "rb") as opened:
            _check_wav_is_complete(path, opened, os.path.getsize(text))
    return _holding_samples(path, soundfile.SoundFile(text))


def _open_bytes(name: str, data: bytes) -> soundfile.SoundFile:
    """The same of a file's bytes."""
    if not data:
        raise AudioError(name, "is empty (0 bytes)")
    _check_wav_is_complete(name, io.BytesIO(data), len(data))
    return _holding_samples(name, soundfile.SoundFile(io.BytesIO(data)))


def _cause(error: soundfile.SoundFileError) -> str:
    """What libsndfile says, without the file or object that it was opened by."""
    return str(error.error_string) if isinstance(error, soundfile.LibsndfileError) else str(error)


def _holding_samples(path: str | os.PathLike[str], file: soundfile.SoundFile) -> soundfile.SoundFile:
    if file.frames <= 0:
        file.close()
        raise AudioError(path, "holds no samples")
    return file


def _check_wav_is_complete(path: str | os.PathLike[str], file: BinaryIO, size: int) -> None:
    """Raises where the header promises more bytes than follow: libsndfile shortens such a file silently."""
    header = file.read(12)
    if len(header) < 12 or header[:4] != b"RIFF" or header[8:] != b"WAVE":
        return
    position = 12
    while len(chunk := file.read(8)) == 8:
        (length,) = struct.unpack("<I", chunk[4:])
        position += 8
        if chunk[:4] == b"data":
            if length not in _UNKNOWN_RIFF_SIZES and position + length > size:
                raise AudioError(
                    path,
                    f"truncated: its header promises {length} bytes of audio, {size - position} follow",
                )
            return
        position += length + length % 2
        file.seek(position)


def _conditioned(path: str | os.PathLike[str], waveform: np.ndarray, rate_hz: int, sample_rate_hz: int) -> np.ndarray:
    """Checks the samples, resamples and clips them."""
    peak = float(np.max(np.abs(waveform)))
    if not np.isfinite(peak):
        bad = int(np.flatnonzero(~np.isfinite(waveform))[0])
        raise AudioError(path, f"sample {bad} is {waveform[bad]}; expected finite samples")
    if peak > _LARGEST_PLAUSIBLE_PEAK:
        raise AudioError(path, f"samples reach {peak:g}; expected a float file in [-1, 1], rescale it")
    if rate_hz != sample_rate_hz:
        waveform = soxr.resample(waveform, rate_hz, sample_rate_hz, quality="HQ")
        if not len(waveform):
            raise AudioError(path, f"too short to resample from {rate_hz} to {sample_rate_hz} Hz")
    return np.clip(waveform, -1.0, 1.0).astype(np.float32, copy=False)
