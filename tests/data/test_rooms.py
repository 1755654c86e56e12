"""Simulated rooms."""

import sys

import numpy as np
import pytest

from qsv.data import Augmenter, simulate_room_impulse_responses


def energy_decay_seconds(response, drop_db):
    """When the energy still to come has fallen by `drop_db` (Schroeder's integral)."""
    energy = np.cumsum(response[::-1].astype(np.float64) ** 2)[::-1]
    return np.argmax(10 * np.log10(energy / energy[0]) < -drop_db) / 16000


def test_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    with pytest.raises(ImportError, match=r"pip install 'qsv\[rooms\]'"):
        simulate_room_impulse_responses(1, 0)


class TestWithPyroomacoustics:
    @pytest.fixture(autouse=True)
    def _needed(self):
        pytest.importorskip("pyroomacoustics")

    def test_responses_follow_the_seed(self):
        first, again, other = (simulate_room_impulse_responses(3, seed).arrays for seed in (0, 0, 1))
        assert len(first) == 3
        for one, two in zip(first, again, strict=True):
            assert one.dtype == np.float32 and one.ndim == 1
            assert np.abs(one).max() == 1.0
            np.testing.assert_array_equal(one, two)
        assert not np.array_equal(first[0][:500], other[0][:500])

    def test_reverberation_time_is_what_was_asked_for(self):
        small = ((4.0, 5.0), (3.0, 4.0), (2.5, 3.0))
        for seconds in (0.2, 0.4):
            responses = simulate_room_impulse_responses(
                4, 0, room_metres=small, rt60_seconds=(seconds, seconds), max_order=60
            ).arrays
            measured = np.mean([3 * energy_decay_seconds(response, 20.0) for response in responses])
            assert measured == pytest.approx(seconds, rel=0.35)

    def test_they_serve_an_augmenter(self):
        augmenter = Augmenter(impulse_responses=simulate_room_impulse_responses(2, 0), probability=1.0)
        speech = np.random.default_rng(0).normal(0, 0.05, 4000).astype(np.float32)
        wet = augmenter.augment(speech, np.random.default_rng(0))
        assert wet.shape == speech.shape and not np.array_equal(wet, speech)

    def test_errors(self):
        with pytest.raises(ValueError, match="count >= 1"):
            simulate_room_impulse_responses(0, 0)
        with pytest.raises(ValueError, match=r"above 1\.0 m for each side"):
            simulate_room_impulse_responses(1, 0, room_metres=((0.5, 2.0), (3.0, 4.0), (2.0, 3.0)))
        with pytest.raises(ValueError, match=r"100 rooms in a row .* too large for a reverberation time"):
            simulate_room_impulse_responses(
                1, 0, room_metres=((10.0, 12.0), (8.0, 10.0), (4.0, 5.0)), rt60_seconds=(0.02, 0.03)
            )
