"""MelSpectrogram against librosa, its volume and its tail, and masks that make padding invisible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from qsv.frontend import MelSpectrogram

UNSCALED = MelSpectrogram(target_dbfs=None)


def librosa_mel(waveform: np.ndarray, num_mels: int = 40) -> np.ndarray:
    feature = pytest.importorskip("librosa").feature
    return feature.melspectrogram(y=waveform, sr=16000, n_fft=400, hop_length=160, n_mels=num_mels).T


@pytest.mark.parametrize("num_mels", [40, 64])
def test_equals_librosa_on_noise(num_mels):
    waveform = np.random.default_rng(0).normal(scale=0.1, size=16123).astype(np.float32)
    features, mask = MelSpectrogram(num_mels=num_mels, target_dbfs=None)(jnp.asarray(waveform)[None])
    # librosa needs the zeros to see the waveform's end as our tail does.
    expected = librosa_mel(np.pad(waveform, (0, 320)), num_mels)
    assert mask is None and features.shape == (1, 1 + 16123 // 160 + 2, num_mels)
    np.testing.assert_allclose(features[0], expected, rtol=1e-4, atol=1e-7)


def test_equals_librosa_on_real_speech(speech_dir):
    waveform, _ = soundfile.read(speech_dir / "an4/fash/an251-fash-b.flac", dtype="float32")
    features, _ = UNSCALED(jnp.asarray(waveform)[None])
    expected = librosa_mel(np.pad(waveform, (0, 320)))
    np.testing.assert_allclose(features[0], expected, rtol=1e-3, atol=1e-6 * expected.max())


def test_an_impulse_by_hand():
    """An impulse has the flat spectrum w^2, w being the window where it lies; a band's weights have area 1 Hz."""
    features = UNSCALED(jnp.zeros((1, 640)).at[0, 160].set(1.0))[0][0]
    flat = features[1]
    # Frame t is centred on sample 160 t, so the impulse lies at place 200 + 160 (1 - t) of it.
    for frame, place in ((0, 360), (1, 200), (2, 40)):
        weight = (0.5 - 0.5 * np.cos(2 * np.pi * place / 400)) ** 2
        np.testing.assert_allclose(features[frame], weight * flat, rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(features[3:], 0)
    # Bins are 40 Hz apart: the sum over bins approaches the area where bands are wide.
    np.testing.assert_allclose(flat[-15:] * 40, 1.0, rtol=0.02)


def test_bands_follow_slaneys_scale():
    """42 Mel bands to 6400 Hz, which is 42 Mel: band m is centred on m + 1 Mel, 200 / 3 Hz each up to 15 Mel."""
    frontend = MelSpectrogram(sample_rate_hz=12800, num_mels=41, frame_length_ms=50.0, target_dbfs=None)
    seconds = np.arange(12800) / 12800
    for hz, band in ((200, 2), (1000, 14), (1000 * 6.4 ** (10 / 27), 24)):
        features = frontend(jnp.asarray(np.sin(2 * np.pi * hz * seconds), jnp.float32)[None])[0][0]
        assert int(jnp.argmax(features[50])) == band


def test_volume_is_raised_to_the_target_but_never_lowered():
    frontend = MelSpectrogram(target_dbfs=-20.0)
    tone = np.sqrt(2) * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    quiet, loud = jnp.asarray(0.01 * tone)[None], jnp.asarray(0.5 * tone)[None]
    np.testing.assert_allclose(frontend(quiet)[0], 100 * UNSCALED(quiet)[0], rtol=1e-4, atol=1e-9)
    np.testing.assert_array_equal(frontend(loud)[0], UNSCALED(loud)[0])
    silence = frontend(jnp.zeros((1, 800)))[0]
    np.testing.assert_array_equal(silence, 0)


@pytest.mark.parametrize("length", [8000, 8120, 8121, 8159])
def test_padding_never_changes_valid_frames_and_is_zero(length):
    frontend = MelSpectrogram()
    waveform = 0.003 * jax.random.normal(jax.random.key(0), (1, length))
    alone, _ = frontend(waveform)
    garbage = jnp.pad(waveform, ((0, 0), (0, 4321)), constant_values=0.5)
    padded, mask = jax.jit(frontend)(garbage, jnp.array([length]))
    frames = alone.shape[1]
    assert mask is not None and int(mask.sum()) == frames == frontend.num_frames(length) == 53
    assert np.all(np.asarray(mask)[0, :frames])
    np.testing.assert_allclose(padded[:, :frames], alone, rtol=1e-4, atol=1e-7)
    assert np.all(np.asarray(padded[:, frames:]) == 0)
    # The last frame sees the end only where it is more than 120 samples past a frame's centre.
    assert np.any(np.asarray(alone[:, -2]) > 0)
    assert np.any(np.asarray(alone[:, -1]) > 0) == (length % 160 > 120 + 1)


def test_the_type_of_the_waveform_is_kept():
    with jax.enable_x64(True):
        waveform = np.random.default_rng(0).normal(scale=0.1, size=(1, 1600))
        wide = MelSpectrogram()(jnp.asarray(waveform))[0]
        narrow = MelSpectrogram()(jnp.asarray(waveform, jnp.float32))[0]
        assert wide.dtype == jnp.float64 and narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, wide, rtol=1e-3)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (jnp.zeros(16000), r"\[batch, samples\]"),
        (jnp.zeros((1, 16000), jnp.int16), "float"),
        (jnp.zeros((1, 399)), "at least 400 samples"),
    ],
)
def test_bad_waveforms_are_refused(waveform, message):
    with pytest.raises(ValueError, match=message):
        MelSpectrogram()(waveform)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("num_mels", 0, "num_mels"), ("target_dbfs", 3.0, "target_dbfs"), ("frame_shift_ms", 0.01, "hold a sample")],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        MelSpectrogram(**{field: value})
