"""Cells that the tables of several experiments have."""

from typing import Any


def interval_cell(row: dict[str, Any], name: str, digits: int, *, sign: str = "") -> str:
    """A figure, with its interval where there is one (very many trials get none); sign "+" is for differences."""
    style = f"{sign}.{digits}f"
    figure = format(row[name], style)
    if f"{name}_interval" not in row:
        return figure
    low, high = (format(end, style) for end in row[f"{name}_interval"])
    return f"{figure} ({low} to {high})"


def correlation_cell(found: dict[str, float] | None) -> str:
    """A rank correlation with its interval; a dash where there is none."""
    return f"{found['estimate']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "–"
