"""How many training crops a second the loading yields, what they cost, and what memory it takes.

    python -m experiments.benchmark_loader --data_dir=prepared --data_layout=prepared --noise_dir=DATA/noise \
        --output=results/benchmark_loader.json

First one core alone: reading, then with changes of speed, then with noise. Then all of it with so many processes as
`--workers` says. Nothing is kept decoded (`--cache_mbytes=0`), as with a corpus that is larger than memory.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.speech import SpeechConfig, make_loader, training_corpus
from experiments.tables import loading_table

READING, SPEED, NOISE = "reading", "and changes of speed", "and noise"


@dataclasses.dataclass(frozen=True)
class LoaderBenchmarkConfig:
    """Flags of the benchmark."""

    workers: tuple[str, ...] = setting(("1", "2"), "Numbers of processes to load with.")
    seconds: float = setting(10.0, "How long to load for each figure.", minimum=0.01)
    sample_rate_hz: int = setting(16000, "Rate of the crops.", minimum=1)
    output: str = setting("", "JSON file for the results; printed in any case.")
    speech: SpeechConfig = SpeechConfig(cache_mbytes=0)

    def __post_init__(self) -> None:
        if not all(count.isdecimal() for count in self.workers):
            raise ValueError(f"--workers must be whole numbers, got {list(self.workers)}")


def run(config: LoaderBenchmarkConfig) -> dict[str, Any]:
    """Measure; returns what is written."""
    require(data_dir=config.speech.data_dir)
    silent = dataclasses.replace(
        config.speech, noise_dir=(), musan_dir="", reverberation_dir="", simulated_rooms=0, speed_perturbation=False
    )
    alone = {"loader_threads": 0, "loader_workers": 0}
    steps = {READING: silent, SPEED: dataclasses.replace(silent, speed_perturbation=True)}
    full = dataclasses.replace(config.speech, speed_perturbation=True)
    rows = [_row(config, dataclasses.replace(own, **alone), name) for name, own in {**steps, NOISE: full}.items()]
    for count in map(int, config.workers):
        own = dataclasses.replace(full, loader_workers=count, loader_threads=1)
        rows.append(_row(config, own, f"all, {count} process{'es' * (count != 1)}"))
    corpus = training_corpus(silent)
    results = {
        "experiment": "benchmark_loader",
        "crop_seconds": config.speech.crop_seconds,
        "batch_size": config.speech.batch_size,
        "layout": config.speech.data_layout,
        "utterances": len(corpus),
        "rows": rows,
        "machine": machine(),
    }
    if config.output:
        write_json(pathlib.Path(config.output), results)
    print(loading_table(results))
    return results


def _row(config: LoaderBenchmarkConfig, speech: SpeechConfig, name: str) -> dict[str, Any]:
    """Crops a second over the time that was asked for, the first batch apart, which starts what loads."""
    corpus = training_corpus(speech)
    loader = make_loader(speech, corpus, seed=0, sample_rate_hz=config.sample_rate_hz)
    next(loader)
    started, batches = time.perf_counter(), 0
    while time.perf_counter() - started < config.seconds:
        next(loader)
        batches += 1
    seconds = time.perf_counter() - started
    memory = sum(map(_resident_bytes, _processes(os.getpid())))
    loader.close()
    return {
        "name": name,
        "workers": speech.loader_workers,
        "crops_per_second": batches * speech.batch_size / seconds,
        "resident_mbytes": memory / 1e6,
    }


def _processes(number: int) -> Iterator[int]:
    """A process and all below it, by their numbers."""
    yield number
    for file in pathlib.Path(f"/proc/{number}/task").glob("*/children"):
        for child in file.read_text().split():
            yield from _processes(int(child))


def _resident_bytes(number: int) -> int:
    """Memory of a process; Linux alone tells it so."""
    lines = pathlib.Path(f"/proc/{number}/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


if __name__ == "__main__":
    launch(LoaderBenchmarkConfig, run)
