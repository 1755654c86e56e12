"""What a Hessian-vector product and a Gauss-Newton probe cost in gradients, and how many give exact traces.

    python -m experiments.benchmark_hessian --model=resnet34 --data_dir=DATA/librispeech251 --cpu_devices=2 \
        --output=results/benchmark_hessian.json

A gradient, a product alone, and a product and a Gauss-Newton probe among `--products` at one point, as the traces take
them, are timed in turns, in one process; medians and quartiles are over rounds. `--pretrained` takes a trained network
in place of one of random weights, whose traces are of no other use.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from experiments.classifier import class_directions
from experiments.configuration import launch, machine, setting, write_json
from experiments.models import load_float_model
from experiments.sensitivity import margin_logits, margin_loss
from experiments.speech import SpeechConfig, make_loader, training_corpus
from experiments.tables import hessian_table
from experiments.timing import ratio_figures, time_figures, time_in_turns
from qsv.data import Corpus
from qsv.models import Network, model_names
from qsv.precision import (
    Loss,
    OutputLoss,
    StoppingRule,
    TraceEstimate,
    gauss_newton_traces,
    hessian_operator,
    hessian_traces,
    hessian_vector_product,
    largest_relative_error,
)
from qsv.quant import leaf_paths
from qsv.training import MarginSoftmax, data_mesh, put_batch, put_replicated

_MARGIN = 0.2


@dataclasses.dataclass(frozen=True)
class HessianBenchmarkConfig:
    """Flags of the benchmark."""

    model: str = setting("resnet34", "Network.", choices=model_names())
    width: int = setting(0, "Channels of the first stage; 0 for the usual.", minimum=0)
    pretrained: str = setting("", "Trained float network in place of --model, as in experiments.quantize.")
    rounds: int = setting(9, "Rounds; each times a gradient and the products.", minimum=2)
    products: int = setting(4, "Products computed together, for the traces too.", minimum=1)
    trace_error: float = setting(0.1, "Wanted standard error of every trace, relative to it.", minimum=1e-6)
    max_probes: int = setting(300, "Probes after which to stop anyway; 0 leaves the traces out.", minimum=0)
    seed: int = setting(0, "Seed of the weights, the crops and the probes.", minimum=0)
    output: str = setting("", "JSON file for the results; printed in any case.")
    speech: SpeechConfig = SpeechConfig(batch_size=16)


def run(config: HessianBenchmarkConfig) -> dict[str, Any]:
    """Time, and estimate the traces; returns what is written."""
    corpus, mesh = training_corpus(config.speech), data_mesh()
    name, losses, params, network = _problem(config, corpus)
    loader = make_loader(config.speech, corpus, seed=config.seed, sample_rate_hz=network.frontend.sample_rate_hz)
    (batch,) = itertools.islice(loader, 1)
    loader.close()
    params, batch = put_replicated(params, mesh), put_batch(batch, mesh)
    mean_loss = _mean_over_devices(losses.loss)
    vectors = [_probe(params, jax.random.key(1 + i)) for i in range(config.products)]
    calls = {
        "gradient": lambda at, data: jax.grad(mean_loss)(at, data),
        "product": lambda at, data: hessian_vector_product(mean_loss, at, vectors[0], data),
        "together": lambda at, data: list(map(hessian_operator(mean_loss, at, data), vectors)),
        "gauss_newton": lambda at, data: _gauss_newton_gradients(losses.outputs, at, data, config.products),
    }
    times = time_in_turns({kind: _once(call, mesh, params, batch) for kind, call in calls.items()}, config.rounds)
    for kind in ("together", "gauss_newton"):
        times[kind] = [milliseconds / config.products for milliseconds in times[kind]]
    results = {
        "experiment": "benchmark_hessian",
        "network": name,
        "setting": f"{config.speech.batch_size} crops of {config.speech.crop_seconds:g} s",
        "rounds": config.rounds,
        "products": config.products,
        "rows": [{**time_figures(kind, own), **ratio_figures(own, times["gradient"])} for kind, own in times.items()],
        "traces": _traces(config, losses, params, batch) if config.max_probes else None,
        "machine": machine(),
    }
    if config.output:
        write_json(pathlib.Path(config.output), results)
    print(hessian_table(results))
    return results


def _probe(params: Any, key: jax.Array) -> Any:
    return jax.tree.map(lambda leaf: jax.random.rademacher(key, leaf.shape, leaf.dtype), params)


class _Losses(NamedTuple):
    """The training's loss, and what it is made of."""

    loss: Loss
    outputs: OutputLoss


