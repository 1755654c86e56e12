"""Loaders: what a batch holds, determinism, resuming at any step, bad files, shards."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import soundfile

from qsv.data import (
    Augmenter,
    BadFilesError,
    Corpus,
    Utterance,
    folder_corpus,
    folder_noise,
    training_loader,
    with_speed_perturbation,
)

CROP = 800  # samples; the ramps are 800, 1600 or 2400 long
RAMP_SPEAKERS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4])
RAMP_CROPS = [1, 2, 3, 1, 2, 1, 2, 3, 1, 2, 1, 2, 3]


def ramp_of(waveform):
    """Which utterance of `ramp_corpus` each row was cut from."""
    return (waveform[:, 0].astype(int) + 32768) // 4500


def loader_of(corpus, **options):
    settings = {"batch_size": 4, "crop_seconds": CROP / 16000, "seed": 1, "num_threads": 2} | options
    return training_loader(corpus, **settings)


def take(loader, count):
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def assert_equal_batches(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["waveform"], other["waveform"])
        np.testing.assert_array_equal(one["label"], other["label"])


@pytest.fixture
def augmenter(write_audio):
    rng = np.random.default_rng(0)
    for index in range(3):
        write_audio(f"noise/{index}.wav", rng.normal(0, 0.1, 3000))
    return Augmenter(folder_noise(write_audio("noise/3.wav", rng.normal(0, 0.1, 3000)).parent))


def test_batches_are_crops_with_the_right_label(ramp_corpus):
    batch = next(loader_of(ramp_corpus, batch_size=64))
    assert batch["waveform"].shape == (64, CROP) and batch["waveform"].dtype == np.int16
    assert batch["label"].shape == (64,) and batch["label"].dtype == np.int32
    assert (np.diff(batch["waveform"].astype(int), axis=1) == 1).all()
    np.testing.assert_array_equal(RAMP_SPEAKERS[ramp_of(batch["waveform"])], batch["label"])
    assert len(np.unique(batch["waveform"][:, 0])) > 30


def test_an_epoch_visits_utterances_in_proportion_to_duration(ramp_corpus):
    loader = loader_of(ramp_corpus, batch_size=1)
    assert loader.num_crops == loader.steps_per_epoch == sum(RAMP_CROPS)
    epochs = [
        [int(ramp_of(batch["waveform"])[0]) for batch in itertools.islice(loader, loader.num_crops)] for _ in range(2)
    ]
    loader.close()
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(dict(enumerate(RAMP_CROPS)))
    assert epochs[0] != epochs[1]


def test_fixed_number_of_crops(ramp_corpus):
    assert loader_of(ramp_corpus, crops_per_utterance=2, batch_size=5).num_crops == 26
    assert loader_of(ramp_corpus, crops_per_utterance=1, batch_size=5).steps_per_epoch == 2


def test_a_slower_copy_lasts_longer_and_has_more_crops(ramp_corpus):
    slower = with_speed_perturbation(ramp_corpus, factors=(0.5,))
    assert loader_of(slower).num_crops == 3 * sum(RAMP_CROPS)


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_batches_do_not_depend_on_threads(ramp_corpus, augmenter, num_threads):
    reference = take(loader_of(ramp_corpus, augment=augmenter), 10)
    assert_equal_batches(take(loader_of(ramp_corpus, augment=augmenter, num_threads=num_threads), 10), reference)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_do_not_depend_on_processes(ramp_corpus, augmenter, num_workers):
    expected = take(loader_of(ramp_corpus, augment=augmenter, num_threads=0), 8)
    assert_equal_batches(expected, take(loader_of(ramp_corpus, augment=augmenter, num_workers=num_workers), 8))


def test_resuming_with_processes(ramp_corpus):
    loader = loader_of(ramp_corpus, num_workers=2)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 4)
    other = loader_of(ramp_corpus, num_workers=2)
    other.set_state(state)
    assert_equal_batches(expected, take(other, 4))


def test_bad_files_in_processes_are_named_here(ramp_corpus, truncate):
    truncate(ramp_corpus.utterances[4].path)
    here, there = loader_of(ramp_corpus, num_threads=0), loader_of(ramp_corpus, num_workers=2)
    assert_equal_batches(list(itertools.islice(here, 9)), list(itertools.islice(there, 9)))
    assert here.bad_files == there.bad_files and here.bad_files[0][0] == ramp_corpus.utterances[4].name
    here.close()
    there.close()


def test_batches_do_not_depend_on_the_cache(ramp_corpus):
    reference = take(loader_of(ramp_corpus), 10)
    for cache_bytes in (0, 10_000):
        assert_equal_batches(take(loader_of(ramp_corpus, cache_bytes=cache_bytes), 10), reference)


def test_another_seed_gives_other_batches(ramp_corpus):
    first, second = (take(loader_of(ramp_corpus, seed=seed), 1)[0]["waveform"] for seed in (1, 2))
    assert (first != second).any()


@pytest.mark.parametrize("step", [0, 1, 7, 13])
def test_resuming_at_any_step(ramp_corpus, augmenter, step):
    corpus = with_speed_perturbation(ramp_corpus)
    reference = take(loader_of(corpus, augment=augmenter), 20)
    interrupted = loader_of(corpus, augment=augmenter)
    for _ in range(step):
        next(interrupted)
    state = json.loads(json.dumps(interrupted.get_state()))
    interrupted.close()
    resumed = loader_of(corpus, augment=augmenter)
    next(resumed)
    resumed.set_state(state)
    assert_equal_batches(take(resumed, 20 - step), reference[step:])


def test_state_of_other_settings_is_refused(ramp_corpus):
    state = loader_of(ramp_corpus).get_state()
    loader_of(ramp_corpus, num_threads=0, cache_bytes=0).set_state(state)
    fewer = Corpus.of(ramp_corpus.utterances[:-1])
    for other in (
        loader_of(ramp_corpus, seed=2),
        loader_of(ramp_corpus, batch_size=5),
        loader_of(fewer),
    ):
        with pytest.raises(ValueError, match="belongs to another corpus, seed"):
            other.set_state(state)
    with pytest.raises(ValueError, match="version 3, got None"):
        loader_of(ramp_corpus).set_state({})


def test_utterances_shorter_than_the_crop_are_repeated(write_audio):
    path = write_audio("short/a/1.wav", np.arange(300, dtype=np.int16))
    waveform = next(loader_of(folder_corpus(path.parents[1]), batch_size=1))["waveform"][0]
    np.testing.assert_array_equal(waveform, np.arange(CROP) % 300)


def test_speed_perturbed_crops(write_audio):
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(32000) / 16000)
    corpus = with_speed_perturbation(folder_corpus(write_audio("tone/a/1.wav", tone).parents[1]))
    batch = next(loader_of(corpus, batch_size=30, crop_seconds=0.5, crops_per_utterance=1))
    peaks = np.argmax(np.abs(np.fft.rfft(batch["waveform"])), axis=1) * 2
    assert corpus.speakers == ("a", "a|sp0.9", "a|sp1.1")
    np.testing.assert_allclose(peaks, np.array([1000, 900, 1100])[batch["label"]], atol=4)
    assert set(batch["label"]) == {0, 1, 2}


def spoil(corpus, truncate):
    """An unreadable header, a file that breaks in decoding, and one that is gone."""
    corpus.utterances[0].path.write_bytes(b"")
    samples = np.random.default_rng(0).normal(0, 0.1, 8000)
    broken = corpus.utterances[5].path
    soundfile.write(broken, samples, 16000, format="MP3")
    truncate(broken.rename(broken.with_suffix(".mp3")))
    truncated = Utterance("spk2/0.mp3", broken.with_suffix(".mp3"), "spk2")
    gone = Utterance("spk4/gone.wav", corpus.utterances[-1].path.with_name("gone.wav"), "spk4")
    return Corpus.of([*corpus.utterances[:5], truncated, *corpus.utterances[6:], gone])


def test_bad_files_are_skipped_the_same_way_in_any_threads(ramp_corpus, truncate):
    corpus = spoil(ramp_corpus, truncate)
    reference = None
    for options in ({"num_threads": 0}, {"num_threads": 3}):
        loader = loader_of(corpus, **options)
        batches = list(itertools.islice(loader, 40))
        names, reasons = zip(*loader.bad_files, strict=True)
        assert names == ("spk0/0.wav", "spk2/0.mp3", "spk4/gone.wav")
        assert reasons[0] == "is empty (0 bytes)" and "truncated" in reasons[1] and "gone.wav" in reasons[2]
        loader.close()
        reference = reference or batches
        assert_equal_batches(batches, reference)


def test_resuming_among_bad_files(ramp_corpus, truncate):
    corpus = spoil(ramp_corpus, truncate)
    reference = take(loader_of(corpus), 30)
    first = loader_of(corpus)
    for _ in range(11):
        next(first)
    second = loader_of(corpus)
    second.set_state(first.get_state())
    first.close()
    assert_equal_batches(take(second, 19), reference[11:])


def test_too_many_bad_files_stop_the_loading(ramp_corpus, truncate):
    corpus = spoil(ramp_corpus, truncate)
    with pytest.raises(BadFilesError, match="2 of 14 files are unreadable, max_bad_files=1; the first:\n  spk0/0.wav"):
        loader_of(corpus, max_bad_files=1)
    loader = loader_of(corpus, max_bad_files=2)
    with pytest.raises(BadFilesError, match="3 of 14"):
        take(loader, 40)


def test_a_corpus_of_missing_files_is_an_error(tmp_path):
    corpus = Corpus.of(Utterance(name, tmp_path / name, "a") for name in ("1.wav", "2.wav"))
    with pytest.raises(BadFilesError, match="2 of 2 files are unreadable"):
        loader_of(corpus)


def test_processes_of_a_training_share_its_batches(ramp_corpus, augmenter):
    options = {"batch_size": 6, "augment": augmenter}
    whole = take(loader_of(ramp_corpus, **options), 5)
    for count in (2, 3):
        loaders = [loader_of(ramp_corpus, shard=(index, count), **options) for index in range(count)]
        assert {loader.steps_per_epoch for loader in loaders} == {4}
        parts = [take(loader, 5) for loader in loaders]
        for name in ("waveform", "label"):
            joined = [np.concatenate([own[name] for own in rows]) for rows in zip(*parts, strict=True)]
            np.testing.assert_array_equal(joined, [batch[name] for batch in whole])


def test_resuming_with_another_number_of_processes(ramp_corpus):
    loader = loader_of(ramp_corpus)
    for _ in range(3):
        next(loader)
    state, expected = loader.get_state(), take(loader, 2)
    for index in range(2):
        part = loader_of(ramp_corpus, shard=(index, 2))
        part.set_state(state)
        for batch, whole in zip(take(part, 2), expected, strict=True):
            np.testing.assert_array_equal(batch["waveform"], whole["waveform"][2 * index : 2 * index + 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"crop_seconds": 0.0}, "positive crop"),
        ({"crops_per_utterance": 0}, "crops_per_utterance"),
        ({"crops_per_utterance": "once"}, "crops_per_utterance"),
        ({"shard": (2, 2)}, "shard"),
        ({"shard": (0, 3)}, "which divides 4"),
        ({"sample_rate_hz": 8000}, "the augmenter works at 16000 Hz, the loader at 8000 Hz"),
    ],
)
def test_settings_are_checked(ramp_corpus, augmenter, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(ramp_corpus, augment=augmenter, **options)


def test_real_speech(speech_dir):
    corpus = folder_corpus(speech_dir / "an4", speakers=["fash", "fbbh"])
    augment = Augmenter(folder_noise(speech_dir / "noise" / "rain"))
    loader = loader_of(corpus, crop_seconds=1.0, batch_size=8, augment=augment)
    batches = take(loader, 3)
    assert all(np.abs(batch["waveform"]).max(axis=1).min() > 100 for batch in batches)
    assert loader.bad_files == ()
