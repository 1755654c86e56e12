"""The eSpeak NG engine: reproducible, and strict about voices and ranges."""

import numpy as np
import pytest

from qsv.data.espeak import Espeak

pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def engine():
    with Espeak() as engine:
        yield engine


def test_speaks(engine):
    spoken = engine.say("seven nine two", accent="en-us", variant="f3")
    assert spoken.dtype == np.int16
    assert 0.5 < len(spoken) / engine.sample_rate_hz < 3
    assert np.abs(spoken).max() > 3000
    assert len(engine.variants) > 50 and engine.version.count(".") >= 1


def test_two_engines_say_the_same():
    recordings = []
    for _ in range(2):
        with Espeak() as engine:
            recordings.append([engine.say("hello", accent="en-us", variant=variant) for variant in ("f3", "m2", "f3")])
    for first, second in zip(*recordings, strict=True):
        np.testing.assert_array_equal(first, second)


def test_parameters_act(engine):
    def seconds(rate):
        return len(engine.say("one two three four", accent="en-us", variant="m1", rate=rate))

    def pitch_hz(pitch):
        spoken = engine.say("aaaa", accent="en-us", variant="m1", pitch=pitch, pitch_range=0).astype(float)
        middle = spoken[len(spoken) // 2 - 2048 :][:4096]
        lags = np.correlate(middle, middle, "full")[4095:]
        return engine.sample_rate_hz / (60 + np.argmax(lags[60:400]))

    assert seconds(120) > 1.3 * seconds(240)
    assert pitch_hz(90) > 1.3 * pitch_hz(10)


def test_errors(engine):
    with pytest.raises(ValueError, match="no voice variant 'nobody'"):
        engine.say("hello", accent="en-us", variant="nobody")
    with pytest.raises(ValueError, match="no voice 'xx-nowhere'"):
        engine.say("hello", accent="xx-nowhere", variant="f3")
    with pytest.raises(ValueError, match="rate 80..450"):
        engine.say("hello", accent="en-us", variant="f3", rate=20)
