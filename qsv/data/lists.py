"""Text files of one item a line, with errors that name every line that is none."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_LONGEST_SHOWN = 200


class MalformedLinesError(ValueError):
    """Lines of a list that can't be read.

    Attributes:
        path: the list.
        lines: number and what is wrong of every such line.
    """

    def __init__(self, path: str | os.PathLike[str], lines: Sequence[tuple[int, str]]) -> None:
        self.path = pathlib.Path(path)
        self.lines = tuple(lines)
        super().__init__(self.path, self.lines)

    def __str__(self) -> str:
        named = [f"{self.path}:{number}: {reason}" for number, reason in self.lines]
        if len(named) == 1:
            return named[0]
        return "\n  ".join([f"{len(named)} lines of {self.path} can't be read:", *named])


def parse_lines(path: str | os.PathLike[str], parse: Callable[[int, str], Item]) -> Iterator[Item]:
    """What a function makes of each line that isn't blank.

    Args:
        path: text file in UTF-8. Other bytes go through, as names of files may hold any.
        parse: (number from 1 on, line without its end) -> item; raises ValueError with what is wrong.

    Yields:
        The items.

    Raises:
        MalformedLinesError: after the last line, with all lines that couldn't be parsed or hold a null character.
    """
    malformed = []
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            if not text:
                continue
            try:
                if "\0" in text:
                    raise ValueError(f"holds a null character, {shown(text)}")
                item = parse(number, text)
            except ValueError as error:
                malformed.append((number, str(error)))
            else:
                yield item
    if malformed:
        raise MalformedLinesError(path, malformed)


def shown(text: str) -> str:
    """A line as an error quotes it, shortened."""
    return repr(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "...")
