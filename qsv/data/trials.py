"""Verification trials: pairs of utterances and whether one person speaks in both."""

from __future__ import annotations

import dataclasses
import os
from array import array
from collections.abc import Container, Sequence

import numpy as np

from qsv.data.corpora import Utterance
from qsv.data.lists import parse_lines, shown

_LABELS = {"0": False, "1": True, "nontarget": False, "target": True}

# Trials in the published lists of VoxCeleb1-O, -E and -H, as cleaned and as they were first.
_VOXCELEB1_TRIALS = {
    "veri_test2.txt": 37_611,
    "list_test_all2.txt": 579_818,
    "list_test_hard2.txt": 550_894,
    "veri_test.txt": 37_720,
    "list_test_all.txt": 581_480,
    "list_test_hard.txt": 552_536,
}


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
    """Reads a trial list: VoxCeleb's `0|1 ENROLMENT TEST`, or Kaldi's and CN-Celeb's with the label behind.

    Args:
        path: text file, one trial a line; label 1 (Kaldi: target) says that both are of one speaker, 0 (nontarget) that
            they aren't; blank lines are skipped.

    Raises:
        MalformedLinesError: (a ValueError) lines are neither; all are named.
        ValueError: all trials are of one class, or it is a list of VoxCeleb1's that isn't whole.
    """
    places: dict[str, int] = {}
    enrolment, test, labels = array("i"), array("i"), array("b")
    for first, second, label in parse_lines(path, _trial):
        enrolment.append(places.setdefault(first, len(places)))
        test.append(places.setdefault(second, len(places)))
        labels.append(label)
    expected = _VOXCELEB1_TRIALS.get(os.path.basename(path))
    if expected and len(labels) != expected:
        raise ValueError(f"{os.fspath(path)} should have {expected:,} trials, it has {len(labels):,}; get it anew")
    try:
        return Trials(
            tuple(places),
            np.array(enrolment, np.int32),
            np.array(test, np.int32),
            np.array(labels, np.bool_),
        )
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _trial(_: int, line: str) -> tuple[str, str, bool]:
    fields = line.split()
    if len(fields) == 3 and fields[0] in ("0", "1"):
        return fields[1], fields[2], _LABELS[fields[0]]
    if len(fields) == 3 and fields[2] in _LABELS:
        return fields[0], fields[1], _LABELS[fields[2]]
    raise ValueError(f"expected '0|1 ENROLMENT TEST' or 'ENROLMENT TEST 0|1|target|nontarget', got {shown(line)}")


def read_enrolments(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Reads what enrolments are made of, such as CN-Celeb's `enroll.map` (several utterances) or `enroll.lst` (one).

    Args:
        path: text file, lines `NAME UTTERANCE [UTTERANCE ...]`; blank lines are skipped.

    Returns:
        {name in the trials: its utterances}.

    Raises:
        MalformedLinesError: (a ValueError) lines without an utterance, or of a name or with an utterance that came
            before; all are named.
        ValueError: there are no lines.
    """
    first_lines: dict[str, int] = {}

    def parse(number: int, line: str) -> tuple[str, tuple[str, ...]]:
        name, *utterances = line.split()
        if not utterances:
            raise ValueError(f"expected 'NAME UTTERANCE [UTTERANCE ...]', got {shown(line)}")
        if len(set(utterances)) != len(utterances):
            raise ValueError(f"an utterance of {name} comes twice")
        if first_lines.setdefault(name, number) != number:
            raise ValueError(f"{name} was enrolled before, in line {first_lines[name]}")
        return name, tuple(utterances)

    enrolments = dict(parse_lines(path, parse))
    if not enrolments:
        raise ValueError(f"{os.fspath(path)}: no enrolments; expected lines 'NAME UTTERANCE [UTTERANCE ...]'")
    return enrolments


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
