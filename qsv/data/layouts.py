"""How corpora lie on disk, and reading them."""

from __future__ import annotations

import enum
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from qsv.data.audio import AUDIO_SUFFIXES
from qsv.data.corpora import Corpus, Utterance
from qsv.data.lists import parse_lines, shown

_VOXCELEB_BASES = (
    "",
    "wav",
    "aac",
    *(f"{part}/{kind}" for part in ("dev", "test") for kind in ("wav", "aac")),
)
_VOXCELEB_SPEAKER = re.compile(r"id\d+")
_CN_CELEB_SPEAKER = re.compile(r"id\d{5}")


class CorpusLayout(enum.Enum):
    """How a corpus lies on disk."""

    FOLDER = "folder"
    """`ROOT/SPEAKER/**/UTT.{wav,flac,ogg,mp3}`."""
    VOXCELEB = "voxceleb"
    """`ROOT/[dev/|test/][wav/|aac/]idNNNNN/VIDEO/UTT.wav`."""
    CN_CELEB = "cn_celeb"
    """`ROOT/data/idNNNNN/UTT.flac` and, of CN-Celeb1, `ROOT/eval/{enroll,test}/idNNNNN-UTT.flac`."""
    LIST = "list"
    """A text file with a line `SPEAKER PATH` for each utterance."""
    FLAT = "flat"
    """Any folder of audio, `ROOT/**/UTT.{wav,flac,ogg,mp3}`; nothing is known of the speakers."""
    PREPARED = "prepared"
    """The split `train` of a corpus of `experiments.prepare`, or `FOLDER:SPLIT[+SPLIT]`."""


def load_corpus(root: str | os.PathLike[str], layout: CorpusLayout) -> Corpus:
    """The corpus at `root` (for `LIST`: the list file) in the given layout."""
    match layout:
        case CorpusLayout.FOLDER:
            return folder_corpus(root)
        case CorpusLayout.VOXCELEB:
            return voxceleb_corpus(root)
        case CorpusLayout.CN_CELEB:
            return cn_celeb_corpus(root)
        case CorpusLayout.LIST:
            return list_corpus(root)
        case CorpusLayout.FLAT:
            return flat_corpus(root)
        case CorpusLayout.PREPARED:
            # It needs TFDS, and this module.
            from qsv.data.prepared import prepared_corpus

            return prepared_corpus(root)


def folder_corpus(root: str | os.PathLike[str], *, speakers: Sequence[str] | None = None) -> Corpus:
    """A corpus of one folder for each speaker, `ROOT/SPEAKER/**/UTT.{wav,flac,ogg,mp3}`.

    Args:
        root: the folder of the speakers' folders.
        speakers: the speakers to take; None for all.

    Raises:
        FileNotFoundError: `root` is no folder.
        ValueError: some of `speakers` were not found (all are listed), or there is no audio.
    """
    root = existing_folder(root)
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if speakers is not None:
        missing = sorted(set(speakers) - set(found))
        if missing:
            raise ValueError(f"{len(missing)} of {len(set(speakers))} speakers have no folder in {root}: {missing}")
        found = sorted(set(speakers))
    utterances = [
        Utterance(path.relative_to(root).as_posix(), path, speaker)
        for speaker in found
        for path in audio_files(root / speaker)
    ]
    if not utterances:
        raise ValueError(f"no audio in {root}: looked for SPEAKER/**/*{{{','.join(AUDIO_SUFFIXES)}}}")
    return Corpus.of(utterances)


def flat_corpus(root: str | os.PathLike[str]) -> Corpus:
    """All audio below a folder, of unknown speakers: every file counts as one of its own.

    Raises:
        FileNotFoundError: `root` is no folder.
        ValueError: there is no audio.
    """
    root = existing_folder(root)
    names = [(path.relative_to(root).as_posix(), path) for path in audio_files(root)]
    if not names:
        raise ValueError(f"no audio in {root}: looked for **/*{{{','.join(AUDIO_SUFFIXES)}}}")
    return Corpus.of(Utterance(name, path, name) for name, path in names)


