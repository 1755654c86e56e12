"""Tables and plots of an allocation of bits."""

import os

from experiments.sensitivity import Measured
from qsv.precision import Allocation
from qsv.scoring.figures import COLOURS, GREY, new_figure, save_figure, style_axes

_BLUE, _ORANGE = COLOURS[:2]


def allocation_table(measured: Measured, allocation: Allocation) -> str:
    """Markdown: one line for each layer, with its sensitivity and the bits that it got."""
    by_trace = bool(measured.traces)
    header = ["layer", "weights", *(["trace / weights", "error"] if by_trace else []), "bits", "cost", "bytes"]
    lines = [f"| {' | '.join(header)} |", f"|---|{'--:|' * (len(header) - 1)}"]
    for layer in measured.layers:
        choice, cells = layer.choice(allocation.bits[layer.path]), [layer.path, f"{layer.weights:,}"]
        if by_trace:
            trace = measured.traces[layer.path]
            error = f"{100 * trace.standard_error / abs(trace.trace):.0f} %" if trace.trace else "–"
            cells += [f"{trace.mean_trace:.3g}", error]
        cells += [str(choice.bits), f"{choice.cost:.3g}", f"{choice.size_bytes:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_allocation(measured: Measured, allocation: Allocation, path: str | os.PathLike[str]) -> None:
    """Bits, sensitivity and bytes of every layer in the network's order, one above the other."""
    layers = measured.layers
    places = range(1, len(layers) + 1)
    chosen = [layer.choice(allocation.bits[layer.path]) for layer in layers]
    figure = new_figure(max(6.4, 0.09 * len(layers)), 7.0)
    bits, sensitivity, size = figure.subplots(3, 1, sharex=True)
    bits.bar(places, [choice.bits for choice in chosen], width=0.8, color=_BLUE)
    bits.axhline(allocation.average_bits, color=_ORANGE, linestyle="--", linewidth=1)
    bits.set_title(f"dashed: mean over weights, {allocation.average_bits:.2f} bits", loc="right", fontsize=9)
    bits.set_ylabel("Bits a weight")
    if measured.traces:
        traces = [measured.traces[layer.path] for layer in layers]
        values = [trace.mean_trace for trace in traces]
        errors = [trace.standard_error / max(trace.weights, 1) for trace in traces]
        sensitivity.errorbar(places, values, errors, fmt="o", color=_BLUE, markersize=3, elinewidth=1)
        sensitivity.set_ylabel("Trace / weights")
    else:
        sensitivity.plot(places, [choice.cost for choice in chosen], "o", color=_BLUE, markersize=3)
        sensitivity.set_ylabel("Cost at these bits")
    sensitivity.set_yscale("log", nonpositive="mask")
    size.bar(places, [4 * layer.weights / 1000 for layer in layers], width=0.8, color=GREY, label="float32")
    size.bar(places, [choice.size_bytes / 1000 for choice in chosen], width=0.8, color=_ORANGE, label="quantized")
    size.set_yscale("log")
    size.set_ylabel("Size (kB)")
    size.set_xlabel("Quantized layer, in the network's order")
    size.legend(frameon=False, loc="upper left")
    for axes in (bits, sensitivity, size):
        style_axes(axes, grid="y")
    save_figure(figure, path)
