"""fbank against kaldi-native-fbank, and masks that make padding invisible."""

import jax
import jax.numpy as jnp
import kaldi_native_fbank
import numpy as np
import pytest
import soundfile

from qsv.frontend import KaldiFbank, fbank, mean_normalize


def kaldi_fbank(
    waveform: np.ndarray, window: str, num_mels: int = 80, full_scale: float = 32768, *, energy: bool = False
) -> np.ndarray:
    options = kaldi_native_fbank.FbankOptions()
    options.use_energy = energy
    options.frame_opts.dither = 0
    options.frame_opts.window_type = window
    options.frame_opts.samp_freq = 16000
    options.mel_opts.num_bins = num_mels
    online = kaldi_native_fbank.OnlineFbank(options)
    online.accept_waveform(16000, (waveform * full_scale).tolist())
    online.input_finished()
    return np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])


def test_samples_that_are_not_scaled_up_meet_kaldis_floor():
    waveform = 0.01 * np.random.default_rng(0).normal(size=4000).astype(np.float32)
    waveform[2000:] *= 1e-4
    ours = np.asarray(fbank(jnp.asarray(waveform)[None], full_scale=1.0)[0])
    np.testing.assert_allclose(ours, kaldi_fbank(waveform, "povey", full_scale=1), atol=1e-3)
    floor = np.log(np.finfo(np.float32).eps)
    assert ours[-1].max() == pytest.approx(floor) and ours[0].min() > floor + 1


@pytest.mark.parametrize("window", ["povey", "hamming"])
def test_fbank_equals_kaldi_on_real_speech(speech_dir, window):
    for name in ("an4/fash/an251-fash-b.flac", "emodb/03"):
        path = speech_dir / name
        path = sorted(path.iterdir())[0] if path.is_dir() else path
        waveform, _ = soundfile.read(path, dtype="float32")
        ours = np.asarray(fbank(jnp.asarray(waveform)[None], window=window)[0])
        kaldi = kaldi_fbank(waveform, window)
        difference = np.abs(ours - kaldi)
        # A band 80 dB below its frame's loudest is rounding noise of a float32 FFT, in Kaldi as here.
        audible = kaldi > kaldi.max(axis=1, keepdims=True) - 8 * np.log(10)
        assert difference[audible].max() <= 1e-3
        assert np.mean(difference > 1e-3) <= 2e-4


@pytest.mark.parametrize("window", ["povey", "hamming"])
@pytest.mark.parametrize("num_mels", [40, 80])
def test_fbank_equals_kaldi_on_noise(window, num_mels):
    waveform = np.random.default_rng(0).normal(scale=0.1, size=16000).astype(np.float32)
    ours = fbank(jnp.asarray(waveform)[None], window=window, num_mels=num_mels)[0]
    np.testing.assert_allclose(ours, kaldi_fbank(waveform, window, num_mels), atol=1e-3, rtol=0)


def test_energy_is_kaldis_first_feature():
    waveform = 0.1 + np.random.default_rng(0).normal(scale=0.1, size=16000).astype(np.float32)
    ours = fbank(jnp.asarray(waveform)[None], num_mels=40, energy=True)[0]
    assert ours.shape[-1] == KaldiFbank(num_mels=40, energy=True).num_features == 41
    np.testing.assert_allclose(ours, kaldi_fbank(waveform, "povey", 40, energy=True), atol=1e-3, rtol=0)


def test_digital_silence_is_the_log_floor():
    silence = fbank(jnp.zeros((1, 800)))
    np.testing.assert_allclose(silence, np.log(np.finfo(np.float32).eps), rtol=1e-6)


def test_padding_never_changes_valid_frames_and_is_zero():
    waveform = jax.random.normal(jax.random.key(0), (1, 8000)) * 0.1
    frontend = KaldiFbank()
    alone, _ = frontend(waveform)
    padded, mask = frontend(jnp.pad(waveform, ((0, 0), (0, 4321))), jnp.array([8000]))
    frames = alone.shape[1]
    assert mask is not None and int(mask.sum()) == frames == frontend.num_frames(8000)
    np.testing.assert_allclose(padded[:, :frames], alone, atol=1e-5)
    assert np.all(np.asarray(padded[:, frames:]) == 0)


def test_mean_normalize_uses_valid_frames_only():
    features = jnp.array([[[1.0], [3.0], [100.0]]])
    mask = jnp.array([[True, True, False]])
    np.testing.assert_array_equal(mean_normalize(features, mask), [[[-1.0], [1.0], [0.0]]])


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
        fbank(waveform)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("window", "hann", "povey"), ("num_mels", 0, "num_mels"), ("high_hz", 9000.0, "8000")],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        KaldiFbank(**{field: value})
