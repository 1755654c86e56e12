"""Log-Mel spectrograms of the networks that predict speech quality."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from qsv.frontend.mel_power import MelFrames

# Added to the power before the natural logarithm.
_OFFSET = 1e-9
# Decibels are taken of no less power than this, and reach so far below the utterance's largest.
_POWER_FLOOR = 1e-10
_DYNAMIC_RANGE_DB = 80.0

Scale = Literal["natural", "decibel"]


@dataclasses.dataclass(frozen=True)
class LogMelSpectrogram(MelFrames):
    """Logarithm of the Mel power spectrogram of frames centred on every hop.

        natural:  y = ln(p + 1e-9)
        decibel:  y = (max(d - max d, -80) + 40) / 40,   d = 10 log10(max(p, 1e-10)), the largest over the utterance

    with p from `mel_power`. The second lies in [-1, 1] whatever the volume.

    Attributes:
        sample_rate_hz: sampling rate the waveform must have.
        num_mels: Mel bands per frame, from 0 Hz to the Nyquist frequency.
        frame_length_ms: length of an analysis frame.
        frame_shift_ms: hop between frames.
        scale: of the two above.

    Raises:
        ValueError: a setting is out of range.

    Source: "natural" with the defaults is that of Nilsson et al. 2024 (arXiv 2407.04578); "decibel" with frames of
    321 samples (20.0625 ms) every 160 is that of DNSMOS P.808 (Reddy et al. 2021, arXiv 2010.15258) as in Microsoft's
    speechmos, which calls librosa.
    """

    num_mels: int = 120
    frame_length_ms: float = 40.0
    frame_shift_ms: float = 20.0
    scale: Scale = "natural"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale not in ("natural", "decibel"):
            raise ValueError(f"scale must be 'natural' or 'decibel', got {self.scale!r}")

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of `num_samples` samples (an int or an integer array)."""
        # Half a frame of zeros on either side; of an odd frame the half is rounded down.
        return 1 + (num_samples - self.frame_length % 2) // self.frame_shift

    def __call__(self, waveform: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Features of a batch, and the mask of its valid frames.

        Args:
            waveform: [batch, samples] float in [-1, 1]; samples past a row's length are taken as zero.
            lengths: [batch] int, valid samples in each row; None when every row is full.

        Returns:
            features [batch, frames, num_mels] in the waveform's dtype, zero in padded frames, and the mask
            [batch, frames] bool (None when lengths is None); frames = 1 + samples // hop, but for odd frames.

        Raises:
            ValueError: the waveform isn't [batch, samples] float, or is shorter than one frame.
        """
        self.check_waveform(waveform)
        waveform, mask = self.cut_to_lengths(waveform, lengths)
        power = self.power(waveform)
        features = jnp.log(power + _OFFSET) if self.scale == "natural" else _relative_decibels(power, mask)
        return (features if mask is None else jnp.where(mask[..., None], features, 0)), mask


def _relative_decibels(power: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[batch, frames, num_mels] in [-1, 1]: 1 is the largest of an utterance, -1 is 80 dB below it."""
    decibels = 10 * jnp.log10(jnp.maximum(power, _POWER_FLOOR))
    counted = decibels if mask is None else jnp.where(mask[..., None], decibels, -jnp.inf)
    loudest = jnp.max(counted, axis=(1, 2), keepdims=True)
    half = _DYNAMIC_RANGE_DB / 2
    return (jnp.maximum(decibels - loudest, -_DYNAMIC_RANGE_DB) + half) / half
