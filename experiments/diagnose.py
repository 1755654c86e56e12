"""What quantization broke: in the weights, the layers' outputs, the scores, the decisions and what embeddings tell.

    python -m experiments.diagnose --reference=campplus_cn_en_common.pt --models=runs/campplus/kmeans_4 \
        --models=runs/campplus/kmeans_2 --test_dir=DATA/an4 --layer_tests=quantized --group_depth=1 \
        --workdir=runs/diagnosis --output=results/diagnosis.json

`--reference` is the float network that the `--models` came from. The work folder gets `report.md`, `results.json` and
plots: distortion and drift of every layer, weights against levels, DET curves, score drift, flips, and with
`--layer_tests` the error rate when a layer (or a group of them) alone is quantized, or alone float. With `--labels`,
probes say what the embeddings tell of each attribute: a file of tab-separated columns, the first `utterance` (names as
in trial lists), the others attributes such as gender or emotion.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.diagnosis_probes import read_attributes, run_probes
from experiments.diagnosis_report import diagnosis_report
from experiments.models import FloatModel, load_float_model, model_file, model_name
from experiments.scoring import measure, score
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.analysis import (
    activation_drift,
    decision_flips,
    drift_by_distance,
    grouped_paths,
    packed_weight_statistics,
    plot_flips,
    plot_layers,
    plot_score_drift,
    plot_weight_histograms,
    rank_correlation,
    score_drift,
    with_layers_of,
)
from qsv.data import read_audio
from qsv.deploy import Embedder, PackedModel, load_packed
from qsv.quant import QTensor, leaf_paths
from qsv.scoring import eer, eer_threshold, plot_det

_DRIFT_BATCH = 8
_MOST_HISTOGRAMS = 16


@dataclasses.dataclass(frozen=True)
class DiagnoseConfig:
    """Flags of a diagnosis."""

    workdir: str = setting("", "Folder for the report and its plots.")
    reference: str = setting("", "Float network, as in experiments.quantize.")
    models: tuple[str, ...] = setting((), "Quantized model: a run's folder or a packed file.")
    layer_tests: str = setting(
        "none",
        "Test with each layer alone quantized, or with each alone float as well; takes an evaluation for each.",
        choices=["none", "quantized", "both"],
    )
    group_depth: int = setting(
        0, "Layers whose paths begin with so many equal parts are tested together; 0 tests each by itself.", minimum=0
    )
    drift_utterances: int = setting(64, "Test utterances whose layers' outputs are compared.", minimum=1)
    drift_seconds: float = setting(2.0, "How much of each, from its middle; shorter ones are left out.", minimum=0.1)
    probe_folds: int = setting(5, "Folds of the probes; no group is in two.", minimum=2)
    labels: str = setting("", "File of the utterances' attributes for probes; needs qsv[analysis].")
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    test: TestConfig = TestConfig()


def run(config: DiagnoseConfig) -> dict[str, Any]:
    """Compare every model with the float network; returns and writes the results."""
    require(workdir=config.workdir, reference=config.reference, models=config.models, test_dir=config.test.test_dir)
    workdir = pathlib.Path(config.workdir)
    test_set = load_test_set(config.test)
    attributes = read_attributes(config.labels, test_set) if config.labels else {}
    reference = load_float_model(config.reference)
    packed = {model_name(name): load_packed(model_file(name)) for name in config.models}
    if len(packed) < len(config.models):
        raise ValueError(f"--models need folders or files of different names, got {list(config.models)}")
    waveforms = drift_waveforms(config, test_set, reference)
    float_embedder = Embedder(reference.network, reference.variables)
    before = score(float_embedder, test_set)
    embedders = {"float": float_embedder}
    scores, models = {}, {}
    for name, model in packed.items():
        drift = activation_drift(reference.network, reference.variables, model.variables(), waveforms)
        places = {row.path: place for place, row in enumerate(drift)}
        weights = packed_weight_statistics(reference.params, model.packed_params)
        weights.sort(key=lambda row: _place(row.path, places))
        embedders[name] = Embedder.of(model)
        scores[name] = score(embedders[name], test_set)
        models[name] = {
            **measure(scores[name], test_set, before),
            "layers": [dataclasses.asdict(row) for row in weights],
            "drift": [dataclasses.asdict(row) for row in drift],
            "scores": _score_figures(before, scores[name], test_set),
            "layer_tests": measure_layers(config, reference, model, [row.path for row in weights], test_set),
        }
        models[name]["correlations"] = _correlations(models[name], 100 * eer(before, test_set.trials.labels))
    results = {
        "experiment": "diagnose",
        "reference": {"name": model_name(config.reference), **measure(before, test_set)},
        "test": pathlib.Path(config.test.test_dir).name,
        "models": models,
        "probes": run_probes(attributes, embedders, test_set, num_folds=config.probe_folds) if attributes else {},
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or workdir / "results.json"), results)
    write_run_record(workdir, "diagnose", config)
    _plot(results, workdir, reference, packed, before, scores, test_set)
    (workdir / "report.md").write_text(diagnosis_report(results), encoding="utf-8")
    print(diagnosis_report(results))
    return results


def _place(path: str, places: Mapping[str, int]) -> int:
    """Where a kernel's layer comes in the network's order; the trees of parameters have that of names."""
    parts = path.split("/")
    names = ("/".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((places[name] for name in names if name in places), len(places))


def drift_waveforms(config: DiagnoseConfig, test_set: TestSet, reference: FloatModel) -> list[np.ndarray]:
    """Batches [batch, samples] float32 of equal crops, evenly picked from the test utterances.

    Raises:
        ValueError: no utterance is long enough.
    """
    rate = reference.network.frontend.sample_rate_hz
    size = round(config.drift_seconds * rate)
    crops: list[np.ndarray] = []
    order = np.random.default_rng(0).permutation(len(test_set.trials.names))
    for index in order:
        waveform = read_audio(test_set.utterances[index].path, sample_rate_hz=rate)
        if len(waveform) >= size:
            start = (len(waveform) - size) // 2
            crops.append(waveform[start : start + size])
        if len(crops) == config.drift_utterances:
            break
    if not crops:
        raise ValueError(f"no test utterance has {config.drift_seconds:g} s; give a smaller --drift_seconds")
    return [np.stack(crops[start : start + _DRIFT_BATCH]) for start in range(0, len(crops), _DRIFT_BATCH)]


def _score_figures(before: np.ndarray, after: np.ndarray, test_set: TestSet) -> dict[str, Any]:
    """Drift and flips."""
    labels = test_set.trials.labels
    own = eer_threshold(after, labels)
    return {
        "drift": _plain(score_drift(before, after, labels)),
        "drift_by_distance": [
            {"from": low, "to": high, **dataclasses.asdict(drift)}
            for low, high, drift in drift_by_distance(before, after, labels)
        ],
        "flips": _plain(decision_flips(before, after, labels)),
        "flips_at_own_threshold": _plain(decision_flips(before, after, labels, own_threshold=own)),
    }


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(value) for name, value in figures.items()}


def measure_layers(
    config: DiagnoseConfig, reference: FloatModel, model: PackedModel, paths: Sequence[str], test_set: TestSet
) -> list[dict[str, Any]]:
    """EER with each group of the kernels alone quantized, and where it is wanted with each alone float."""
    if config.layer_tests == "none":
        return []
    quantized = model.variables()

    def error(params: Any, batch_stats: Any) -> float:
        variables = {"params": params, "batch_stats": batch_stats}
        return 100 * eer(score(Embedder(reference.network, variables), test_set), test_set.trials.labels)

    rows = []
    for name, group in grouped_paths(paths, config.group_depth).items():
        alone = with_layers_of(reference.params, quantized["params"], group)
        row: dict[str, Any] = {"layer": name, "paths": group}
        row["eer_percent_alone_quantized"] = error(alone, reference.batch_stats)
        if config.layer_tests == "both":
            rest = with_layers_of(quantized["params"], reference.params, group)
            row["eer_percent_alone_float"] = error(rest, quantized["batch_stats"])
        rows.append(row)
    return rows


def _correlations(model: Mapping[str, Any], float_eer_percent: float) -> dict[str, Any]:
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
        mean = [float(np.mean([distortion[path] for path in row["paths"]])) for row in tests]
        loss = [row["eer_percent_alone_quantized"] - float_eer_percent for row in tests]
        pairs["weight error and EER with this layer alone quantized"] = (mean, loss)
    found = {}
    for name, (x, y) in pairs.items():
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0 and np.all(np.isfinite([x, y])):
            found[name] = dataclasses.asdict(rank_correlation(x, y))
    return found


def _plot(
    results: dict[str, Any],
    workdir: pathlib.Path,
    reference: FloatModel,
    packed: Mapping[str, PackedModel],
    before: np.ndarray,
    scores: Mapping[str, np.ndarray],
    test_set: TestSet,
) -> None:
    """Every figure of the diagnosis."""
    labels = test_set.trials.labels
    plot_det({"float": (before, labels), **{name: (own, labels) for name, own in scores.items()}}, workdir / "det.png")
    plot_score_drift(before, scores, labels, workdir / "score_drift.png")
    plot_flips(before, scores, labels, workdir / "flips.png")
    plot_flips(before, scores, labels, workdir / "flips_own_threshold.png", own_thresholds=True)
    models = results["models"]
    for part, ylabel in (("layers", "Relative error of the weights"), ("drift", "Relative error of the output")):
        rows = {
            name: {row["path"].removesuffix("/kernel"): row["distortion"]["relative_error"] for row in model[part]}
            for name, model in models.items()
        }
        plot_layers(rows, workdir / f"{part}.png", ylabel=ylabel)
    tests = {}
    for name, model in models.items():
        for kind in ("alone quantized", "alone float"):
            key = f"eer_percent_{kind.replace(' ', '_')}"
            own = {row["layer"]: row[key] for row in model["layer_tests"] if key in row}
            if own:
                tests[f"{name}, {kind}"] = own
    if tests:
        plot_layers(tests, workdir / "layer_tests.png", ylabel="EER (%)", reference=results["reference"]["eer_percent"])
    leaves = dict(leaf_paths(reference.params))
    for name, model in packed.items():
        quantized = {path: leaf for path, leaf in leaf_paths(model.packed_params) if isinstance(leaf, QTensor)}
        # Evenly over the network.
        shown = list(quantized)[:: -(-len(quantized) // _MOST_HISTOGRAMS)]
        plot_weight_histograms(
            {path: leaves[path] for path in shown},
            {path: quantized[path] for path in shown},
            workdir / f"weights_{name}.png",
        )


if __name__ == "__main__":
    launch(DiagnoseConfig, run)
