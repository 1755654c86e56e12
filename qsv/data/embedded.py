"""The embedded corpus: synthetic voices in noise, made on the spot, so that everything runs offline.

It is no substitute for speech. It is there to see a pipeline work from end to end, and to compare two
settings of it within minutes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import soundfile
import soxr

from qsv.data.augmentation import mix_at_snr, reverberate
from qsv.data.corpora import Corpus
from qsv.data.espeak import Espeak
from qsv.data.layouts import folder_corpus
from qsv.data.synthetic_noise import NOISE_KINDS, channel_filter, decaying_response, synthetic_noise
from qsv.data.trials import Trials, all_pairs, read_trials, write_trials

_FORMAT_VERSION = 1
_SAMPLE_RATE_HZ = 16000
_SETTINGS_FILE = "corpus.json"
_NUM_BABBLE_VOICES = 8
_BABBLE_SENTENCES = 12
_NOISE_CLIPS_PER_KIND = 8
_NOISE_CLIP_SECONDS = 10

_ACCENTS = (
    "en-us",
    "en-gb-x-rp",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-029",
    "en-us-nyc",
)
# Without a pitch of their own, or another voice at another speed.
_UNUSED_VARIANTS = frozenset({"whisper", "whisperf", "fast"})
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WORD_LIST = """
    apple bridge candle doctor engine forest garden hammer island jacket kitchen ladder market number
    orange paper quiet river silver table under valley window yellow animal better circle danger evening
    father golden harbour insect journey kettle lemon morning needle office pencil rabbit season thunder
    uncle village winter anchor bottle copper distant early finger gentle honest inside kingdom letter
    mountain nothing open people question remember simple travel useful voyage wonder always bring carry
    drink every follow great house large might never other place right small think voice water young along
    begin clear drive
"""
_WORDS = tuple(_WORD_LIST.split())


@dataclasses.dataclass(frozen=True)
class _Settings:
    """All that the samples depend on, apart from the version of eSpeak NG."""

    speakers: int
    test_speakers: int
    utterances_per_speaker: int
    seed: int
    lowest_snr_db: float
    highest_snr_db: float
    format: int = _FORMAT_VERSION


@dataclasses.dataclass(frozen=True)
class Voice:
    """A synthetic speaker: all its utterances share these, up to a small jitter of rate and pitch."""

    accent: str
    variant: str
    rate: int
    pitch: int
    pitch_range: int


@dataclasses.dataclass(frozen=True)
class EmbeddedCorpus:
    """What `build_embedded_corpus` made.

    Attributes:
        train: speakers to train on.
        test: other speakers; no voice variant is in both.
        trials: every pair of test utterances.
        noise_folder: clips of noise to augment with, as for `folder_noise`.
    """

    train: Corpus
    test: Corpus
    trials: Trials
    noise_folder: pathlib.Path


def build_embedded_corpus(
    folder: str | os.PathLike[str],
    *,
    speakers: int = 60,
    test_speakers: int = 20,
    utterances_per_speaker: int = 16,
    seed: int = 0,
    snr_db: tuple[float, float] = (0.0, 20.0),
) -> EmbeddedCorpus:
    """Makes a small corpus of synthetic voices, or finds it made before.

    A speaker is an eSpeak NG voice variant with an accent, a rate, a pitch and a range of pitch. It says
    digits or a few random words, at slightly changing rate and pitch, in a small room, in noise, through a
    random gentle filter, and at a random level. Written are `train/SPEAKER/UTT.flac`,
    `test/SPEAKER/UTT.flac`, `trials.txt` (every pair of `test`), `noise/KIND/CLIP.flac` and `corpus.json`,
    into a temporary folder that is renamed when it is complete. The same settings give the same samples with
    the same version of eSpeak NG.

    Args:
        folder: where to; it must not exist, be empty, or hold a corpus of the same settings.
        speakers: training speakers.
        test_speakers: test speakers.
        utterances_per_speaker: utterances of each, of one to five seconds.
        seed: of everything random.
        snr_db: range that each utterance's signal-to-noise ratio is drawn from.

    Returns:
        The corpus, read from the folder.

    Raises:
        ImportError: eSpeak NG is not installed (`pip install 'qsv[demo]'`).
        ValueError: a setting is out of range, or the folder holds something else.
    """
    if speakers < 1 or test_speakers < 2 or utterances_per_speaker < 2 or not snr_db[0] <= snr_db[1]:
        raise ValueError(
            "expected speakers >= 1, test_speakers and utterances_per_speaker >= 2 and snr_db (low, high), "
            f"got {speakers}, {test_speakers}, {utterances_per_speaker} and {snr_db}"
        )
    folder = pathlib.Path(folder)
    settings = _Settings(speakers, test_speakers, utterances_per_speaker, seed, float(snr_db[0]), float(snr_db[1]))
    if not _is_made(folder, settings):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            with Espeak() as engine:
                _make(partial, engine, settings)
            partial.chmod(0o755)
            _rename(partial, folder, settings)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return EmbeddedCorpus(
        folder_corpus(folder / "train"),
        folder_corpus(folder / "test"),
        read_trials(folder / "trials.txt"),
        folder / "noise",
    )


def _is_made(folder: pathlib.Path, settings: _Settings) -> bool:
    """Whether the folder holds a finished corpus of these settings; raises where it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    description = folder / _SETTINGS_FILE
    if not description.is_file():
        raise ValueError(f"{folder} exists and is no embedded corpus; name another folder")
    found = json.loads(description.read_text(encoding="utf-8"))["settings"]
    expected = dataclasses.asdict(settings)
    if found != expected:
        raise ValueError(
            f"{folder} holds an embedded corpus of other settings, {found} instead of {expected}; "
            "name another folder or delete this one"
        )
    return True


