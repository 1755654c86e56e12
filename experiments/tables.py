"""Tables and plots of results, and README's tables from `results/*.json`.

    python -m experiments.tables README.md

replaces what stands between `<!-- table results/NAME.json -->` and `<!-- end table -->` in each file named.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from experiments.configuration import launch
from qsv.scoring.figures import COLOURS, GREY, MARKERS, new_figure, save_figure, style_axes

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


def _comparison_note(results: dict[str, Any]) -> str:
    seeds = f"means of {results['seeds']} seeds" if results["seeds"] > 1 else "one seed"
    return (
        f"{results['steps']} steps of fine-tuning in all; {seeds}; float {results['float_eer_percent']:.2f} %; "
        f"test on {results['test']}; intervals by resampling {results['resampled']}, paired."
    )


# Okabe and Ito's colours, told apart by all; the first is the float model's.
_SIZE_TICKS_KB = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))

_TABLES = {
    "ablation": ablation_table,
    "binary": binary_table,
    "benchmark_hessian": hessian_table,
    "benchmark_training": training_speed_table,
    "bit_widths": bit_width_table,
    "precision_study": precision_table,
}


def plot_error_against_size(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """EER with its interval against the file's size, a line for each way to quantize; the float model is a diamond."""
    figure = new_figure()
    axes = figure.add_subplot()
    rows, colours = results["rows"], (GREY, *COLOURS)
    for index, series in enumerate(dict.fromkeys(map(_series, rows))):
        own = sorted((row for row in rows if _series(row) == series), key=lambda row: row["file_bytes"])
        # Equal bits make files of equal size: moved apart a little, or their intervals would hide each other.
        sizes = [row["file_bytes"] / 1000 * 1.03 ** max(index - 1, 0) for row in own]
        errors = [row["eer_percent"] for row in own]
        spans = [
            [row["eer_percent"] - row["eer_percent_interval"][0] for row in own],
            [row["eer_percent_interval"][1] - row["eer_percent"] for row in own],
        ]
        style: dict[str, Any] = {
            "color": colours[index % len(colours)],
            "marker": MARKERS[index % len(MARKERS)],
            "label": series,
        }
        axes.errorbar(sizes, errors, spans, capsize=3, linewidth=1.5, elinewidth=1, markersize=5, **style)
    tops: dict[tuple[int, int], float] = {}
    for row in rows:
        place = (row["bits"], round(row["file_bytes"] / 1000))
        tops[place] = max(tops.get(place, 0), row["eer_percent_interval"][1])
    for (bits, size), top in tops.items():
        text = "float" if bits == 32 else f"{bits} bits"
        axes.annotate(text, (size, top), textcoords="offset points", xytext=(2, 5), ha="center", fontsize=8)
    axes.axhline(rows[0]["eer_percent"], color=GREY, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    sizes_kb = [row["file_bytes"] / 1000 for row in rows]
    ticks = [tick for tick in _SIZE_TICKS_KB if 0.8 * min(sizes_kb) <= tick <= 1.2 * max(sizes_kb)]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("File size (kB)")
    axes.set_ylabel("EER (%), 95 % interval")
    # Networks that make no error at all leave the axis to matplotlib.
    axes.set_ylim(0, 1.15 * max(row["eer_percent_interval"][1] for row in rows) or None)
    style_axes(axes)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def _series(row: dict[str, Any]) -> str:
    """What a row is called in a plot, but for its bits."""
    scales = ", channel scales" if row["scales"] == "channel" else ""
    trained = "" if row["steps"] or row["scheme"] == "float" else ", not trained"
    return f"{row['scheme']}{scales}{trained}"


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    launch(TablesConfig, run)
