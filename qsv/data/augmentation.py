"""Augmentation of training speech: noise, reverberation and speed, pure functions of a random generator."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import scipy.signal

from qsv.data.audio import read_audio, resample, to_float32
from qsv.data.cache import AudioCache
from qsv.data.layouts import audio_files

_MUSAN_PARTS = (
    ("noise", (0.0, 15.0), (1, 1)),
    ("speech", (10.0, 30.0), (3, 8)),
    ("music", (5.0, 15.0), (1, 1)),
)


@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """Clips to mix into speech.

    Attributes:
        clips: the audio files; none need be as long as the speech.
        snr_db: the signal-to-noise ratio is drawn evenly from this range.
        num_mixed: how many clips are summed, drawn evenly from this range, both ends included; (3, 8) of
            speech makes babble.

    Raises:
        ValueError: no clips, or a range that is empty.
    """

    clips: tuple[pathlib.Path, ...]
    snr_db: tuple[float, float] = (0.0, 15.0)
    num_mixed: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("a noise source needs at least one clip")
        if not self.snr_db[0] <= self.snr_db[1]:
            raise ValueError(f"expected snr_db (low, high), got {self.snr_db}")
        if not 1 <= self.num_mixed[0] <= self.num_mixed[1]:
            raise ValueError(f"expected num_mixed (low, high) of at least 1, got {self.num_mixed}")


@dataclasses.dataclass(frozen=True, eq=False)
class ImpulseResponses:
    """Impulse responses of rooms, as files or as arrays (`simulate_room_impulse_responses`).

    Attributes:
        clips: audio files; of several channels the first is taken, since their mean would be a comb filter.
        arrays: `[taps] float32` at the augmenter's sample rate.

    Raises:
        ValueError: neither is given, or an array is not one-dimensional, finite and other than zero.
    """

    clips: tuple[pathlib.Path, ...] = ()
    arrays: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if not self.clips and not self.arrays:
            raise ValueError("expected impulse responses as clips or arrays, got neither")
        for index, array in enumerate(self.arrays):
            if array.ndim != 1 or not np.all(np.isfinite(array)) or not np.any(array):
                raise ValueError(
                    f"impulse response {index} of shape {array.shape} must be one-dimensional, finite, and not all zero"
                )


def folder_noise(root: str | os.PathLike[str], *, snr_db: tuple[float, float] = (0.0, 15.0)) -> tuple[NoiseSource, ...]:
    """One source of all audio files below a folder, whatever its classes.

    Raises:
        ValueError: there is no audio.
    """
    return (NoiseSource(_clips(pathlib.Path(root)), snr_db),)


def musan_noise(root: str | os.PathLike[str]) -> tuple[NoiseSource, ...]:
    """The three sources of a MUSAN folder.

    Noise at 0..15 dB, babble of 3..8 voices at 10..30 dB, music at 5..15 dB.

    Raises:
        ValueError: `root` lacks one of noise/, speech/, music/, or it holds no audio.

    Source: Snyder et al., "MUSAN: A Music, Speech, and Noise Corpus", 2015; the ranges are WeSpeaker's.
    WeSpeaker draws one clip out of all files, so that a part comes as often as it has files, and mixes one
    voice; we draw the part first, and mix babble as Kaldi's recipe does.
    """
    root = pathlib.Path(root)
    return tuple(NoiseSource(_clips(root / part), snr_db, mixed) for part, snr_db, mixed in _MUSAN_PARTS)


def folder_impulse_responses(root: str | os.PathLike[str]) -> ImpulseResponses:
    """The impulse responses below a folder: RIRS_NOISES as unpacked, or any folder of audio files.

    Of RIRS_NOISES (told by its `simulated_rirs/`) the noise recordings are left out.

    Raises:
        ValueError: there is no audio.
    """
    root = pathlib.Path(root)
    clips = _clips(root)
    if (root / "simulated_rirs").is_dir():
        clips = tuple(
            clip
            for clip in clips
            if "pointsource_noises" not in clip.relative_to(root).parts and "_noise_" not in clip.name
        )
    return ImpulseResponses(clips=clips)


def mix_at_snr(waveform: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Adds noise so that the ratio of the energies over the whole length is `snr_db`.

    y = x + n sqrt(sum(x^2) / sum(n^2) 10^(-snr_db / 10))

    Args:
        waveform: `[samples] float32`.
        noise: `[samples] float32`.
        snr_db: signal-to-noise ratio.

    Returns:
        `[samples] float32`, not clipped; the waveform itself where it or the noise is silent.
    """
    if waveform.shape != noise.shape:
        raise ValueError(f"expected noise of the waveform's shape {waveform.shape}, got {noise.shape}")
    signal_energy, noise_energy = _energy(waveform), _energy(noise)
    if signal_energy == 0 or noise_energy == 0:
        return waveform
    gain = math.sqrt(signal_energy / noise_energy * 10 ** (-snr_db / 10))
    return waveform + np.float32(gain) * noise


def reverberate(waveform: np.ndarray, impulse_response: np.ndarray) -> np.ndarray:
    """Convolves with an impulse response, keeping the place in time and the energy.

    The strongest tap counts as the direct path and is put at delay zero, so that the words stay in place.

    Args:
        waveform: `[samples] float32`.
        impulse_response: `[taps] float32`.

    Returns:
        `[samples] float32` with the energy of the waveform, not clipped.
    """
    energy = _energy(waveform)
    if energy == 0:
        return waveform
    direct = int(np.argmax(np.abs(impulse_response)))
    wet = scipy.signal.oaconvolve(waveform, impulse_response)[direct : direct + len(waveform)]
    wet_energy = _energy(wet)
    if wet_energy == 0:
        return waveform
    return (wet * math.sqrt(energy / wet_energy)).astype(np.float32)


