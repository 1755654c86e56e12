"""Decoding: formats, rates, channels, seeking, and files that must be refused."""

import pickle

import numpy as np
import pytest
import soundfile

from qsv.data.audio import (
    AudioError,
    audio_duration_seconds,
    fit_length,
    read_audio,
    resample,
    to_float32,
    to_int16,
)


def tone(frequency_hz, sample_rate_hz, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(int(seconds * sample_rate_hz)) / sample_rate_hz)).astype(
        np.float32
    )


def peak_hz(waveform, sample_rate_hz):
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    return np.argmax(spectrum) * sample_rate_hz / len(waveform)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_formats(write_audio, suffix):
    original = tone(440, 16000)
    waveform = read_audio(write_audio(f"a.{suffix}", original))
    assert waveform.dtype == np.float32
    assert waveform.shape == original.shape
    np.testing.assert_allclose(waveform[2000:6000], original[2000:6000], atol=0.02)


def test_sixteen_bits_survive_exactly(write_audio):
    samples = np.random.default_rng(0).integers(-32768, 32768, 1000).astype(np.int16)
    np.testing.assert_array_equal(to_int16(read_audio(write_audio("a.flac", samples))), samples)
    np.testing.assert_array_equal(to_int16(to_float32(samples)), samples)


def test_to_int16_saturates_instead_of_wrapping():
    np.testing.assert_array_equal(to_int16(np.array([1.0, -1.0, 1.7, -1.7], np.float32)), [32767, -32768] * 2)


def test_stereo_8_khz_becomes_mono_16_khz(write_audio):
    left, right = tone(500, 8000), tone(1500, 8000)
    path = write_audio("a.wav", np.stack([left, right], axis=1), 8000)
    both = read_audio(path)
    assert len(both) == 8000
    spectrum = np.abs(np.fft.rfft(both))
    assert {int(place) for place in np.argsort(spectrum)[-2:]} == {250, 750}
    assert np.std(both[1000:7000]) == pytest.approx(0.25, abs=0.002)  # two tones of amplitude 0.25
    assert peak_hz(read_audio(path, channel=1), 16000) == pytest.approx(1500, abs=4)
    with pytest.raises(AudioError, match="2 channels, channel 2"):
        read_audio(path, channel=2)


def test_start_and_duration_select_samples(write_audio):
    samples = np.arange(16000, dtype=np.int16)
    path = write_audio("a.flac", samples)
    piece = read_audio(path, start_seconds=0.25, duration_seconds=0.125)
    np.testing.assert_array_equal(to_int16(piece), samples[4000:6000])
    np.testing.assert_array_equal(to_int16(read_audio(path, start_seconds=0.75, duration_seconds=9)), samples[12000:])
    with pytest.raises(AudioError, match="starts reading at 1.0 s, but ends after 1.000 s"):
        read_audio(path, start_seconds=1.0)
    with pytest.raises(ValueError, match="duration_seconds > 0"):
        read_audio(path, duration_seconds=0.0)


def test_duration(write_audio):
    assert audio_duration_seconds(write_audio("a.ogg", np.zeros(12000), 8000)) == 1.5


@pytest.mark.parametrize("read", [read_audio, audio_duration_seconds])
def test_missing_and_empty_files(tmp_path, write_audio, read):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.wav"):
        read(tmp_path / "nowhere.wav")
    (tmp_path / "empty.flac").touch()
    with pytest.raises(AudioError, match=r"empty\.flac: is empty"):
        read(tmp_path / "empty.flac")
    with pytest.raises(AudioError, match=r"none\.wav: holds no samples"):
        read(write_audio("none.wav", np.zeros(0)))
    (tmp_path / "text.wav").write_text("this is no audio file at all")
    with pytest.raises(AudioError, match=r"text\.wav: cannot be decoded"):
        read(tmp_path / "text.wav")
    with pytest.raises(AudioError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_truncated_files(write_audio, truncate, suffix):
    path = write_audio(f"a.{suffix}", np.random.default_rng(0).normal(0, 0.1, 32000).astype(np.float32))
    truncate(path)
    with pytest.raises(AudioError, match=rf"a\.{suffix}: .*truncated"):
        read_audio(path)


def test_wav_of_unknown_length_is_not_truncated(write_audio):
    path = write_audio("piped.wav", np.arange(100, dtype=np.int16))
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert len(read_audio(path)) == 100


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_samples(write_audio, bad):
    samples = np.zeros(100, np.float32)
    samples[42] = bad
    with pytest.raises(AudioError, match="sample 42 is"):
        read_audio(write_audio("a.wav", samples, subtype="FLOAT"))


def test_overdriven_float_is_clipped_and_wrong_scale_refused(write_audio):
    overdriven = np.array([1.5, -1.5, 0.5], np.float32)
    waveform = read_audio(write_audio("a.wav", overdriven, subtype="FLOAT"))
    np.testing.assert_array_equal(waveform, np.array([1, -1, 0.5], np.float32))
    with pytest.raises(AudioError, match="samples reach 20000"):
        read_audio(write_audio("b.wav", np.array([20000.0, 0], np.float32), subtype="FLOAT"))


def test_error_survives_pickling(tmp_path):
    error = pickle.loads(pickle.dumps(AudioError(tmp_path / "a.wav", "is broken")))
    assert error.reason == "is broken"
    assert str(error).endswith("a.wav: is broken")


def test_resample_and_fit_length():
    assert resample(np.zeros(1001, np.float32), 8000, 16000, 2000).shape == (2000,)
    np.testing.assert_array_equal(fit_length(np.array([1, 2]), 4), [1, 2, 2, 2])
    np.testing.assert_array_equal(fit_length(np.array([1, 2, 3]), 2), [1, 2])


def test_real_speech(speech_dir):
    path = next((speech_dir / "an4").glob("*/*.flac"))
    waveform = read_audio(path)
    assert len(waveform) == soundfile.info(path).frames
    assert 0.01 < np.abs(waveform).max() <= 1
