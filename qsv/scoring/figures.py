"""The look of every figure: colours that stay apart in print, light grids, PNG and SVG."""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, without its yellow, in an order that stays apart in print too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("D", "o", "s", "^", "v", "P", "X")
GREY = "#999999"
_GRID = "#DDDDDD"
_DOTS_PER_INCH = 150


def new_figure(width_inches: float = 6.4, height_inches: float = 4.4) -> Figure:
    """An empty figure, its parts laid out when it is saved.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'qsv[demo]'") from error
    return Figure(figsize=(width_inches, height_inches), dpi=_DOTS_PER_INCH, layout="constrained")


def style_axes(axes: Axes, *, grid: str = "both") -> None:
    """A light grid behind the data, along "x", "y" or "both", and no frame where there is no axis."""
    axes.grid(axis=grid, color=_GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format of the file's suffix (.png, .pdf, .svg); beside a .png its .svg, for print.

    An .svg of the same figure is the same file to the byte.
    """
    import matplotlib

    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix != ".svg":
        figure.savefig(target)
    if target.suffix in (".png", ".svg"):
        with matplotlib.rc_context({"svg.hashsalt": "qsv"}):
            figure.savefig(target.with_suffix(".svg"), metadata={"Date": None})
