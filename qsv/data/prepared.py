"""A prepared corpus (`qsv.data.tfds_voxceleb`) to read: any recording at once, and tables of them all."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from qsv.data.corpora import Corpus, Utterance
from qsv.data.record import Record
from qsv.data.recordings import TRAIN

INFO_FILE = "dataset_info.json"
# What TFDS calls a dataset until it is whole: this, six characters and its name.
INCOMPLETE = "incomplete."


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSplit:
    """One split of a prepared corpus, in the order of its shards.

    It can be pickled, and opens its files when it is first read from.

    Attributes:
        folder: of the dataset.
        split: "train", "validation" or "test".
        sample_rate_hz: of its audio.
        speakers: of this split, in the order of their classes; a class is a place there.
        names: what trial lists call the recordings.
        labels: classes, [n] int32.
        num_samples: lengths, [n] int64.
        source: random access to the examples, as TFDS reads them.
    """

    folder: pathlib.Path
    split: str
    sample_rate_hz: int
    speakers: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray
    num_samples: np.ndarray
    source: Sequence[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def place(self) -> str:
        """What the names of the recordings are put behind in errors."""
        return f"{self.folder}:{self.split}/"

    def records(self) -> Iterator[Record]:
        """All recordings."""
        for index, (name, num_samples) in enumerate(zip(self.names, self.num_samples.tolist(), strict=True)):
            yield Record(self.source, index, self.place + name, num_samples, self.sample_rate_hz)


def open_prepared(folder: str | os.PathLike[str], split: str = TRAIN) -> PreparedSplit:
    """A split of a prepared corpus.

    Args:
        folder: of the dataset, or one above it that holds no other.
        split: its name.

    Raises:
        FileNotFoundError: there is no prepared corpus.
        ValueError: there are several, it has no such split or an empty one, or its tables don't fit its shards.
    """
    import tensorflow_datasets as tfds

    from qsv.data.tfds_voxceleb import INDEX_SUFFIX, read_table

    found = prepared_folder(folder)
    builder = tfds.builder_from_directory(found)
    if split not in builder.info.splits:
        raise ValueError(f"{found} has no split {split!r}, only {', '.join(builder.info.splits)}")
    info = builder.info.splits[split]
    rows: list[list[str]] = []
    for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
        table = f"{path}{INDEX_SUFFIX}"
        own = read_table(table)
        if len(own) != length:
            raise ValueError(f"{table} has {len(own)} lines, its shard {length} recordings; prepare the corpus anew")
        rows += own
    if not rows:
        raise ValueError(f"{found}: no recording of the split {split!r} could be read; see report.json there")
    names, speakers, num_samples = zip(*rows, strict=True)
    known = sorted(set(speakers))
    labels = np.searchsorted(known, speakers).astype(np.int32)
    return PreparedSplit(
        found,
        split,
        int(builder.info.metadata["sample_rate_hz"]),
        tuple(known),
        names,
        labels,
        np.array(num_samples, np.int64),
        builder.as_data_source(split),
    )


def prepared_corpus(root: str | os.PathLike[str]) -> Corpus:
    """The split "train" of a corpus that `experiments.prepare` made; others as `FOLDER:SPLIT` or `FOLDER:SPLIT+SPLIT`.

    Raises:
        FileNotFoundError: there is no prepared corpus.
        ValueError: there are several, or it has no such split.
    """
    folder, _, splits = os.fspath(root).rpartition(":")
    opened = [open_prepared(folder, split) for split in splits.split("+")] if folder else [open_prepared(root)]
    return Corpus.of(
        Utterance(name, record, own.speakers[label])
        for own in opened
        for name, record, label in zip(own.names, own.records(), own.labels.tolist(), strict=True)
    )


def prepared_folder(folder: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of the one dataset at or below a folder; errors as above."""
    folder = pathlib.Path(folder)
    found = sorted(path.parent for path in folder.rglob(INFO_FILE) if not path.parent.name.startswith(INCOMPLETE))
    if not found:
        raise FileNotFoundError(f"{folder} holds no prepared corpus (no {INFO_FILE}); see experiments.prepare")
    if len(found) > 1:
        raise ValueError(f"{folder} holds {len(found)} prepared corpora, name one: {', '.join(map(str, found[:5]))}")
    return found[0]
