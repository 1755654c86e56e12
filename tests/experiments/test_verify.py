"""Verifications: scores, decisions, exit statuses, conversions, and the input they refuse."""

import math
import re

import numpy as np
import pytest
import soundfile

from experiments import verify


@pytest.fixture
def compare(float_run):
    def run(*paths, threshold=-2.0, model=float_run):
        arguments = tuple(map(str, paths))
        return verify.run(verify.VerifyConfig(model=str(model), threshold=threshold, arguments=arguments))

    return run


@pytest.fixture
def write_voice(tmp_path, make_voice):
    """The same utterance at any rate, with any number of channels."""

    def write(name, *, sample_rate_hz=16000, spread=None, **options):
        speech = make_voice(140, np.random.default_rng(5), sample_rate_hz=sample_rate_hz)
        if spread is not None:
            difference = spread * np.sin(np.arange(len(speech)))
            speech = np.stack([speech + difference, speech - difference], axis=1)
        path = tmp_path / name
        soundfile.write(path, speech, sample_rate_hz, **options)
        return path

    return write


def test_a_file_against_itself_scores_one(compare, speech, capsys):
    path = speech.test / "test0" / "0.wav"
    assert compare(path, path) == pytest.approx(1, abs=1e-5)
    assert capsys.readouterr().out == "score 1.0000, threshold -2.0000: same speaker\n"


def test_stereo_is_averaged(compare, speech, write_voice):
    other = speech.test / "test0" / "0.wav"
    mono = compare(write_voice("mono.wav", subtype="FLOAT"), other)
    assert compare(write_voice("stereo.wav", spread=0.1, subtype="FLOAT"), other) == pytest.approx(mono, abs=1e-4)


@pytest.mark.parametrize(("name", "sample_rate_hz"), [("a.wav", 8000), ("a.flac", 44100), ("a.ogg", 16000)])
def test_other_rates_and_formats_are_converted(compare, write_voice, tmp_path, name, sample_rate_hz):
    original = write_voice("original.wav")
    converted = compare(write_voice(name, sample_rate_hz=sample_rate_hz), original)
    # The same samples taken for another rate are another voice.
    misread = tmp_path / "misread.wav"
    soundfile.write(misread, soundfile.read(write_voice("slow.wav", sample_rate_hz=8000))[0], 16000)
    assert converted > 0.97
    assert compare(misread, original) < 0.9


def test_different_speakers_end_with_status_3(run_experiment, speech, float_run):
    first, second = speech.test / "test0" / "0.wav", speech.test / "test3" / "0.wav"
    status, output, errors = run_experiment("verify", f"--model={float_run}", first, second)
    assert (status, errors) == (3, "")
    score, threshold = re.fullmatch(r"score (\S+), threshold (\S+): different speakers\n", output).groups()
    assert float(score) < float(threshold)


def test_the_threshold_decides(compare, speech):
    first, second = speech.test / "test0" / "0.wav", speech.test / "test3" / "0.wav"
    score = compare(first, second)
    assert compare(first, second, threshold=score) == score
    with pytest.raises(SystemExit) as caught:
        compare(first, second, threshold=math.nextafter(score, 2))
    assert caught.value.code == 3


def test_the_models_own_threshold_is_the_default(compare, speech, capsys):
    path = speech.test / "test0" / "0.wav"
    compare(path, path, threshold=math.nan)
    assert re.search(r"threshold 0\.\d{4}: same speaker", capsys.readouterr().out)


def test_a_model_without_a_threshold_needs_one_given(compare, speech, wespeaker_checkpoint):
    path = speech.test / "test0" / "0.wav"
    with pytest.raises(ValueError, match="no calibrated threshold to decide by; give --threshold"):
        compare(path, path, threshold=math.nan, model=wespeaker_checkpoint)
    assert compare(path, path, threshold=0.5, model=wespeaker_checkpoint) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_recordings_are_needed(compare, count):
    with pytest.raises(ValueError, match=f"give two recordings to compare, got {count}"):
        compare(*["a.wav"] * count)


def samples(count, value=0.1):
    return np.full(count, value, np.float32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "bad.wav: is empty"),
        (samples(0), "bad.wav: holds no samples"),
        (samples(8000, math.nan), "bad.wav: sample 0 is nan"),
        (samples(100), "bad.wav: has 100 samples at 16000 Hz, the network needs at least 400"),
    ],
    ids=["no bytes", "no samples", "nan", "too short"],
)
def test_unusable_recordings_are_named(compare, speech, tmp_path, content, message):
    path = tmp_path / "bad.wav"
    if content is None:
        path.touch()
    else:
        soundfile.write(path, content, 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match=message):
        compare(speech.test / "test0" / "0.wav", path)


def test_missing_recordings_and_models_are_named(compare, speech, tmp_path):
    path = speech.test / "test0" / "0.wav"
    with pytest.raises(FileNotFoundError, match="no audio file .*nowhere.wav"):
        compare(path, tmp_path / "nowhere.wav")
    with pytest.raises(FileNotFoundError, match="no model file or run folder"):
        compare(path, path, model=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--model must be given"):
        compare(path, path, model="")


def test_an_unusable_recording_is_one_line_and_exit_status_1(run_experiment, speech, float_run, tmp_path):
    empty = tmp_path / "empty.wav"
    empty.touch()
    status, output, errors = run_experiment("verify", f"--model={float_run}", speech.test / "test0" / "0.wav", empty)
    assert (status, output) == (1, "")
    assert errors == f"error: {empty}: is empty (0 bytes)\n"
