"""Zip archives, also in parts as large corpora are published."""

from __future__ import annotations

import functools
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Iterable, Sequence

# VoxCeleb's `vox1_dev_wav_partaa`, `vox1_dev_wav_partab`, ...
_PART = re.compile(r"(.+_part)[a-z]{2}")


class JoinedFile(io.RawIOBase):
    """Several files read as one that has them one behind the other.

    Args:
        paths: the files in order.

    Raises:
        FileNotFoundError: one is missing.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._paths = [pathlib.Path(path) for path in paths]
        self._ends = []
        end = 0
        for path in self._paths:
            end += path.stat().st_size
            self._ends.append(end)
        self._position = 0
        self._opened: tuple[int, io.FileIO] | None = None

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As a file's."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._ends[-1]}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """As a file's: up to the end of one part."""
        if self._position >= self._ends[-1]:
            return 0
        number = next(i for i, end in enumerate(self._ends) if self._position < end)
        if self._opened is None or self._opened[0] != number:
            self._close_part()
            self._opened = (number, io.FileIO(self._paths[number]))
        file = self._opened[1]
        file.seek(self._position - (self._ends[number - 1] if number else 0))
        count = file.readinto(buffer)
        self._position += count
        return count

    def close(self) -> None:
        """Closes the part that is open."""
        self._close_part()
        super().close()

    def _close_part(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
            self._opened = None


def archives_in(paths: Iterable[pathlib.Path]) -> list[tuple[str, ...]]:
    """The zip archives among files, each as its parts in order."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        part = _PART.fullmatch(path.name)
        if part or path.suffix == ".zip":
            found.setdefault(str(path.with_name(part[1])) if part else str(path), []).append(str(path))
    return [tuple(parts) for parts in found.values()]


@functools.lru_cache(maxsize=8)
def open_archive(parts: tuple[str, ...]) -> zipfile.ZipFile:
    """An archive to read, opened once in a process.

    Raises:
        ValueError: it is no whole zip archive, as where a part is missing; names the files.
    """
    try:
        return zipfile.ZipFile(io.BufferedReader(JoinedFile(parts)))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{', '.join(parts)}: not a whole zip archive ({error}); is a part missing?") from error
