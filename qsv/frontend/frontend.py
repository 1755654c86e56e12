"""What every front end is, and how one is written to a file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from qsv.frontend.fbank import KaldiFbank
from qsv.frontend.log_mel_spectrogram import LogMelSpectrogram
from qsv.frontend.mel_spectrogram import MelSpectrogram
from qsv.frontend.speechbrain_fbank import SpeechBrainFbank


class FrontEnd(Protocol):
    """What turns a waveform into a network's input; part of every checkpoint and packed file.

    A front end is a frozen, hashable dataclass of numbers and strings.
    """

    @property
    def sample_rate_hz(self) -> int:
        """Sampling rate the waveform must have."""

    @property
    def num_features(self) -> int:
        """Features of a frame."""

    @property
    def min_samples(self) -> int:
        """Samples of the shortest waveform that it takes."""

    def __call__(self, waveform: jax.Array, lengths: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Features of a batch, and the mask of its valid frames.

        Args:
            waveform: [batch, samples] float in [-1, 1], zero padded at the end.
            lengths: [batch] int, valid samples in each row; None when every row is full.

        Returns:
            features [batch, frames, num_features] in the waveform's dtype, zero in padded frames, and the mask
            [batch, frames] bool (None when lengths is None).
        """


_KINDS: dict[str, type] = {
    "kaldi_fbank": KaldiFbank,
    "log_mel_spectrogram": LogMelSpectrogram,
    "mel_spectrogram": MelSpectrogram,
    "speechbrain_fbank": SpeechBrainFbank,
}


def frontend_to_json(frontend: FrontEnd) -> dict[str, Any]:
    """A front end's kind and settings as JSON-compatible fields."""
    kind = next(name for name, one in _KINDS.items() if type(frontend) is one)
    return {"kind": kind, **dataclasses.asdict(frontend)}  # type: ignore[call-overload]


def frontend_from_json(fields: Mapping[str, Any]) -> FrontEnd:
    """The front end that `frontend_to_json` described; raises ValueError on a kind or field it doesn't know."""
    settings = dict(fields)
    kind = settings.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown front end {kind!r}, known are {sorted(_KINDS)}; the file needs a newer qsv")
    unknown = set(settings) - {field.name for field in dataclasses.fields(_KINDS[kind])}
    if unknown:
        raise ValueError(f"unknown front end fields {sorted(unknown)}; the file needs a newer qsv")
    frontend: FrontEnd = _KINDS[kind](**settings)
    return frontend
