"""Clips with a number each, such as their quality."""

from __future__ import annotations

import csv
import math
import os
import pathlib

from qsv.data.corpora import Corpus, Utterance


def read_labels(path: str | os.PathLike[str], column: str, *, split: str = "") -> tuple[Corpus, dict[str, float]]:
    """Labelled clips of a table, such as `build_noisy_corpus` writes.

    Args:
        path: a CSV file with columns `path` (relative to the file's folder), `speaker`, the label's and, where a
            split is wanted, `split`.
        column: name of the label's column; rows without one are left out.
        split: only rows of this split; "" for all.

    Returns:
        The clips, named by their paths, and {name: label}.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a label isn't a finite number, or no rows are left.
    """
    path = pathlib.Path(path)
    utterances, labels = [], {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        needed = {"path", "speaker", column, *(["split"] if split else [])}
        missing = needed - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} has no columns {sorted(missing)}, only {reader.fieldnames}")
        for row in reader:
            if not row[column] or (split and row["split"] != split):
                continue
            labels[row["path"]] = _number(row[column], path, reader.line_num)
            utterances.append(Utterance(row["path"], path.parent / row["path"], row["speaker"]))
    if not utterances:
        raise ValueError(f"{path} has no clips with a label {column!r}" + (f" in the split {split!r}" if split else ""))
    return Corpus.of(utterances), labels


def _number(text: str, path: pathlib.Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}:{line}: a label must be a finite number, got {text!r}")
    return value
