"""Traces of the Gauss-Newton matrix, from gradients alone."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from qsv.precision.traces import Probe, Report, StoppingRule, TraceEstimate, estimate_traces, over_devices
from qsv.quant import leaf_paths, with_leaves

_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class OutputLoss:
    """A loss of a network's outputs, as far as its curvature goes.

    Attributes:
        outputs: (params, batch) -> [examples, n], such as embeddings or logits.
        root: (outputs [examples, n], signs [examples, n]) -> [examples, n]: R signs for an R of every example with
            R R^T = the Hessian of its loss in its outputs.
    """

    outputs: Callable[[Any, Any], jax.Array]
    root: Callable[[jax.Array, jax.Array], jax.Array]


def cosine_root(embeddings: jax.Array, signs: jax.Array) -> jax.Array:
    """For 1 - cosine with targets that the embeddings equal: R = (I - u u^T) / |e|, u = e / |e|."""
    lengths = jnp.maximum(jnp.linalg.norm(embeddings, axis=-1, keepdims=True), _TINY)
    unit = embeddings / lengths
    return (signs - unit * jnp.sum(unit * signs, axis=-1, keepdims=True)) / lengths


def softmax_root(logits: jax.Array, signs: jax.Array) -> jax.Array:
    """For the cross-entropy of a softmax p: R = diag(sqrt p) - p sqrt(p)^T, so that R R^T = diag(p) - p p^T."""
    shares = jax.nn.softmax(logits)
    roots = jnp.sqrt(shares)
    return roots * signs - shares * jnp.sum(roots * signs, axis=-1, keepdims=True)


def gauss_newton_traces(
    loss: OutputLoss,
    params: Any,
    batches: Iterable[Any],
    paths: Iterable[str],
    *,
    key: jax.Array,
    rule: StoppingRule | None = None,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> dict[str, TraceEstimate]:
    """Traces of the diagonal blocks of G = mean over examples of J^T R R^T J, J the outputs' Jacobian.

        tr(G_ll) = E[|J_l^T R s|^2] / examples,   s Rademacher vectors in the outputs

    A probe is one pass backwards that all layers and all probes of a batch share the forward pass of, two thirds of a
    gradient, and a layer's sample has no noise from the other layers: `hessian_traces` needs many times more probes, of
    two gradients each. G is the Hessian without the term of the residual: equal to it where that vanishes, as for the
    drift of embeddings at the float network, and near it for a cross-entropy that is well fitted; G is never
    indefinite.

    Args:
        loss: the outputs, and their loss's curvature.
        params: where; a tree of arrays.
        batches: as in `hessian_traces`, like all that follow.
        paths: of the leaves that are layers.
        key: of the probes.
        rule: when the traces are exact enough.
        mesh: devices with an axis `data`.
        report: called at every look at the rule.

    Returns:
        {path: estimate} in the order of `paths`.

    Raises:
        ValueError: no batches, no layers or an unknown path.
        FloatingPointError: a gradient isn't finite.

    Source: Schraudolph 2002 for the matrix; the probes are Hutchinson's in the space of the outputs, as in the
    Kronecker-factored Fisher's sampling, Martens & Grosse 2015 (arXiv 1503.05671), with signs in place of sampled
    labels.
    """
    wanted = tuple(paths)
    probe = _make_probe(loss, wanted, mesh)
    return estimate_traces(probe, params, batches, wanted, rule or StoppingRule(), key=key, report=report)


def _make_probe(loss: OutputLoss, wanted: tuple[str, ...], mesh: Mesh | None) -> Probe:
    def squared_gradients(params: Any, keys: jax.Array, batch: Any) -> jax.Array:
        if mesh is not None:
            # Gradients of each device's own examples: no sum over devices, whose cross terms would be noise.
            params = jax.tree.map(lambda leaf: lax.pcast(leaf, ("data",), to="varying"), params)
        layers = {path: leaf for path, leaf in leaf_paths(params) if path in wanted}
        outputs, pull_back = jax.vjp(lambda own: loss.outputs(with_leaves(params, own), batch), layers)

        def probe(key: jax.Array) -> jax.Array:
            own = key if mesh is None else jax.random.fold_in(key, lax.axis_index("data"))
            signs = jax.random.rademacher(own, outputs.shape, outputs.dtype)
            (gradients,) = pull_back(loss.root(outputs, signs))
            return jnp.stack([jnp.sum(jnp.square(gradients[path])) for path in wanted]) / len(outputs)

        # As in `hessian_traces`, no loop.
        samples = jnp.stack([probe(own) for own in keys])
        return samples if mesh is None else lax.pmean(samples, "data")

    return over_devices(squared_gradients, mesh)