def _problem(config: HessianBenchmarkConfig, corpus: Corpus) -> tuple[str, _Losses, Any, Network]:
    """What the network is called, its training loss, its parameters, and itself."""
    classify = MarginSoftmax(len(corpus.speakers))
    if config.pretrained:
        model = load_float_model(config.pretrained)
        network, variables, name = model.network, model.variables, pathlib.Path(config.pretrained).name
        head = class_directions(model, corpus, sub_centers=1)
    else:
        network = Network.of_size(config.model, width=config.width)
        variables, name = network.init(jax.random.key(config.seed)), f"{config.model} of random weights"
        head = classify.init(jax.random.key(config.seed + 1), network.embedding_size)
    arguments = (network, variables["batch_stats"], head, classify, _MARGIN)
    return name, _Losses(margin_loss(*arguments), margin_logits(*arguments)), variables["params"], network


def _mean_over_devices(loss: Loss) -> Loss:
    return lambda params, batch: lax.pmean(loss(params, batch), "data")


def _gauss_newton_gradients(loss: OutputLoss, params: Any, batch: Any, count: int) -> list[Any]:
    """The gradients that the samples of so many probes are made of, summed over devices to be returned."""
    outputs, pull_back = jax.vjp(lambda at: loss.outputs(at, batch), params)
    signs = jax.random.rademacher(jax.random.key(2), (count, *outputs.shape), outputs.dtype)
    return [pull_back(loss.root(outputs, own)) for own in signs]


def _once(call: Callable[[Any, Any], Any], mesh: Mesh, params: Any, batch: Any) -> Callable[[], None]:
    """A compiled and warm call that blocks until it is done, each device with its part of the batch."""
    whole, part = PartitionSpec(), PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(whole, part), out_specs=whole))

    def once() -> None:
        jax.block_until_ready(mapped(params, batch))

    once()
    return once


def _traces(config: HessianBenchmarkConfig, losses: _Losses, params: Any, batch: Any) -> dict[str, Any]:
    """By both curvatures: probes and seconds until every kernel's trace is as exact as wanted."""
    paths = [path for path, _ in leaf_paths(params) if path.endswith("/kernel")]
    found = {}
    for kind, estimate in {
        "hessian": functools.partial(hessian_traces, losses.loss),
        "gauss_newton": functools.partial(gauss_newton_traces, losses.outputs),
    }.items():
        started = time.perf_counter()
        with tqdm(total=config.max_probes, desc=f"traces, {kind}", unit="probe") as bar:

            def report(probes: int, _: Any, bar: Any = bar) -> None:
                bar.update(probes - bar.n)

            estimates = estimate(
                params,
                [batch],
                paths,
                key=jax.random.key(config.seed),
                rule=StoppingRule(config.trace_error, max_probes=config.max_probes, probes_together=config.products),
                mesh=data_mesh(),
                report=report,
            )
        found[kind] = {
            "layers": len(paths),
            "seconds": time.perf_counter() - started,
            **_errors(estimates, config.trace_error),
        }
    return {"wanted_error": config.trace_error, **found}


def _errors(estimates: dict[str, TraceEstimate], wanted: float) -> dict[str, Any]:
    """How exact traces are, and how many probes they would need."""
    errors = np.array([own.standard_error / max(abs(own.trace), 1e-30) for own in estimates.values()])
    probes = max(own.probes for own in estimates.values())
    return {
        "probes": probes,
        "largest_error": largest_relative_error(estimates),
        "median_error": float(np.median(errors)),
        "layers_within": int(np.sum(errors <= wanted)),
        # A standard error falls with the root of the probes.
        "probes_needed": math.ceil(probes * (largest_relative_error(estimates) / wanted) ** 2),
    }


if __name__ == "__main__":
    launch(HessianBenchmarkConfig, run)
