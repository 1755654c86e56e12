"""The report of a diagnosis as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from experiments.table_cells import correlation_cell

_WORST_LAYERS, _FRAGILE_LAYERS = 10, 5
_QUANTILES = ("median", "quantile_99")


def diagnosis_report(results: dict[str, Any]) -> str:
    """All that `experiments.diagnose` found, in tables."""
    reference = results["reference"]
    parts = [
        f"# What quantization changed in {reference['name']}",
        f"Test on {results['test']}: {reference['target_trials']:,} target and {reference['non_target_trials']:,} "
        f"non-target trials; float EER {reference['eer_percent']:.2f} %.",
        diagnosis_table(results),
        "Distortion of weights, and a layer alone quantized, is of the float network's weights moved to the nearest of "
        "the model's levels; drift and scores are the model's own.",
    ]
    if any(model["layer_tests"] for model in results["models"].values()):
        tests = results["layer_tests"]
        parts.append(
            f"Layers are tested on {tests['trials']:,} trials, with a float EER of {tests['float_eer_percent']:.2f} %."
        )
    for name, model in results["models"].items():
        parts += [f"## {name}", *_model_parts(model)]
    if results["probes"] or results["not_probed"]:
        parts += ["## What embeddings tell", *_probe_parts(results)]
    return "\n\n".join(parts) + "\n"


def diagnosis_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each model of `experiments.diagnose`."""
    rows = []
    for name, model in results["models"].items():
        scores = model["scores"]
        cells = [f"{model['eer_percent']:.2f}"]
        for part in ("target", "non-target"):
            drift = scores["drift"][part]
            cells.append(f"{drift['mean']:+.3f} ± {drift['deviation']:.3f}")
        for part in ("flips", "flips_at_own_threshold"):
            flips = scores[part]["all"]
            cells.append(f"{flips['harmful']:,} / {flips['beneficial']:,}")
        rows.append([name, *cells])
    header = [
        "model",
        "EER %",
        "drift of targets",
        "of non-targets",
        "flips, harmful / beneficial, at the float threshold",
        "at the model's own",
    ]
    return _table(header, rows)


def diagnosis_summary(results: dict[str, Any]) -> str:
    """Markdown: the models of a diagnosis side by side, without each layer's figures."""
    models = results["models"]
    reference, tests = results["reference"], results["layer_tests"]
    parts = [
        diagnosis_table(results),
        f"Against {reference['name']} in float, {reference['eer_percent']:.2f} %; test on {results['test']}: "
        f"{reference['target_trials']:,} target and {reference['non_target_trials']:,} non-target trials.",
    ]
    fragile = {name: _most_fragile(model)[:_FRAGILE_LAYERS] for name, model in models.items() if model["layer_tests"]}
    if fragile:
        rows = [[name, ", ".join(map(_fragility, worst))] for name, worst in fragile.items()]
        parts += [
            _table(["model", "layers that move scores most when they alone are quantized: mean change (EER %)"], rows),
            f"Layers are tested on {tests['trials']:,} trials, with a float EER of {tests['float_eer_percent']:.2f} %.",
        ]
    pairs = list(dict.fromkeys(pair for model in models.values() for pair in model["correlations"]))
    if pairs:
        rows = [
            [pair, *(correlation_cell(model["correlations"].get(pair)) for model in models.values())] for pair in pairs
        ]
        parts.append(_table(["rank correlation over layers (95 % interval)", *models], rows))
    parts += _flips_side_by_side(models)
    if results["probes"]:
        parts.append(_probe_table(results["probes"]))
    return "\n\n".join(parts) + "\n"


