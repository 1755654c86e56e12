"""Corpora of noisy speech: disjoint splits, exact ratios, labels, builds that go on after a kill."""

import csv
import dataclasses
import sys

import numpy as np
import pytest
import soundfile

from qsv.data import (
    AudioError,
    build_noisy_corpus,
    draw_mixtures,
    flat_corpus,
    folder_corpus,
    mix,
    read_labels,
    training_loader,
    wideband_pesq,
)

RATE = 16000


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Four speakers of buzzing vowels and five noises."""
    root = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    seconds = np.arange(2 * RATE) / RATE
    for speaker in range(4):
        (root / "speech" / f"s{speaker}").mkdir(parents=True)
        pitch = 100 + 20 * speaker
        voice = sum(np.sin(2 * np.pi * pitch * k * seconds) / k for k in range(1, 20))
        voice *= 0.1 * (np.sin(2 * np.pi * 3 * seconds) > 0)
        soundfile.write(root / "speech" / f"s{speaker}" / "a.wav", voice, RATE)
    (root / "noise").mkdir()
    for clip in range(5):
        soundfile.write(root / "noise" / f"n{clip}.wav", 0.1 * rng.normal(size=RATE), RATE)
    return folder_corpus(root / "speech"), [u.path for u in flat_corpus(root / "noise").utterances]


@pytest.fixture
def mixtures(sources):
    return draw_mixtures(*sources, counts=(4, 2, 2), seed=1)


def test_no_speaker_and_no_noise_is_in_two_splits(sources):
    mixtures = draw_mixtures(*sources, counts=(300, 50, 50), snr_db=(-15, 25))
    seen = {split: [m for m in mixtures if m.split == split] for split in ("train", "validation", "test")}
    assert [len(own) for own in seen.values()] == [300, 50, 50]
    for thing in (lambda m: m.utterance.speaker, lambda m: m.noise):
        owners = [{thing(m) for m in own} for own in seen.values()]
        assert all(owners) and len(set.union(*owners)) == sum(map(len, owners))
    ratios = [m.snr_db for m in mixtures]
    assert -15 <= min(ratios) < -12 and 22 < max(ratios) <= 25
    assert mixtures == draw_mixtures(*sources, counts=(300, 50, 50), snr_db=(-15, 25))
    assert mixtures != draw_mixtures(*sources, counts=(300, 50, 50), snr_db=(-15, 25), seed=1)


def test_takes_of_one_recording_are_in_one_split(sources):
    folder = sources[1][0].parent
    takes = [folder / f"{kind}/1-{recording}-{take}.ogg" for kind in "xy" for recording in range(6) for take in "ABC"]
    # A folder given twice has the same clips.
    mixtures = draw_mixtures(sources[0], takes + takes[:9], counts=(300, 100, 100))
    assert {m.noise for m in mixtures} == set(takes)
    splits = {(m.noise.parent, m.noise.stem[:-2]): set() for m in mixtures}
    for mixture in mixtures:
        splits[mixture.noise.parent, mixture.noise.stem[:-2]].add(mixture.split)
    assert len(splits) == 12 and all(len(own) == 1 for own in splits.values())


def test_speakers_are_shared_out_in_proportion(sources):
    speech, noise = sources
    mixtures = draw_mixtures(speech, noise, counts=(1, 1, 1000))
    assert len({m.utterance.speaker for m in mixtures if m.split == "test"}) == 2


def test_a_mixture_has_its_ratio_and_never_clips(mixtures):
    for mixture in mixtures:
        clean, noisy = mix(mixture, num_samples=3 * RATE)
        noise = (noisy - clean).astype(np.float64)
        ratio = 10 * np.log10(np.sum(np.square(clean, dtype=np.float64)) / np.sum(np.square(noise)))
        assert ratio == pytest.approx(mixture.snr_db, abs=0.01)
        assert np.abs(noisy).max() <= 0.99 + 1e-6


def test_a_build_has_a_labelled_file_for_every_mixture(mixtures, tmp_path):
    pytest.importorskip("pesq")
    table = build_noisy_corpus(tmp_path, mixtures, seconds=2.0, num_workers=0)
    rows = list(csv.DictReader(table.open()))
    assert [row["path"] for row in rows] == [f"{m.split}/{m.name}.flac" for m in mixtures]
    for row, mixture in zip(rows, mixtures, strict=True):
        clean, noisy = mix(mixture, num_samples=2 * RATE)
        samples, rate = soundfile.read(tmp_path / row["path"], dtype="float32")
        assert rate == RATE
        np.testing.assert_allclose(samples, noisy, atol=1 / 32768)
        assert float(row["pesq"]) == pytest.approx(wideband_pesq(clean, noisy), abs=1e-5)
        assert float(row["snr_db"]) == pytest.approx(mixture.snr_db, abs=1e-3)
        assert row["speaker"] == mixture.utterance.speaker and row["noise"] == mixture.noise.name
    labels = [float(row["pesq"]) for row in rows]
    assert 1 <= min(labels) < max(labels) <= 4.65


def test_processes_make_the_same_files(mixtures, tmp_path):
    pytest.importorskip("pesq")
    tables = [build_noisy_corpus(tmp_path / str(n), mixtures[:3], seconds=1.0, num_workers=n) for n in (0, 2)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    name = f"train/{mixtures[0].name}.flac"
    assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_an_interrupted_build_goes_on(mixtures, tmp_path, cut, monkeypatch):
    pytest.importorskip("pesq")
    table = build_noisy_corpus(tmp_path, mixtures, seconds=1.0, num_workers=0)
    whole = table.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = b"".join(lines[:4])
    table.write_bytes(kept[: len(kept) - cut] if cut else kept)
    made = []
    monkeypatch.setattr("qsv.data.mixtures.wideband_pesq", lambda *args: made.append(1) or wideband_pesq(*args))
    assert build_noisy_corpus(tmp_path, mixtures, seconds=1.0, num_workers=0).read_bytes() == whole
    assert len(made) == len(mixtures) - (3 if cut == 0 else 2)


def test_a_folder_of_other_settings_is_refused(mixtures, tmp_path):
    pytest.importorskip("pesq")
    build_noisy_corpus(tmp_path, mixtures[:2], seconds=1.0, num_workers=0)
    with pytest.raises(ValueError, match="other speech, noise or settings"):
        build_noisy_corpus(tmp_path, mixtures[:2], seconds=2.0, num_workers=0)


def test_silence_has_no_label(tmp_path, mixtures):
    pytest.importorskip("pesq")
    assert np.isnan(wideband_pesq(np.zeros(RATE, np.float32), np.zeros(RATE, np.float32)))
    (tmp_path / "labels.csv").write_text("path,speaker,pesq\na.wav,s,1.5\nb.wav,s,\n")
    corpus, labels = read_labels(tmp_path / "labels.csv", "pesq")
    assert labels == {"a.wav": 1.5} and len(corpus) == 1


def test_what_is_missing_is_said(sources, mixtures, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="clips in each of"):
        draw_mixtures(*sources, counts=(4, 0, 1))
    with pytest.raises(ValueError, match="3 splits need as many noise recordings"):
        draw_mixtures(sources[0], sources[1][:2], counts=(1, 1, 1))
    with pytest.raises(ValueError, match="snr_db"):
        draw_mixtures(*sources, counts=(1, 1, 1), snr_db=(3, 1))
    (tmp_path / "text.wav").write_text("no audio")
    with pytest.raises(AudioError, match="text.wav"):
        mix(dataclasses.replace(mixtures[0], noise=tmp_path / "text.wav"), num_samples=RATE)
    monkeypatch.setitem(sys.modules, "pesq", None)
    with pytest.raises(ImportError, match=r"qsv\[quality\]"):
        build_noisy_corpus(tmp_path / "corpus", mixtures)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,speaker\na.wav,s\n", r"no columns \['pesq', 'split'\]"),
        ("path,speaker,split,pesq\na.wav,s,test,1.0\n", "in the split 'train'"),
        ("path,speaker,split,pesq\na.wav,s,train,good\n", "labels.csv:2: a label must be a finite number, got 'good'"),
        ("path,speaker,split,pesq\na.wav,s,train,inf\n", "finite"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.csv", "pesq", split="train")


def test_a_loader_hands_on_the_labels(sources):
    speech, _ = sources
    labels = {utterance.name: 1.5 + place for place, utterance in enumerate(speech.utterances)}
    settings = {"batch_size": 4, "crop_seconds": 2.0, "seed": 0}
    loader = training_loader(speech, **settings, labels=labels)
    batch = next(loader)
    assert batch["label"].dtype == np.float32
    assert sorted(batch["label"]) == sorted(labels.values())
    state = loader.get_state()
    loader.close()
    other = training_loader(speech, **settings, labels={name: label + 1 for name, label in labels.items()})
    with pytest.raises(ValueError, match="another corpus"):
        other.set_state(state)
    other.close()
    with pytest.raises(ValueError, match="1 utterances have no label"):
        training_loader(speech, **settings, labels=dict(list(labels.items())[1:]))
