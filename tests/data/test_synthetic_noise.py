"""Noise, rooms and channels made from random numbers."""

import numpy as np
import pytest

from qsv.data.synthetic_noise import NOISE_KINDS, channel_filter, decaying_response, synthetic_noise

RATE = 16000


def octave_energies(noise):
    power = np.abs(np.fft.rfft(noise)) ** 2
    edges = [int(len(noise) * hz / RATE) for hz in (500, 1000, 2000, 4000)]
    return [power[low:high].sum() for low, high in zip(edges, edges[1:], strict=False)]


@pytest.fixture
def voices():
    return [np.sin(np.arange(5000) * step).astype(np.float32) for step in (0.1, 0.2, 0.3)]


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noise_is_a_function_of_the_generator(kind, voices):
    first, second, third = (
        synthetic_noise(kind, 8000, RATE, voices, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (8000,) and first.dtype == np.float32
    np.testing.assert_array_equal(first, second)
    assert np.std(first) > 0 and not np.array_equal(first, third)


def test_spectra():
    rng = np.random.default_rng(0)
    white = octave_energies(synthetic_noise("white", 10 * RATE, RATE, (), rng))
    pink = octave_energies(synthetic_noise("pink", 10 * RATE, RATE, (), rng))
    np.testing.assert_allclose(np.diff(np.log2(white)), 1.0, atol=0.1)
    np.testing.assert_allclose(np.diff(np.log2(pink)), 0.0, atol=0.1)
    hum = np.abs(np.fft.rfft(synthetic_noise("hum", RATE, RATE, (), rng)))
    assert np.argmax(hum) % 50 == 0 or np.argmax(hum) % 60 == 0


def test_errors():
    with pytest.raises(ValueError, match="babble needs voices"):
        synthetic_noise("babble", 10, RATE, (), np.random.default_rng(0))
    with pytest.raises(ValueError, match="got 'brown'"):
        synthetic_noise("brown", 10, RATE, (), np.random.default_rng(0))


def test_decaying_response():
    response = decaying_response(
        RATE, np.random.default_rng(0), rt60_seconds=(0.4, 0.4), direct_to_reverberant_db=(6.0, 6.0)
    )
    tail = response[1:].astype(np.float64)
    assert response[0] == 1
    assert 10 * np.log10(np.sum(tail**2)) == pytest.approx(-6.0, abs=1e-4)
    half = len(tail) // 2
    early, late = np.sum(tail[:400] ** 2), np.sum(tail[half : half + 400] ** 2)
    assert 10 * np.log10(early / late) == pytest.approx(30.0, abs=2.0)


def test_channel_filter_keeps_place_and_changes_colour():
    click = np.zeros(1000, np.float32)
    click[500] = 1
    np.testing.assert_allclose(
        channel_filter(click, RATE, np.random.default_rng(0), deviation_db=0.0), click, atol=0.02
    )
    coloured = channel_filter(click, RATE, np.random.default_rng(0))
    assert coloured.dtype == np.float32 and np.argmax(np.abs(coloured)) == 500
    gains = 20 * np.log10(np.abs(np.fft.rfft(coloured))[20:450])
    assert 2 < np.ptp(gains) < 25
