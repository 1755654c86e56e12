"""Clips of noisy speech with a known quality: clean speech and noise mixed at given ratios, and labelled."""

from __future__ import annotations

import concurrent.futures
import csv
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import re
import types
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
import soundfile
import tqdm

from qsv.data.audio import AudioError, to_float32, to_int16
from qsv.data.augmentation import mix_at_snr
from qsv.data.cache import AudioCache
from qsv.data.corpora import Corpus, Utterance

LABELS_FILE, SETTINGS_FILE = "labels.csv", "corpus.json"
SPLITS = ("train", "validation", "test")
COLUMNS = ("path", "split", "speaker", "speech", "noise", "snr_db", "pesq")

# What tells the takes of one recording from each other at the end of their names.
_TAKE = re.compile(r"-[A-Z]$")
# Both signals are brought down together where the mixture would clip.
_HIGHEST_PEAK = 0.99
# In the worker processes; the audio that one mixture needs is read when its turn comes.
_CACHE_BYTES = 2**28
_CHUNK = 8

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A clip to be made.

    Attributes:
        name: of its file, without the suffix.
        split: of `SPLITS`.
        utterance: the clean speech.
        noise: the noise clip.
        snr_db: ratio of their energies over the clip.
        seed: of the places where the two are cut.
    """

    name: str
    split: str
    utterance: Utterance
    noise: pathlib.Path
    snr_db: float
    seed: int


def draw_mixtures(
    speech: Corpus,
    noise: Sequence[pathlib.Path],
    *,
    counts: Sequence[int],
    snr_db: tuple[float, float] = (-15.0, 25.0),
    seed: int = 0,
) -> tuple[Mixture, ...]:
    """Which clips a corpus of noisy speech will have: no speaker and no noise recording is in two splits.

    Speakers are drawn evenly, then one of their utterances; noise clips and ratios are drawn evenly too.

    Args:
        speech: clean speech.
        noise: noise clips; those of one folder whose names differ in a last `-LETTER` are takes of one recording, as in
            ESC-50.
        counts: clips of each split; speakers and recordings are shared out in proportion, at least one each.
        snr_db: range of the signal-to-noise ratios.
        seed: of all draws.

    Returns:
        The clips, split by split.

    Raises:
        ValueError: counts or range are none, or there are fewer speakers or noise recordings than splits.
    """
    if len(counts) != len(SPLITS) or min(counts) < 1:
        raise ValueError(f"a corpus needs clips in each of {SPLITS}, got {tuple(counts)}")
    if not snr_db[0] <= snr_db[1]:
        raise ValueError(f"expected snr_db (low, high), got {snr_db}")
    rng = np.random.default_rng(seed)
    speakers = _shared_out(list(speech.speakers), counts, rng, "speakers")
    recordings = _shared_out(_takes(noise), counts, rng, "noise recordings")
    by_speaker: dict[str, list[Utterance]] = {}
    for utterance in speech.utterances:
        by_speaker.setdefault(utterance.speaker, []).append(utterance)
    mixtures = []
    for split, count, own_speakers, own_recordings in zip(SPLITS, counts, speakers, recordings, strict=True):
        own_clips = [clip for takes in own_recordings for clip in takes]
        for number in range(count):
            utterances = by_speaker[own_speakers[rng.integers(len(own_speakers))]]
            mixtures.append(
                Mixture(
                    f"{split}_{number:06d}",
                    split,
                    utterances[rng.integers(len(utterances))],
                    own_clips[rng.integers(len(own_clips))],
                    float(rng.uniform(*snr_db)),
                    int(rng.integers(2**31)),
                )
            )
    return tuple(mixtures)


def _takes(noise: Sequence[pathlib.Path]) -> list[list[pathlib.Path]]:
    """The clips of each recording."""
    recordings: dict[pathlib.Path, list[pathlib.Path]] = {}
    for clip in sorted(set(noise)):
        recordings.setdefault(clip.parent / _TAKE.sub("", clip.stem), []).append(clip)
    return list(recordings.values())


def _shared_out(things: list[_T], counts: Sequence[int], rng: np.random.Generator, name: str) -> list[list[_T]]:
    """Shuffled and cut in proportion to the counts, at least one in each part."""
    if len(things) < len(counts):
        raise ValueError(f"{len(counts)} splits need as many {name} at least, got {len(things)}")
    order = rng.permutation(len(things))
    ends = np.round(np.cumsum(counts) / np.sum(counts) * len(things)).astype(int)
    for part in range(len(ends)):
        # At least one more than the part before, and one left for each part behind.
        least = (ends[part - 1] if part else 0) + 1
        ends[part] = min(max(ends[part], least), len(things) - (len(ends) - 1 - part))
    starts = [0, *ends[:-1]]
    return [[things[index] for index in order[start:end]] for start, end in zip(starts, ends, strict=True)]


def build_noisy_corpus(
    root: str | os.PathLike[str],
    mixtures: Sequence[Mixture],
    *,
    seconds: float = 5.0,
    sample_rate_hz: int = 16000,
    num_workers: int = 2,
) -> pathlib.Path:
    """Make the clips and label each with wideband PESQ of the mixture against its clean speech.

    An interrupted build goes on where it was. A clip whose quality PESQ can't tell, such as one of silence, has an
    empty label.

    Args:
        root: folder for `SPLIT/NAME.flac` (16 bits), `labels.csv` with the columns `COLUMNS`, and `corpus.json`.
        mixtures: from `draw_mixtures`.
        seconds: length of a clip; shorter speech or noise is repeated.
        sample_rate_hz: rate of the clips; wideband PESQ needs 16000.
        num_workers: processes; 0 to do it in this one.

    Returns:
        Path of `labels.csv`.

    Raises:
        ImportError: the package pesq isn't installed; `pip install 'qsv[quality]'` does it.
        ValueError: the folder holds clips of other settings, or a setting is out of range.
        AudioError: speech or noise can't be decoded.

    Source: labels as in Nilsson et al. 2024 (arXiv 2407.04578); PESQ is ITU-T P.862.2.
    """
    if sample_rate_hz != 16000 or seconds <= 0 or num_workers < 0:
        raise ValueError(
            "expected a rate of 16000 Hz, a positive length and num_workers >= 0, got "
            f"{sample_rate_hz} Hz, {seconds} s and {num_workers}"
        )
    import_pesq()
    root = pathlib.Path(root)
    _claim(root, mixtures, seconds)
    path = root / LABELS_FILE
    done = _finished_rows(path)
    left = mixtures[done:]
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        if not done and not path.stat().st_size:
            writer.writerow(COLUMNS)
        shown = tqdm.tqdm(desc="mixing and labelling", total=len(mixtures), initial=done, unit="clip")
        for mixture, label in zip(left, _labels(root, left, seconds, sample_rate_hz, num_workers), strict=True):
            writer.writerow(
                (
                    f"{mixture.split}/{mixture.name}.flac",
                    mixture.split,
                    mixture.utterance.speaker,
                    mixture.utterance.name,
                    mixture.noise.name,
                    f"{mixture.snr_db:.3f}",
                    "" if math.isnan(label) else f"{label:.5f}",
                )
            )
            file.flush()
            shown.update()
        shown.close()
    return path


def _claim(root: pathlib.Path, mixtures: Sequence[Mixture], seconds: float) -> None:
    """Make the folders; raise ValueError where clips of other settings are there."""
    last = mixtures[-1]
    settings = {"clips": len(mixtures), "seconds": seconds, "last": [str(field) for field in dataclasses.astuple(last)]}
    path = root / SETTINGS_FILE
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{root} holds a corpus of other speech, noise or settings; choose another folder")
        return
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _finished_rows(path: pathlib.Path) -> int:
    """Rows of labels that are whole; what a kill left of the last one is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return max(0, whole.count(b"\n") - 1)


