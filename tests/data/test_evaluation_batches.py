"""Batches of whole utterances: every one once, few lengths, and files that can't be read."""

import numpy as np
import pytest

from qsv.data import AudioError, BadFiles, BadFilesError, Utterance, evaluation_batches, read_audio


def test_evaluation_batches_hold_every_utterance_once(ramp_corpus):
    utterances = ramp_corpus.utterances
    batches = list(evaluation_batches(utterances, batch_size=5))
    assert [len(batch.indices) for batch in batches] == [5, 5, 3]
    assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(13))
    for batch in batches:
        assert batch.waveform.dtype == np.float32 and batch.lengths.dtype == batch.indices.dtype == np.int32
        assert batch.waveform.shape == (5, 8000)  # the shortest of the padded lengths
        for row, length, index in zip(batch.waveform, batch.lengths, batch.indices, strict=False):
            np.testing.assert_array_equal(row[:length], read_audio(utterances[index].path))
            assert not row[length:].any()
    np.testing.assert_array_equal(batches[-1].waveform[3:], batches[-1].waveform[[0, 0]])
    np.testing.assert_array_equal(batches[-1].lengths[3:], batches[-1].lengths[[0, 0]])


def test_evaluation_lengths_lie_on_a_grid_and_padding_is_small(write_audio):
    rng = np.random.default_rng(0)
    lengths = rng.integers(16000, 80000, 40)
    pairs = [(f"{n}", write_audio(f"{n}.wav", np.zeros(length))) for n, length in enumerate(lengths)]
    batches = list(evaluation_batches(pairs, batch_size=4))
    padded = [batch.waveform.shape[1] for batch in batches]
    assert padded == sorted(padded, reverse=True)
    grid = {int(np.ceil(8000 * 1.25**power)) for power in range(20)}
    assert set(padded) <= grid
    for batch in batches:
        np.testing.assert_array_equal(batch.lengths[: len(batch.indices)], lengths[batch.indices])
    assert sum(lengths) / sum(4 * length for length in padded) > 0.8


def test_evaluation_of_a_length_on_the_grid_is_not_padded(write_audio):
    path = write_audio("a.wav", np.zeros(10000))
    assert next(evaluation_batches([("a", path)], batch_size=1)).waveform.shape == (1, 10000)


def test_evaluation_max_seconds_speed_and_rate(write_audio):
    path = write_audio("a.wav", np.random.default_rng(0).normal(0, 0.1, 40000), 8000)
    half = next(evaluation_batches([("a", path)], batch_size=1, max_seconds=0.75))
    assert half.lengths[0] == 12000
    np.testing.assert_array_equal(half.waveform[0, :12000], read_audio(path, duration_seconds=0.75))
    for speed, length in ((1.25, 64000), (0.8, 100000)):
        changed = Utterance("a", path, "a", speed=speed)
        assert next(evaluation_batches([changed], batch_size=1)).lengths[0] == length


def test_evaluation_errors(ramp_corpus, tmp_path):
    (tmp_path / "empty.wav").touch()
    with pytest.raises(AudioError, match=r"empty\.wav"):
        list(evaluation_batches([("a", tmp_path / "empty.wav")], batch_size=1))
    with pytest.raises(FileNotFoundError):
        list(evaluation_batches([("a", tmp_path / "gone.wav")], batch_size=1))
    with pytest.raises(ValueError, match="no utterances"):
        evaluation_batches([], batch_size=1)
    with pytest.raises(ValueError, match="length_ratio > 1"):
        evaluation_batches(ramp_corpus.utterances, batch_size=1, length_ratio=1.0)
    with pytest.raises(ValueError, match="max_seconds > 0"):
        evaluation_batches(ramp_corpus.utterances, batch_size=1, max_seconds=0)


def test_unreadable_files_are_in_no_batch_where_they_are_noted(write_audio, tmp_path):
    good = [(name, write_audio(f"{name}.wav", np.zeros(9000 + n))) for n, name in enumerate("abc")]
    (tmp_path / "empty.wav").touch()
    broken = write_audio("late.flac", np.random.default_rng(0).normal(0, 0.1, 9000))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    pairs = [("empty", tmp_path / "empty.wav"), *good[:2], ("gone", tmp_path / "gone.wav"), ("late", broken), good[2]]
    bad_files = BadFiles(5, len(pairs))
    batches = list(evaluation_batches(pairs, batch_size=2, bad_files=bad_files))
    assert sorted(np.concatenate([batch.indices for batch in batches])) == [1, 2, 5]
    lengths = np.concatenate([batch.lengths[: len(batch.indices)] for batch in batches])
    assert sorted(lengths) == [9000, 9001, 9002] and all(len(batch.waveform) == 2 for batch in batches)
    assert [name for name, _ in bad_files.sorted()] == ["empty", "gone", "late"]
    with pytest.raises(BadFilesError, match="3 of 6 files"):
        list(evaluation_batches(pairs, batch_size=2, bad_files=BadFiles(2, len(pairs))))