def change_speed(waveform: np.ndarray, speed: float, *, num_samples: int | None = None) -> np.ndarray:
    """Plays a waveform `speed` times faster by resampling: tempo and pitch both change, as with `sox speed`.

    Args:
        waveform: `[samples] float32`.
        speed: above 1 is faster, shorter and higher.
        num_samples: length of the result; None for `round(samples / speed)`.

    Returns:
        `[num_samples] float32`.
    """
    if speed <= 0:
        raise ValueError(f"expected a positive speed, got {speed}")
    if num_samples is None:
        num_samples = max(1, round(len(waveform) / speed))
    return resample(waveform, speed, 1.0, num_samples)


class Augmenter:
    """Adds noise or reverberation to some of the waveforms it is given.

    With probability `probability` one of the two is applied, each equally often where both are there. For
    noise a source is drawn, then clips of it, then the ratio. All draws come from the generator that is
    passed in, so the same generator state gives the same waveform, in any thread.

    Args:
        noise: sources of noise (`folder_noise`, `musan_noise`).
        impulse_responses: rooms (`folder_impulse_responses`, `simulate_room_impulse_responses`).
        probability: how often a waveform is augmented.
        sample_rate_hz: rate of the waveforms.
        cache_bytes: bound of the memory for decoded noise clips, and of that for impulse responses.

    Raises:
        ValueError: neither noise nor impulse responses, a probability outside [0, 1], or a clip whose header
            cannot be read (all are counted, the first is named).
    """

    def __init__(
        self,
        noise: Sequence[NoiseSource] = (),
        impulse_responses: ImpulseResponses | None = None,
        *,
        probability: float = 0.6,
        sample_rate_hz: int = 16000,
        cache_bytes: int = 2**29,
    ) -> None:
        if not noise and impulse_responses is None:
            raise ValueError("an augmenter needs noise sources, impulse responses, or both; got neither")
        if not 0 <= probability <= 1:
            raise ValueError(f"expected probability in [0, 1], got {probability}")
        self.sample_rate_hz = sample_rate_hz
        self._noise = tuple(noise)
        self._impulse_responses = impulse_responses
        self._probability = probability
        clips = (clip for source in self._noise for clip in source.clips)
        self._clips = AudioCache(clips, sample_rate_hz=sample_rate_hz, cache_bytes=cache_bytes)
        if self._clips.unreadable:
            path, reason = next(iter(self._clips.unreadable.items()))
            raise ValueError(f"{len(self._clips.unreadable)} noise clips are unreadable, such as {path}: {reason}")
        self._responses: dict[pathlib.Path, np.ndarray] = {}
        self._responses_bytes_left = cache_bytes

    def augment(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the waveform with noise or reverberation, or as it is.

        Args:
            waveform: `[samples] float32` in [-1, 1].
            rng: where every draw comes from.

        Returns:
            `[samples] float32`, clipped to [-1, 1].
        """
        if rng.random() >= self._probability:
            return waveform
        if self._impulse_responses is not None and (not self._noise or rng.random() < 0.5):
            waveform = reverberate(waveform, self._impulse_response(self._impulse_responses, rng))
        else:
            source = self._noise[rng.integers(len(self._noise))]
            noise = self._mixed_clips(source, len(waveform), rng)
            waveform = mix_at_snr(waveform, noise, rng.uniform(*source.snr_db))
        return np.clip(waveform, -1.0, 1.0)

    def _mixed_clips(self, source: NoiseSource, num_samples: int, rng: np.random.Generator) -> np.ndarray:
        """The sum of random pieces of random clips; several are brought to one level first."""
        count = int(rng.integers(source.num_mixed[0], source.num_mixed[1], endpoint=True))
        total = np.zeros(num_samples, np.float32)
        for clip in rng.integers(len(source.clips), size=count):
            piece = to_float32(self._clips.random_crop(source.clips[clip], num_samples, rng))
            if count > 1:
                piece /= np.float32(math.sqrt(_energy(piece)) or 1.0)
            total += piece
        return total

    def _impulse_response(self, responses: ImpulseResponses, rng: np.random.Generator) -> np.ndarray:
        """A random response, decoded once while there is room."""
        index = int(rng.integers(len(responses.clips) + len(responses.arrays)))
        if index >= len(responses.clips):
            return responses.arrays[index - len(responses.clips)]
        path = responses.clips[index]
        response = self._responses.get(path)
        if response is None:
            response = read_audio(path, sample_rate_hz=self.sample_rate_hz, channel=0)
            if response.nbytes <= self._responses_bytes_left:
                # Threads that race here overrun the bound by one response each at most.
                self._responses_bytes_left -= response.nbytes
                self._responses[path] = response
        return response


def _energy(waveform: np.ndarray) -> float:
    """Sum of squares in float64: float32 would lose digits over long clips."""
    return float(np.sum(np.square(waveform, dtype=np.float64)))


def _clips(root: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The audio files below a folder, of which there must be some."""
    clips = tuple(audio_files(root)) if root.is_dir() else ()
    if not clips:
        raise ValueError(f"no audio files below {root}")
    return clips
