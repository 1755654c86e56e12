"""Noise, rooms and channels made from random numbers, for the embedded corpus and for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.signal

NOISE_KINDS = ("white", "pink", "hum", "babble")
_SILENCE = np.float32(1e-4)


def synthetic_noise(
    kind: str, num_samples: int, sample_rate_hz: int, voices: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """A stretch of noise.

    Args:
        kind: `white`; `pink`, whose power falls with 1/f; `hum`, a mains tone with overtones; or `babble`,
            three to six of the voices at once.
        num_samples: its length.
        sample_rate_hz: sample rate.
        voices: speech for `babble`, each `[samples] float32`.
        rng: where every draw comes from.

    Returns:
        `[num_samples] float32` of no particular level.

    Raises:
        ValueError: an unknown kind, or babble without voices.
    """
    match kind:
        case "white":
            noise = rng.standard_normal(num_samples)
        case "pink":
            spectrum = np.fft.rfft(rng.standard_normal(num_samples))
            noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), num_samples)
        case "hum":
            time = np.arange(num_samples) / sample_rate_hz
            harmonics = np.arange(1, 20) * rng.choice((50.0, 60.0))
            gains = rng.exponential(size=len(harmonics)) / np.sqrt(np.arange(1, 20))
            phases = rng.uniform(0, 2 * np.pi, len(harmonics))
            noise = gains @ np.sin(2 * np.pi * harmonics[:, None] * time + phases[:, None])
            noise += 0.1 * rng.standard_normal(num_samples)
        case "babble":
            if not voices:
                raise ValueError("babble needs voices")
            noise = np.zeros(num_samples)
            for index in rng.integers(len(voices), size=rng.integers(3, 7)):
                voice = np.roll(voices[index], rng.integers(len(voices[index])))
                noise += np.resize(voice, num_samples) / (np.sqrt(np.mean(np.square(voice))) + _SILENCE)
        case _:
            raise ValueError(f"expected a noise kind of {NOISE_KINDS}, got {kind!r}")
    return noise.astype(np.float32)


def decaying_response(
    sample_rate_hz: int,
    rng: np.random.Generator,
    *,
    rt60_seconds: tuple[float, float] = (0.1, 0.5),
    direct_to_reverberant_db: tuple[float, float] = (0.0, 15.0),
) -> np.ndarray:
    """A crude room: a direct path and exponentially decaying white noise.

    Args:
        sample_rate_hz: sample rate.
        rng: where every draw comes from.
        rt60_seconds: range of the time in which the tail falls by 60 dB.
        direct_to_reverberant_db: range of the ratio of the direct path's energy to the tail's.

    Returns:
        `[taps] float32`; the direct path is the first tap, 1.

    Source: Polack's statistical model of late reverberation, 1988.
    """
    rt60 = rng.uniform(*rt60_seconds)
    time = np.arange(1, int(rt60 * sample_rate_hz)) / sample_rate_hz
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    ratio_db = rng.uniform(*direct_to_reverberant_db)
    tail *= 10 ** (-ratio_db / 20) / np.linalg.norm(tail)
    return np.concatenate([[1.0], tail]).astype(np.float32)


def channel_filter(
    waveform: np.ndarray, sample_rate_hz: int, rng: np.random.Generator, *, deviation_db: float = 3.0
) -> np.ndarray:
    """Filters with a random smooth magnitude response, as microphones differ; the phase is linear.

    Args:
        waveform: `[samples] float32`.
        sample_rate_hz: sample rate.
        rng: where every draw comes from.
        deviation_db: standard deviation of the gain at each of seven points, spaced evenly in octaves.

    Returns:
        `[samples] float32`, not delayed.
    """
    nyquist = sample_rate_hz / 2
    points = np.geomspace(nyquist / 64, nyquist, 7)
    gains_db = rng.normal(0.0, deviation_db, 7)
    frequencies = np.linspace(0, nyquist, 65)
    gains = 10 ** (np.interp(np.log(np.maximum(frequencies, 1.0)), np.log(points), gains_db) / 20)
    taps = scipy.signal.firwin2(129, frequencies, gains, fs=sample_rate_hz)
    return scipy.signal.oaconvolve(waveform, taps, mode="same").astype(np.float32)
