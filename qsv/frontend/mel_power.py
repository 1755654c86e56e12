"""Mel power spectrograms as librosa computes them, shared by the front ends that are built on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


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
    framed = padded[:, np.arange(frames)[:, None] * frame_shift + np.arange(frame_length)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame_length) / frame_length)
    spectrum = jnp.fft.rfft(framed * window.astype(waveform.dtype), axis=-1)
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