def _rename(partial: pathlib.Path, folder: pathlib.Path, settings: _Settings) -> None:
    """Puts the finished corpus in place; another process that finished the same one first is as good."""
    try:
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError:
        if not _is_made(folder, settings):
            raise


def _make(folder: pathlib.Path, engine: Espeak, settings: _Settings) -> None:
    """Writes the whole corpus."""
    rng = np.random.default_rng(settings.seed)
    variants = [variant for variant in engine.variants if variant not in _UNUSED_VARIANTS]
    variants = [variants[place] for place in rng.permutation(len(variants))]
    num_test_variants = min(settings.test_speakers, len(variants) // 4)
    babble_variants = variants[:_NUM_BABBLE_VOICES]
    test_variants = variants[_NUM_BABBLE_VOICES : _NUM_BABBLE_VOICES + num_test_variants]
    train_variants = variants[_NUM_BABBLE_VOICES + num_test_variants :]
    voices = {
        "train": _draw_voices(settings.speakers, train_variants, rng),
        "test": _draw_voices(settings.test_speakers, test_variants, rng),
    }
    babble = [
        np.concatenate([_say(engine, voice, rng) for _ in range(_BABBLE_SENTENCES)])
        for voice in _draw_voices(_NUM_BABBLE_VOICES, babble_variants, rng)
    ]

    def noise(num_samples: int) -> np.ndarray:
        return synthetic_noise(rng.choice(NOISE_KINDS), num_samples, _SAMPLE_RATE_HZ, babble, rng)

    for part, part_voices in voices.items():
        for index, voice in enumerate(part_voices):
            for number in range(settings.utterances_per_speaker):
                waveform = _recorded(_say(engine, voice, rng), noise, settings, rng)
                _write(folder / part / f"{part}{index:03d}" / f"{number:03d}.flac", waveform)
    for kind in NOISE_KINDS:
        for number in range(_NOISE_CLIPS_PER_KIND):
            clip = synthetic_noise(kind, _NOISE_CLIP_SECONDS * _SAMPLE_RATE_HZ, _SAMPLE_RATE_HZ, babble, rng)
            _write(folder / "noise" / kind / f"{number:02d}.flac", _at_level(clip, -20.0))
    write_trials(folder / "trials.txt", all_pairs(folder_corpus(folder / "test").utterances))
    description = {
        "settings": dataclasses.asdict(settings),
        "espeak_ng_version": engine.version,
        "voices": {part: [dataclasses.asdict(voice) for voice in of_part] for part, of_part in voices.items()},
    }
    (folder / _SETTINGS_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _draw_voices(count: int, variants: Sequence[str], rng: np.random.Generator) -> list[Voice]:
    """Random voices; a variant is used again, otherwise spoken, only when all have been used."""
    return [
        Voice(
            accent=str(rng.choice(_ACCENTS)),
            variant=variants[index % len(variants)],
            rate=int(rng.integers(145, 206)),
            pitch=int(rng.integers(20, 81)),
            pitch_range=int(rng.integers(20, 81)),
        )
        for index in range(count)
    ]


def _say(engine: Espeak, voice: Voice, rng: np.random.Generator) -> np.ndarray:
    """`[samples] float32`: one random sentence, clean."""
    if rng.random() < 0.5:
        text = " ".join(rng.choice(_DIGITS, size=rng.integers(6, 11)))
    else:
        text = " ".join(rng.choice(_WORDS, size=rng.integers(6, 11)))
    spoken = engine.say(
        text,
        accent=voice.accent,
        variant=voice.variant,
        rate=round(voice.rate * rng.uniform(0.9, 1.1)),
        pitch=voice.pitch + int(rng.integers(-5, 6)),
        pitch_range=voice.pitch_range + int(rng.integers(-10, 11)),
    )
    return soxr.resample(spoken.astype(np.float32) / 32768, engine.sample_rate_hz, _SAMPLE_RATE_HZ)


def _recorded(
    speech: np.ndarray,
    noise: Callable[[int], np.ndarray],
    settings: _Settings,
    rng: np.random.Generator,
) -> np.ndarray:
    """The speech as a microphone might take it: filtered, in a room, in noise, at some level."""
    speech = reverberate(speech, decaying_response(_SAMPLE_RATE_HZ, rng))
    speech = mix_at_snr(speech, noise(len(speech)), rng.uniform(settings.lowest_snr_db, settings.highest_snr_db))
    return _at_level(channel_filter(speech, _SAMPLE_RATE_HZ, rng), rng.uniform(-32.0, -20.0))


def _at_level(waveform: np.ndarray, level_db: float) -> np.ndarray:
    """Scaled to this root mean square relative to full scale, peaks clipped."""
    gain = 10 ** (level_db / 20) / np.sqrt(np.mean(np.square(waveform, dtype=np.float64)))
    return np.clip(waveform * gain, -1.0, 1.0)


def _write(path: pathlib.Path, waveform: np.ndarray) -> None:
    """Writes a 16-bit flac file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform, _SAMPLE_RATE_HZ, subtype="PCM_16")
