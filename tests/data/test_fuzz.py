"""Five hundred malformed audio files and two hundred malformed lines: every one named, and nothing crashes."""

import io
import pathlib
import struct

import numpy as np
import pytest
import soundfile

from qsv.data import (
    AudioError,
    BadFiles,
    Corpus,
    MalformedLinesError,
    Utterance,
    evaluation_batches,
    folder_corpus,
    list_corpus,
    read_audio,
    read_enrolments,
    read_trials,
    training_loader,
)
from qsv.data.audio import decode_audio

FILES, LINES = 500, 200
RATE_HZ = 16000


def encoded(kind, rng, *, seconds=0.4):
    """A good file's bytes."""
    samples = 0.1 * rng.normal(size=int(seconds * RATE_HZ))
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE_HZ, format=kind.upper(), subtype="PCM_16" if kind != "ogg" else None)
    return buffer.getvalue()


def cut_short(data, rng):
    return data[: rng.integers(1, len(data) // 2)]


def cut_in_header(data, rng):
    return data[: rng.integers(1, 40)]


def noise(data, rng):
    return rng.bytes(len(data))


def noisy_header(data, rng):
    return rng.bytes(60) + data[60:]


def text(data, rng):
    return b"<html><body>404 not found</body></html>" * int(rng.integers(1, 50))


def nothing(data, rng):
    return b""


def zeros(data, rng):
    return bytes(len(data))


def other_format(data, rng):
    """A field of a WAV header that nothing can read: no channels, no rate, no bits, or a format that isn't sound."""
    offset, value = [(22, 0), (24, 0), (34, 0), (20, 0x4242), (34, 64)][rng.integers(5)]
    return data[:offset] + struct.pack("<H", value) + data[offset + 2 :]


def infinite(data, rng):
    samples = 0.1 * rng.normal(size=4000).astype(np.float32)
    samples[rng.integers(4000)] = rng.choice([np.nan, np.inf, -np.inf, 1e9])
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE_HZ, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def without_samples(data, rng):
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(0), RATE_HZ, format="WAV")
    return buffer.getvalue()


# An Ogg file has no length in its header, so that a truncated one is a shorter one: only its header is cut.
DAMAGES = {
    "wav": (
        cut_short,
        cut_in_header,
        noise,
        noisy_header,
        text,
        nothing,
        zeros,
        other_format,
        infinite,
        without_samples,
    ),
    "flac": (cut_short, cut_in_header, noise, noisy_header, text, nothing, zeros),
    "ogg": (cut_in_header, noise, noisy_header, text, nothing, zeros),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> pathlib.Path:
    """A corpus of malformed files among as many good ones, `SPEAKER/NUMBER_DAMAGE.SUFFIX`."""
    folder, rng = tmp_path_factory.mktemp("damaged"), np.random.default_rng(0)
    for number in range(FILES):
        kind = ("wav", "flac", "ogg")[number % 3]
        damage = DAMAGES[kind][number // 3 % len(DAMAGES[kind])]
        path = folder / f"speaker{number % 10}" / f"{number}_{damage.__name__}.{kind}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damage(encoded(kind, rng), rng))
        (path.parent / f"{number}_good.wav").write_bytes(encoded("wav", rng))
    return folder


def is_good(utterance):
    return utterance.path.stem.endswith("_good")


def test_reading_names_every_file(damaged):
    files = [utterance.path for utterance in folder_corpus(damaged).utterances if not is_good(utterance)]
    assert len(files) == FILES
    read = []
    for path in files:
        try:
            read_audio(path)
        except AudioError as error:
            assert error.path == path and str(path) in str(error) and error.reason
        else:
            read.append(path)
    assert read == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_training_goes_on_and_names_every_file(damaged, workers):
    corpus = folder_corpus(damaged)
    loader = training_loader(
        corpus, batch_size=16, crop_seconds=0.2, seed=0, max_bad_files=FILES, num_workers=workers, crops_per_utterance=1
    )
    for _ in range(6 * len(corpus) // 16):
        batch = next(loader)
        assert batch["waveform"].shape == (16, 3200) and batch["waveform"].any(axis=1).all()
    loader.close()
    assert [name for name, _ in loader.bad_files] == sorted(own.name for own in corpus.utterances if not is_good(own))


def test_embedding_goes_on_and_names_every_file(damaged):
    corpus = folder_corpus(damaged)
    bad_files = BadFiles(FILES, len(corpus))
    batches = list(evaluation_batches(corpus.utterances, batch_size=4, bad_files=bad_files))
    read = [corpus.utterances[index] for batch in batches for index in batch.indices]
    assert len(read) == FILES and all(map(is_good, read))
    assert len(bad_files.sorted()) == FILES


def test_random_damage_to_samples_or_header_never_crashes():
    """Flipped bits may leave a file that can be read: then as finite samples, else with an error of ours."""
    rng = np.random.default_rng(1)
    outcomes = {"read": 0, "refused": 0}
    corpus = [(kind, encoded(kind, rng)) for kind in ("wav", "flac", "ogg")]
    for number in range(300):
        kind, data = corpus[number % 3]
        changed = bytearray(data)
        for place in rng.integers(0, min(len(data), 200) if number % 2 else len(data), rng.integers(1, 6)):
            changed[place] = rng.integers(256)
        try:
            waveform = decode_audio(bytes(changed), "fuzz")
        except AudioError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            assert np.isfinite(waveform).all() and np.abs(waveform).max() <= 1
    assert min(outcomes.values()) > 50, outcomes


def malformed(rng, kind):
    """One line that is no trial, or no entry of a list of utterances, or no enrolment."""
    shared = ["\0", "a\0b c d", "x"]
    own = {
        "trials": [
            "1 a",
            "a b",
            "2 a b",
            "1 a b c",
            "a b yes",
            "-1 a b",
            "true a b",
            "1.0 a b",
            "a b target extra",
            "1,a,b",
        ],
        "list": ["speaker", "1234567890", "?" * 5000, "\u200b", "speaker\u00a0x".replace("\u00a0", "")],
        "enrolments": ["ann", "?" * 5000, "ann a.wav a.wav", "\ud800".encode("utf-8", "surrogatepass").hex()],
    }[kind]
    return (shared + own)[rng.integers(len(shared + own))]


GOOD = {
    "trials": lambda n: f"{n % 2} a{n} b{n}",
    "list": lambda n: f"speaker{n % 7} folder with spaces/{n}.wav",
    "enrolments": lambda n: f"model{n} {n}a.wav {n}b.wav",
}
READ = {"trials": read_trials, "list": list_corpus, "enrolments": read_enrolments}


@pytest.mark.parametrize("kind", GOOD)
def test_every_malformed_line_is_named(tmp_path, kind):
    rng = np.random.default_rng(2)
    is_bad = rng.permutation(np.arange(3 * LINES) < LINES)
    lines = [malformed(rng, kind) if bad else GOOD[kind](n) for n, bad in enumerate(is_bad)]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(MalformedLinesError) as raised:
        READ[kind](path)
    assert [number for number, _ in raised.value.lines] == (1 + np.flatnonzero(is_bad)).tolist()
    shown = str(raised.value).splitlines()
    assert len(shown) == 1 + LINES and max(map(len, shown)) < 500
    path.write_text("\n".join(line for line, bad in zip(lines, is_bad, strict=True) if not bad), encoding="utf-8")
    READ[kind](path)


def test_random_bytes_are_a_list_of_malformed_lines(tmp_path):
    rng = np.random.default_rng(3)
    for name, read in READ.items():
        path = tmp_path / f"{name}.txt"
        path.write_bytes(rng.bytes(20_000))
        with pytest.raises(ValueError, match=path.name):
            read(path)


def test_listed_files_that_are_not_there_are_named(tmp_path, damaged):
    good = next(damaged.glob("*/*_good.wav"))
    missing = [Utterance(f"{n}.wav", tmp_path / f"{n}.wav", f"speaker{n}") for n in range(20)]
    corpus = Corpus.of([*missing, Utterance("good.wav", good, "good")])
    loader = training_loader(corpus, batch_size=4, crop_seconds=0.2, seed=0, crops_per_utterance=1)
    for _ in range(20):
        assert next(loader)["waveform"].any(axis=1).all()
    loader.close()
    assert len(loader.bad_files) == 20
