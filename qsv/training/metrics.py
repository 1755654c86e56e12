"""Metrics on disk: one JSON object a line, and TensorBoard events."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

from tensorboardX import SummaryWriter


class MetricWriter:
    """Appends scalars to `metrics.jsonl` and TensorBoard events in a run's folder.

    Names are `group/name_unit`, such as `eval/eer_percent`.
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._events = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one step; flushed, so that a kill loses nothing."""
        values = {name: float(value) for name, value in scalars.items()}
        # JSON has no NaN; null keeps the line readable everywhere.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.write(json.dumps({"step": step, "time_seconds": round(time.time(), 3), **finite}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`; a resumed run's repeated steps appear again, the last one counts."""
    path = pathlib.Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
