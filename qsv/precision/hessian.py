"""Hessian-vector products of any loss, and the traces of its diagonal blocks, one for each layer."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from qsv.precision.traces import Probe, Report, StoppingRule, TraceEstimate, estimate_traces, over_devices
from qsv.quant import leaf_paths, with_leaves

# (parameters, batch) -> mean loss over the batch's examples, scalar.
Loss = Callable[[Any, Any], jax.Array]


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
    rule: StoppingRule | None = None,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> dict[str, TraceEstimate]:
    """Traces of the Hessian's diagonal blocks, all layers from the same probes.

        tr(H_ll) = E[v_l . (H v)_l],   v one Rademacher vector over all layers

    One product serves all layers, but each one's sample has the noise of its coupling to all others. Where the loss is
    of the form that `gauss_newton_traces` takes, that one needs far fewer and cheaper probes.

    Args:
        loss: (params, batch) -> mean over the batch's examples, so that the mean over batches is the whole's.
        params: where; a tree of arrays.
        batches: microbatches of equal size, pytrees of arrays; each product goes over all of them one by one, so that
            memory is that of one.
        paths: of the leaves that are layers; all others are constants.
        key: of the probes.
        rule: when the traces are exact enough; None for the usual one.
        mesh: devices with an axis `data`, along which the first axis of the batch's arrays is split.
        report: called with the number of probes and the estimates whenever the rule is looked at.

    Returns:
        {path: estimate} in the order of `paths`.

    Raises:
        ValueError: no batches, no layers or an unknown path.
        FloatingPointError: a product isn't finite.

    Source: Hutchinson 1989; HAWQ-V2, Dong et al. 2020 (arXiv 1911.03852), which probes layer by layer.
    """
    wanted = tuple(paths)
    probe = _make_probe(loss, wanted, mesh)
    return estimate_traces(probe, params, batches, wanted, rule or StoppingRule(), key=key, report=report)


def _make_probe(loss: Loss, wanted: tuple[str, ...], mesh: Mesh | None) -> Probe:
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

    return over_devices(products, mesh)
