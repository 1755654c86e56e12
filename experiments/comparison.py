"""Several kinds of models on the same trials: means over seeds, differences paired over the trials."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.scoring import resample, score
from experiments.testing import TestSet
from qsv.deploy import load
from qsv.scoring import Interval


def compare(
    paths: Mapping[str, Sequence[pathlib.Path]], test_set: TestSet, *, against: Sequence[str]
) -> list[dict[str, Any]]:
    """Error rates of kinds of models.

    Args:
        paths: {kind: packed files, one for each seed}; as many of each kind.
        test_set: the trials.
        against: kinds that all later ones are compared with.

    Returns:
        For every kind its bytes (the largest file's), the EER of every seed, their mean with its interval, and by how
        much that is above those of `against` that come earlier, all in percent.
    """
    kinds = list(paths)
    systems = [score(load(path), test_set) for kind in kinds for path in paths[kind]]
    every, own, first = resample(systems, test_set), [], 0
    for kind in kinds:
        own.append(range(first, first + len(paths[kind])))
        first += len(paths[kind])
    means = every.averaged(own)
    rows = []
    for index, kind in enumerate(kinds):
        row = {
            "file_bytes": max(path.stat().st_size for path in paths[kind]),
            "eer_percent_of_seeds": [100 * float(every.estimates[system, 0]) for system in own[index]],
            **_percent("eer_percent", means.interval(0, index)),
        }
        for other in against:
            if other in kinds[:index]:
                difference = means.difference(0, index, kinds.index(other))
                row |= _percent(f"eer_percent_above_{other}", difference)
        rows.append(row)
    return rows


def _percent(name: str, interval: Interval) -> dict[str, Any]:
    return {name: 100 * interval.estimate, f"{name}_interval": [100 * interval.low, 100 * interval.high]}
