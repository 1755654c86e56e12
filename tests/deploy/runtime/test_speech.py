"""Recordings that nothing can be told from."""

import numpy as np
import pytest

from qsv.deploy.runtime import SpeechRequirements
from qsv.deploy.runtime.speech import loudest_level_db

RATE_HZ = 16000
TONE = (0.3 * np.sin(np.arange(RATE_HZ) / 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (TONE[: RATE_HZ // 10], r"too short: 0\.10 s, at least 0\.5 s"),
        (np.tile(TONE, 121), r"too long: 121\.00 s, at most 120 s are taken"),
        (np.zeros(RATE_HZ, np.float32), "is silent; at least -60 dB"),
        (np.full(RATE_HZ, 0.2, np.float32), "is silent"),
        (1e-4 * TONE, "is silent: its loudest part is at -9"),
        (np.clip(20 * TONE, -1, 1), "is clipped: 8.% of its samples"),
        (np.where(np.arange(RATE_HZ) == 7, np.nan, TONE), "not finite"),
    ],
)
def test_what_cannot_be_used_is_refused(waveform, message):
    with pytest.raises(ValueError, match=message):
        SpeechRequirements().check(waveform, RATE_HZ)


def test_good_speech_passes_and_a_little_clipping_is_told():
    assert SpeechRequirements().check(TONE, RATE_HZ) == []
    overdriven = TONE.copy()
    overdriven[100:200] = 1.0
    assert SpeechRequirements().check(overdriven, RATE_HZ) == [
        "is clipped in part: 0.6% of its samples are at full scale"
    ]


def test_the_level_is_that_of_the_loudest_part():
    waveform = np.zeros(RATE_HZ, np.float32)
    waveform[8000:8320] = np.sqrt(2) * 0.1 * np.sin(2 * np.pi * np.arange(320) / 40)
    assert loudest_level_db(waveform, RATE_HZ) == pytest.approx(-20, abs=0.01)
    assert loudest_level_db(np.zeros(RATE_HZ), RATE_HZ) == -np.inf
