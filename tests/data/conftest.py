"""Small corpora and audio files for the tests of `qsv.data`."""

import pathlib
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from qsv.data import Corpus, folder_corpus

SAMPLE_RATE_HZ = 16000


@pytest.fixture
def write_audio(tmp_path) -> Callable[..., pathlib.Path]:
    """Writes samples to `tmp_path/name` and returns the path."""

    def write(name, samples, sample_rate_hz=SAMPLE_RATE_HZ, **options) -> pathlib.Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, sample_rate_hz, **options)
        return path

    return write


@pytest.fixture
def truncate() -> Callable[[pathlib.Path], None]:
    """Cuts a file in half."""

    def cut(path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    return cut


@pytest.fixture
def ramp_corpus(write_audio, tmp_path) -> Corpus:
    """Five speakers with 3, 2, 3, 2, 3 utterances of 800, 1600 and 2400 samples.

    The n-th utterance of all counts up from `4500 n - 32768`: every sample tells its file and place.
    """
    start = -32768
    for speaker in range(5):
        for number in range(3 if speaker % 2 == 0 else 2):
            samples = np.arange(start, start + 800 * (number + 1), dtype=np.int16)
            write_audio(f"ramps/spk{speaker}/{number}.wav", samples)
            start += 4500
    return folder_corpus(tmp_path / "ramps")
