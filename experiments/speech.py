"""Training speech: which corpora, how they are cropped and augmented."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from experiments.configuration import require, setting
from qsv.data import (
    AUDIO_SUFFIXES,
    AudioError,
    Augmenter,
    Corpus,
    CorpusLayout,
    ImpulseResponses,
    NoiseSource,
    TrainingLoader,
    Utterance,
    concatenate,
    folder_impulse_responses,
    folder_noise,
    load_corpus,
    musan_noise,
    read_audio,
    training_loader,
    with_speed_perturbation,
)
from qsv.frontend import FrontEnd


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """Corpora and augmentation of a training."""

    data_dir: tuple[str, ...] = setting((), "Folder (or list file, see --data_layout) of training speech.")
    data_layout: str = setting(
        "folder",
        "How --data_dir is laid out: folder is SPEAKER/**/UTT.{wav,flac,ogg,mp3}, voxceleb is VoxCeleb's, "
        "cn_celeb CN-Celeb's, list a file of `SPEAKER PATH` lines, flat any folder of audio without speakers, "
        "prepared a corpus of experiments.prepare (its split train, or FOLDER:SPLIT).",
        choices=[layout.value for layout in CorpusLayout],
    )
    exclude_speakers: str = setting("", "File of speakers, one a line, to leave out: those of the test set.")
    speed_perturbation: bool = setting(False, "Add every speaker at 0.9 and 1.1 times the speed as new ones.")
    crop_seconds: float = setting(2.0, "Length of a training crop in seconds.", minimum=0.1)
    batch_size: int = setting(64, "Crops in a step, over all devices.", minimum=1)
    noise_dir: tuple[str, ...] = setting((), "Folder of noise, mixed at 0..15 dB SNR.")
    musan_dir: str = setting("", "MUSAN's folder: noise, babble and music at WeSpeaker's SNRs.")
    reverberation_dir: str = setting("", "Folder of room impulse responses, such as RIRS_NOISES.")
    simulated_rooms: int = setting(0, "Rooms to simulate for reverberation; needs qsv[rooms].", minimum=0)
    augmentation_probability: float = setting(0.6, "Share of the crops that get noise or reverberation.", minimum=0.0)
    loader_threads: int = setting(2, "Threads that decode and augment, in each process.", minimum=0, incidental=True)
    loader_workers: int = setting(
        0,
        "Processes that decode and augment, for more than Python's one core; 0 for this one alone.",
        minimum=0,
        incidental=True,
    )
    cache_mbytes: int = setting(1024, "Memory for decoded audio in megabytes.", minimum=0, incidental=True)
    max_bad_files: int = setting(
        100, "Unreadable audio files are skipped and counted; more than this stop the run.", minimum=0, incidental=True
    )


def training_corpus(config: SpeechConfig, *, labelled: bool = True) -> Corpus:
    """The corpora of a config as one, without the excluded speakers.

    Args:
        config: which corpora.
        labelled: whether speakers are needed; else a folder that holds audio itself is taken to be flat.

    Raises:
        ValueError: no corpus was named, one is empty, or an excluded speaker is in none of them.
    """
    require(data_dir=config.data_dir)
    corpora = [load_corpus(folder, _layout(folder, config.data_layout, labelled)) for folder in config.data_dir]
    if config.exclude_speakers:
        excluded = set(pathlib.Path(config.exclude_speakers).read_text(encoding="utf-8").split())
        unknown = excluded - {speaker for corpus in corpora for speaker in corpus.speakers}
        if unknown:
            raise ValueError(
                f"{config.exclude_speakers}: speakers {sorted(unknown)} are in none of {list(config.data_dir)}"
            )
        corpora = [
            Corpus.of(utterance for utterance in corpus.utterances if utterance.speaker not in excluded)
            for corpus in corpora
        ]
    corpus = concatenate(corpora, prefixes=None if labelled else config.data_dir) if len(corpora) > 1 else corpora[0]
    return with_speed_perturbation(corpus) if config.speed_perturbation else corpus


def speech_digests(config: SpeechConfig) -> dict[str, Any]:
    """What the flags lead to that name files, by flag: names of audio below folders, not what can be heard there.

    Raises:
        OSError: a corpus or the file of speakers isn't there.
        ValueError: a corpus is empty.
    """
    excluded = pathlib.Path(config.exclude_speakers).read_text(encoding="utf-8") if config.exclude_speakers else ""
    return {
        "data_dir": [
            corpus_digest(load_corpus(folder, _layout(folder, config.data_layout, labelled=False)))
            for folder in config.data_dir
        ],
        "exclude_speakers": names_digest(sorted(excluded.split())),
        "noise_dir": [names_digest(_audio_below(folder)) for folder in config.noise_dir],
        "musan_dir": names_digest(_audio_below(config.musan_dir)),
        "reverberation_dir": names_digest(_audio_below(config.reverberation_dir)),
    }


def corpus_digest(corpus: Corpus) -> str:
    """Tells corpora apart by the names of their utterances and speakers, in order."""
    return names_digest([f"{utterance.name} {utterance.speaker}" for utterance in corpus.utterances])


def names_digest(names: Sequence[str]) -> str:
    """How many, and their SHA-256; empty without any."""
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return f"{len(names)} names {digest}" if names else ""


def _audio_below(folder: str) -> list[str]:
    """Names below a folder; none where none is given."""
    found = pathlib.Path(folder).rglob("*") if folder else ()
    return sorted(path.relative_to(folder).as_posix() for path in found if path.suffix.lower() in AUDIO_SUFFIXES)


def _layout(folder: str, layout: str, labelled: bool) -> CorpusLayout:
    """The layout that was asked for, or the flat one where labels don't matter and audio lies in the folder itself."""
    path = pathlib.Path(folder)
    if labelled or layout != CorpusLayout.FOLDER.value or not path.is_dir():
        return CorpusLayout(layout)
    has_audio = any(file.suffix.lower() in AUDIO_SUFFIXES for file in path.iterdir())
    return CorpusLayout.FLAT if has_audio else CorpusLayout.FOLDER


