"""What quantization broke: in the weights, the layers' outputs, the scores, the decisions and what embeddings tell.

    python -m experiments.diagnose --reference=campplus_cn_en_common.pt --models=runs/campplus/kmeans_4 \
        --models=runs/campplus/kmeans_2 --test_dir=DATA/an4 --layer_tests=quantized --group_depth=1 \
        --workdir=runs/diagnosis --output=results/diagnosis.json

`--reference` is the float network that the `--models` came from. The work folder gets `report.md`, `results.json` and
plots: distortion and drift of every layer, weights against levels, DET curves, score drift, flips, and with
`--layer_tests` the error rate when a layer (or a group of them) alone is quantized, or alone float. Distortion of
weights, and a layer alone quantized, is of the float network's own weights moved to the nearest of the model's levels:
the model's weights, where they were trained or rounded together, make up for each other, which alone they can't.

Probes say what the embeddings tell of the speaker, the recording, the duration and the augmentation, and with
`--labels` of other attributes: a file of tab-separated columns, the first `utterance` (names as in trial lists), the
others such as gender, emotion or session. Plots and probes need qsv[analysis].
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.diagnosis_layers import evenly, layer_correlations, layer_test_trials, measure_layers
from experiments.diagnosis_probes import (
    augmentations,
    augmented_utterances,
    probed_attributes,
    read_attributes,
    run_probes,
)
from experiments.diagnosis_report import diagnosis_report
from experiments.models import FloatModel, load_float_model, model_file, model_name
from experiments.scoring import embed_trials, measure, score, score_embeddings
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.analysis import (
    activation_drift,
    decision_flips,
    drift_by_distance,
    flip_density,
    in_units_of_levels,
    packed_weight_statistics,
    plot_flips,
    plot_layers,
    plot_score_drift,
    plot_weight_histograms,
    score_drift,
    standardized_paths,
)
from qsv.data import read_audio
from qsv.deploy import Embedder, PackedModel, load_packed
from qsv.quant import QTensor, leaf_paths
from qsv.scoring import eer, eer_threshold, plot_det

_DRIFT_BATCH = 8
_MOST_HISTOGRAMS = 16
_FLIP_BINS = 20


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
    layer_test_utterances: int = setting(
        0, "Test utterances, evenly picked, whose trials these tests take; 0 takes all.", minimum=0
    )
    drift_utterances: int = setting(64, "Test utterances whose layers' outputs are compared.", minimum=1)
    drift_seconds: float = setting(2.0, "How much of each, from its middle; shorter ones are left out.", minimum=0.1)
    probe_folds: int = setting(5, "Folds of the probes; no group is in two.", minimum=2)
    labels: str = setting("", "File of the utterances' attributes for probes.")
    augmented_utterances: int = setting(
        200,
        "Test utterances, evenly picked, that are played slower and faster as well, for a probe of the augmentation; "
        "0 leaves it out.",
        minimum=0,
    )
    noise_dir: tuple[str, ...] = setting((), "Folder of noise for that probe.")
    reverberation_dir: str = setting("", "Folder of impulse responses for that probe.")
    output: str = setting(
        "", "JSON file for the results without every layer's statistics; --workdir/results.json has these too."
    )
    test: TestConfig = TestConfig()


def run(config: DiagnoseConfig) -> dict[str, Any]:
    """Compare every model with the float network; returns and writes the results."""
    require(workdir=config.workdir, reference=config.reference, models=config.models, test_dir=config.test.test_dir)
    workdir = pathlib.Path(config.workdir)
    test_set = load_test_set(config.test)
    labels = read_attributes(config.labels, test_set) if config.labels else {}
    reference = load_float_model(config.reference)
    packed = _packed_models(config)
    rate = reference.network.frontend.sample_rate_hz
    augmented = evenly(len(test_set.trials.names), config.augmented_utterances)
    types = augmentations(config.noise_dir, config.reverberation_dir, sample_rate_hz=rate) if augmented else {}
    attributes, left_out = probed_attributes(
        labels, test_set, types=list(types), places=augmented, num_folds=config.probe_folds
    )
    layer_test_set = layer_test_trials(test_set, config.layer_test_utterances)
    waveforms = drift_waveforms(config, test_set, reference)
    float_embedder = Embedder(reference.network, reference.variables)
    embedders, embeddings = {"float": float_embedder}, {"float": embed_trials(float_embedder, test_set)}
    before = score_embeddings(embeddings["float"], test_set, float_embedder)
    layers_before = before if layer_test_set is test_set else score(float_embedder, layer_test_set)
    float_eer_percent = 100 * eer(layers_before, layer_test_set.trials.labels)
    scores, models = {}, {}
    for name, model in packed.items():
        embedders[name] = Embedder.of(model)
        embeddings[name] = embed_trials(embedders[name], test_set)
        scores[name] = score_embeddings(embeddings[name], test_set, embedders[name])
        models[name] = {
            **measure(scores[name], test_set, before),
            **_layer_figures(reference, model, waveforms),
            "scores": _score_figures(before, scores[name], test_set),
            "layer_tests": [],
        }
        if config.layer_tests != "none":
            models[name]["layer_tests"] = measure_layers(
                reference,
                model,
                [row["path"] for row in models[name]["layers"]],
                layer_test_set,
                before=layers_before,
                group_depth=config.group_depth,
                alone_float=config.layer_tests == "both",
            )
        models[name]["correlations"] = layer_correlations(models[name], float_eer_percent)
    results = {
        "experiment": "diagnose",
        "reference": {"name": model_name(config.reference), **measure(before, test_set)},
        "test": pathlib.Path(config.test.test_dir).name,
        "models": models,
        "layer_tests": {"trials": len(layer_test_set.trials), "float_eer_percent": float_eer_percent},
        "probes": {},
        "not_probed": left_out,
        "machine": machine(),
    }
    # Before the probes too, so that whatever becomes of them, the layer tests' hours aren't lost.
    _write(config, results)
    write_run_record(workdir, "diagnose", config)
    if "augmentation" in attributes:
        recordings = augmented_utterances(types, test_set, augmented, sample_rate_hz=rate)
        embeddings = {
            name: np.concatenate([own, embedders[name].embed_files(recordings)]) for name, own in embeddings.items()
        }
    results["probes"] = run_probes(attributes, embeddings, num_folds=config.probe_folds)
    _write(config, results)
    _plot(results, workdir, reference, packed, before, scores, test_set)
    (workdir / "report.md").write_text(diagnosis_report(results), encoding="utf-8")
    print(diagnosis_report(results))
    return results


def _packed_models(config: DiagnoseConfig) -> dict[str, PackedModel]:
    """{name: model}; raises where two are of one name, or one has no quantized layer."""
    packed = {model_name(name): load_packed(model_file(name)) for name in config.models}
    if len(packed) < len(config.models):
        raise ValueError(f"--models need folders or files of different names, got {list(config.models)}")
    for name, model in packed.items():
        if not any(isinstance(leaf, QTensor) for _, leaf in leaf_paths(model.packed_params)):
            raise ValueError(f"--models: {name} has no quantized layer; give a float network as --reference")
    return packed


def _write(config: DiagnoseConfig, results: dict[str, Any]) -> None:
    """All results to the work folder, and what tables show to --output."""
    results = _without_infinities(results)
    write_json(pathlib.Path(config.workdir) / "results.json", results)
    if config.output:
        models = {
            name: {key: value for key, value in model.items() if key not in ("layers", "drift")}
            for name, model in results["models"].items()
        }
        write_json(pathlib.Path(config.output), {**results, "models": models})


def _without_infinities(value: Any) -> Any:
    """The same figures with null in place of what JSON can't say: infinity (nothing lost) and NaN (no trials)."""
    if isinstance(value, Mapping):
        return {name: _without_infinities(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _layer_figures(reference: FloatModel, model: PackedModel, waveforms: list[np.ndarray]) -> dict[str, Any]:
    """Distortion of every quantized kernel and drift of every layer's output, both in the order of computation."""
    drift = activation_drift(reference.network, reference.variables, model.variables(), waveforms)
    places = {row.path: place for place, row in enumerate(drift)}
    standardized = standardized_paths(model.plan_description)
    weights = packed_weight_statistics(reference.params, model.packed_params, standardized=standardized)
    weights.sort(key=lambda row: _place(row.path, places))
    return {
        "layers": [dataclasses.asdict(row) for row in weights],
        "drift": [dataclasses.asdict(row) for row in drift],
    }


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
        "flip_density": _flip_density(before, after, labels, None),
        "flip_density_at_own_threshold": _flip_density(before, after, labels, own),
    }


def _flip_density(
    before: np.ndarray, after: np.ndarray, labels: np.ndarray, own_threshold: float | None
) -> dict[str, list[float]]:
    density = flip_density(before, after, labels, own_threshold=own_threshold, num_bins=_FLIP_BINS)
    return {name: values.tolist() for name, values in density.items()}


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: dataclasses.asdict(value) for name, value in figures.items()}


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
        plot_layers(
            tests, workdir / "layer_tests.png", ylabel="EER (%)", reference=results["layer_tests"]["float_eer_percent"]
        )
    for name, model in packed.items():
        standardized = standardized_paths(model.plan_description)
        leaves = dict(leaf_paths(in_units_of_levels(reference.params, model.packed_params, standardized=standardized)))
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
