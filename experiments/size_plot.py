"""The plot of errors against file sizes."""

import os
import statistics
from typing import Any

from qsv.scoring.figures import COLOURS, GREY, MARKERS, new_figure, save_figure, style_axes

_SIZE_TICKS_KB = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


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
    for bits in dict.fromkeys(row["bits"] for row in rows):
        own = [row for row in rows if row["bits"] == bits]
        size = statistics.geometric_mean([row["file_bytes"] / 1000 for row in own])
        top = max(row["eer_percent_interval"][1] for row in own)
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
