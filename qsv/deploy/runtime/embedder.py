"""From recordings to embeddings by an ONNX file."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from qsv.data.audio import AudioError, audio_duration_seconds, read_audio
from qsv.deploy.runtime.backends import make_runner
from qsv.deploy.runtime.model_file import FORMAT, FORMAT_VERSION, METADATA_KEY, ModelFileError, read_sealed
from qsv.deploy.runtime.speech import SpeechRequirements

_NEEDED = {"network": dict, "input": str, "sample_rate_hz": int, "min_samples": int, "embedding_size": int}


class OnnxEmbedder:
    """A network in an ONNX file of `qsv.deploy.onnx.export_onnx`, ready to embed.

    Attributes:
        path: the file.
        description: what the file says of itself: network, plan, threshold, provenance.
        threshold: calibrated score above which two recordings are one speaker's, or None.
        sample_rate_hz: of the waveforms that it takes.
        embedding_size: of an embedding.
        digest: SHA-256 of the file's content, by which voice prints know their model.

    Args:
        path: the file, whose graph takes waveforms.
        threads: of one embedding; 0 for as many as there are cores.
        backend: "onnxruntime", or "openvino" where that is installed.
        requirements: what a recording must have; None takes any that the network can, however long.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: it is damaged, of another program, of a newer format, takes features, or gives a score of
            speech quality in place of embeddings.
        ImportError: the backend isn't installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        threads: int = 0,
        backend: str = "onnxruntime",
        requirements: SpeechRequirements | None = None,
    ) -> None:
        self.path = pathlib.Path(path)
        model = read_sealed(path)
        self.description = checked_description(path, model.description)
        if self.description["input"] != "waveform":
            raise ModelFileError(path, "takes features; export it with --input=waveform")
        if self.description["embedding_size"] < 2:
            # Cosines of single values are -1 or 1, whoever speaks.
            name = self.description["network"].get("name")
            raise ModelFileError(path, f"is a {name}, which gives one score in place of speaker embeddings")
        self.digest = model.digest
        self._run = make_runner(path, model.data, backend=backend, threads=threads)
        self.sample_rate_hz = int(self.description["sample_rate_hz"])
        self.embedding_size = int(self.description["embedding_size"])
        self.threshold: float | None = self.description.get("threshold")
        self._min_samples = int(self.description["min_samples"])
        self._requirements = requirements

    def __call__(self, waveform: np.ndarray) -> np.ndarray:
        """The embedding of a waveform.

        Args:
            waveform: [samples] float32 in [-1, 1] at `sample_rate_hz`.

        Returns:
            [embedding_size] float32, not length normalised.

        Raises:
            ValueError: it has another shape, isn't finite, is too short, or falls short of the requirements.
            ModelFileError: the backend fails, for lack of memory for one.
        """
        waveform = np.asarray(waveform, np.float32)
        if waveform.ndim != 1:
            raise ValueError(f"waveform must be [samples], got shape {waveform.shape}")
        self.check(waveform)
        return self._run(waveform[None])[0]

    def embed_file(self, path: str | os.PathLike[str]) -> tuple[np.ndarray, list[str]]:
        """The embedding of an audio file, and warnings about the recording.

        Args:
            path: wav, flac, ogg or mp3, of any rate and number of channels.

        Returns:
            [embedding_size] float32, not length normalised; texts, most often none.

        Raises:
            FileNotFoundError: there is no such file.
            AudioError: it can't be decoded, or can't be used: too short, too long, silent, clipped.
            ModelFileError: the backend fails, for lack of memory for one.
        """
        if self._requirements is not None:
            # By the header: a long recording isn't decoded to be refused.
            seconds = audio_duration_seconds(path)
            with _errors_of(path):
                self._requirements.check_length(seconds)
        waveform = read_audio(path, sample_rate_hz=self.sample_rate_hz)
        with _errors_of(path):
            warnings = self.check(waveform)
        embedding = self._run(waveform[None])[0]
        if not np.isfinite(embedding).all():
            raise AudioError(path, "its embedding is not finite")
        return embedding, warnings

    def check(self, waveform: np.ndarray) -> list[str]:
        """Warnings about a waveform [samples]; raises ValueError where it can't be embedded."""
        warnings = []
        if self._requirements is not None:
            warnings = self._requirements.check(waveform, self.sample_rate_hz)
        elif not np.isfinite(waveform).all():
            raise ValueError("holds samples that are not finite")
        if len(waveform) < self._min_samples:
            seconds, needed = (count / self.sample_rate_hz for count in (len(waveform), self._min_samples))
            raise ValueError(f"is too short: {seconds:.3f} s, the network needs at least {needed:.3f} s")
        return warnings


@contextlib.contextmanager
def _errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, what is wrong with a recording is said with the name of its file."""
    try:
        yield
    except ValueError as error:
        raise AudioError(path, str(error)) from error


def checked_description(path: str | os.PathLike[str], text: str) -> dict[str, Any]:
    """What a model file says of itself; raises ModelFileError where that isn't enough to run it."""
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelFileError(path, "has no description of its network; export it anew") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise ModelFileError(path, f"its metadata {METADATA_KEY!r} are not those of {FORMAT}")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        hint = "export it anew" if isinstance(version, int) and version < FORMAT_VERSION else "a newer qsv wrote it"
        raise ModelFileError(path, f"is of format {version}, this qsv reads {FORMAT_VERSION}: {hint}")
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(description.get(name), kind)]
    threshold = description.get("threshold")
    if threshold is not None and not (isinstance(threshold, int | float) and math.isfinite(threshold)):
        wrong.append("threshold")
    if wrong:
        raise ModelFileError(path, f"its description lacks {', '.join(wrong)}")
    return description
