"""Tables of results, and README's tables from `results/*.json`.

    python -m experiments.tables README.md

replaces what stands between `<!-- table results/NAME.json -->` and `<!-- end table -->` in each file named.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from experiments.configuration import launch
from experiments.diagnosis_report import diagnosis_table

_MARKED = re.compile(r"(<!-- table (?P<path>\S+) -->\n).*?(<!-- end table -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """The arguments are the Markdown files."""

    arguments: tuple[str, ...] = ()


def run(config: TablesConfig) -> None:
    """Rewrite the tables of every file named."""
    if not config.arguments:
        raise ValueError("name the Markdown files whose tables to make anew, such as README.md")
    for name in config.arguments:
        path = pathlib.Path(name)
        path.write_text(with_tables(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")


def with_tables(text: str, folder: pathlib.Path) -> str:
    """The Markdown text with its tables made anew from the results they name, relative to `folder`."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((folder / match["path"]).read_text(encoding="utf-8"))
        return f"{match[1]}\n{_TABLES[results['experiment']](results)}\n{match[3]}"

    return _MARKED.sub(table, text)


def bit_width_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each model of `experiments.bit_widths`."""
    lines = [
        "| levels | scales | bits | steps | EER % (95 % interval) | minDCF (95 % interval) "
        "| EER / float EER (95 % interval) | file bytes | float parameters / file |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        # A float model without an error has no ratio to it.
        missing = "1" if row["scheme"] == "float" else "–"
        ratio = _interval(row, "eer_ratio", 2) if "eer_ratio" in row else missing
        lines.append(
            f"| {row['scheme']} | {row['scales']} | {row['bits']} | {row['steps']} "
            f"| {_interval(row, 'eer_percent', 2)} | {_interval(row, 'min_dcf', 3)} | {ratio} | {row['file_bytes']:,} "
            f"| {row['compression_ratio']:.2f} |"
        )
    first = results["rows"][0]
    lines.append("")
    lines.append(
        f"{results['parameters']:,} parameters; steps of fine-tuning; test on {results['test']}: "
        f"{first['target_trials']:,} target and {first['non_target_trials']:,} non-target trials of "
        f"{first['speakers']} speakers; intervals by resampling {first['resampled']}."
    )
    return "\n".join(lines) + "\n"


def training_speed_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each variant of `experiments.benchmark_training`."""
    lines = ["| step | median ms | quartiles ms | crops/s | against float |", "|---|--:|--:|--:|--:|"]
    for row in results["rows"]:
        low, high = row["milliseconds_quartiles"]
        lines.append(
            f"| {row['name']} | {row['milliseconds']:.0f} | {low:.0f} to {high:.0f} "
            f"| {row['crops_per_second']:.1f} | {row['ratio_to_float']:.3f} |"
        )
    setting = results["setting"]
    lines += [
        "",
        f"{setting}; {results['rounds']} interleaved rounds on {results['machine']['cores']} cores.",
    ]
    return "\n".join(lines) + "\n"


