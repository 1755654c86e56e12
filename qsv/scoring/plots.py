"""DET plots."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from qsv.scoring.figures import COLOURS, GREY, LINE_STYLES, new_figure, save_figure, style_axes
from qsv.scoring.metrics import Floats, det_curve, detection_cost, eer_of_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS_PERCENT = (0.01, 0.1, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 90)


def plot_det(
    systems: Mapping[str, tuple[ArrayLike, ArrayLike]],
    path: str | os.PathLike[str],
    *,
    p_target: float = 0.01,
    c_miss: float = 1.0,
    c_fa: float = 1.0,
    title: str | None = None,
) -> None:
    """Draws detection error trade-off curves on normal-deviate axes, EER (circle) and minDCF (triangle)
    marked.

    Args:
        systems: name -> `(scores, labels)` as in `det_curve`; the legend keeps the order.
        path: file to write; its suffix says the format (.png, .pdf, .svg), and a .png has its .svg beside it.
        p_target: prior of a target trial for minDCF.
        c_miss: cost of a miss for minDCF.
        c_fa: cost of a false alarm for minDCF.
        title: printed above the plot.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no system, or its trials are not as `det_curve` wants them; the system is named.

    Source: Martin et al., "The DET curve in assessment of detection task performance", Eurospeech 1997.
    """
    if not systems:
        raise ValueError("there is no system to plot")
    costs = {"p_target": p_target, "c_miss": c_miss, "c_fa": c_fa}
    curves = [_Curve.of(name, *trials, costs) for name, trials in systems.items()]
    figure = new_figure(6.4, 7.4)
    axes = figure.add_subplot()
    low, high = _limits(curves)
    _finish_axes(axes, low, high, title)
    for number, curve in enumerate(curves):
        colour, line = COLOURS[number % len(COLOURS)], LINE_STYLES[number % len(LINE_STYLES)]
        axes.plot(
            _deviate(curve.p_fa),
            _deviate(curve.p_miss),
            color=colour,
            linestyle=line,
            linewidth=1.6,
            label=f"{curve.name}: EER {100 * curve.equal:.2f} %, minDCF {curve.cost:.3f}",
        )
        # A mark outside the plot is drawn on its edge.
        for mark, point in (("o", (curve.equal, curve.equal)), ("v", curve.cheapest)):
            axes.plot(*_deviate(np.clip(point, low, high))[:, None], mark, clip_on=False, **_marker(colour))
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", label="EER", **_marker("#666666")),
        Line2D([], [], marker="v", linestyle="", label=f"minDCF, p_target = {p_target:g}", **_marker("#666666")),
    ]
    handles, _ = axes.get_legend_handles_labels()
    # Below the plot, where it covers no curve.
    figure.legend(handles=[*handles, *marks], loc="outside lower center", frameon=False)
    save_figure(figure, path)


@dataclasses.dataclass(frozen=True)
class _Curve:
    """Operating points of one system; `cheapest` is (p_fa, p_miss) at the minimum detection cost."""

    name: str
    p_miss: Floats
    p_fa: Floats
    equal: float
    cost: float
    cheapest: tuple[float, float]

    @classmethod
    def of(cls, name: str, scores: ArrayLike, labels: ArrayLike, costs: dict[str, float]) -> _Curve:
        try:
            _, p_miss, p_fa = det_curve(scores, labels)
        except ValueError as error:
            raise ValueError(f"system {name!r}: {error}") from error
        cost = detection_cost(p_miss, p_fa, **costs)
        best = np.argmin(cost)
        return cls(name, p_miss, p_fa, eer_of_rates(p_miss, p_fa), cost[best], (p_fa[best], p_miss[best]))


def _limits(curves: list[_Curve]) -> tuple[float, float]:
    """Lowest and highest rate shown: what holds every mark, within reason."""
    rates = [rate for curve in curves for rate in (curve.equal, *curve.cheapest)]
    return 1e-4 if min(rates) < 3e-3 else 1e-3, float(np.clip(1.3 * max(rates), 0.5, 0.95))


def _deviate(probability: ArrayLike) -> Floats:
    """Standard normal quantile; 0 and 1 are moved beyond every axis instead of to infinity."""
    return ndtri(np.clip(probability, 1e-9, 1.0 - 1e-9))


def _marker(colour: str) -> dict[str, Any]:
    return {"color": colour, "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 1.0, "zorder": 3}


def _finish_axes(axes: Axes, low: float, high: float, title: str | None) -> None:
    limits = _deviate([low, high])
    ticks = [tick for tick in TICKS_PERCENT if low <= tick / 100 <= high]
    positions, names = _deviate(np.divide(ticks, 100)), [f"{tick:g}" for tick in ticks]
    axes.plot(limits, limits, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    axes.set_xticks(positions, names)
    axes.set_yticks(positions, names)
    axes.set_box_aspect(1)
    axes.set_xlabel("False alarms (%)")
    axes.set_ylabel("Misses (%)")
    style_axes(axes)
    if title is not None:
        axes.set_title(title)
