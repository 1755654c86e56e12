"""Linear Mel spectrogram of the volume-normalised waveform: the front end of GE2E encoders."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qsv.frontend.mel_power import MelFrames

# Below this mean square a row is silent, and its gain meaningless.
_MIN_POWER = 1e-30


@dataclasses.dataclass(frozen=True)
class MelSpectrogram(MelFrames):
    """Mel power spectrogram without a logarithm, of a waveform whose volume is raised to a target.

        gain = max(1, 10^(target_dbfs / 20) / rms),   rms over the valid samples
        y[t, m] = sum_k weights[k, m] |rfft(hann * gain * x[centred on sample t * shift])[k]|^2

    Frames are centred and the waveform continues as zeros on either side. Beyond the `1 + samples // shift` frames
    that are centred on the waveform there are `tail_frames` more, the last that can still see its end, so a reader
    that appends zero frames gets what it would get from a waveform with zeros appended.

    Attributes:
        sample_rate_hz: sampling rate the waveform must have.
        num_mels: Mel bands per frame, from 0 Hz to the Nyquist frequency.
        frame_length_ms: length of an analysis frame.
        frame_shift_ms: hop between frames.
        target_dbfs: a quieter waveform is raised to this level in dB of full scale, a louder one stays; None leaves
            all as they are.

    Raises:
        ValueError: a setting is out of range.

    Source: Resemblyzer's audio.py, which calls `librosa.feature.melspectrogram` (periodic Hann window, Slaney's Mel
    scale and area normalisation, zero padding). Its trimming of long silences by a voice activity detector is left
    to the caller.
    """

    target_dbfs: float | None = -30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_dbfs is not None and self.target_dbfs > 0:
            raise ValueError(f"target_dbfs must be at most 0, full scale, or None, got {self.target_dbfs}")

    @property
    def tail_frames(self) -> int:
        """Frames centred past the end of a waveform that may still see samples of it."""
        # The window's first sample has weight zero.
        return max(0, -(-(self.frame_length // 2 - 1) // self.frame_shift))

    def num_frames(self, num_samples: Any) -> Any:
        """Frames of `num_samples` samples (an int or an integer array), those of the tail included."""
        return 1 + num_samples // self.frame_shift + self.tail_frames

    def __call__(self, waveform: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Features of a batch, and the mask of its valid frames.

        Args:
            waveform: [batch, samples] float in [-1, 1]; samples past a row's length are taken as zero.
            lengths: [batch] int, valid samples in each row; None when every row is full.

        Returns:
            features [batch, frames, num_mels] in the waveform's dtype, zero in padded frames, and the mask
            [batch, frames] bool (None when lengths is None); frames = 1 + samples // shift + tail_frames.

        Raises:
            ValueError: the waveform isn't [batch, samples] float, or is shorter than one frame.
        """
        self.check_waveform(waveform)
        waveform, mask = self.cut_to_lengths(waveform, lengths)
        if self.target_dbfs is not None:
            waveform = waveform * _gain(waveform, lengths, self.target_dbfs)
        # Frames past a row's end are zero by themselves: all that they see is zero.
        return self.power(waveform), mask


def _gain(waveform: jax.Array, lengths: jax.Array | None, target_dbfs: float) -> jax.Array:
    """[batch, 1] factor, at least 1, that raises each row to the level; samples past its length must be zero."""
    count = waveform.shape[1] if lengths is None else jnp.maximum(jnp.asarray(lengths), 1)[:, None]
    power = jnp.sum(jnp.square(waveform), axis=1, keepdims=True) / count
    gain = 10 ** (target_dbfs / 20) / jnp.sqrt(jnp.maximum(power, _MIN_POWER))
    return jnp.maximum(gain, 1).astype(waveform.dtype)
