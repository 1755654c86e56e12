"""An audio file that lies in a shard."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Record:
    """A recording in a prepared corpus; stands wherever the path of an audio file does.

    Attributes:
        source: random access to examples with the bytes of a file as "audio".
        index: its place there.
        place: what errors call it.
        num_samples: its length.
        sample_rate_hz: its rate.
    """

    source: Sequence[dict[str, Any]]
    index: int
    place: str
    num_samples: int
    sample_rate_hz: int

    def __fspath__(self) -> str:
        return self.place

    def __str__(self) -> str:
        return self.place

    def read_bytes(self) -> bytes:
        """The bytes of the file."""
        return bytes(self.source[self.index]["audio"])


AudioPath = pathlib.Path | Record
