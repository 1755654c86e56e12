"""Recordings of speakers as published corpora have them: in folders, or in zip archives not unpacked."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping

from qsv.data.archives import archives_in, open_archive
from qsv.data.audio import AUDIO_SUFFIXES, AudioError
from qsv.data.layouts import CorpusLayout, audio_files, cn_celeb_corpus, existing_folder, load_corpus

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PUBLISHED_SUFFIXES = (*AUDIO_SUFFIXES, ".m4a")

_VOXCELEB = re.compile(r"(?:.*/)?(id\d{5})/([^/]+)/([^/]+)\.\w+")
# The speakers of VoxCeleb1 whose names begin with E.
_VOXCELEB1_TEST = frozenset(f"id{number}" for number in range(10270, 10310))


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    """One recording of one speaker, not yet read.

    Attributes:
        name: what trial lists call it.
        speaker: who speaks.
        path: the file, or the name within the archive.
        archive: parts of the zip archive; empty for a file.
        num_bytes: its size.
    """

    name: str
    speaker: str
    path: str
    archive: tuple[str, ...]
    num_bytes: int

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            AudioError: the archive is damaged here.
            OSError: the file can't be read.
        """
        if not self.archive:
            return pathlib.Path(self.path).read_bytes()
        try:
            return open_archive(self.archive).read(self.path)
        except (zipfile.BadZipFile, EOFError) as error:
            raise AudioError(self.name, f"damaged in {self.archive[0]} ({error})") from error


def voxceleb1(root: str | pathlib.Path) -> dict[str, list[Recording]]:
    """VoxCeleb1: folders `[wav/]idNNNNN/VIDEO/UTT.wav`, or the published zip files and parts.

    Returns:
        {"train", "test"}: "test" is of the 40 speakers id10270 to id10309. Splits without recordings are absent.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no audio, or one utterance is there twice.
    """
    return _splits((TEST if own.speaker in _VOXCELEB1_TEST else TRAIN, own) for _, own in _voxceleb(root))


def voxceleb2(root: str | pathlib.Path) -> dict[str, list[Recording]]:
    """VoxCeleb2: folders `[dev/|test/]aac/idNNNNN/VIDEO/UTT.m4a`, or the published zip files and parts.

    Returns:
        {"train", "test"}: "test" is what lies in a folder or an archive with `test` in its name; errors as above.
    """
    return _splits((TEST if "test" in place else TRAIN, own) for place, own in _voxceleb(root))


def cn_celeb(root: str | pathlib.Path) -> dict[str, list[Recording]]:
    """CN-Celeb 1 or 2: `data/idNNNNN/UTT.flac`; of 1 also `dev/dev.lst` and `eval/{enroll,test}/idNNNNN-UTT.flac`.

    Returns:
        {"train", "test"}: "train" is of the speakers in `dev/dev.lst`, or of all where `eval/` is absent; "test" has
        `data/`'s recordings of the others too, which enrolments of several utterances are made of. Errors as above, and
        where `eval/` is there without the list.
    """
    root = existing_folder(root)
    evaluation, developers = root / "eval", root / "dev" / "dev.lst"
    speakers = set(developers.read_text(encoding="utf-8").split()) if developers.exists() else None
    if evaluation.is_dir() and speakers is None:
        raise ValueError(f"{developers} is missing: which speakers of {root / 'data'} are for training isn't known")

    def found() -> Iterator[tuple[str, Recording]]:
        for own in cn_celeb_corpus(root).utterances:
            path = pathlib.Path(own.path)
            is_train = not path.is_relative_to(evaluation) and (speakers is None or own.speaker in speakers)
            yield TRAIN if is_train else TEST, _file(path, own.name, own.speaker)

    return _splits(found())


def speaker_folders(root: str | pathlib.Path, layout: CorpusLayout = CorpusLayout.FOLDER) -> dict[str, list[Recording]]:
    """{"train"}: any corpus of `load_corpus`; raises what that does."""
    corpus = load_corpus(root, layout)
    return _splits((TRAIN, _file(pathlib.Path(own.path), own.name, own.speaker)) for own in corpus.utterances)


def with_validation(splits: Mapping[str, list[Recording]], share: float) -> dict[str, list[Recording]]:
    """Moves a share of the speakers from "train" to "validation", one at least, the same on every machine.

    Raises:
        ValueError: the share isn't in [0, 1), or leaves no speaker for training.
    """
    if not 0 <= share < 1:
        raise ValueError(f"the share of validation speakers must be at least 0 and below 1, got {share}")
    if not share:
        return {name: list(own) for name, own in splits.items()}
    speakers = sorted({own.speaker for own in splits[TRAIN]}, key=lambda speaker: (_place(speaker), speaker))
    count = max(1, round(share * len(speakers)))
    if count == len(speakers):
        raise ValueError(f"{share:g} of {count} speakers for validation leaves none for training")
    held = set(speakers[:count])
    return {
        **splits,
        TRAIN: [own for own in splits[TRAIN] if own.speaker not in held],
        VALIDATION: [own for own in splits[TRAIN] if own.speaker in held],
    }


def shuffled(recordings: Iterable[Recording]) -> list[Recording]:
    """In an order that depends on the names alone, and mixes speakers."""
    return sorted(recordings, key=lambda own: (_place(own.name), own.name))


def _place(name: str) -> float:
    """A number in [0, 1) that looks random."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) / 2**64


def _voxceleb(root: str | pathlib.Path) -> Iterator[tuple[str, Recording]]:
    """(folder or archive below the root that it is in, recording) of VoxCeleb 1 or 2."""
    root = existing_folder(root)
    for path in audio_files(root, PUBLISHED_SUFFIXES):
        place = path.relative_to(root).as_posix()
        named = _VOXCELEB.fullmatch(place)
        if named:
            yield place, _file(path, f"{named[1]}/{named[2]}/{named[3]}.wav", named[1])
    for archive in archives_in(path for path in root.rglob("*") if path.is_file()):
        place = pathlib.Path(archive[0]).relative_to(root).as_posix()
        for member in open_archive(archive).infolist():
            named = _VOXCELEB.fullmatch(member.filename)
            if named and member.filename.lower().endswith(PUBLISHED_SUFFIXES):
                name = f"{named[1]}/{named[2]}/{named[3]}.wav"
                yield place, Recording(name, named[1], member.filename, archive, member.file_size)


def _file(path: pathlib.Path, name: str, speaker: str) -> Recording:
    return Recording(name, speaker, str(path), (), path.stat().st_size)


def _splits(found: Iterable[tuple[str, Recording]]) -> dict[str, list[Recording]]:
    """{split: recordings}, after checks that hold for every corpus."""
    splits: dict[str, list[Recording]] = {}
    names: dict[str, Recording] = {}
    for split, own in found:
        other = names.setdefault(own.name, own)
        if other is not own:
            raise ValueError(f"{own.name} is there twice: {_where(other)} and {_where(own)}; leave one of them out")
        splits.setdefault(split, []).append(own)
    if not splits:
        raise ValueError("no recordings were found; see the corpus's layout in qsv.data.recordings")
    speakers = {split: {own.speaker for own in recordings} for split, recordings in splits.items()}
    shared = sorted(speakers.get(TRAIN, set()) & speakers.get(TEST, set()))
    if shared:
        raise ValueError(f"{len(shared)} speakers are in train and in test, such as {shared[:5]}")
    return splits


def _where(recording: Recording) -> str:
    return recording.path + (f" in {recording.archive[0]}" if recording.archive else "")
