"""SpeechBrain's filter banks against torch.stft, facts worked by hand, and masks that make padding invisible."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from qsv.frontend import SpeechBrainFbank


def torch_fbank(waveform: np.ndarray, num_mels: int = 80) -> np.ndarray:
    """[frames, num_mels]: the same features out of PyTorch's own transform, in the order of SpeechBrain's steps."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    spectrum = torch.stft(
        torch.from_numpy(waveform),
        400,
        160,
        400,
        torch.hamming_window(400),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, num_mels + 2) / 2595) - 1)
    center, width = edges[1:-1, None], (edges[1:] - edges[:-1])[:-1, None]
    slope = (torch.linspace(0, 8000, 201) - center) / width
    triangles = torch.clamp(torch.minimum(slope + 1, 1 - slope), min=0)
    decibels = 10 * torch.log10(torch.clamp(spectrum.abs().square().T @ triangles.T, min=1e-10))
    decibels = torch.maximum(decibels, decibels.max() - 80)
    return (decibels - decibels.mean(dim=0)).numpy()


def test_features_equal_torch_on_real_speech(speech_dir):
    for name in ("an4/fash/an251-fash-b.flac", "emodb/03"):
        path = speech_dir / name
        path = sorted(path.iterdir())[0] if path.is_dir() else path
        waveform, _ = soundfile.read(path, dtype="float32")
        ours, mask = SpeechBrainFbank()(jnp.asarray(waveform)[None])
        expected = torch_fbank(waveform)
        assert mask is None and ours.shape[1:] == expected.shape
        np.testing.assert_allclose(ours[0], expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("num_mels", [40, 80])
def test_features_equal_torch_on_noise(num_mels):
    waveform = np.random.default_rng(0).normal(scale=0.1, size=16123).astype(np.float32)
    ours, _ = SpeechBrainFbank(num_mels=num_mels)(jnp.asarray(waveform)[None])
    np.testing.assert_allclose(ours[0], torch_fbank(waveform, num_mels), atol=1e-3, rtol=0)


def test_an_impulse_by_hand():
    # A single sample at a frame's centre has a flat spectrum of (0.54 + 0.46)^2 there.
    frontend = SpeechBrainFbank(mean_normalize=False)
    waveform = jnp.zeros((1, 16000)).at[0, 3200].set(1.0)
    features = frontend(waveform)[0][0]
    assert features.shape == (101, 80)
    # The first band: centre and width are both 700 (10^(mel / 2595) - 1), and only the bin at 40 Hz is inside.
    mel = 2595 * math.log10(1 + 8000 / 700) / 81
    center = 700 * (10 ** (mel / 2595) - 1)
    assert features[20, 0] == pytest.approx(10 * math.log10(1 - (40 - center) / center), abs=1e-3)
    # The frame after it sees the sample 160 samples before its centre.
    expected = features[20] + 20 * math.log10(0.54 - 0.46 * math.cos(2 * math.pi * 40 / 400))
    np.testing.assert_allclose(features[21], expected, atol=1e-3)
    # Silence is 80 dB below the loudest value.
    np.testing.assert_allclose(features[50], float(features.max()) - 80, atol=1e-4)


def test_digital_silence_is_the_power_floor():
    silence, _ = SpeechBrainFbank(mean_normalize=False)(jnp.zeros((1, 800)))
    np.testing.assert_allclose(silence, -100.0, rtol=1e-6)


def test_padding_never_changes_valid_frames_and_is_zero():
    waveform = jax.random.normal(jax.random.key(0), (2, 12000)) * 0.1
    # The loud row has quiet frames at its floor; noise past the other row's end mustn't be seen.
    waveform = waveform.at[0, 2000:4000].multiply(1e-6)
    lengths = jnp.array([12000, 8005])
    frontend = SpeechBrainFbank()
    padded, mask = frontend(jnp.pad(waveform, ((0, 0), (0, 4321)), constant_values=50.0), lengths)
    assert mask is not None
    for row, length in enumerate((12000, 8005)):
        alone, _ = frontend(waveform[row : row + 1, :length])
        frames = alone.shape[1]
        assert int(mask[row].sum()) == frames == frontend.num_frames(length)
        np.testing.assert_allclose(padded[row, :frames], alone[0], atol=1e-4)
        assert np.all(np.asarray(padded[row, frames:]) == 0)


def test_the_dynamic_range_is_of_each_row_alone():
    noise = jax.random.normal(jax.random.key(0), (1, 8000)) * 0.1
    faded = noise.at[:, 4000:].multiply(1e-6)
    rows = jnp.concatenate([faded, 30 * noise])
    features, _ = SpeechBrainFbank(mean_normalize=False)(rows)
    np.testing.assert_allclose(jnp.min(features[0]), jnp.max(features[0]) - 80, atol=1e-4)
    narrow, _ = SpeechBrainFbank(mean_normalize=False, dynamic_range_db=30.0)(rows)
    np.testing.assert_allclose(jnp.min(narrow[0]), jnp.max(narrow[0]) - 30, atol=1e-4)


def test_frames_shorter_than_the_transform_are_centred_in_it():
    torch = pytest.importorskip("torch")
    waveform = np.random.default_rng(0).normal(scale=0.1, size=4000).astype(np.float32)
    frontend = SpeechBrainFbank(fft_size=512, mean_normalize=False, dynamic_range_db=500.0)
    power = torch.stft(
        torch.from_numpy(waveform),
        512,
        160,
        400,
        torch.hamming_window(400),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    # The top band is far wider than a bin, so that the sum of its power is seen through the rest of the features.
    ours = frontend(jnp.asarray(waveform)[None])[0][0, :, -1]
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    triangle = np.maximum(1 - np.abs(np.linspace(0, 8000, 257) - edges[80]) / (edges[80] - edges[79]), 0)
    expected = 10 * np.log10(power.abs().square().numpy().T @ triangle)
    np.testing.assert_allclose(ours, expected, atol=1e-3)


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
        SpeechBrainFbank()(waveform)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_mels", 0, "num_mels"),
        ("fft_size", 398, "at least a frame's 400"),
        ("fft_size", 401, "even"),
        ("high_hz", 9000.0, "8000"),
        ("dynamic_range_db", 0.0, "dynamic_range_db"),
    ],
)
def test_bad_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        SpeechBrainFbank(**{field: value})
