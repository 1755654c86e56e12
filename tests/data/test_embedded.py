"""The embedded corpus: what it holds, that it is reproducible, made once, and never half."""

import json
import sys

import numpy as np
import pytest

from qsv.data import build_embedded_corpus, check_trials, embedded, folder_noise, read_audio

pytest.importorskip("espeakng_loader")

SMALL = {"speakers": 3, "test_speakers": 2, "utterances_per_speaker": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedded") / "corpus"
    return folder, build_embedded_corpus(folder, **SMALL)


def test_contents(made):
    folder, corpus = made
    assert len(corpus.train) == 6 and len(corpus.test) == 4
    assert not set(corpus.train.speakers) & set(corpus.test.speakers)
    assert len(corpus.trials) == 6 and corpus.trials.labels.sum() == 2
    check_trials(corpus.trials, corpus.test)
    assert len(folder_noise(corpus.noise_folder)[0].clips) == 32
    voices = json.loads((folder / "corpus.json").read_text())["voices"]
    variants = [{voice["variant"] for voice in voices[part]} for part in ("train", "test")]
    assert not variants[0] & variants[1]
    for utterance in (*corpus.train.utterances, *corpus.test.utterances):
        waveform = read_audio(utterance.path)
        assert 0.7 < len(waveform) / 16000 < 8
        assert 10 ** (-33 / 20) < np.sqrt(np.mean(waveform**2)) < 10 ** (-19 / 20)


def test_same_settings_give_the_same_samples(made, tmp_path):
    _, corpus = made
    again = build_embedded_corpus(tmp_path / "again", **SMALL)
    other = build_embedded_corpus(tmp_path / "other", **SMALL, seed=1)
    same, different = [], []
    for index, utterance in enumerate(corpus.train.utterances):
        waveform = read_audio(utterance.path)
        same.append(np.array_equal(waveform, read_audio(again.train.utterances[index].path)))
        different.append(not np.array_equal(waveform, read_audio(other.train.utterances[index].path)))
    assert all(same) and all(different)


def test_a_finished_folder_is_used_again(made, monkeypatch):
    folder, corpus = made
    monkeypatch.setattr(embedded, "_make", lambda *_: pytest.fail("made again"))
    assert build_embedded_corpus(folder, **SMALL).train == corpus.train
    with pytest.raises(ValueError, match="embedded corpus of other settings"):
        build_embedded_corpus(folder, **SMALL, seed=5)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(ValueError, match="is no embedded corpus"):
        build_embedded_corpus(tmp_path, **SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "all my work"


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "write_trials", fail)
    with pytest.raises(KeyboardInterrupt):
        build_embedded_corpus(tmp_path / "corpus", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_another_process_may_win(made, tmp_path):
    _, corpus = made
    target = tmp_path / "corpus"
    target.mkdir()
    first = build_embedded_corpus(target, **SMALL)
    assert first.train.speakers == corpus.train.speakers
    partial = tmp_path / "partial"
    partial.mkdir()
    settings = embedded._Settings(3, 2, 2, 0, 0.0, 20.0)
    embedded._rename(partial, target, settings)
    assert (target / "trials.txt").is_file()


@pytest.mark.parametrize(
    "wrong", [{"speakers": 0}, {"test_speakers": 1}, {"utterances_per_speaker": 1}, {"snr_db": (5.0, 0.0)}]
)
def test_settings_are_checked(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected speakers >= 1"):
        build_embedded_corpus(tmp_path / "corpus", **(SMALL | wrong))


def test_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r"pip install 'qsv\[demo\]'"):
        build_embedded_corpus(tmp_path / "corpus", **SMALL)
    assert list(tmp_path.iterdir()) == []