def _labels(
    root: pathlib.Path, mixtures: Sequence[Mixture], seconds: float, sample_rate_hz: int, num_workers: int
) -> Iterator[float]:
    """Each clip's PESQ once its file is written, in order."""
    tasks = [(str(root), mixture, seconds, sample_rate_hz) for mixture in mixtures]
    if not num_workers:
        yield from map(_make_clip, tasks)
        return
    # Not forked: JAX's threads may hold locks.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as executor:
        yield from executor.map(_make_clip, tasks, chunksize=_CHUNK)


def _make_clip(task: tuple[str, Mixture, float, int]) -> float:
    """Write one clip; returns its PESQ, NaN where that has none."""
    root, mixture, seconds, sample_rate_hz = task
    clean, noisy = mix(mixture, num_samples=round(seconds * sample_rate_hz), sample_rate_hz=sample_rate_hz)
    soundfile.write(
        pathlib.Path(root) / mixture.split / f"{mixture.name}.flac", to_int16(noisy), sample_rate_hz, subtype="PCM_16"
    )
    return wideband_pesq(clean, noisy)


def mix(mixture: Mixture, *, num_samples: int, sample_rate_hz: int = 16000) -> tuple[np.ndarray, np.ndarray]:
    """The clean speech and the noisy clip, each [num_samples] float32 in [-1, 1].

    Raises:
        AudioError: one of the files can't be decoded.
    """
    rng = np.random.default_rng(mixture.seed)
    paths = (mixture.utterance.path, mixture.noise)
    audio = AudioCache(paths, sample_rate_hz=sample_rate_hz, cache_bytes=_CACHE_BYTES)
    for path, reason in audio.unreadable.items():
        raise AudioError(path, reason)
    clean, noise = (to_float32(audio.random_crop(path, num_samples, rng)) for path in paths)
    noisy = mix_at_snr(clean, noise, mixture.snr_db)
    gain = np.float32(min(1.0, _HIGHEST_PEAK / max(float(np.max(np.abs(noisy))), _HIGHEST_PEAK)))
    return gain * clean, gain * noisy


def wideband_pesq(clean: np.ndarray, noisy: np.ndarray) -> float:
    """Wideband PESQ, from 1.0 to 4.64; NaN where there is no speech to compare.

    Args:
        clean: [samples] float at 16 kHz, the reference.
        noisy: [samples] float, what is judged.

    Raises:
        ImportError: the package pesq isn't installed.

    Source: ITU-T P.862.2, by the package pesq.
    """
    pesq = import_pesq()
    try:
        return float(pesq.pesq(16000, clean, noisy, "wb"))
    except pesq.NoUtterancesError:
        return math.nan


def import_pesq() -> types.ModuleType:
    """The package pesq; ImportError, with what to install, where it is missing."""
    try:
        import pesq
    except ImportError as error:
        raise ImportError("labels by PESQ need the package pesq: pip install 'qsv[quality]'") from error
    return pesq
