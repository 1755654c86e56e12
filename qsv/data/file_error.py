"""What errors about a file have in common."""

import os
import pathlib


class FileError(ValueError):
    """A file that cannot be used; the message names the file and what is wrong with it.

    Args:
        path: the file.
        reason: what is wrong, without the file's name.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = pathlib.Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"
