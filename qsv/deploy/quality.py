"""From waveforms and audio files to a predicted quality of the speech."""

import dataclasses
import os

import jax
import numpy as np

from qsv.data import read_audio
from qsv.deploy.embedder import Embedder

_HOP_SECONDS = 1
# {network: seconds that a segment needs, seconds of it that are scored}
_SEGMENT_SECONDS = {"dnsmos": (5.0, 5.0), "dnsmos_p808": (9.01, 9.0)}
# A batch of segments of a long recording; the last one is filled up, so that one shape is compiled.
_BATCH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class QualityEstimator:
    """A network of speech quality ready to score recordings of any length.

    A recording is cut into segments as long as the training's clips, one every second of it, and their scores are
    averaged; a shorter one is repeated first.

    Attributes:
        embedder: the network, from `qsv.deploy.load` or an import.

    Raises:
        ValueError: the network makes speaker embeddings.

    Source: Microsoft's speechmos for DNSMOS P.808, where a segment of 9.01 s is needed and 9.00 s of it are scored;
    its starts are at whole seconds up to the recording's whole seconds minus 10. Its rounding skips the starts at 7 to
    23 s; ours doesn't.
    """

    embedder: Embedder

    def __post_init__(self) -> None:
        if self.embedder.network.name not in _SEGMENT_SECONDS:
            raise ValueError(
                f"{self.embedder.network.name} makes speaker embeddings; quality needs {', '.join(_SEGMENT_SECONDS)}"
            )

    def __call__(self, waveform: np.ndarray, sample_rate_hz: float) -> float:
        """The score of a waveform.

        Args:
            waveform: [samples] or [samples, channels] float in [-1, 1].
            sample_rate_hz: its rate; resampled where the network's is another.

        Returns:
            What the network was trained to predict, such as a mean opinion score from 1 to 5.

        Raises:
            ValueError: as `Embedder` does.
        """
        return self._score(self.embedder.prepared(waveform, sample_rate_hz))

    def score_file(self, path: str | os.PathLike[str]) -> float:
        """The score of an audio file; raises what `Embedder.embed_file` raises."""
        rate = self.embedder.network.frontend.sample_rate_hz
        waveform = read_audio(path, sample_rate_hz=rate)
        self.embedder.check_length(path, len(waveform))
        return self._score(waveform)

    def _score(self, waveform: np.ndarray) -> float:
        network = self.embedder.network
        needed, scored = (
            round(seconds * network.frontend.sample_rate_hz) for seconds in _SEGMENT_SECONDS[network.name]
        )
        while len(waveform) < needed:
            waveform = np.tile(waveform, 2)
        hop = _HOP_SECONDS * network.frontend.sample_rate_hz
        whole_seconds = len(waveform) // hop * hop
        count = max(1, (whole_seconds - needed) // hop + 1)
        segments = np.stack([waveform[start : start + scored] for start in range(0, count * hop, hop)])
        scores = [
            np.asarray(self.embedder.embed_batch(jax.device_put(batch)))[: len(segments) - first, 0]
            for first in range(0, len(segments), _BATCH)
            for batch in [np.resize(segments[first : first + _BATCH], (min(_BATCH, len(segments)), scored))]
        ]
        return float(np.mean(np.concatenate(scores)))
