"""Tables of results, and those and the figures of README and docs/ from `results/*.json`.

    python -m experiments.tables README.md docs/*.md

replaces what stands between `<!-- table results/NAME.json -->` and `<!-- end table -->` in each file named, and draws
the figures whose line follows a `<!-- figure results/NAME.json -->`; paths are relative to that file. A marker may name
several files where one experiment's table has a line for each (`<!-- table results/A.json results/B.json -->`).
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

from experiments.configuration import launch
from experiments.diagnosis_report import diagnosis_summary
from experiments.size_plot import plot_error_against_size
from experiments.study_tables import (
    cascade_table,
    integer_table,
    quality_table,
    selection_table,
    weight_study_table,
)
from experiments.table_cells import interval_cell

_MARKED = re.compile(r"(<!-- table (?P<paths>\S+(?: \S+)*) -->\n).*?(<!-- end table -->)", re.DOTALL)
_DRAWN = re.compile(r"<!-- figure (?P<path>\S+) -->\n!\[[^\]]*\]\((?P<figure>[^)]+)\)")


@dataclasses.dataclass(frozen=True)
class TablesConfig:
    """The arguments are the Markdown files."""

    arguments: tuple[str, ...] = ()


def run(config: TablesConfig) -> None:
    """Rewrite the tables of every file named, and draw its figures."""
    if not config.arguments:
        raise ValueError("name the Markdown files whose tables to make anew, such as README.md")
    for name in config.arguments:
        path = pathlib.Path(name)
        text = path.read_text(encoding="utf-8")
        path.write_text(with_tables(text, path.parent), encoding="utf-8")
        for match in _DRAWN.finditer(text):
            results = json.loads((path.parent / match["path"]).read_text(encoding="utf-8"))
            plot_error_against_size(results, path.parent / match["figure"])


def with_tables(text: str, folder: pathlib.Path) -> str:
    """The Markdown text with its tables made anew from the results they name, relative to `folder`."""

    def table(match: re.Match[str]) -> str:
        results = [json.loads((folder / path).read_text(encoding="utf-8")) for path in match["paths"].split()]
        (experiment,) = {one["experiment"] for one in results}
        return f"{match[1]}\n{_TABLES[experiment](*results)}\n{match[3]}"

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
        ratio = interval_cell(row, "eer_ratio", 2) if "eer_ratio" in row else missing
        lines.append(
            f"| {row['scheme']} | {row['scales']} | {row['bits']} | {row['steps']} "
            f"| {interval_cell(row, 'eer_percent', 2)} | {interval_cell(row, 'min_dcf', 3)} | {ratio} "
            f"| {row['file_bytes']:,} | {row['compression_ratio']:.2f} |"
        )
    first = results["rows"][0]
    # Files from before there were pins have none.
    pins = [pin.partition(":") for pin in results.get("pinned", [])]
    pinned = "".join(f"{bits} bits for `{path}` in all models; " for bits, _, path in pins)
    lines.append("")
    lines.append(
        f"{results['parameters']:,} parameters; {pinned}steps of fine-tuning; test on {results['test']}: "
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
        ratio = interval_cell(row, "eer_ratio", 2) if "eer_ratio" in row else missing
        lines.append(f"| {row['ingredient']} | {cosine} | {interval_cell(row, 'eer_percent', 2)} | {ratio} |")
    lines.append("")
    lines.append(
        f"{results['scheme']}, {results['bits']} bits, no training; each line with all above it; median cosine over "
        f"utterances of the calibration's corpus; test on {results['test']}."
    )
    return "\n".join(lines) + "\n"


def hessian_table(results: dict[str, Any]) -> str:
    """Markdown: a gradient, a Hessian-vector product, and what the traces of `experiments.benchmark_hessian` took."""
    lines = ["| of the loss | median ms | quartiles ms | gradients (range over rounds) |", "|---|--:|--:|--:|"]
    names = {
        "gradient": "gradient",
        "product": "Hessian-vector product alone",
        "together": f"each of {results['products']} products at one point",
        "gauss_newton": f"each of {results['products']} Gauss-Newton probes at one point",
    }
    for row in results["rows"]:
        low, high = row["milliseconds_quartiles"]
        least, most = row["ratio_range"]
        cost = "1" if row["name"] == "gradient" else f"{row['ratio']:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {names[row['name']]} | {row['milliseconds']:.0f} | {low:.0f} to {high:.0f} | {cost} |")
    text = f"{results['network']}, {results['setting']}; {results['rounds']} interleaved rounds"
    if results["traces"]:
        wanted = 100 * results["traces"]["wanted_error"]
        lines += ["", f"| traces | probes | seconds | layers within {wanted:.0f} % | largest error % | probes needed |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        for kind, name in (("hessian", "Hessian"), ("gauss_newton", "Gauss-Newton")):
            own = results["traces"][kind]
            lines.append(
                f"| {name} | {own['probes']} | {own['seconds']:.0f} | {own['layers_within']} of {own['layers']} "
                f"| {100 * own['largest_error']:.0f} | {own['probes_needed']:,} |"
            )
    return "\n".join([*lines, "", f"{text}; {results['machine']['cores']} cores."]) + "\n"


def inference_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each file, length and number of threads of `experiments.benchmark_inference`."""
    lines = [
        "| frames | threads | file | latency ms (quartiles) | against float (range) | load and first run s | peak MB "
        "| file bytes |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    names = {
        "float": "float",
        "packed": f"{results['bits']}-bit weights, float arithmetic",
        "integer": f"{results['bits']}-bit weights, 8-bit activations",
    }
    names |= {f"{kind} on OpenVINO": f"{name}, on OpenVINO" for kind, name in names.items()}
    for row in results["rows"]:
        (low, high), (least, most) = row["milliseconds_quartiles"], row["ratio_range"]
        lines.append(
            f"| {row['frames']} | {row['threads']} | {names.get(row['name'], row['name'])} "
            f"| {row['milliseconds']:.1f} ({low:.1f} to {high:.1f}) | {row['ratio']:.2f} ({least:.2f} to {most:.2f}) "
            f"| {row['start_seconds']:.2f} | {row['peak_mbytes']:.0f} | {results['file_bytes'][row['name']]:,} |"
        )
    integers = results["integer_operations"]
    quantized = sum(count for name, count in integers.items() if name.startswith("QLinear"))
    floats = integers.get("Conv", 0) + integers.get("FusedConv", 0)
    lines += [
        "",
        f"{results['network']}, from features to embedding; {results['rounds']} interleaved rounds; "
        f"{quantized} operations of the integer graph run in integers, {floats} convolutions in float; "
        f"onnxruntime {results['onnxruntime']}, {results['machine']['cores']} cores. Codes, tables and floats of the "
        f"{results['bits']}-bit weights take {results['content_bytes']:,} bytes. `qsv verify` from start to end: "
        + ", ".join(f"{seconds:.2f} s ({kind})" for kind, seconds in results["verify_seconds"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def loading_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each way of loading of `experiments.benchmark_loader`."""
    lines = ["| crops | processes | crops/s | ms a crop | resident MB |", "|---|--:|--:|--:|--:|"]
    for row in results["rows"]:
        rate = row["crops_per_second"]
        lines.append(
            f"| {row['name']} | {row['workers'] or 'this one'} | {rate:,.0f} | {1000 / rate:.2f} "
            f"| {row['resident_mbytes']:,.0f} |"
        )
    lines += [
        "",
        f"Crops of {results['crop_seconds']:g} s of {results['utterances']:,} utterances, layout {results['layout']}, "
        f"nothing kept decoded; {results['machine']['cores']} cores.",
    ]
    return "\n".join(lines) + "\n"


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
            interval_cell(row, f"eer_percent_above_{other}", 2) if f"eer_percent_above_{other}" in row else ""
            for other in ("uniform", "one_shot")
        ]
        cells = [f"{row['bits']} bits", name, interval_cell(row, "eer_percent", 2), *above, f"{row['file_bytes']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _comparison_note(results)]) + "\n"


def binary_table(results: dict[str, Any]) -> str:
    """Markdown: one line for each kind of `experiments.binary`."""
    lines = [
        "| levels | EER % (95 % interval) | above sign (95 % interval) | above static (95 % interval) | file bytes |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        above = [
            interval_cell(row, f"eer_percent_above_{other}", 2) if f"eer_percent_above_{other}" in row else ""
            for other in ("sign", "static_binary")
        ]
        cells = [row["kind"].replace("_", " "), interval_cell(row, "eer_percent", 2), *above, f"{row['file_bytes']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _comparison_note(results)]) + "\n"


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
    "benchmark_inference": inference_table,
    "benchmark_loader": loading_table,
    "benchmark_training": training_speed_table,
    "bit_widths": bit_width_table,
    "precision_study": precision_table,
    "weight_study": weight_study_table,
    "cascade": cascade_table,
    "diagnose": diagnosis_summary,
    "integer_network": integer_table,
    "speech_quality": quality_table,
    "select_layers": selection_table,
}


if __name__ == "__main__":
    launch(TablesConfig, run)
