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
        "| weights | bits | EER % (95 % interval) | minDCF (95 % interval) | EER / float EER (95 % interval) "
        "| file bytes | float parameters / file |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        # A float model without an error has no ratio to it.
        missing = "1" if row["scheme"] == "float" else "–"
        ratio = _interval(row, "eer_ratio", 2) if "eer_ratio" in row else missing
        lines.append(
            f"| {row['scheme']} | {row['bits']} | {_interval(row, 'eer_percent', 2)} "
            f"| {_interval(row, 'min_dcf', 3)} | {ratio} | {row['file_bytes']:,} "
            f"| {row['compression_ratio']:.2f} |"
        )
    first = results["rows"][0]
    lines.append("")
    lines.append(
        f"{results['parameters']:,} parameters, {results['steps']} fine-tuning steps; "
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


_TABLES = {"bit_widths": bit_width_table, "benchmark_training": training_speed_table}


def plot_error_against_size(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """EER with its interval against the file's size, one line for each scheme."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install 'qsv[demo]'") from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    float_row, *rows = results["rows"]
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    # Okabe and Ito's colours, told apart by all.
    colours = dict(zip(schemes, ("#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=False))
    for index, scheme in enumerate(schemes):
        own = sorted((row for row in rows if row["scheme"] == scheme), key=lambda row: row["file_bytes"])
        sizes = [row["file_bytes"] / 1000 for row in own]
        errors = [row["eer_percent"] for row in own]
        spans = [
            [row["eer_percent"] - row["eer_percent_interval"][0] for row in own],
            [row["eer_percent_interval"][1] - row["eer_percent"] for row in own],
        ]
        axes.errorbar(
            sizes,
            errors,
            spans,
            label=scheme,
            color=colours[scheme],
            marker="os^D"[index],
            capsize=3,
            linewidth=1.5,
        )
        for row, size in zip(own, sizes, strict=True):
            axes.annotate(
                f"{row['bits']} bits",
                (size, row["eer_percent"]),
                textcoords="offset points",
                xytext=(5, 6 if index == 0 else -12),
                fontsize=8,
                color=colours[scheme],
            )
    axes.axhline(float_row["eer_percent"], color="#555555", linestyle="--", linewidth=1)
    axes.annotate(
        f"float, {float_row['file_bytes'] / 1000:,.0f} kB",
        (0.99, float_row["eer_percent"]),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right",
        fontsize=8,
        color="#555555",
    )
    axes.set_xlabel("File size (kB)")
    axes.set_ylabel("EER (%), 95 % interval")
    axes.set_ylim(bottom=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _interval(row: dict[str, Any], name: str, digits: int) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    launch(TablesConfig, run)
