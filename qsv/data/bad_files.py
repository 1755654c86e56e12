"""Bookkeeping of unreadable files: a few are skipped, many stop the run."""

from __future__ import annotations

import threading
from typing import Any

_SHOWN_BAD_FILES = 5


class BadFilesError(RuntimeError):
    """More of a corpus is unreadable than was allowed."""


class BadFiles:
    """Unreadable files, each counted once, and an error when they become too many; safe between threads.

    Args:
        limit: more unreadable files than this raise.
        num_files: how many files there are; if all are unreadable, that raises too, whatever the limit.
    """

    def __init__(self, limit: int, num_files: int) -> None:
        if limit < 0:
            raise ValueError(f"expected max_bad_files >= 0, got {limit}")
        self._limit = limit
        self._num_files = num_files
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def add(self, name: str, reason: str) -> None:
        """Notes a file; raises BadFilesError where there are more than the limit, or no file is left."""
        with self._lock:
            self._reasons.setdefault(name, reason)
            too_many = len(self._reasons) > self._limit or len(self._reasons) == self._num_files
        if too_many:
            raise BadFilesError(self.describe())

    def sorted(self) -> tuple[tuple[str, str], ...]:
        """Name and reason of each, sorted."""
        with self._lock:
            return tuple(sorted(self._reasons.items()))

    def describe(self) -> str:
        """What an error says: how many there are, how many were allowed, and the first ones."""
        bad = self.sorted()
        first = "\n".join(f"  {name}: {reason}" for name, reason in bad[:_SHOWN_BAD_FILES])
        count = f"{len(bad)} of {self._num_files} files are unreadable, max_bad_files={self._limit}"
        return f"{count}; the first:\n{first}"
