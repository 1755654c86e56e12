"""SpeechBrain's log-Mel filter banks in jnp, with frame masks for padded batches."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsv.frontend.fbank import mean_normalize
from qsv.frontend.framing import framed

_POWER_FLOOR = 1e-10


@dataclasses.dataclass(frozen=True)
class SpeechBrainFbank:
    """Log-Mel filter banks in decibels as SpeechBrain computes them, mean normalised.

    Frames are centred on multiples of the hop, with zeros beyond the utterance's ends. Their power spectrum is
    weighted by symmetric triangles whose centres are equally spaced on the Mel scale 2595 log10(1 + f / 700), each
    as wide on both sides as it is far from its left neighbour. Values more than `dynamic_range_db` below the
    utterance's largest are raised to that level.

    Attributes:
        sample_rate_hz: sampling rate the waveform must have.
        num_mels: Mel bands per frame.
        fft_size: points of the Fourier transform, even; a shorter frame is centred in it.
        frame_length_ms: length of an analysis frame (periodic Hamming window).
        frame_shift_ms: hop between frames.
        low_hz: lower edge of the first Mel band.
        high_hz: upper edge of the last band; 0 means the Nyquist frequency.
        dynamic_range_db: range of the values of an utterance (SpeechBrain's top_db).
        mean_normalize: subtract each utterance's mean over its valid frames.

    Source: speechbrain.lobes.features.Fbank (STFT, spectral_magnitude, Filterbank) followed by
    InputNormalization(norm_type="sentence", std_norm=False), the front end of spkrec-ecapa-voxceleb (behaviour, not
    code). In a padded batch SpeechBrain takes the largest value over the padding too and rounds relative lengths to
    frames; here a row's features are those of the utterance alone.
    """

    sample_rate_hz: int = 16000
    num_mels: int = 80
    fft_size: int = 400
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_hz: float = 0.0
    high_hz: float = 0.0
    dynamic_range_db: float = 80.0
    mean_normalize: bool = True

    def __post_init__(self) -> None:
        for name in ("sample_rate_hz", "num_mels", "frame_length_ms", "frame_shift_ms", "dynamic_range_db"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.fft_size % 2 or self.fft_size < self.frame_length:
            raise ValueError(f"fft_size must be even and at least a frame's {self.frame_length}, got {self.fft_size}")
        if not 0 <= self.low_hz < self.highest_hz <= self.sample_rate_hz / 2:
            raise ValueError(
                f"Mel bands need 0 <= low_hz < high_hz <= {self.sample_rate_hz / 2} Hz, "
                f"got low_hz={self.low_hz}, high_hz={self.high_hz}"
            )

    @property
    def num_features(self) -> int:
        """Features of a frame."""
        return self.num_mels

    @property
    def highest_hz(self) -> float:
        """Upper edge of the last Mel band in Hz."""
        return self.high_hz or self.sample_rate_hz / 2

    @property
    def frame_length(self) -> int:
        """Samples in a frame."""
        return round(self.sample_rate_hz * self.frame_length_ms / 1000)

    @property
    def frame_shift(self) -> int:
        """Samples between the centres of two frames."""
        return round(self.sample_rate_hz * self.frame_shift_ms / 1000)

    @property
    def min_samples(self) -> int:
        """Samples of the shortest waveform that it takes: one frame's, where SpeechBrain takes even a single one."""
        return self.frame_length

    def num_frames(self, num_samples: Any) -> Any:
        """Frames in `num_samples` samples (an int or an integer array)."""
        return 1 + num_samples // self.frame_shift

    def __call__(self, waveform: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Features of a batch, and the mask of its valid frames.

        Args:
            waveform: [batch, samples] float in [-1, 1]; what is past a row's length is taken as zero.
            lengths: [batch] int, valid samples in each row; None when every row is full.

        Returns:
            features [batch, frames, num_mels] in the waveform's dtype, zero in padded frames, and the mask
            [batch, frames] bool (None when lengths is None); frames = 1 + samples // hop.

        Raises:
            ValueError: the waveform isn't [batch, samples] float, or is shorter than one frame.
        """
        if waveform.ndim != 2 or not jnp.issubdtype(waveform.dtype, jnp.floating):
            raise ValueError(f"waveform must be [batch, samples] float, got {waveform.shape} {waveform.dtype}")
        if waveform.shape[1] < self.min_samples:
            raise ValueError(
                f"waveform must have at least {self.min_samples} samples (one frame), got {waveform.shape[1]}"
            )
        return _features(self, waveform, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _features(
    frontend: SpeechBrainFbank, waveform: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    frames = frontend.num_frames(waveform.shape[1])
    mask = None
    if lengths is not None:
        limit = jnp.asarray(lengths)[:, None]
        # The frames at a row's end reach past it.
        waveform = jnp.where(jnp.arange(waveform.shape[1]) < limit, waveform, 0)
        mask = jnp.arange(frames) < frontend.num_frames(limit)
    edge = frontend.fft_size // 2
    padded = jnp.pad(waveform, ((0, 0), (edge, edge)))
    cut = framed(padded, frames, length=frontend.fft_size, shift=frontend.frame_shift)
    spectrum = jnp.fft.rfft(cut * _window(frontend).astype(waveform.dtype), axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    energies = power @ jnp.asarray(_mel_weights(frontend), power.dtype)
    decibels = (10 * jnp.log10(jnp.maximum(energies, _POWER_FLOOR))).astype(waveform.dtype)
    counted = decibels if mask is None else jnp.where(mask[..., None], decibels, -jnp.inf)
    loudest = jnp.max(counted, axis=(1, 2), keepdims=True)
    features = jnp.maximum(decibels, loudest - frontend.dynamic_range_db)
    if frontend.mean_normalize:
        features = mean_normalize(features, mask)
    elif mask is not None:
        features = jnp.where(mask[..., None], features, 0)
    return features, mask


def _window(frontend: SpeechBrainFbank) -> np.ndarray:
    """[fft_size] float64: the periodic Hamming window of a frame amid zeros."""
    length = frontend.frame_length
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(length) / length)
    before = (frontend.fft_size - length) // 2
    return np.pad(window, (before, frontend.fft_size - length - before))


@functools.cache
def _mel_weights(frontend: SpeechBrainFbank) -> np.ndarray:
    """[fft_size // 2 + 1, num_mels] float64 triangles."""
    mels = np.linspace(_mel(frontend.low_hz), _mel(frontend.highest_hz), frontend.num_mels + 2)
    edges_hz = 700 * (10 ** (mels / 2595) - 1)
    center, width = edges_hz[1:-1], np.diff(edges_hz)[:-1]
    bins_hz = np.linspace(0, frontend.sample_rate_hz // 2, frontend.fft_size // 2 + 1)[:, None]
    return np.maximum(1 - np.abs(bins_hz - center) / width, 0)


def _mel(frequency_hz: float) -> float:
    return float(2595 * np.log10(1 + frequency_hz / 700))