def _most_fragile(model: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted(model["layer_tests"], key=lambda row: -row["score_drift_alone_quantized"])


def _fragility(row: dict[str, Any]) -> str:
    drift, error = row["score_drift_alone_quantized"], row["eer_percent_alone_quantized"]
    return f"{row['layer']} {drift:.3f} ({error:.2f})"


def _flips_side_by_side(models: dict[str, Any]) -> list[str]:
    """Where on the float network's scale of scores decisions flip at each model's own threshold."""
    rows = _flip_rows([model["scores"]["flip_density_at_own_threshold"] for model in models.values()])
    own = [f"flips of {name}, harmful / beneficial, at its own threshold" for name in models]
    header = ["float score", "trials", *own]
    return [_table(header, rows)] if rows else []


def _model_parts(model: dict[str, Any]) -> list[str]:
    worst = sorted(model["layers"], key=lambda row: -row["distortion"]["relative_error"])[:_WORST_LAYERS]
    weights = [
        [
            row["path"],
            str(row["bits"]),
            f"{100 * row['distortion']['relative_error']:.1f} %",
            f"{row['distortion']['cosine']:.4f}",
            f"{row['distortion']['sqnr_db']:.1f}",
            f"{row['kurtosis']:.1f}",
            f"{row['smoothness']:.2f}",
            f"{row['code_entropy_bits']:.2f}",
        ]
        for row in worst
    ]
    header = ["layer", "bits", "weight error", "cosine", "SQNR dB", "kurtosis", "smoothness", "code entropy, bits"]
    parts = [f"Layers whose weights moved most, of {len(model['layers'])}:", _table(header, weights)]
    drifted = [
        [row["path"], f"{100 * row['distortion']['relative_error']:.1f} %", f"{row['distortion']['cosine']:.4f}"]
        for row in sorted(model["drift"], key=lambda row: -row["distortion"]["relative_error"])[:_WORST_LAYERS]
    ]
    parts += ["Layers whose outputs moved most:", _table(["layer", "output error", "cosine"], drifted)]
    if model["layer_tests"]:
        fragile = _most_fragile(model)[:_WORST_LAYERS]
        both = "eer_percent_alone_float" in fragile[0]
        parts += [
            "Layers that move scores most when they alone are quantized:",
            _table(
                ["layer", "mean change of a score", "EER %", *(["EER % with it alone float"] if both else [])],
                [
                    [
                        row["layer"],
                        f"{row['score_drift_alone_quantized']:.4f}",
                        f"{row['eer_percent_alone_quantized']:.2f}",
                        *([f"{row['eer_percent_alone_float']:.2f}"] if both else []),
                    ]
                    for row in fragile
                ],
            ),
        ]
    if model["correlations"]:
        parts += [
            "Rank correlations over layers, with 95 % intervals:",
            _table(
                ["of", "Spearman"],
                [[name, correlation_cell(found)] for name, found in model["correlations"].items()],
            ),
        ]
    nearest = [
        [f"{row['from']:.3f} to {row['to']:.3f}", f"{row['trials']:,}", *(f"{row[name]:.3f}" for name in _QUANTILES)]
        for row in model["scores"]["drift_by_distance"]
    ]
    header = ["float score's distance from the threshold", "trials", "median size of the drift", "99th percentile"]
    return [*parts, "Drift of scores:", _table(header, nearest), *_flip_parts(model["scores"])]


def _flip_rows(densities: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Float score, trials, flips of each kind of decisions; bins without any are left out."""
    edges, rows = densities[0]["edges"], []
    for place, (low, high, trials) in enumerate(zip(edges, edges[1:], densities[0]["trials"], strict=False)):
        if any(own[kind][place] for own in densities for kind in ("harmful", "beneficial")):
            cells = [f"{own['harmful'][place]:,} / {own['beneficial'][place]:,}" for own in densities]
            rows.append([f"{low:.3f} to {high:.3f}", f"{trials:,}", *cells])
    return rows


def _flip_parts(scores: dict[str, Any]) -> list[str]:
    """Where on the float network's scale of scores decisions flip, bins without any left out."""
    rows = _flip_rows([scores["flip_density"], scores["flip_density_at_own_threshold"]])
    if not rows:
        return ["No decision flips."]
    header = ["float score", "trials", "harmful / beneficial at the float threshold", "at the model's own"]
    return ["Where decisions flip:", _table(header, rows)]


def _probe_parts(results: dict[str, Any]) -> list[str]:
    parts = [_probe_table(results["probes"])] if results["probes"] else []
    return [*parts, *(f"Not probed: {name}, {reason}." for name, reason in results["not_probed"].items())]


def _probe_table(probes: dict[str, Any]) -> str:
    models = list(next(iter(probes.values())))
    rows = []
    for name, found in probes.items():
        any_model = found[models[0]]
        cells = [f"{100 / any_model['values']:.1f} %", f"{100 * any_model['majority']:.1f} %"]
        for model in models:
            figures = found[model]
            low, high = (100 * end for end in figures["gap_interval"])
            gap = f" ({100 * figures['gap']:+.1f}; {low:+.1f} to {high:+.1f})" if model != "float" else ""
            cells.append(f"{100 * figures['balanced_accuracy']:.1f} %{gap}")
        rows.append([name, *cells])
    table = _table(["attribute, probe", "chance", "most frequent value", *models], rows)
    return (
        "Balanced accuracy, whose chance level is one over the number of values; in brackets the gap to float with its "
        f"95 % interval. The most frequent value's share is the plain accuracy of guessing it.\n\n{table}"
    )


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|---|{'--:|' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