def voxceleb_corpus(root: str | os.PathLike[str]) -> Corpus:
    """VoxCeleb1 or 2 as unpacked, `ROOT/[dev/|test/][wav/|aac/]idNNNNN/VIDEO/UTT.wav`: all that is there.

    Names are those of the official trial lists, `id10270/5r0dWxy17C8/00001.wav`, whatever the file's own
    suffix, so that audio converted to flac still matches them.

    Raises:
        FileNotFoundError: `root` is no folder.
        ValueError: there is no audio, or only `.m4a` files as VoxCeleb2 ships, which must be converted first.
    """
    root = existing_folder(root)
    utterances = []
    for base in (root / name for name in _VOXCELEB_BASES):
        if not base.is_dir():
            continue
        for entry in sorted(os.scandir(base), key=lambda entry: entry.name):
            if _VOXCELEB_SPEAKER.fullmatch(entry.name) and entry.is_dir():
                utterances += [
                    Utterance(path.relative_to(base).with_suffix(".wav").as_posix(), path, entry.name)
                    for path in audio_files(entry.path)
                ]
    if utterances:
        return Corpus.of(utterances)
    if next(_files(root, (".m4a",)), None):
        raise ValueError(
            f"{root} holds .m4a files only, which libsndfile cannot decode; convert each with "
            "`ffmpeg -i UTT.m4a -ac 1 -ar 16000 UTT.wav`"
        )
    places = ", ".join(f"{base}/idNNNNN".lstrip("/") for base in _VOXCELEB_BASES)
    raise ValueError(f"no audio in {root}: looked for VIDEO/UTT.{{wav,flac,ogg,mp3}} in {places}")


def cn_celeb_corpus(root: str | os.PathLike[str]) -> Corpus:
    """CN-Celeb 1 or 2 as unpacked: all that is there, speech for training and for evaluation.

    Names are those of the published lists, whatever the file's own suffix: `id00800/singing-01-001.wav` of what is in
    `data/`, `test/id00800-singing-01-001.wav` and `enroll/id00800-enroll.wav` of what is in `eval/`.

    Raises:
        FileNotFoundError: `root` is no folder.
        ValueError: there is no audio.
    """
    root = existing_folder(root)
    utterances = []
    for base in (root / "data", root / "eval"):
        for path in audio_files(base):
            name = path.relative_to(base).with_suffix(".wav").as_posix()
            speaker = _CN_CELEB_SPEAKER.search(name)
            if speaker:
                utterances.append(Utterance(name, path, speaker[0]))
    if not utterances:
        raise ValueError(
            f"no audio in {root}: looked for data/idNNNNN/UTT.flac and eval/{{enroll,test}}/idNNNNN-*.flac"
        )
    return Corpus.of(utterances)


def list_corpus(list_file: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Corpus:
    """A corpus listed in a text file, a line `SPEAKER PATH` for each utterance.

    Args:
        list_file: the list; blank lines are skipped, and a path may contain spaces.
        root: folder that relative paths start from; None for the list's own folder.

    Raises:
        MalformedLinesError: (a ValueError) lines without two fields, or of a path listed before; all are named.
        ValueError: there are no lines.
    """
    list_file = pathlib.Path(list_file)
    folder = list_file.parent if root is None else pathlib.Path(root)
    first_lines: dict[str, int] = {}

    def parse(number: int, line: str) -> Utterance:
        fields = line.split(maxsplit=1)
        if len(fields) != 2:
            raise ValueError(f"expected 'SPEAKER PATH', got {shown(line)}")
        speaker, name = fields
        if first_lines.setdefault(name, number) != number:
            raise ValueError(f"{name} was listed before, in line {first_lines[name]}")
        return Utterance(name, folder / name, speaker)

    utterances = list(parse_lines(list_file, parse))
    if not utterances:
        raise ValueError(f"{list_file}: no utterances; expected lines 'SPEAKER PATH'")
    return Corpus.of(utterances)


def audio_files(root: str | os.PathLike[str], suffixes: tuple[str, ...] = AUDIO_SUFFIXES) -> list[pathlib.Path]:
    """The audio files anywhere below a folder, sorted; links to folders are followed."""
    return sorted(_files(root, suffixes))


def _files(root: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Iterator[pathlib.Path]:
    """Files below a folder that end in one of the suffixes."""
    for folder, _, names in os.walk(root, followlinks=True):
        for name in names:
            if name.lower().endswith(suffixes):
                yield pathlib.Path(folder, name)


def existing_folder(root: str | os.PathLike[str]) -> pathlib.Path:
    """The path, checked to be a folder."""
    root = pathlib.Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no corpus folder {root}")
    return root
