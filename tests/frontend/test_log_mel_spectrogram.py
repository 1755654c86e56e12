"""LogMelSpectrogram against librosa and by hand, and masks that make padding invisible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from qsv.frontend import LogMelSpectrogram, frontend_from_json, frontend_to_json

P808 = LogMelSpectrogram(frame_length_ms=20.0625, frame_shift_ms=10.0, scale="decibel")


@pytest.mark.parametrize("frontend", [LogMelSpectrogram(), P808])
@pytest.mark.parametrize("samples", [16000, 16319, 16321])
def test_equals_librosa(frontend, samples):
    librosa = pytest.importorskip("librosa")
    waveform = np.random.default_rng(0).normal(scale=0.1, size=samples).astype(np.float32)
    waveform[:8000] = 0
    power = librosa.feature.melspectrogram(
        y=waveform, sr=16000, n_fft=frontend.frame_length, hop_length=frontend.frame_shift, n_mels=120
    ).T
    if frontend.scale == "natural":
        expected = np.log(power + 1e-9)
    else:
        expected = (librosa.power_to_db(power, ref=np.max) + 40) / 40
    features, mask = frontend(jnp.asarray(waveform)[None])
    assert mask is None and features.shape == (1, *expected.shape)
    np.testing.assert_allclose(features[0], expected, atol=1e-3)


def test_nine_seconds_are_the_900_frames_of_p808(speech_dir):
    assert P808.frame_length == 321 and P808.num_frames(144_000) == 900
    waveform, _ = soundfile.read(speech_dir / "an4/fash/an251-fash-b.flac", dtype="float32")
    features = np.asarray(P808(jnp.asarray(np.resize(waveform, 144_000))[None])[0])
    assert features.shape == (1, 900, 120)
    assert features.max() == 1 and features.min() >= -1


def test_decibels_do_not_depend_on_the_volume_and_end_80_below_the_loudest():
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    tone[8000:] = 0
    loud, quiet = (np.asarray(P808(jnp.asarray(gain * tone)[None])[0]) for gain in (0.9, 0.09))
    np.testing.assert_allclose(loud, quiet, atol=1e-4)
    np.testing.assert_array_equal(loud[0, -1], -1)
    assert loud.max() == 1


def test_silence_is_finite():
    silence = jnp.zeros((1, 1600))
    np.testing.assert_allclose(LogMelSpectrogram()(silence)[0], np.log(1e-9), rtol=1e-6)
    np.testing.assert_array_equal(P808(silence)[0], 1)


@pytest.mark.parametrize("frontend", [LogMelSpectrogram(), P808])
@pytest.mark.parametrize("length", [8000, 8120, 8319, 8321])
def test_padding_never_changes_valid_frames_and_is_zero(frontend, length):
    waveform = 0.01 * jax.random.normal(jax.random.key(0), (1, length))
    alone, _ = frontend(waveform)
    garbage = jnp.pad(waveform, ((0, 0), (0, 4321)), constant_values=0.5)
    padded, mask = jax.jit(frontend)(garbage, jnp.array([length]))
    frames = alone.shape[1]
    assert int(mask.sum()) == frames == frontend.num_frames(length)
    np.testing.assert_allclose(padded[:, :frames], alone, atol=1e-4)
    np.testing.assert_array_equal(padded[:, frames:], 0)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (jnp.zeros(16000), r"\[batch, samples\]"),
        (jnp.zeros((1, 16000), jnp.int16), "float"),
        (jnp.zeros((1, 639)), "at least 640 samples"),
    ],
)
def test_bad_waveforms_are_refused(waveform, message):
    with pytest.raises(ValueError, match=message):
        LogMelSpectrogram()(waveform)


@pytest.mark.parametrize(
    ("field", "value"), [("num_mels", 0), ("frame_shift_ms", 0.01), ("scale", "bel"), ("sample_rate_hz", 0)]
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        LogMelSpectrogram(**{field: value})


def test_survives_json():
    assert frontend_from_json(frontend_to_json(P808)) == P808
