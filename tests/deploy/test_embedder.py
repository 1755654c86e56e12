import pathlib

import jax
import numpy as np
import pytest
import soundfile
import soxr

from qsv.data import AudioError, Utterance
from qsv.deploy import Embedder, load, load_packed, save
from qsv.models.network import _embed
from qsv.quant import Rule, dequantize, fake_quantize, resolve

RATE = 16000


def speech_like(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Harmonics of a wandering pitch, and a little noise: smooth enough to survive a lower rate."""
    times = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (110 + 10 * seed) * times + 3 * np.sin(2 * np.pi * 2 * times)
    harmonics = sum(np.sin(k * phase) / k for k in range(1, 15))
    return (0.1 * harmonics * (1.2 + np.sin(2 * np.pi * 3 * times))).astype(np.float32)


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.fixture(scope="module")
def embedder(model_bytes, tmp_path_factory) -> Embedder:
    path = tmp_path_factory.mktemp("embedder") / "model.qsv"
    path.write_bytes(model_bytes)
    return load(path)


def write(folder: pathlib.Path, name: str, waveform: np.ndarray, rate: int = RATE) -> pathlib.Path:
    path = folder / name
    soundfile.write(path, waveform, rate, subtype="FLOAT" if name.endswith(".wav") else None)
    return path


def test_embeds_what_the_dequantized_network_embeds(trained, embedder):
    waveform = speech_like(1.3)
    variables = {"params": dequantize(trained.packed), "batch_stats": trained.variables["batch_stats"]}
    expected = trained.network.embed(variables, jax.numpy.asarray(waveform)[None])[0]
    found = embedder(waveform, RATE)
    assert found.shape == (16,)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert embedder.threshold == 0.25


def test_exact_length_of_the_grid_needs_no_padding(trained, embedder):
    waveform = speech_like(0.5)
    lengths = np.array([len(waveform)], np.int32)
    expected = trained.network.embed(embedder.variables, waveform[None], lengths)[0]
    np.testing.assert_array_equal(embedder(waveform, RATE), expected)


def test_lengths_share_a_few_compilations(embedder):
    embedder(speech_like(0.7), RATE)
    compiled = _embed._cache_size()
    for samples in (10_050, 11_000, 12_400):
        embedder(speech_like(samples / RATE), RATE)
    assert _embed._cache_size() == compiled


def test_samples_beyond_the_end_do_not_count(embedder):
    # Both are padded to one length: the padding must not leak into the shorter one.
    short = embedder(speech_like(0.55), RATE)
    long = embedder(speech_like(0.62), RATE)
    assert np.max(np.abs(short - long)) > 1e-4


def test_other_rates_are_resampled(embedder):
    waveform = speech_like(1.0, 8000)
    expected = embedder(soxr.resample(waveform, 8000, RATE, quality="HQ"), RATE)
    np.testing.assert_array_equal(embedder(waveform, 8000), expected)
    assert cosine(embedder(speech_like(1.0, 48000), 48000), embedder(speech_like(1.0), RATE)) > 0.999


def test_channels_are_averaged(embedder):
    left, right = speech_like(1.0), speech_like(1.0, seed=1)
    stereo = np.stack([left, right], axis=1)
    np.testing.assert_allclose(embedder(stereo, RATE), embedder((left + right) / 2, RATE), rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(embedder(stereo, RATE) - embedder(left, RATE))) > 1e-4


def test_result_can_be_written_to(embedder):
    embedder(speech_like(0.5), RATE)[:] = 0


@pytest.mark.parametrize(
    ("waveform", "rate", "message"),
    [
        (np.zeros(0, np.float32), RATE, "waveform is empty"),
        (np.zeros((0, 2), np.float32), RATE, "waveform is empty"),
        (np.zeros(399, np.float32), RATE, "has 399 samples at 16000 Hz, the network needs at least 400"),
        (np.zeros(199, np.float32), 8000, "has 199 samples at 8000 Hz, the network needs at least 200"),
        (np.array([0.0] * 500 + [np.nan]), RATE, "must be finite, 1 samples aren't, the first at index 500"),
        (np.array([np.inf] * 500), RATE, "must be finite, 500 samples aren't"),
        (np.zeros((1, 2, 500), np.float32), RATE, r"\[samples, channels\], got shape \(1, 2, 500\)"),
        (np.zeros((500, 0), np.float32), RATE, r"got shape \(500, 0\)"),
        (np.zeros((2, 500), np.float32), RATE, r"got shape \(2, 500\); transpose it"),
        (np.float32(0), RATE, r"got shape \(\)"),
        (np.zeros(500, np.int16), RATE, "got int16; divide 16-bit samples by 32768"),
        (np.full(500, 1000.0), RATE, r"in \[-1, 1\], its samples reach 1000"),
        (np.zeros(500, np.float32), 0, "sample_rate_hz must be positive, got 0"),
        (np.zeros(500, np.float32), float("nan"), "sample_rate_hz must be positive, got nan"),
    ],
)
def test_waveforms_that_cannot_be_embedded_are_refused(embedder, waveform, rate, message):
    with pytest.raises(ValueError, match=message):
        embedder(waveform, rate)


@pytest.mark.parametrize(("samples", "rate"), [(400, RATE), (200, 8000), (1103, 44100)])
def test_one_frame_suffices(embedder, samples, rate):
    waveform = 0.1 * np.random.default_rng(0).standard_normal(samples)
    assert np.all(np.isfinite(embedder(waveform, rate)))


def test_files_of_any_kind(embedder, tmp_path):
    waveform = speech_like(0.9)
    path = write(tmp_path, "mono.wav", waveform)
    np.testing.assert_array_equal(embedder.embed_file(path), embedder(waveform, RATE))
    low = speech_like(0.9, 8000)
    stereo = write(tmp_path, "stereo.flac", np.stack([low, -0.5 * low], axis=1), 8000)
    decoded, rate = soundfile.read(stereo)
    np.testing.assert_allclose(embedder.embed_file(str(stereo)), embedder(decoded, rate), rtol=1e-4, atol=1e-5)


def test_many_files_in_order_each_as_alone(embedder, tmp_path, capsys):
    lengths = (0.9, 1.1, 0.4, 0.6, 0.5)
    paths = [write(tmp_path, f"{i}.wav", speech_like(s, seed=i)) for i, s in enumerate(lengths)]
    files = [paths[0], str(paths[1]), ("two", paths[2]), Utterance("three", paths[3], "speaker"), paths[4]]
    embeddings = embedder.embed_files(files, batch_size=2, progress=False)
    assert embeddings.shape == (5, 16)
    assert embeddings.dtype == np.float32
    for embedding, path in zip(embeddings, paths, strict=True):
        np.testing.assert_allclose(embedding, embedder.embed_file(path), rtol=1e-3, atol=1e-4)
    assert capsys.readouterr().err == ""
    embedder.embed_files(files[:1], batch_size=2)
    assert "embedding" in capsys.readouterr().err


def test_beginning_of_files(embedder, tmp_path):
    path = write(tmp_path, "a.wav", speech_like(1.1))
    beginning = embedder.embed_files([path], batch_size=1, max_seconds=0.5, progress=False)
    np.testing.assert_allclose(beginning[0], embedder(speech_like(1.1)[:8000], RATE), rtol=1e-4, atol=1e-5)


def test_files_that_cannot_be_embedded_are_named(embedder, tmp_path):
    good = write(tmp_path, "good.wav", speech_like(0.5))
    short = write(tmp_path, "short.wav", np.zeros(399, np.float32))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"nothing")
    for call in (embedder.embed_file, lambda path: embedder.embed_files([good, path], progress=False)):
        with pytest.raises(AudioError, match=r"short\.wav: has 399 samples at 16000 Hz.*at least 400"):
            call(short)
        with pytest.raises(AudioError, match=r"broken\.wav"):
            call(broken)
        with pytest.raises(FileNotFoundError, match="absent"):
            call(tmp_path / "absent.wav")
    with pytest.raises(ValueError, match="no utterances"):
        embedder.embed_files([])


def test_save_quantizes_writes_and_reports(trained, tmp_path):
    path = tmp_path / "model.qsv"
    params, statistics = trained.variables["params"], trained.variables["batch_stats"]
    report = save(
        path,
        trained.network,
        trained.plan,
        params,
        trained.qstate,
        statistics,
        threshold=0.5,
        provenance={"a": 1},
    )
    assert report.file_bytes == path.stat().st_size
    assert {row.scheme for row in report.rows} >= {"KMeans(bits=2)", "Uniform(bits=3)", "float32"}
    model = load_packed(path)
    assert (model.threshold, model.provenance) == (0.5, {"a": 1})
    assert model.plan_description["stem/conv/kernel"] == "KMeans(bits=2)"
    expected = fake_quantize(trained.plan, params, trained.qstate)
    for found, wanted in zip(jax.tree.leaves(load(path).variables["params"]), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_float_file_embeds_as_the_float_network(trained, tmp_path):
    params, statistics = trained.variables["params"], trained.variables["batch_stats"]
    save(tmp_path / "float", trained.network, resolve([Rule(".*", None)], params), params, {}, statistics)
    waveform = speech_like(0.5)
    expected = Embedder(trained.network, trained.variables)(waveform, RATE)
    np.testing.assert_array_equal(load(tmp_path / "float")(waveform, RATE), expected)


def test_real_speech_through_file_and_batch(embedder, speech_dir):
    paths = (
        sorted(speech_dir.joinpath("an4").rglob("*.flac"))[:3] or sorted(speech_dir.joinpath("an4").rglob("*.wav"))[:3]
    )
    assert paths
    together = embedder.embed_files(paths, batch_size=3, progress=False)
    for embedding, path in zip(together, paths, strict=True):
        np.testing.assert_allclose(embedding, embedder.embed_file(path), rtol=1e-3, atol=1e-4)
