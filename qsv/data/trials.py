"""Verification trials: pairs of utterances and whether one person speaks in both."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Container, Sequence

import numpy as np

from qsv.data.corpora import Utterance

_VOXCELEB_LABELS = {"0": False, "1": True}
_KALDI_LABELS = {"nontarget": False, "target": True}


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """Pairs of utterances; each name is held once, so that half a million trials take 5 MB.

    Attributes:
        names: the distinct utterances.
        enrolment: `[trials] int32`, places in `names`.
        test: `[trials] int32`, places in `names`.
        labels: `[trials] bool`, whether both are of one speaker.

    Raises:
        ValueError: the arrays disagree in shape, point outside `names`, or hold trials of one class only, of
            which no error rate can be computed.
    """

    names: tuple[str, ...]
    enrolment: np.ndarray
    test: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in (("enrolment", np.int32), ("test", np.int32), ("labels", np.bool_)):
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != (len(self.labels),):
                raise ValueError(
                    f"expected {name} of shape ({len(self.labels)},) and type {dtype.__name__}, "
                    f"got {column.shape} {column.dtype}"
                )
        for column in (self.enrolment, self.test):
            if len(column) and not 0 <= column.min() <= column.max() < len(self.names):
                raise ValueError(
                    f"trials point to utterances {column.min()}..{column.max()}, there are {len(self.names)} names"
                )
        targets = int(self.labels.sum())
        if targets in (0, len(self.labels)):
            raise ValueError(
                f"expected trials of both classes, got {targets} target and {len(self) - targets} non-target trials"
            )

    def __len__(self) -> int:
        return len(self.labels)


class MissingUtterancesError(ValueError):
    """Trials name utterances that are not there.

    Attributes:
        names: all of them, sorted.
    """

    def __init__(self, names: Sequence[str], total: int) -> None:
        self.names = tuple(names)
        self.total = total
        super().__init__(self.names, total)

    def __str__(self) -> str:
        shown = "\n".join(f"  {name}" for name in self.names)
        return f"{len(self.names)} of {self.total} utterances of the trials are missing:\n{shown}"


def read_trials(path: str | os.PathLike[str]) -> Trials:
    """Reads a trial list: VoxCeleb's `LABEL ENROLMENT TEST` or Kaldi's `ENROLMENT TEST target|nontarget`.

    Args:
        path: text file, one trial a line; label 1 says that both are of one speaker; blank lines are skipped.

    Raises:
        ValueError: a line is neither (file and line are named), or all trials are of one class.
    """
    places: dict[str, int] = {}
    enrolment, test, labels = array("i"), array("i"), array("b")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) == 3 and fields[0] in _VOXCELEB_LABELS:
                label, first, second = _VOXCELEB_LABELS[fields[0]], fields[1], fields[2]
            elif len(fields) == 3 and fields[2] in _KALDI_LABELS:
                first, second, label = fields[0], fields[1], _KALDI_LABELS[fields[2]]
            else:
                raise ValueError(
                    f"{os.fspath(path)}:{number}: expected '0|1 ENROLMENT TEST' or 'ENROLMENT TEST "
                    f"target|nontarget', got {line.strip()!r}"
                )
            enrolment.append(places.setdefault(first, len(places)))
            test.append(places.setdefault(second, len(places)))
            labels.append(label)
    try:
        return Trials(
            tuple(places),
            np.array(enrolment, np.int32),
            np.array(test, np.int32),
            np.array(labels, np.bool_),
        )
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def write_trials(path: str | os.PathLike[str], trials: Trials) -> None:
    """Writes trials as VoxCeleb's `LABEL ENROLMENT TEST`, which `read_trials` reads."""
    columns = (trials.labels, trials.enrolment, trials.test)
    with open(path, "w", encoding="utf-8") as file:
        for label, first, second in zip(*(column.tolist() for column in columns), strict=True):
            file.write(f"{label:d} {trials.names[first]} {trials.names[second]}\n")


def all_pairs(utterances: Sequence[Utterance]) -> Trials:
    """Every unordered pair of different utterances, `n (n - 1) / 2` trials.

    Raises:
        ValueError: two utterances have one name, or all pairs are of one class.
    """
    names = tuple(utterance.name for utterance in utterances)
    if len(set(names)) != len(names):
        raise ValueError(f"{len(names) - len(set(names))} of {len(names)} utterance names are repeated")
    _, speakers = np.unique([utterance.speaker for utterance in utterances], return_inverse=True)
    first, second = (place.astype(np.int32) for place in np.triu_indices(len(names), k=1))
    return Trials(names, first, second, speakers[first] == speakers[second])


def missing_names(trials: Trials, available: Container[str]) -> tuple[str, ...]:
    """Utterances of the trials that a corpus (or any collection of names) does not have, sorted."""
    return tuple(sorted(name for name in trials.names if name not in available))


def check_trials(trials: Trials, available: Container[str]) -> None:
    """Raises MissingUtterancesError, which carries every missing name, unless all are available."""
    missing = missing_names(trials, available)
    if missing:
        raise MissingUtterancesError(missing, len(trials.names))
