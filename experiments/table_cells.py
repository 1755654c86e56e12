"""Cells that the tables of several experiments have."""

from typing import Any


def interval_cell(row: dict[str, Any], name: str, digits: int) -> str:
    """A figure with its interval."""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
