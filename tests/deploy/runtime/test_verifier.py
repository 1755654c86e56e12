"""Embeddings and decisions of the runtime, against those of JAX."""

import sys

import numpy as np
import pytest
import soundfile

from qsv.data import AudioError
from qsv.deploy import load
from qsv.deploy.runtime import OnnxEmbedder, SpeakerVerifier, SpeechRequirements, StoreError, VoicePrintStore

RATE_HZ = 16000


@pytest.fixture(scope="module")
def embedder(exported):
    return OnnxEmbedder(exported.onnx, threads=1, requirements=SpeechRequirements())


@pytest.fixture
def verifier(embedder, tmp_path):
    return SpeakerVerifier(embedder, VoicePrintStore(tmp_path / "prints"))


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_embeddings_are_those_of_jax(exported, embedder, recordings):
    reference = load(exported.packed)
    for path in recordings.values():
        found, warnings = embedder.embed_file(path)
        assert cosine(found, reference.embed_file(path)) > 0.99999
        assert found.shape == (embedder.embedding_size,) and warnings == []
        waveform, _ = soundfile.read(path, dtype="float32")
        np.testing.assert_array_equal(embedder(waveform), found)


def test_any_rate_and_channels_are_taken(embedder, recordings, tmp_path):
    waveform, _ = soundfile.read(recordings["a0"], dtype="float32")
    wide = np.interp(np.arange(3 * len(waveform)) / 3, np.arange(len(waveform)), waveform)
    soundfile.write(tmp_path / "stereo.flac", np.stack([wide, wide], axis=1), 3 * RATE_HZ)
    found, _ = embedder.embed_file(tmp_path / "stereo.flac")
    assert cosine(found, embedder.embed_file(recordings["a0"])[0]) > 0.99


def test_the_score_is_the_cosine_with_the_mean(verifier, recordings):
    made = verifier.enrol("Ann", [recordings["a0"], recordings["a1"]])
    assert (made.added, made.utterances) == (2, 2)
    decision = verifier.verify("Ann", recordings["a2"])
    embeddings = [verifier.embedder.embed_file(recordings[name])[0] for name in ("a0", "a1", "a2")]
    units = [embedding / np.linalg.norm(embedding) for embedding in embeddings]
    assert made.least_score == pytest.approx(cosine(*embeddings[:2]), abs=1e-5)
    assert decision.score == pytest.approx(cosine(units[0] + units[1], units[2]), abs=1e-5)
    assert decision.threshold == 0.995 and decision.accepted
    assert not verifier.verify("Ann", recordings["b0"]).accepted


def test_enrolment_of_more_recordings_adds_to_the_voice_print(verifier, recordings):
    assert verifier.enrol("Ann", [recordings["a0"]]).least_score is None
    assert verifier.enrol("Ann", [recordings["a1"]]).utterances == 2
    assert verifier.enrol("Ann", [recordings["b1"]]).least_score < 0.995
    assert verifier.enrol("Ann", [recordings["a2"]], replace=True).utterances == 1


def test_the_likeliest_speaker_comes_first(verifier, recordings):
    verifier.enrol("Ann", [recordings["a0"]])
    verifier.enrol("Bob", [recordings["b0"]])
    candidates = verifier.identify(recordings["b1"])
    assert [candidate.name for candidate in candidates] == ["Bob", "Ann"]
    assert candidates[0].accepted and not candidates[1].accepted
    assert candidates[0].score > candidates[1].score


def write(path, waveform, rate_hz=RATE_HZ, **options):
    soundfile.write(path, waveform, rate_hz, **options)
    return path


TONE = 0.3 * np.sin(np.arange(RATE_HZ) / 5)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(RATE_HZ), "is silent"),
        (TONE[: RATE_HZ // 10], "too short: 0.10 s"),
        (np.clip(20 * TONE, -1, 1), "is clipped"),
        (np.where(np.arange(RATE_HZ) == 7, np.nan, TONE), "sample 7 is nan"),
        (np.zeros((RATE_HZ, 2)), "is silent"),
        (TONE[:50], "too short: 0.00 s"),
    ],
)
def test_bad_recordings_are_refused_and_enrol_nobody(verifier, recordings, tmp_path, waveform, message):
    bad = write(tmp_path / "bad.wav", waveform, subtype="FLOAT")
    with pytest.raises(AudioError, match=rf"bad\.wav: .*{message}"):
        verifier.enrol("Ann", [recordings["a0"], bad])
    assert verifier.store.names() == []
    verifier.enrol("Ann", [recordings["a0"]])
    with pytest.raises(AudioError, match=message):
        verifier.verify("Ann", bad)


