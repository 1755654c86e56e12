"""Hessian-vector products of any loss, and the traces of its diagonal blocks, one for each layer."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qsv.quant import leaf_paths, with_leaves

# (parameters, batch) -> mean loss over the batch's examples, scalar.
Loss = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class TraceEstimate:
    """A Hutchinson estimate of the trace of one layer's diagonal block of the Hessian.

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


def hessian_vector_product(loss: Loss, params: Any, vector: Any, batch: Any) -> Any:
    """H v for the Hessian H of a loss, by forward over reverse differentiation.

    Args:
        loss: (params, batch) -> scalar. Not through a quantizer: forward mode raises at its `custom_vjp`.
        params: where, a tree of floating-point arrays.
        vector: v, a tree like the parameters.
        batch: what the loss takes.

    Returns:
        A tree like the parameters. It costs two to three gradients: of a network's eight products of activations and
        weights, where a gradient has three, two are those of the gradient itself (`hessian_operator` shares them).

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    return jax.jvp(lambda at: jax.grad(loss)(at, batch), (params,), (vector,))[1]


def hessian_operator(loss: Loss, params: Any, batch: Any) -> Callable[[Any], Any]:
    """The map v -> H v, linearized: what does not depend on v is computed once, and each product costs two gradients.

    What is kept between products takes memory: four of a convolutional network take 2.3 times what one does.

    Args:
        loss: (params, batch) -> scalar, as in `hessian_vector_product`.
        params: where.
        batch: what the loss takes.

    Returns:
        v -> H v, both trees like the parameters. To be called within the same `jax.jit`.
    """
    return jax.linearize(lambda at: jax.grad(loss)(at, batch), params)[1]


def hessian_traces(
    loss: Loss,
    params: Any,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    key: jax.Array,
    relative_error: float = 0.1,
    min_probes: int = 8,
    max_probes: int = 300,
    probes_together: int = 4,
    floor: float = 1e-3,
    mesh: Mesh | None = None,
    report: Callable[[int, Mapping[str, TraceEstimate]], None] | None = None,
) -> dict[str, TraceEstimate]:
    """Traces of the Hessian's diagonal blocks, all layers from the same probes.

        tr(H_ll) = E[v_l . (H v)_l],   v one Rademacher vector over all layers

    Probes go on until every layer's standard error is small enough. (The usual rule, that the running mean moves by
    less than a thousandth, stops while the error is still 7 to 18 %.)

    Args:
        loss: (params, batch) -> mean over the batch's examples, so that the mean over batches is the whole's.
        params: where; a tree of arrays.
        batches: microbatches of equal size, pytrees of arrays; each product goes over all of them one by one, so that
            memory is that of one.
        paths: of the leaves that are layers; all others are constants.
        key: of the probes.
        relative_error: wanted standard error relative to the trace.
        min_probes: probes before the rule may stop.
        max_probes: probes after which it stops anyway.
        probes_together: probes between two looks at the rule, for which the gradient's part of a product is computed
            once a batch; estimates are the same for any number.
        floor: a trace counts as at least this share of the largest when its error is judged.
        mesh: devices with an axis `data`, along which the first axis of the batch's arrays is split.
        report: called with the number of probes and the estimates whenever the rule is looked at.

    Returns:
        {path: estimate} in the order of `paths`.

    Raises:
        ValueError: no batches, no layers, an unknown path, or an option out of range.
        FloatingPointError: a product isn't finite.

    Source: Hutchinson 1989; HAWQ-V2, Dong et al. 2020 (arXiv 1911.03852), which probes layer by layer.
    """
    batches, wanted, leaves = list(batches), list(paths), dict(leaf_paths(params))
    _check(batches, wanted, leaves, relative_error, min_probes, max_probes)
    if not probes_together >= 1:
        raise ValueError(f"probes_together must be at least 1, got {probes_together}")
    probe = _make_probe(loss, tuple(wanted), mesh)
    samples: list[np.ndarray] = []
    estimates: dict[str, TraceEstimate] = {}
    while len(samples) < max_probes:
        keys = jnp.stack([jax.random.fold_in(key, len(samples) + i) for i in range(probes_together)])
        mean = np.mean([np.asarray(probe(params, keys, batch), np.float64) for batch in batches], axis=0)
        if not np.isfinite(mean).all():
            layer = wanted[int(np.argmin(np.isfinite(mean).all(axis=0)))]
            raise FloatingPointError(f"the Hessian-vector product of {layer} is not finite")
        samples.extend(mean[: max_probes - len(samples)])
        if len(samples) < 2:
            continue
        estimates = _estimates(wanted, leaves, np.stack(samples))
        if report is not None:
            report(len(samples), estimates)
        if len(samples) >= min_probes and largest_relative_error(estimates, floor=floor) <= relative_error:
            break
    return estimates


def largest_relative_error(estimates: Mapping[str, TraceEstimate], *, floor: float = 1e-3) -> float:
    """The largest standard error relative to its trace, which counts as at least `floor` times the largest trace."""
    largest = max(abs(estimate.trace) for estimate in estimates.values())
    tiny = float(np.finfo(np.float64).tiny)
    return max(
        estimate.standard_error / max(abs(estimate.trace), floor * largest, tiny) for estimate in estimates.values()
    )


def _check(
    batches: list[Any],
    wanted: list[str],
    leaves: Mapping[str, Any],
    relative_error: float,
    min_probes: int,
    max_probes: int,
) -> None:
    if not batches:
        raise ValueError("traces need at least one batch")
    if not wanted:
        raise ValueError("traces need at least one layer")
    unknown = [path for path in wanted if path not in leaves]
    if unknown:
        raise ValueError(f"{unknown} are no leaves of the parameters; leaves are {list(leaves)[:8]} ...")
    if not relative_error > 0:
        raise ValueError(f"relative_error must be positive, got {relative_error}")
    if not 2 <= min_probes <= max_probes:
        raise ValueError(f"probes must be 2 <= min_probes <= max_probes, got {min_probes} and {max_probes}")


def _make_probe(loss: Loss, wanted: tuple[str, ...], mesh: Mesh | None) -> Callable[[Any, jax.Array, Any], jax.Array]:
    """(params, keys [probes], batch) -> v_l . (H v)_l for every probe and layer, [probes, layers] float32."""

    def products(params: Any, keys: jax.Array, batch: Any) -> jax.Array:
        layers = {path: leaf for path, leaf in leaf_paths(params) if path in wanted}

        def loss_of_layers(layers: dict[str, jax.Array], batch: Any) -> jax.Array:
            value = loss(with_leaves(params, layers), batch)
            return value if mesh is None else lax.pmean(value, "data")

        multiply = hessian_operator(loss_of_layers, layers, batch)

        def probe(key: jax.Array) -> jax.Array:
            vector = {
                path: jax.random.rademacher(own, layers[path].shape, layers[path].dtype)
                for path, own in zip(wanted, jax.random.split(key, len(wanted)), strict=True)
            }
            product = multiply(vector)
            return jnp.stack([jnp.vdot(vector[path], product[path]) for path in wanted])

        # Not `lax.map`: on a CPU XLA's convolutions are several times slower inside a loop.
        return jnp.stack([probe(own) for own in keys])

    if mesh is None:
        return jax.jit(products)
    whole, part = PartitionSpec(), PartitionSpec("data")
    return jax.jit(jax.shard_map(products, mesh=mesh, in_specs=(whole, whole, part), out_specs=whole))


def _estimates(wanted: list[str], leaves: Mapping[str, Any], samples: np.ndarray) -> dict[str, TraceEstimate]:
    """From samples [probes, layers]."""
    probes = len(samples)
    means, errors = samples.mean(axis=0), samples.std(axis=0, ddof=1) / math.sqrt(probes)
    return {
        path: TraceEstimate(float(mean), float(error), probes, int(leaves[path].size))
        for path, mean, error in zip(wanted, means, errors, strict=True)
    }
