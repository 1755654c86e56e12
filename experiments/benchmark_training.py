"""What quantization-aware training costs a step, and what the CPU convolution rule saves.

    python -m experiments.benchmark_training --output=results/benchmark_training.json

Every variant's step runs once a round, in turns, in one process, so that a slower minute of the machine meets all of
them; medians and quartiles are over rounds. `--torch` adds the float step of the same network in PyTorch, where that
is installed, in rounds of its own afterwards; it is given the same huge pages.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from experiments.configuration import launch, machine, setting, write_json
from experiments.tables import training_speed_table
from experiments.timing import ratio_figures, time_figures, time_in_turns
from qsv.models import Network, model_names, resnet
from qsv.quant import KMeans, Quantizer, Rule, Uniform, init, resolve
from qsv.training import (
    Classification,
    MarginSoftmax,
    Optimizer,
    Task,
    TrainState,
    data_mesh,
    learning_rate_schedule,
    make_train_step,
    margin_schedule,
    put_batch,
    put_replicated,
)

_NUM_SPEAKERS = 1000
_FLOAT = "float"


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Flags of the benchmark."""

    model: str = setting("resnet18", "Network.", choices=model_names())
    width: int = setting(16, "Channels of the first stage; 0 for the usual.", minimum=0)
    crop_seconds: float = setting(1.0, "Length of a crop in seconds.", minimum=0.1)
    batch_size: int = setting(32, "Crops in a step.", minimum=1)
    rounds: int = setting(9, "Rounds; each runs every variant once.", minimum=2)
    quantized: bool = setting(True, "Time quantization-aware steps too.")
    torch: bool = setting(False, "Compare with PyTorch in float32, which must be installed.")
    output: str = setting("", "JSON file for the results; printed in any case.")


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Time all variants; returns what is written."""
    samples = round(config.crop_seconds * 16000)
    rng = np.random.default_rng(0)
    batch = {
        "waveform": rng.integers(-3000, 3000, (config.batch_size, samples)).astype(np.int16),
        "label": rng.integers(0, _NUM_SPEAKERS, config.batch_size).astype(np.int32),
    }
    steps = {_FLOAT: _step(config, batch, None)}
    if config.quantized:
        steps |= {
            "kmeans 4 bits": _step(config, batch, KMeans(4)),
            "uniform 4 bits": _step(config, batch, Uniform(4)),
            "kmeans 8 bits": _step(config, batch, KMeans(8)),
        }
    with mock.patch.object(resnet, "conv_general_dilated", jax.lax.conv_general_dilated):
        steps["float, XLA's convolution gradients"] = _step(config, batch, None)
    times = time_in_turns(steps, config.rounds)
    if config.torch:
        # Imported only now: the spinning threads of its OpenMP would slow the steps above.
        from experiments.torch_resnet import make_torch_step

        torch_steps = {
            name: make_torch_step(config.model, config.width, batch, _NUM_SPEAKERS, channels_last=channels_last)
            for name, channels_last in (("float, PyTorch", False), ("float, PyTorch, channels last", True))
        }
        times |= time_in_turns(torch_steps, config.rounds)
    results = {
        "experiment": "benchmark_training",
        "setting": f"{config.model} of width {config.width}, {config.batch_size} crops of {config.crop_seconds:g} s",
        "rounds": config.rounds,
        "rows": [_row(name, times[name], times[_FLOAT], config.batch_size) for name in times],
        "machine": machine(),
    }
    if config.output:
        write_json(pathlib.Path(config.output), results)
    print(training_speed_table(results))
    return results


def _step(config: BenchmarkConfig, batch: dict[str, np.ndarray], quantizer: Quantizer | None) -> Callable[[], None]:
    """A compiled and warm training step, quantized or float, that blocks until it is done."""
    network = Network.of_size(config.model, width=config.width)
    variables = network.init(jax.random.key(0))
    plan = resolve([Rule(".*/kernel", quantizer), Rule(".*", None)], variables["params"])
    learning_rate = learning_rate_schedule("constant", peak=1e-4, final=1e-4, num_steps=1)
    loss = MarginSoftmax(_NUM_SPEAKERS)
    task = Task(
        network=network,
        objective=Classification(loss, margin_schedule(final=0.2, rise_start=0, rise_end=0)),
        plan=plan,
        learning_rate=learning_rate,
        transformation=Optimizer().transformation(learning_rate),
    )
    mesh = data_mesh()
    state = TrainState.create(
        params=variables["params"],
        head=loss.init(jax.random.key(1), network.embedding_size),
        batch_stats=variables["batch_stats"],
        transformation=task.transformation,
        seed=0,
        qstate=init(plan, variables["params"]),
    )
    state = put_replicated(state, mesh)
    train_step, placed = make_train_step(task, mesh), put_batch(batch, mesh)

    def once() -> None:
        nonlocal state
        state, metrics = train_step(state, placed)
        jax.block_until_ready((state, metrics))

    once()
    once()
    return once


def _row(name: str, times: list[float], float_times: list[float], batch_size: int) -> dict[str, Any]:
    """One variant's figures."""
    figures = time_figures(name, times)
    return {
        **figures,
        "crops_per_second": 1000 * batch_size / figures["milliseconds"],
        "ratio_to_float": ratio_figures(times, float_times)["ratio"],
    }


if __name__ == "__main__":
    launch(BenchmarkConfig, run)
