"""Kaldi-compatible log-Mel filter banks in jnp, with frame masks for padded batches."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qsv.frontend.framing import framed

Window = Literal["povey", "hamming"]

# Kaldi floors the Mel energies at the float32 machine epsilon before the logarithm.
_LOG_FLOOR = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class KaldiFbank:
    """Log-Mel filter banks as Kaldi computes them, mean normalised: the front end of WeSpeaker and 3D-Speaker.

    Attributes:
        sample_rate_hz: sampling rate the waveform must have.
        num_mels: Mel bands per frame.
        window: "povey" (Kaldi's default, 3D-Speaker) or "hamming" (WeSpeaker).
        frame_length_ms: length of an analysis frame.
        frame_shift_ms: hop between frames.
        low_hz: lower edge of the first Mel band.
        high_hz: upper edge of the last band; 0 means the Nyquist frequency, negative an offset from it.
        preemphasis: first-order pre-emphasis coefficient.
        full_scale: what a sample of 1 becomes: 32768 for Kaldi and WeSpeaker, which read 16-bit samples; 1 for
            3D-Speaker, where the floor of Mel energies then cuts off what is quiet.
        mean_normalize: subtract each utterance's mean over its valid frames.
        energy: a first feature before the bands, the logarithm of the frame's energy (Kaldi's `use_energy`).
    """

    sample_rate_hz: int = 16000
    num_mels: int = 80
    window: Window = "povey"
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_hz: float = 20.0
    high_hz: float = 0.0
    preemphasis: float = 0.97
    full_scale: float = 32768.0
    mean_normalize: bool = True
    energy: bool = False

    def __post_init__(self) -> None:
        if self.window not in ("povey", "hamming"):
            raise ValueError(f"window must be 'povey' or 'hamming', got {self.window!r}")
        for name in ("sample_rate_hz", "num_mels", "frame_length_ms", "frame_shift_ms", "full_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.low_hz < self.highest_hz <= self.sample_rate_hz / 2:
            raise ValueError(
                f"Mel bands need 0 <= low_hz < high_hz <= {self.sample_rate_hz / 2} Hz, "
                f"got low_hz={self.low_hz}, high_hz={self.high_hz}"
            )

    @property
    def highest_hz(self) -> float:
        """Upper edge of the last Mel band in Hz."""
        return self.high_hz if self.high_hz > 0 else self.sample_rate_hz / 2 + self.high_hz

    @property
    def num_features(self) -> int:
        """Features of a frame."""
        return self.num_mels + self.energy

    @property
    def frame_length(self) -> int:
        """Samples in a frame."""
        return int(self.sample_rate_hz * self.frame_length_ms / 1000)

    @property
    def min_samples(self) -> int:
        """Samples of the shortest waveform that it takes: one frame."""
        return self.frame_length

    @property
    def frame_shift(self) -> int:
        """Samples between the starts of two frames."""
        return int(self.sample_rate_hz * self.frame_shift_ms / 1000)

    def num_frames(self, num_samples: Any) -> Any:
        """Frames in `num_samples` samples (an int or an integer array), Kaldi's `snip_edges=true`."""
        frames = 1 + (num_samples - self.frame_length) // self.frame_shift
        return jnp.maximum(frames, 0) if isinstance(frames, jax.Array | np.ndarray) else max(frames, 0)

    def num_samples(self, num_frames: int) -> int:
        """Fewest samples that give `num_frames` frames."""
        return self.frame_length + (num_frames - 1) * self.frame_shift

    def __call__(self, waveform: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Features of a batch, and the mask of its valid frames.

        Args:
            waveform: [batch, samples] float in [-1, 1], zero padded at the end.
            lengths: [batch] int, valid samples in each row; None when every row is full.

        Returns:
            features [batch, frames, num_features] in the waveform's dtype, zero in padded frames, and the mask
            [batch, frames] bool (None when lengths is None).
        """
        features = fbank(waveform, **self._fbank_options())
        mask = None
        if lengths is not None:
            mask = jnp.arange(features.shape[1]) < self.num_frames(jnp.asarray(lengths))[:, None]
        if self.mean_normalize:
            features = mean_normalize(features, mask)
        elif mask is not None:
            features = jnp.where(mask[..., None], features, 0)
        return features, mask

    def _fbank_options(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "mean_normalize"}


@functools.partial(
    jax.jit,
    static_argnames=(
        "window",
        "num_mels",
        "sample_rate_hz",
        "frame_length_ms",
        "frame_shift_ms",
        "low_hz",
        "high_hz",
        "preemphasis",
        "full_scale",
        "energy",
    ),
)
def fbank(
    waveform: jax.Array,
    *,
    window: Window = "povey",
    num_mels: int = 80,
    sample_rate_hz: int = 16000,
    frame_length_ms: float = 25.0,
    frame_shift_ms: float = 10.0,
    low_hz: float = 20.0,
    high_hz: float = 0.0,
    preemphasis: float = 0.97,
    full_scale: float = 32768.0,
    energy: bool = False,
) -> jax.Array:
    """Log-Mel filter-bank energies as Kaldi computes them, without dither.

    Each frame has its mean removed, is pre-emphasized, windowed and zero padded to a power of two; the power
    spectrum is weighted by triangles that are equally spaced on the Mel scale 1127 ln(1 + f / 700).

    Args:
        waveform: [batch, samples] float in [-1, 1].
        window: "povey" (a Hann window to the power 0.85) or "hamming".
        num_mels: Mel bands.
        sample_rate_hz: sampling rate of the waveform.
        frame_length_ms: frame length.
        frame_shift_ms: hop.
        low_hz: lower edge of the first band.
        high_hz: upper edge of the last; 0 is the Nyquist frequency, negative an offset from it.
        preemphasis: coefficient of x[t] - c x[t-1].
        full_scale: factor of the waveform, 2^15 as Kaldi reads 16-bit samples. Energies are floored after it.
        energy: put the logarithm of the energy of each frame, its mean removed, before the bands.

    Returns:
        [batch, frames, energy + num_mels] in the waveform's dtype; frames = 1 + (samples - frame) // shift ("snip
        edges").

    Raises:
        ValueError: the waveform isn't [batch, samples] float, or is shorter than one frame.

    Source: Kaldi's feature-fbank.cc, feature-window.cc and mel-computations.cc (behaviour, not code). Within
    1e-3 of `kaldi-native-fbank` on speech, except in bands more than 80 dB below their frame's loudest, where
    both are rounding noise of a float32 FFT.
    """
    frontend = KaldiFbank(
        sample_rate_hz, num_mels, window, frame_length_ms, frame_shift_ms, low_hz, high_hz, preemphasis, full_scale
    )
    if waveform.ndim != 2 or not jnp.issubdtype(waveform.dtype, jnp.floating):
        raise ValueError(f"waveform must be [batch, samples] float, got {waveform.shape} {waveform.dtype}")
    length, frames = frontend.frame_length, frontend.num_frames(waveform.shape[1])
    if frames < 1:
        raise ValueError(f"waveform must have at least {length} samples (one frame), got {waveform.shape[1]}")
    cut = framed(waveform, frames, length=length, shift=frontend.frame_shift) * full_scale
    cut = cut - jnp.mean(cut, axis=-1, keepdims=True)
    frame_energy = jnp.sum(jnp.square(cut), axis=-1, keepdims=True)
    # Kaldi pre-emphasizes a frame's first sample against itself.
    previous = jnp.concatenate([cut[..., :1], cut[..., :-1]], axis=-1)
    cut = (cut - preemphasis * previous) * _window(window, length).astype(waveform.dtype)
    fft_size = 2 ** math.ceil(math.log2(length))
    spectrum = jnp.fft.rfft(cut, n=fft_size, axis=-1)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    energies = power @ jnp.asarray(_mel_weights(frontend, fft_size), power.dtype)
    if energy:
        energies = jnp.concatenate([frame_energy, energies], axis=-1)
    return jnp.log(jnp.maximum(energies, _LOG_FLOOR)).astype(waveform.dtype)


def mean_normalize(features: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Subtract each utterance's mean over its valid frames; padded frames become zero.

    Args:
        features: [batch, frames, mels] float.
        mask: [batch, frames] bool, true where a frame is valid; None when all are.

    Returns:
        [batch, frames, mels] in the dtype of `features`.
    """
    if mask is None:
        return features - jnp.mean(features, axis=1, keepdims=True)
    valid = mask[..., None]
    count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(valid, features, 0), axis=1, keepdims=True) / count
    return jnp.where(valid, features - mean, 0)


def _window(window: Window, length: int) -> np.ndarray:
    phase = 2 * np.pi * np.arange(length) / (length - 1)
    if window == "hamming":
        return 0.54 - 0.46 * np.cos(phase)
    return (0.5 - 0.5 * np.cos(phase)) ** 0.85


@functools.cache
def _mel_weights(frontend: KaldiFbank, fft_size: int) -> np.ndarray:
    """[fft_size // 2 + 1, num_mels] float64 triangles; Kaldi gives the Nyquist bin no weight."""
    edges = np.linspace(_mel(frontend.low_hz), _mel(frontend.highest_hz), frontend.num_mels + 2)
    left, center, right = edges[:-2], edges[1:-1], edges[2:]
    bins = _mel(np.arange(fft_size // 2) * frontend.sample_rate_hz / fft_size)[:, None]
    rising, falling = (bins - left) / (center - left), (right - bins) / (right - center)
    weights = np.maximum(np.minimum(rising, falling), 0)
    return np.concatenate([weights, np.zeros((1, frontend.num_mels))])


def _mel(frequency_hz: Any) -> Any:
    return 1127 * np.log1p(np.asarray(frequency_hz) / 700)
