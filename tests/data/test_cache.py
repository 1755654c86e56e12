"""The decoded-audio cache: same pieces with and without it, a byte bound, and short files."""

import numpy as np
import pytest

from qsv.data.audio import AudioError
from qsv.data.cache import AudioCache


def crops(cache, path, num_samples, count=20):
    rng = np.random.default_rng(3)
    return np.stack([cache.random_crop(path, num_samples, rng) for _ in range(count)])


def test_cached_and_sought_pieces_are_equal(write_audio):
    path = write_audio("a.flac", np.arange(3000, dtype=np.int16))
    cached = AudioCache([path], sample_rate_hz=16000, cache_bytes=6000)
    sought = AudioCache([path], sample_rate_hz=16000, cache_bytes=5999)
    pieces = crops(cached, path, 100)
    np.testing.assert_array_equal(pieces, crops(sought, path, 100))
    assert cached.cached_bytes == 6000
    assert sought.cached_bytes == 0
    assert (np.diff(pieces, axis=1) == 1).all()
    assert len(np.unique(pieces[:, 0])) > 15


def test_the_first_files_are_kept_in_any_order_of_use(write_audio):
    paths = [write_audio(f"{index}.wav", np.full(1000, index, np.int16)) for index in range(3)]
    cache = AudioCache(paths, sample_rate_hz=16000, cache_bytes=4500)
    for path in reversed(paths):
        crops(cache, path, 10, count=1)
    assert cache.cached_bytes == 4000
    paths[2].unlink()
    with pytest.raises(FileNotFoundError):
        crops(cache, paths[2], 10, count=1)
    paths[0].unlink()
    assert (crops(cache, paths[0], 10, count=1) == 0).all()


def test_short_files_are_repeated(write_audio):
    path = write_audio("a.wav", np.array([1, 2, 3], np.int16))
    for cache_bytes in (0, 100):
        cache = AudioCache([path], sample_rate_hz=16000, cache_bytes=cache_bytes)
        np.testing.assert_array_equal(crops(cache, path, 7, count=1)[0], [1, 2, 3, 1, 2, 3, 1])


def test_every_place_is_reached(write_audio):
    path = write_audio("a.wav", np.arange(5, dtype=np.int16))
    cache = AudioCache([path], sample_rate_hz=16000, cache_bytes=100)
    assert set(crops(cache, path, 3, count=100)[:, 0]) == {0, 1, 2}


def test_resampled_pieces_have_the_length_that_was_asked_for(write_audio):
    path = write_audio("a.wav", np.zeros(5000), 11025)
    for cache_bytes in (0, 10**6):
        cache = AudioCache([path], sample_rate_hz=16000, cache_bytes=cache_bytes)
        assert crops(cache, path, 1237).shape == (20, 1237)


def test_unreadable_headers_are_listed(tmp_path, write_audio):
    (tmp_path / "empty.wav").touch()
    good = write_audio("good.wav", np.zeros(10))
    paths = [tmp_path / "empty.wav", tmp_path / "gone.wav", good, good]
    cache = AudioCache(paths, sample_rate_hz=16000, cache_bytes=0)
    assert list(cache.num_samples.values()) == [10]
    assert cache.unreadable[paths[0]] == "is empty (0 bytes)"
    assert "gone.wav" in cache.unreadable[paths[1]]


def test_a_broken_file_fails_again_and_again(write_audio, truncate):
    path = write_audio("a.mp3", np.random.default_rng(0).normal(0, 0.1, 16000))
    truncate(path)
    cache = AudioCache([path], sample_rate_hz=16000, cache_bytes=10**6)
    for _ in range(2):
        with pytest.raises(AudioError, match="truncated"):
            crops(cache, path, 100, count=1)
