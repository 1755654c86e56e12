"""Whether a recording can be told anything from: long enough but not too long, not silent, not clipped."""

import dataclasses
import math

import numpy as np

_FULL_SCALE = 0.999
_MIN_SECONDS = 0.5
# The memory that a ResNet34 or an ECAPA needs grows by 5 to 8 MB a second.
_MAX_SECONDS = 120.0


@dataclasses.dataclass(frozen=True)
class SpeechRequirements:
    """What a recording must have.

    Attributes:
        min_seconds: shortest length.
        max_seconds: longest length, which bounds the memory that an embedding takes.
        min_level_db: level of its loudest 20 ms, root mean square, in decibels relative to full scale.
        max_clipped_share: share of its samples at full scale, of 0 to 1.
        warn_clipped_share: share from which on it is accepted with a warning.
    """

    min_seconds: float = _MIN_SECONDS
    max_seconds: float = _MAX_SECONDS
    min_level_db: float = -60.0
    max_clipped_share: float = 0.1
    warn_clipped_share: float = 0.001

    def check_length(self, seconds: float) -> None:
        """Raises ValueError where a recording of this length can't be used; the message has no file's name."""
        if seconds < self.min_seconds:
            raise ValueError(f"is too short: {seconds:.2f} s, at least {self.min_seconds:g} s are needed")
        if seconds > self.max_seconds:
            raise ValueError(f"is too long: {seconds:.2f} s, at most {self.max_seconds:g} s are taken; cut it")

    def check(self, waveform: np.ndarray, sample_rate_hz: int) -> list[str]:
        """Warnings about a recording, most often none.

        Args:
            waveform: [samples] float in [-1, 1].
            sample_rate_hz: its rate.

        Raises:
            ValueError: it is too short, too long, silent, clipped or not finite; the message has no file's name.
        """
        self.check_length(len(waveform) / sample_rate_hz)
        if not np.isfinite(waveform).all():
            raise ValueError("holds samples that are not finite")
        level = loudest_level_db(waveform, sample_rate_hz)
        if level < self.min_level_db:
            found = "is silent" if math.isinf(level) else f"is silent: its loudest part is at {level:.0f} dB"
            raise ValueError(f"{found}; at least {self.min_level_db:g} dB of full scale are needed")
        clipped = float(np.mean(np.abs(waveform) >= _FULL_SCALE))
        if clipped > self.max_clipped_share:
            raise ValueError(f"is clipped: {clipped:.0%} of its samples are at full scale; record it more quietly")
        if clipped > self.warn_clipped_share:
            return [f"is clipped in part: {clipped:.1%} of its samples are at full scale"]
        return []


def loudest_level_db(waveform: np.ndarray, sample_rate_hz: int) -> float:
    """Root mean square of the loudest 20 ms, in decibels relative to full scale; -inf for zeros."""
    length = max(sample_rate_hz // 50, 1)
    whole = np.asarray(waveform[: len(waveform) // length * length], np.float64).reshape(-1, length)
    centred = whole - np.mean(whole)
    power = float(np.max(np.mean(centred**2, axis=1)))
    # Below the smallest step of 24 bits nothing but the mean's rounding is left.
    return 10 * math.log10(power) if power > 2.0**-48 else -math.inf