def ablation_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each ingredient of `experiments.ablation`."""
    lines = [
        "| added | cosine with float | EER % (95 % interval) | EER / float EER (95 % interval) |",
        "|---|--:|--:|--:|",
    ]
    for row in results["rows"]:
        cosine = f"{row['median_cosine']:.4f}" if "median_cosine" in row else "1"
        missing = "1" if row["ingredient"] == "float" else "–"
        ratio = _interval(row, "eer_ratio", 2) if "eer_ratio" in row else missing
        lines.append(f"| {row['ingredient']} | {cosine} | {_interval(row, 'eer_percent', 2)} | {ratio} |")
    lines.append("")
    lines.append(
        f"{results['scheme']}, {results['bits']} bits, no training; each line with all above it; median cosine over "
        f"utterances of the calibration's corpus; test on {results['test']}."
    )
    return "\n".join(lines) + "\n"


def hessian_table(results: dict[str, Any]) -> str:
    """Markdown: a gradient, a Hessian-vector product, and what the traces of `experiments.benchmark_hessian` took."""
    lines = ["| of the loss | median ms | quartiles ms |", "|---|--:|--:|"]
    for row in results["rows"]:
        low, high = row["milliseconds_quartiles"]
        name = {"gradient": "gradient", "product": "Hessian-vector product"}[row["name"]]
        lines.append(f"| {name} | {row['milliseconds']:.0f} | {low:.0f} to {high:.0f} |")
    low, high = results["ratio_range"]
    text = (
        f"{results['network']}, {results['setting']}; a product costs {results['ratio']:.2f} gradients "
        f"({low:.2f} to {high:.2f} over {results['rounds']} rounds)"
    )
    traces = results["traces"]
    if traces:
        text += (
            f"; traces of {traces['layers']} layers by {traces['probes']} products in {traces['seconds']:.0f} s, "
            f"{traces['layers_within']} of them within {100 * traces['wanted_error']:.0f} %, "
            f"the largest standard error {100 * traces['largest_error']:.0f} %"
        )
    return "\n".join([*lines, "", f"{text}; {results['machine']['cores']} cores."]) + "\n"


def precision_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each width and strategy of `experiments.precision_study`."""
    lines = [
        "| size of | precision | EER % (95 % interval) | above uniform (95 % interval) "
        "| above one-shot (95 % interval) | file bytes |",
        "|---|---|--:|--:|--:|--:|",
    ]
    names = {"uniform": "uniform", "one_shot": "mixed, one-shot"}
    for row in results["rows"]:
        name = names.get(row["strategy"], f"mixed, stages by {row['strategy'].replace('_', ' ')}")
        above = [
            _interval(row, f"eer_percent_above_{other}", 2) if f"eer_percent_above_{other}" in row else ""
            for other in ("uniform", "one_shot")
        ]
        cells = [f"{row['bits']} bits", name, _interval(row, "eer_percent", 2), *above, f"{row['file_bytes']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _comparison_note(results)]) + "\n"


def binary_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each kind of `experiments.binary`."""
    lines = [
        "| 1 bit | EER % (95 % interval) | above sign (95 % interval) | above static (95 % interval) | file bytes |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        above = [
            _interval(row, f"eer_percent_above_{other}", 2) if f"eer_percent_above_{other}" in row else ""
            for other in ("sign", "static_binary")
        ]
        cells = [row["kind"].replace("_", " "), _interval(row, "eer_percent", 2), *above, f"{row['file_bytes']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _comparison_note(results)]) + "\n"


def weight_study_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each network, scheme and width of `experiments.weight_study`."""
    columns = [f"EER % on {test} (ratio)" for test in results["tests"]]
    header = ["network", "levels", "bits", "steps", "median weight error", *columns]
    lines = [f"| {' | '.join(header)} |", f"|---|---|{'--:|' * (len(header) - 2)}"]
    for network in results["networks"]:
        unchanged = [f"{errors['eer_percent']:.2f}" for errors in network["float_tests"]]
        lines.append(f"| {network['network']} | float | 32 | 0 | 0 | {' | '.join(unchanged)} |")
        for row in network["rows"]:
            errors = [_error_and_ratio(errors) for errors in row["tests"]]
            distortion = f"{100 * row['median_relative_error']:.1f} %"
            cells = [network["network"], row["scheme"], str(row["bits"]), str(row["steps"]), distortion, *errors]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for network in results["networks"]:
        low, high = network["smoothness_quartiles"]
        lines.append(
            f"{network['network']}: {network['layers']} layers, median smoothness {network['median_smoothness']:.2f} "
            f"(quartiles {low:.2f} to {high:.2f}), median kurtosis {network['median_kurtosis']:.1f}."
        )
    found = results["distortion_and_errors"]
    if found:
        lines.append(
            f"Rank correlation of weight error and EER ratio, untrained models: {found['estimate']:.2f} "
            f"({found['low']:.2f} to {found['high']:.2f})."
        )
    return "\n".join(lines) + "\n"


def cascade_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each stage of `experiments.cascade`, and one for the cascade."""
    lines = [
        "| system | EER % (95 % interval) | minDCF | actDCF | Cllr | EER / last stage's (95 % interval) "
        "| bit operations of a trial | file bytes |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    own = results["cascade"]
    systems = [(row["name"], row["relative_operations"], row["file_bytes"], row) for row in results["rows"]]
    systems.append(("cascade", own["relative_operations_of_a_trial"], own["bytes_read"], own))
    for name, operations, size, row in systems:
        ratio = _interval(row, "eer_ratio", 2) if "eer_ratio" in row else "–"
        lines.append(
            f"| {name} | {_interval(row, 'eer_percent', 2)} | {row['min_dcf']:.3f} | {row['act_dcf']:.3f} "
            f"| {row['cllr']:.3f} | {ratio} | {100 * operations:.1f} % | {size:,} |"
        )
    settled = " / ".join(f"{100 * share:.1f} %" for share in own["settled"])
    flips, development = own["flips"], results["development"]
    text = (
        f"Trials settled at each stage: {settled}; against the last stage {flips['harmful']} decisions got worse and "
        f"{flips['beneficial']} better; every utterance embedded once at each stage that a trial of it reaches, the "
        f"embeddings of all trials take {100 * own['relative_operations']:.1f} % of the operations. Calibrated on "
        f"{development['trials']:,} trials of {development['speakers']} other speakers; test on {results['test']}; "
        "activations are float32."
    )
    if results["runtime"]:
        runtime = results["runtime"]
        text += f" From audio, {runtime['decisions_equal']:,} of {runtime['trials']:,} decisions are the same."
    return "\n".join([*lines, "", text]) + "\n"


def quality_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each network of `experiments.speech_quality`."""
    lines = [
        "| maps and weights | MSE (95 % interval) | PCC (95 % interval) | SRCC | PCC minus float's (95 % interval) "
        "| memory, all maps | times less | memory, largest layer | times less |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = results["rows"][0]
    for row in results["rows"]:
        behind = _interval(row, "pcc_difference", 3) if "pcc_difference" in row else ""
        lines.append(
            f"| {row['name']} | {_interval(row, 'mse', 3)} | {_interval(row, 'pcc', 3)} | {row['srcc']:.3f} | {behind} "
            f"| {row['memory_bytes']:,} | {first['memory_bytes'] / row['memory_bytes']:.1f} "
            f"| {row['memory_bytes_at_peak']:,} "
            f"| {first['memory_bytes_at_peak'] / row['memory_bytes_at_peak']:.1f} |"
        )
    clips = results["clips"]
    lines += [
        "",
        f"{results['network']}, {results['parameters']:,} parameters, predicts {results['label'].upper()} of clips of "
        f"{results['clip_seconds']:g} s; {clips['train']:,} to train on, {clips['test']:,} to test on, of "
        f"{results['test_speakers']} other speakers and other noise; {results['scheme']} levels; intervals by "
        "resampling speakers. "
        "Memory in bytes: weights as stored, and either the outputs of all convolutions together or the input and "
        "output of the largest one.",
    ]
    return "\n".join(lines) + "\n"


def selection_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each size and front of `experiments.select_layers`."""
    lines = [
        "| chosen by | layers quantized | bytes of the parameters | of float | EER % (95 % interval) "
        "| above float (95 % interval) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    names = {
        "float": "float",
        "greedy": f"each layer's {results['ranked_by']}",
        "hessian": "Hessian",
        "selected": "selected, calibrated",
    }
    whole = results["float_parameter_bytes"]
    rows = [{"front": "float", "layers": 0, "parameter_bytes": whole} | results["float"], *results["rows"]]
    for row in [*rows, {"front": "selected"} | results["selected"]]:
        above = _interval(row, "eer_percent_difference", 2) if "eer_percent_difference" in row else ""
        lines.append(
            f"| {names[row['front']]} | {row['layers']} | {row['parameter_bytes']:,} "
            f"| {100 * row['parameter_bytes'] / whole:.1f} % | {_interval(row, 'eer_percent', 2)} | {above} |"
        )
    lines += [
        "",
        f"{results['network']}, {results['layers']} layers, {results['scheme']} levels of {results['bits']} bits, the "
        f"other layers float; the selected file has {results['selected']['file_bytes']:,} bytes; test on "
        f"{results['test']}; intervals by resampling {results['float']['resampled']}, paired.",
    ]
    return "\n".join(lines) + "\n"


def _error_and_ratio(errors: dict[str, Any]) -> str:
    ratio = f" ({errors['eer_ratio']:.2f})" if "eer_ratio" in errors else ""
    return f"{errors['eer_percent']:.2f}{ratio}"


def _comparison_note(results: dict[str, Any]) -> str:
    seeds = f"means of {results['seeds']} seeds" if results["seeds"] > 1 else "one seed"
    return (
        f"{results['steps']} steps of fine-tuning in all; {seeds}; float {results['float_eer_percent']:.2f} %; "
        f"test on {results['test']}; intervals by resampling {results['resampled']}, paired."
    )


_TABLES = {
    "ablation": ablation_table,
    "binary": binary_table,
    "benchmark_hessian": hessian_table,
    "benchmark_training": training_speed_table,
    "bit_widths": bit_width_table,
    "precision_study": precision_table,
    "weight_study": weight_study_table,
    "cascade": cascade_table,
    "diagnose": diagnosis_table,
    "speech_quality": quality_table,
    "select_layers": selection_table,
}


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    launch(TablesConfig, run)
