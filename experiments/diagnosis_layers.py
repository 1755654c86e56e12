"""Layer tests of a diagnosis: what each layer alone costs, and whether the look of its weights tells it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.models import FloatModel
from experiments.scoring import score
from experiments.testing import TestSet
from qsv.analysis import (
    grouped_paths,
    in_units_of_levels,
    nearest_levels,
    rank_correlation,
    standardized_paths,
    with_layers_of,
)
from qsv.data import Trials
from qsv.deploy import Embedder, PackedModel
from qsv.scoring import eer


def evenly(count: int, most: int) -> list[int]:
    """At most so many of the first `count` numbers, evenly picked."""
    return list(range(0, count, -(-count // most))) if most else []


def layer_test_trials(test_set: TestSet, most: int) -> TestSet:
    """The trials among at most so many utterances, evenly picked; all where it is 0.

    Raises:
        ValueError: they are of one class only.
    """
    trials = test_set.trials
    if not 0 < most < len(trials.names):
        return test_set
    chosen = np.array(evenly(len(trials.names), most))
    places = np.full(len(trials.names), -1, np.int32)
    places[chosen] = np.arange(chosen.size)
    enrolment, test = places[trials.enrolment], places[trials.test]
    kept = (enrolment >= 0) & (test >= 0)
    labels = trials.labels[kept]
    if labels.all() or not labels.any():
        raise ValueError(
            f"the {labels.size} trials among {chosen.size} utterances are of one class only; give more "
            "--layer_test_utterances"
        )
    names = tuple(trials.names[place] for place in chosen)
    return dataclasses.replace(test_set, trials=Trials(names, enrolment[kept], test[kept], labels))


def measure_layers(
    reference: FloatModel,
    model: PackedModel,
    paths: Sequence[str],
    test_set: TestSet,
    *,
    before: np.ndarray,
    group_depth: int,
    alone_float: bool,
) -> list[dict[str, Any]]:
    """EER and scores with each group of the kernels alone quantized, and where it is wanted EER with each alone float.

    Quantized ones are the float network's moved to the nearest levels, in the float network. Float ones are that
    network's too, in the quantized network as it is.

    Args:
        reference: the float network.
        model: the quantized one.
        paths: its quantized kernels.
        test_set: the trials.
        before: [trials] scores of the float network.
        group_depth: kernels whose paths begin with so many equal parts are one group; 0 is each by itself.
        alone_float: whether to measure that too.

    Returns:
        {"layer", "paths", "eer_percent_alone_quantized", "score_drift_alone_quantized"}, and "eer_percent_alone_float",
        of every group; the drift is the mean size of the scores' changes, which tells small losses from none where an
        error rate, a count of few trials, doesn't.
    """
    quantized, standardized = model.variables(), standardized_paths(model.plan_description)
    rounded = nearest_levels(reference.params, model.packed_params, standardized=standardized)
    unquantized = in_units_of_levels(reference.params, model.packed_params, standardized=standardized)

    def scores(params: Any, batch_stats: Any) -> np.ndarray:
        return score(Embedder(reference.network, {"params": params, "batch_stats": batch_stats}), test_set)

    labels, rows = test_set.trials.labels, []
    for name, group in grouped_paths(paths, group_depth).items():
        alone = with_layers_of(reference.params, rounded, group)
        row: dict[str, Any] = {"layer": name, "paths": group}
        after = scores(alone, reference.batch_stats)
        row["eer_percent_alone_quantized"] = 100 * eer(after, labels)
        row["score_drift_alone_quantized"] = float(np.mean(np.abs(after - before)))
        if alone_float:
            rest = with_layers_of(quantized["params"], unquantized, group)
            row["eer_percent_alone_float"] = 100 * eer(scores(rest, quantized["batch_stats"]), labels)
        rows.append(row)
    return rows


def layer_correlations(model: Mapping[str, Any], float_eer_percent: float) -> dict[str, Any]:
    """Whether what happened to a layer's weights says what happened to its output, or to the errors."""
    layers = {row["path"]: row for row in model["layers"]}
    distortion = {path: row["distortion"]["relative_error"] for path, row in layers.items()}
    outputs = {f"{row['path']}/kernel": row["distortion"]["relative_error"] for row in model["drift"]}
    shared = [path for path in distortion if path in outputs]
    pairs = {
        "smoothness and weight error": ([row["smoothness"] for row in layers.values()], list(distortion.values())),
        "kurtosis and weight error": ([row["kurtosis"] for row in layers.values()], list(distortion.values())),
        "weight error and output drift": ([distortion[p] for p in shared], [outputs[p] for p in shared]),
    }
    tests = model["layer_tests"]
    if tests:
        losses = {
            "score drift": [row["score_drift_alone_quantized"] for row in tests],
            "EER": [row["eer_percent_alone_quantized"] - float_eer_percent for row in tests],
        }
        looks = {name: {path: row[name] for path, row in layers.items()} for name in ("smoothness", "kurtosis")}
        for name, own in (("weight error", distortion), *looks.items()):
            mean = [float(np.mean([own[path] for path in row["paths"]])) for row in tests]
            for kind, loss in losses.items():
                pairs[f"{name} and {kind} with this layer alone quantized"] = (mean, loss)
    found = {}
    for name, (x, y) in pairs.items():
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0 and np.all(np.isfinite([x, y])):
            found[name] = dataclasses.asdict(rank_correlation(x, y))
    return found
