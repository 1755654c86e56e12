"""Probes of a diagnosis: attributes of the test utterances, and how well embeddings tell them."""

import csv
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.testing import TestSet
from qsv.analysis import probe
from qsv.data import audio_duration_seconds
from qsv.deploy import Embedder

_DURATION_CLASSES = ("short", "medium", "long")


def read_attributes(path: str, test_set: TestSet) -> dict[str, dict[str, str]]:
    """{attribute: {utterance: value}} of a tab-separated file.

    Raises:
        ValueError: the file has no column `utterance` or no other, or names an utterance that is in no trial.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        columns = reader.fieldnames or []
        if "utterance" not in columns or len(columns) < 2:
            raise ValueError(f"{path}: the first line must name the columns, `utterance` and attributes, got {columns}")
        rows = list(reader)
    unknown = {row["utterance"] for row in rows} - set(test_set.trials.names)
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} utterances are in no trial, such as {sorted(unknown)[0]!r}")
    # A row may leave an attribute open.
    return {name: {row["utterance"]: row[name] for row in rows if row[name]} for name in columns if name != "utterance"}


def run_probes(
    attributes: Mapping[str, Mapping[str, str]],
    embedders: Mapping[str, Embedder],
    test_set: TestSet,
    *,
    num_folds: int,
) -> dict[str, Any]:
    """Balanced accuracy of both probes for every attribute, and each model's gap to float.

    Args:
        attributes: from `read_attributes`; the utterances' length and speaker come on top.
        embedders: {model: embedder}, "float" among them.
        test_set: the utterances.
        num_folds: folds of the cross-validation.

    Returns:
        {"attribute, probe": {model: figures}}.
    """
    names = test_set.trials.names
    embeddings = {name: embedder.embed_files(test_set.utterances) for name, embedder in embedders.items()}
    found: dict[str, Any] = {}
    for attribute, values, groups in _probed(attributes, test_set):
        chosen = [index for index, name in enumerate(names) if name in values]
        labels = [values[names[index]] for index in chosen]
        for kind in ("logistic", "mlp"):
            results = {
                name: probe(own[chosen], labels, np.asarray(groups)[chosen], kind=kind, num_folds=num_folds)
                for name, own in embeddings.items()
            }
            unquantized = results["float"]
            found[f"{attribute}, {kind}"] = {
                name: {
                    "utterances": len(chosen),
                    "values": len(set(labels)),
                    "balanced_accuracy": result.balanced_accuracy,
                    "interval": result.interval(),
                    "gap": result.balanced_accuracy - unquantized.balanced_accuracy,
                    "gap_interval": result.interval(unquantized),
                }
                for name, result in results.items()
            }
    return found


def _probed(
    attributes: Mapping[str, Mapping[str, str]], test_set: TestSet
) -> list[tuple[str, Mapping[str, str], list[str]]]:
    """(attribute, values, groups): those of the file and the length among unknown speakers, then the speaker."""
    names, speakers = test_set.trials.names, test_set.speakers.tolist()
    seconds = np.array([audio_duration_seconds(utterance.path) for utterance in test_set.utterances])
    terciles = np.searchsorted(np.quantile(seconds, [1 / 3, 2 / 3]), seconds)
    lengths = {name: _DURATION_CLASSES[place] for name, place in zip(names, terciles, strict=True)}
    own = [(attribute, values, speakers) for attribute, values in attributes.items()]
    speaker = dict(zip(names, speakers, strict=True))
    return [*own, ("duration", lengths, speakers), ("speaker", speaker, list(names))]