def test_long_recordings_are_refused_before_they_are_decoded(verifier, tmp_path, monkeypatch):
    path = write(tmp_path / "long.flac", np.tile(TONE, 121))
    monkeypatch.setattr("qsv.deploy.runtime.embedder.read_audio", None)
    with pytest.raises(AudioError, match=r"long\.flac: is too long: 121\.00 s, at most 120 s are taken"):
        verifier.enrol("Ann", [path])
    assert verifier.store.names() == []


def test_some_clipping_is_told_and_accepted(verifier, tmp_path):
    overdriven = TONE.copy()
    overdriven[100:200] = 1.0
    made = verifier.enrol("Ann", [write(tmp_path / "loud.wav", overdriven)])
    assert len(made.warnings) == 1 and "loud.wav is clipped in part" in made.warnings[0]


def test_missing_and_unreadable_recordings_are_named(verifier, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        verifier.enrol("Ann", [tmp_path / "gone.wav"])
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(AudioError, match="text.wav"):
        verifier.enrol("Ann", [tmp_path / "text.wav"])
    with pytest.raises(ValueError, match="at least one recording"):
        verifier.enrol("Ann", [])


def test_voice_prints_of_another_model_are_refused(verifier, recordings):
    verifier.store.enrol("Ann", "0" * 64, np.ones((1, 16)))
    with pytest.raises(StoreError, match="another model"):
        verifier.verify("Ann", recordings["a0"])
    with pytest.raises(StoreError, match="another model"):
        verifier.enrol("Ann", [recordings["a0"]])
    with pytest.raises(StoreError, match="nobody is enrolled"):
        verifier.identify(recordings["a0"])


def test_thresholds_are_checked(embedder, verifier, recordings, monkeypatch):
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got 2"):
        SpeakerVerifier(embedder, verifier.store, threshold=2)
    verifier.enrol("Ann", [recordings["a0"]])
    assert SpeakerVerifier(embedder, verifier.store, threshold=-1).verify("Ann", recordings["b0"]).accepted
    monkeypatch.setattr(embedder, "threshold", None)
    without = SpeakerVerifier(embedder, verifier.store)
    without.enrol("Ann", [recordings["a1"]])
    with pytest.raises(ValueError, match="no calibrated threshold"):
        without.verify("Ann", recordings["a0"])


def test_waveforms_are_checked(exported, embedder):
    free = OnnxEmbedder(exported.onnx)
    with pytest.raises(ValueError, match=r"\[samples\]"):
        free(np.zeros((2, RATE_HZ)))
    with pytest.raises(ValueError, match="not finite"):
        free(np.full(RATE_HZ, np.nan))
    with pytest.raises(ValueError, match=r"too short: 0\.001 s, the network needs at least 0\.175 s"):
        free(np.zeros(10))
    assert np.isfinite(free(np.zeros(RATE_HZ))).all()
    with pytest.raises(ValueError, match="threads"):
        OnnxEmbedder(exported.onnx, threads=-1)


def test_openvino_runs_the_same_file(exported, embedder, recordings):
    pytest.importorskip("openvino", reason="OpenVINO isn't installed: pip install 'qsv[openvino]'")
    other = OnnxEmbedder(exported.onnx, threads=1, backend="openvino")
    for path in recordings.values():
        assert cosine(other.embed_file(path)[0], embedder.embed_file(path)[0]) > 0.99999


def test_a_backend_that_is_not_there_says_how_to_get_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install 'qsv\[openvino\]'"):
        OnnxEmbedder(exported.onnx, backend="openvino")
    with pytest.raises(ValueError, match="backend must be one of onnxruntime, openvino, got 'abacus'"):
        OnnxEmbedder(exported.onnx, backend="abacus")