def is_readable(utterance: Utterance, frontend: FrontEnd) -> bool:
    """Whether an utterance can be embedded; training passes over those that can't, so what follows it must too."""
    try:
        waveform = read_audio(utterance.path, sample_rate_hz=frontend.sample_rate_hz)
    except (AudioError, OSError):
        return False
    return int(len(waveform) / utterance.speed) >= frontend.min_samples


def make_augmenter(config: SpeechConfig, *, seed: int, sample_rate_hz: int) -> Augmenter | None:
    """The augmentation of a config, None where it names neither noise nor rooms."""
    noise: list[NoiseSource] = []
    for folder in config.noise_dir:
        noise.extend(folder_noise(folder))
    if config.musan_dir:
        noise.extend(musan_noise(config.musan_dir))
    responses: ImpulseResponses | None = None
    if config.reverberation_dir and config.simulated_rooms:
        raise ValueError("give --reverberation_dir or --simulated_rooms, not both")
    if config.reverberation_dir:
        responses = folder_impulse_responses(config.reverberation_dir)
    elif config.simulated_rooms:
        from qsv.data.rooms import simulate_room_impulse_responses

        responses = simulate_room_impulse_responses(config.simulated_rooms, seed=seed, sample_rate_hz=sample_rate_hz)
    if not noise and responses is None:
        return None
    return Augmenter(noise, responses, probability=config.augmentation_probability, sample_rate_hz=sample_rate_hz)


def make_loader(
    config: SpeechConfig, corpus: Corpus, *, seed: int, sample_rate_hz: int, whole: bool = False
) -> TrainingLoader:
    """Endless training batches, of which each process of a training has its rows, or all of them where `whole`."""
    return training_loader(
        corpus,
        batch_size=config.batch_size,
        crop_seconds=config.crop_seconds,
        seed=seed,
        augment=make_augmenter(config, seed=seed, sample_rate_hz=sample_rate_hz),
        sample_rate_hz=sample_rate_hz,
        cache_bytes=config.cache_mbytes * 2**20,
        max_bad_files=config.max_bad_files,
        num_threads=config.loader_threads,
        num_workers=config.loader_workers,
        shard=(0, 1) if whole else (jax.process_index(), jax.process_count()),
    )


def report_bad_files(bad_files: tuple[tuple[str, str], ...]) -> None:
    """Say how many files were skipped, and the first of them."""
    if bad_files:
        print(f"skipped {len(bad_files)} unreadable files:")
        for name, reason in bad_files[:10]:
            print(f"  {name}: {reason}")
