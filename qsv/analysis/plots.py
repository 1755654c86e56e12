"""Figures of what quantization changed: weights against their levels, layers, drift of scores, flips."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from qsv.analysis.scores import flip_density
from qsv.quant import QTensor
from qsv.quant.qtensor import scaled_levels
from qsv.scoring import eer_threshold
from qsv.scoring.figures import COLOURS, GREY, LINE_STYLES, MARKERS, new_figure, save_figure, style_axes

_COLUMNS = 4
# Beyond so many levels their lines would hide the histogram.
_MOST_LEVELS_DRAWN = 16
# Of so few measurements on a curve each is marked; of more, the line is enough.
_MOST_MARKED = 12


def plot_weight_histograms(
    weights: Mapping[str, ArrayLike],
    packed: Mapping[str, QTensor],
    path: str | os.PathLike[str],
    *,
    num_bins: int = 100,
) -> None:
    """Histograms of layers' float weights, with the levels that they are quantized to as lines.

    Args:
        weights: {layer: float weights}, a panel each.
        packed: {layer: the same quantized}; of layers with a scale for each channel the mean scale is drawn.
        path: file to write, as in `plot_det`.
        num_bins: bins over the range of a layer's weights.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no layer.
    """
    if not weights:
        raise ValueError("there is no layer to plot")
    rows = -(-len(weights) // _COLUMNS)
    figure = new_figure(2.6 * _COLUMNS, 1.9 * rows + 0.4)
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axes, (name, values) in zip(panels, weights.items(), strict=False):
        axes.hist(np.asarray(values, np.float64).ravel(), num_bins, density=True, color=COLOURS[0], alpha=0.75)
        for level in _drawn_levels(packed[name]):
            axes.axvline(level, color=COLOURS[1], linewidth=0.8)
        axes.set_title(name, fontsize=7)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
        style_axes(axes, grid="x")
    for axes in panels[len(weights) :]:
        axes.set_visible(False)
    figure.supxlabel("Weight (lines: levels)")
    figure.supylabel("Density")
    save_figure(figure, path)


def _drawn_levels(packed: QTensor) -> np.ndarray:
    """The levels of a tensor, those of its channels averaged; none where they are too many."""
    levels = np.asarray(scaled_levels(packed.codebook, packed.scale), np.float64)
    mean = levels.reshape(-1, levels.shape[-1]).mean(axis=0)
    return mean if mean.size <= _MOST_LEVELS_DRAWN else np.empty(0)


def plot_layers(
    figures: Mapping[str, Mapping[str, float]],
    path: str | os.PathLike[str],
    *,
    ylabel: str,
    reference: float | None = None,
) -> None:
    """One figure of every layer for several networks, in the order of the layers.

    Args:
        figures: {network: {layer: figure}}, in their order; networks may lack layers that others have.
        path: file to write, as in `plot_det`.
        ylabel: what the figure is, with its unit.
        reference: a level to draw as a line, such as the float network's error rate.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to plot.
    """
    layers = _merged(figures.values())
    if not layers:
        raise ValueError("there is no layer to plot")
    places = {name: place for place, name in enumerate(layers, start=1)}
    figure = new_figure(max(6.4, min(0.14 * len(layers), 20.0)), 4.6)
    axes = figure.add_subplot()
    if reference is not None:
        axes.axhline(reference, color=GREY, linestyle=":", linewidth=1.2)
    for number, (network, own) in enumerate(figures.items()):
        axes.plot(
            [places[name] for name in own],
            list(own.values()),
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINE_STYLES[number % len(LINE_STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=3,
            linewidth=1,
            label=network,
        )
    step = -(-len(layers) // 40)
    axes.set_xticks(range(1, len(layers) + 1, step), layers[::step], rotation=90, fontsize=6)
    axes.set_xlabel("Layer, in the network's order")
    axes.set_ylabel(ylabel)
    style_axes(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)


def _merged(orders: Iterable[Iterable[str]]) -> list[str]:
    """All names once, those that the first order lacks behind the one that they follow in their own."""
    merged: list[str] = []
    for names in orders:
        place = 0
        for name in names:
            if name in merged:
                place = merged.index(name) + 1
            else:
                merged.insert(place, name)
                place += 1
    return merged


def plot_score_drift(
    reference: ArrayLike,
    systems: Mapping[str, ArrayLike],
    labels: ArrayLike,
    path: str | os.PathLike[str],
    *,
    num_bins: int = 80,
) -> None:
    """Densities of the drift of scores from a float network's, of target and non-target trials.

    Args:
        reference: `[trials]` scores of the float network.
        systems: {network: `[trials]` scores}.
        labels: `[trials]` bool or 0/1, true for target trials.
        path: file to write, as in `plot_det`.
        num_bins: bins over the range of all drifts.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no network to plot.
    """
    if not systems:
        raise ValueError("there is no network to plot")
    before, targets = np.asarray(reference, np.float64), np.asarray(labels, bool)
    drifts = {name: np.asarray(scores, np.float64) - before for name, scores in systems.items()}
    everything = np.concatenate(list(drifts.values()))
    edges = np.histogram_bin_edges(everything, num_bins, tuple(np.quantile(everything, [1e-4, 1 - 1e-4])))
    figure = new_figure(8.0, 3.8)
    for axes, (title, trials) in zip(
        figure.subplots(1, 2, sharex=True), (("Target trials", targets), ("Non-target trials", ~targets)), strict=True
    ):
        for number, (name, drift) in enumerate(drifts.items()):
            density, _ = np.histogram(drift[trials], edges, density=True)
            line = LINE_STYLES[number % len(LINE_STYLES)]
            axes.stairs(density, edges, color=COLOURS[number % len(COLOURS)], linestyle=line, label=name)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("Score less float score")
        style_axes(axes)
    figure.axes[0].set_ylabel("Density")
    figure.axes[1].legend(frameon=False)
    save_figure(figure, path)


def plot_flips(
    reference: ArrayLike,
    systems: Mapping[str, ArrayLike],
    labels: ArrayLike,
    path: str | os.PathLike[str],
    *,
    own_thresholds: bool = False,
    num_bins: int = 60,
) -> None:
    """Where on the float network's scale of scores decisions flip, a panel for each network.

    Args:
        reference: as in `plot_score_drift`, and so are the next three.
        systems: as there.
        labels: as there.
        path: as there.
        own_thresholds: decide at each network's own EER threshold, not the float one's.
        num_bins: bins of equal width over the scores.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no network to plot.
    """
    if not systems:
        raise ValueError("there is no network to plot")
    threshold = eer_threshold(reference, labels)
    figure = new_figure(6.4, 1.0 + 1.9 * len(systems))
    panels = figure.subplots(len(systems), 1, sharex=True, squeeze=False).ravel()
    for axes, (name, scores) in zip(panels, systems.items(), strict=True):
        own = eer_threshold(scores, labels) if own_thresholds else None
        found: dict[str, Any] = flip_density(
            reference, scores, labels, threshold=threshold, own_threshold=own, num_bins=num_bins
        )
        axes.stairs(found["trials"], found["edges"], color=GREY, linestyle=":", label="trials")
        for part, colour, line in (("harmful", COLOURS[1], "-"), ("beneficial", COLOURS[0], "--")):
            axes.stairs(found[part], found["edges"], color=colour, linestyle=line, label=f"{part} flips")
        axes.axvline(threshold, color=GREY, linewidth=0.8)
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
        axes.set_title(name, fontsize=9)
        axes.set_ylabel("Trials")
        style_axes(axes)
    panels[-1].set_xlabel("Score of the float network (line: its EER threshold)")
    panels[0].legend(frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_trade_off(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[float, float]],
    path: str | os.PathLike[str],
    *,
    xlabel: str,
    ylabel: str,
) -> None:
    """Curves of what is lost against what it costs, and single systems beside them.

    Args:
        curves: {name: (x, y)}, such as a cascade at all bounds.
        points: {name: (x, y)}, such as single precisions.
        path: file to write, as in `plot_det`.
        xlabel: the cost, with its unit.
        ylabel: the loss, with its unit.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to plot.
    """
    if not curves and not points:
        raise ValueError("there is nothing to plot")
    figure = new_figure()
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        colour, line = COLOURS[number % len(COLOURS)], LINE_STYLES[number % len(LINE_STYLES)]
        marker = "o" if len(curve[0]) <= _MOST_MARKED else ""
        axes.plot(*curve, color=colour, linestyle=line, marker=marker, markersize=4, label=name)
    for number, (name, point) in enumerate(points.items()):
        axes.scatter(*point, marker=MARKERS[number % len(MARKERS)], color=GREY, zorder=3, label=name)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    style_axes(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)


def plot_predictions(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike, path: str | os.PathLike[str], *, label: str
) -> None:
    """Predicted against true scores, a panel for each predictor.

    Args:
        predictions: {predictor: [n] scores}.
        labels: [n] true ones.
        path: file to write, as in `plot_det`.
        label: what is predicted, such as "PESQ".

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no predictor.
    """
    if not predictions:
        raise ValueError("there is no predictor to plot")
    truth = np.asarray(labels, np.float64)
    figure = new_figure(3.2 * len(predictions) + 0.4, 3.6)
    panels = figure.subplots(1, len(predictions), squeeze=False, sharex=True, sharey=True).ravel()
    ends = [float(truth.min()), float(truth.max())]
    for axes, (name, values) in zip(panels, predictions.items(), strict=True):
        axes.plot(ends, ends, color=GREY, linewidth=1)
        axes.scatter(truth, np.asarray(values, np.float64), s=6, color=COLOURS[0], alpha=0.5, linewidths=0)
        axes.set_title(name, fontsize=9)
        style_axes(axes)
    figure.supxlabel(label)
    figure.supylabel(f"Predicted {label}")
    save_figure(figure, path)
