"""Traces of a curvature's diagonal blocks, one for each layer, from random probes with a stopping rule."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from qsv.quant import leaf_paths

# (params, keys [probes], batch) -> an unbiased sample of every layer's trace for every probe, [probes, layers]
Probe = Callable[[Any, jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class TraceEstimate:
    """An estimate of the trace of one layer's diagonal block of a curvature.

    Attributes:
        trace: mean over the probes; may be negative.
        standard_error: of the mean.
        probes: how many.
        weights: size of the layer.
    """

    trace: float
    standard_error: float
    probes: int
    weights: int

    @property
    def mean_trace(self) -> float:
        """Trace over weights, 0 where it is negative, as HAWQ-V2 takes it."""
        return max(self.trace, 0.0) / max(self.weights, 1)


Report = Callable[[int, Mapping[str, TraceEstimate]], None]


@dataclasses.dataclass(frozen=True)
class StoppingRule:
    """When the traces of all layers are exact enough.

    Attributes:
        relative_error: wanted standard error relative to the trace.
        min_probes: probes before the rule may stop.
        max_probes: probes after which it stops anyway.
        probes_together: probes between two looks at the rule, for which what they share is computed once a batch;
            estimates are the same for any number.
        floor: a trace counts as at least this share of the largest when its error is judged.

    Raises:
        ValueError: an option is out of range.
    """

    relative_error: float = 0.1
    min_probes: int = 8
    max_probes: int = 300
    probes_together: int = 4
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not self.relative_error > 0:
            raise ValueError(f"relative_error must be positive, got {self.relative_error}")
        if not 2 <= self.min_probes <= self.max_probes:
            raise ValueError(
                f"probes must be 2 <= min_probes <= max_probes, got {self.min_probes} and {self.max_probes}"
            )
        if not self.probes_together >= 1:
            raise ValueError(f"probes_together must be at least 1, got {self.probes_together}")


def estimate_traces(
    probe: Probe,
    params: Any,
    batches: Iterable[Any],
    paths: Iterable[str],
    rule: StoppingRule,
    *,
    key: jax.Array,
    report: Report | None = None,
) -> dict[str, TraceEstimate]:
    """Probe until every layer's standard error is small enough.

    (The usual rule, that the running mean moves by less than a thousandth, stops while the error is still 7 to 18 %.)

    Args:
        probe: gives samples; compiled.
        params: first argument of the probe.
        batches: microbatches of equal size; each probe goes over all of them one by one, so that memory is that of one.
        paths: of the leaves that are layers, in the order of the samples.
        rule: when to stop.
        key: of the probes.
        report: called with the number of probes and the estimates whenever the rule is looked at.

    Returns:
        {path: estimate} in the order of `paths`.

    Raises:
        ValueError: no batches, no layers or an unknown path.
        FloatingPointError: a sample isn't finite.
    """
    batches, wanted, leaves = list(batches), list(paths), dict(leaf_paths(params))
    _check(batches, wanted, leaves)
    samples: list[np.ndarray] = []
    estimates: dict[str, TraceEstimate] = {}
    while len(samples) < rule.max_probes:
        keys = jnp.stack([jax.random.fold_in(key, len(samples) + i) for i in range(rule.probes_together)])
        mean = np.mean([np.asarray(probe(params, keys, batch), np.float64) for batch in batches], axis=0)
        if not np.isfinite(mean).all():
            layer = wanted[int(np.argmin(np.isfinite(mean).all(axis=0)))]
            raise FloatingPointError(f"the curvature of {layer} is not finite")
        samples.extend(mean[: rule.max_probes - len(samples)])
        if len(samples) < 2:
            continue
        estimates = _estimates(wanted, leaves, np.stack(samples))
        if report is not None:
            report(len(samples), estimates)
        is_sure = largest_relative_error(estimates, floor=rule.floor) <= rule.relative_error
        if len(samples) >= rule.min_probes and is_sure:
            break
    return estimates


def over_devices(products: Probe, mesh: Mesh | None) -> Probe:
    """A compiled probe, each device with its part of the batch."""
    if mesh is None:
        return jax.jit(products)
    whole, part = PartitionSpec(), PartitionSpec("data")
    return jax.jit(jax.shard_map(products, mesh=mesh, in_specs=(whole, whole, part), out_specs=whole))


def largest_relative_error(estimates: Mapping[str, TraceEstimate], *, floor: float = 1e-3) -> float:
    """The largest standard error relative to its trace, which counts as at least `floor` times the largest trace."""
    largest = max(abs(estimate.trace) for estimate in estimates.values())
    tiny = float(np.finfo(np.float64).tiny)
    return max(
        estimate.standard_error / max(abs(estimate.trace), floor * largest, tiny) for estimate in estimates.values()
    )


def _check(batches: list[Any], wanted: list[str], leaves: Mapping[str, Any]) -> None:
    if not batches:
        raise ValueError("traces need at least one batch")
    if not wanted:
        raise ValueError("traces need at least one layer")
    unknown = [path for path in wanted if path not in leaves]
    if unknown:
        raise ValueError(f"{unknown} are no leaves of the parameters; leaves are {list(leaves)[:8]} ...")


def _estimates(wanted: list[str], leaves: Mapping[str, Any], samples: np.ndarray) -> dict[str, TraceEstimate]:
    """From samples [probes, layers]."""
    probes = len(samples)
    means, errors = samples.mean(axis=0), samples.std(axis=0, ddof=1) / math.sqrt(probes)
    return {
        path: TraceEstimate(float(mean), float(error), probes, int(leaves[path].size))
        for path, mean, error in zip(wanted, means, errors, strict=True)
    }
