"""QualityEstimator: which segments of a recording are scored."""

import jax
import numpy as np
import pytest
import soundfile

from qsv.deploy import Embedder, QualityEstimator
from qsv.models import Network

RATE = 16000


@pytest.fixture(scope="module")
def embedder():
    network = Network.of_size("dnsmos")
    return Embedder(network, network.init(jax.random.key(0)))


def noise(seconds):
    rng = np.random.default_rng(0)
    return (0.1 * rng.normal(size=round(seconds * RATE)) * rng.uniform(size=round(seconds * RATE))).astype(np.float32)


@pytest.mark.parametrize(("seconds", "starts"), [(5.0, [0]), (5.9, [0]), (7.5, [0, 1, 2]), (16.0, range(12))])
def test_a_score_is_the_mean_over_segments_a_second_apart(embedder, seconds, starts):
    waveform = noise(seconds)
    expected = [
        embedder.network.embed(embedder.variables, waveform[None, s * RATE : (s + 5) * RATE])[0, 0] for s in starts
    ]
    np.testing.assert_allclose(QualityEstimator(embedder)(waveform, RATE), np.mean(expected), atol=1e-5)


def test_a_short_recording_is_repeated(embedder):
    estimate = QualityEstimator(embedder)
    waveform = noise(1.7)
    # Doubled twice.
    np.testing.assert_allclose(estimate(waveform, RATE), estimate(np.tile(waveform, 4), RATE), atol=1e-6)


def test_files_and_waveforms_agree(embedder, tmp_path):
    waveform = noise(6.0)
    soundfile.write(tmp_path / "clip.wav", waveform, RATE, subtype="FLOAT")
    estimate = QualityEstimator(embedder)
    np.testing.assert_allclose(estimate.score_file(tmp_path / "clip.wav"), estimate(waveform, RATE), atol=1e-3)


def test_speaker_networks_and_bad_recordings_are_refused(embedder, tmp_path):
    network = Network("resnet10", {"width": 2, "embedding_size": 4})
    with pytest.raises(ValueError, match="resnet10 makes speaker embeddings"):
        QualityEstimator(Embedder(network, network.init(jax.random.key(0))))
    estimate = QualityEstimator(embedder)
    with pytest.raises(ValueError, match="has 100 samples"):
        estimate(noise(100 / RATE), RATE)
    soundfile.write(tmp_path / "short.wav", noise(100 / RATE), RATE)
    with pytest.raises(ValueError, match="short.wav"):
        estimate.score_file(tmp_path / "short.wav")
