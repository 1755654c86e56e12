"""Timing of several calls in turns, so that a slower minute of the machine meets all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm


def time_in_turns(
    calls: Mapping[str, Callable[[], None]], rounds: int, *, pause_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Milliseconds of every call in every round; each call blocks until it is done, and is warm.

    Before each there is a pause, for threads of the call before that wait for more work in a busy loop.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc="benchmark", unit="round"):
        for name, call in calls.items():
            time.sleep(pause_seconds)
            started = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - started))
    return times


def time_figures(name: str, times: list[float]) -> dict[str, Any]:
    """Name, median and quartiles."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"name": name, "milliseconds": median, "milliseconds_quartiles": [low, high]}


def ratio_figures(times: list[float], reference: list[float]) -> dict[str, Any]:
    """Median and range of the ratios within each round."""
    ratios = [own / other for own, other in zip(times, reference, strict=True)]
    return {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
