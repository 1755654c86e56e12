"""Mel power spectrograms as librosa computes them, shared by the front ends that are built on them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsv.frontend.framing import framed


@dataclasses.dataclass(frozen=True)
class MelFrames:
    """How a front end that is built on `mel_power` cuts a waveform and bands its spectrum.

    Attributes:
        sample_rate_hz: sampling rate the waveform must have.
        num_mels: Mel bands per frame, from 0 Hz to the Nyquist frequency.
        frame_length_ms: length of an analysis frame.
        frame_shift_ms: hop between frames.

    Raises:
        ValueError: a setting is out of range.
    """

    sample_rate_hz: int = 16000
    num_mels: int = 40
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "num_mels", "frame_length_ms", "frame_shift_ms"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if min(self.frame_length, self.frame_shift) < 1:
            raise ValueError(
                f"frames must hold a sample at {self.sample_rate_hz} Hz, got frame_length_ms={self.frame_length_ms}, "
                f"frame_shift_ms={self.frame_shift_ms}"
            )

    @property
    def num_features(self) -> int:
        """Features of a frame."""
        return self.num_mels

    @property
    def frame_length(self) -> int:
        """Samples in a frame."""
        return int(self.sample_rate_hz * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """Samples between the centres of two frames."""
        return int(self.sample_rate_hz * self.frame_shift_ms / 1000)

    @property
    def min_samples(self) -> int:
        """Samples of the shortest waveform that it takes: one frame."""
        return self.frame_length

    def check_waveform(self, waveform: jax.Array) -> None:
        """Raise ValueError unless it is [batch, samples] float, and as long as one frame."""
        if waveform.ndim != 2 or not jnp.issubdtype(waveform.dtype, jnp.floating):
            raise ValueError(f"waveform must be [batch, samples] float, got {waveform.shape} {waveform.dtype}")
        if waveform.shape[1] < self.min_samples:
            raise ValueError(
                f"waveform must have at least {self.min_samples} samples (one frame), got {waveform.shape[1]}"
            )

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of `num_samples` samples (an int or an integer array)."""
        raise NotImplementedError

    def cut_to_lengths(self, waveform: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """The waveform with zeros past each row's length, and the mask [batch, frames] of its valid frames."""
        if lengths is None:
            return waveform, None
        samples, limit = waveform.shape[1], jnp.asarray(lengths)[:, None]
        mask = jnp.arange(self.num_frames(samples)) < self.num_frames(limit)
        return jnp.where(jnp.arange(samples) < limit, waveform, 0), mask

    def power(self, waveform: jax.Array) -> jax.Array:
        """[batch, frames, num_mels] of a waveform [batch, samples]."""
        return mel_power(
            waveform,
            self.num_frames(waveform.shape[1]),
            sample_rate_hz=self.sample_rate_hz,
            frame_length=self.frame_length,
            frame_shift=self.frame_shift,
            num_mels=self.num_mels,
        )


def mel_power(
    waveform: jax.Array, frames: int, *, sample_rate_hz: int, frame_length: int, frame_shift: int, num_mels: int
) -> jax.Array:
    """Mel power spectrogram of frames centred on every `frame_shift`-th sample; beyond its ends the waveform is zero.

        y[t, m] = sum_k weights[k, m] |rfft(hann * x[centred on sample t * shift])[k]|^2

    Args:
        waveform: [batch, samples] float.
        frames: how many.
        sample_rate_hz: rate of the waveform.
        frame_length: samples in a frame, which is the length of the transform too.
        frame_shift: samples between two frames.
        num_mels: bands, from 0 Hz to the Nyquist frequency.

    Returns:
        [batch, frames, num_mels] in the waveform's dtype.

    Source: `librosa.feature.melspectrogram` with its defaults (periodic Hann window, Slaney's Mel scale and area
    normalisation, zero padding).
    """
    before = frame_length // 2
    after = max(0, (frames - 1) * frame_shift + frame_length - before - waveform.shape[1])
    padded = jnp.pad(waveform, ((0, 0), (before, after)))
    cut = framed(padded, frames, length=frame_length, shift=frame_shift)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame_length) / frame_length)
    spectrum = jnp.fft.rfft(cut * window.astype(waveform.dtype), axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    weights = _mel_weights(sample_rate_hz, frame_length, num_mels)
    return (power @ jnp.asarray(weights, power.dtype)).astype(waveform.dtype)


@functools.cache
def _mel_weights(sample_rate_hz: int, fft_size: int, num_mels: int) -> np.ndarray:
    """[fft_size // 2 + 1, num_mels] float64 triangles in Hz, each of area 1 Hz."""
    edges = _slaney_hz(np.linspace(0.0, _slaney_mel(sample_rate_hz / 2), num_mels + 2))
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    bins = (np.arange(fft_size // 2 + 1) * sample_rate_hz / fft_size)[:, None]
    rising, falling = (bins - left) / (center - left), (right - bins) / (right - center)
    return np.maximum(np.minimum(rising, falling), 0) * 2 / (right - left)


# Slaney's Auditory Toolbox: 200/3 Hz a Mel up to 1 kHz, then 27 Mel for every factor of 6.4.
_HZ_PER_MEL = 200 / 3
_BREAK_MEL, _BREAK_HZ = 15.0, 1000.0
_MEL_PER_NEPER = 27 / np.log(6.4)


def _slaney_mel(frequency_hz: float) -> float:
    if frequency_hz < _BREAK_HZ:
        return frequency_hz / _HZ_PER_MEL
    return float(_BREAK_MEL + _MEL_PER_NEPER * np.log(frequency_hz / _BREAK_HZ))


def _slaney_hz(mel: np.ndarray) -> np.ndarray:
    above = _BREAK_HZ * np.exp((np.maximum(mel, _BREAK_MEL) - _BREAK_MEL) / _MEL_PER_NEPER)
    return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, above)
