"""Quantization of whole parameter trees, as pure functions of a plan."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qsv.quant.policy import Plan, leaf_paths
from qsv.quant.qtensor import QTensor, decode, scaled_levels
from qsv.quant.quantizer import Quantizer, QuantizerState, weight_statistics

# path -> state, for the quantized leaves only
States = Mapping[str, QuantizerState]


def init(plan: Plan, params: Any, *, importance: Mapping[str, jax.Array] | None = None) -> dict[str, QuantizerState]:
    """Fit every planned quantizer to its leaf.

    Args:
        plan: from `resolve`.
        params: the float parameter tree.
        importance: {path: what each weight's squared error counts, broadcasting against the leaf}, such as the mean
            squares of a layer's inputs; leaves that it doesn't name count evenly.

    Returns:
        `{path: QuantizerState}` of the quantized leaves.

    Raises:
        ValueError: the plan is for another tree, or a leaf holds NaN or infinity (seen outside jit only).
    """
    leaves = dict(_matched(plan, params))
    states = {}
    for path, quantizer in plan.quantized.items():
        _check_finite(path, leaves[path])
        known = None if importance is None else importance.get(path)
        # Quantizers of a user's own need not know about importance.
        states[path] = quantizer.init(leaves[path]) if known is None else quantizer.init(leaves[path], known)
    return states


def fake_quantize(plan: Plan, params: Any, qstate: States) -> Any:
    """Move every planned leaf to its levels; straight-through gradients.

    Args:
        plan: from `resolve`.
        params: the float parameter tree.
        qstate: from `init`.

    Returns:
        A tree like `params`, equal to `dequantize(quantize(plan, params, qstate))` bit for bit.
    """
    return _map(plan, params, lambda path, spec, leaf: spec.fake_quantize(leaf, qstate[path]))


def quantize(plan: Plan, params: Any, qstate: States) -> Any:
    """The tree with a `QTensor` in place of every planned leaf."""
    return _map(plan, params, lambda path, spec, leaf: spec.quantize(leaf, qstate[path]))


def dequantize(packed: Any) -> Any:
    """The tree with every `QTensor` replaced by its values."""
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QTensor) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )


def refresh(plan: Plan, params: Any, qstate: States) -> dict[str, QuantizerState]:
    """Fit every codebook anew to parameters that have moved; fixed codebooks stay."""
    leaves = dict(_matched(plan, params))
    return {path: spec.refresh(leaves[path], qstate[path]) for path, spec in plan.quantized.items()}


def anneal(plan: Plan, qstate: States, progress: jax.typing.ArrayLike) -> dict[str, QuantizerState]:
    """The states at a share of a training; quantizers whose backward pass changes with it have a method `anneal`.

    Args:
        plan: from `resolve`.
        qstate: from `init`.
        progress: 0 to 1; may be traced.
    """
    return {
        path: spec.anneal(qstate[path], progress) if hasattr(spec, "anneal") else qstate[path]
        for path, spec in plan.quantized.items()
    }


def level_spacings(plan: Plan, params: Any, qstate: States) -> dict[str, jax.Array]:
    """Distance from a weight's level to the nearest other one: the mean over every quantized leaf.

    How far a weight must move before its code changes is half of that, and differs from layer to layer and from width
    to width: steps of training are better measured by it than by themselves. (The mean over levels would be several
    times as much where levels are dense around zero and few for the largest weights.)

    Args:
        plan: from `resolve`.
        params: the float parameter tree.
        qstate: from `init`.

    Returns:
        {path: scalar}, in the unit of the weights.
    """
    leaves = dict(_matched(plan, params))
    return {path: _level_spacing(quantizer, leaves[path], qstate[path]) for path, quantizer in plan.quantized.items()}


def _level_spacing(quantizer: Quantizer, weights: jax.Array, state: QuantizerState) -> jax.Array:
    packed = quantizer.quantize(weights, state)
    gaps = jnp.diff(scaled_levels(packed.codebook, packed.scale), axis=-1)
    # A scheme with fewer levels than codes repeats its last one.
    gaps = jnp.where(gaps > 0, gaps, jnp.nan)
    below, above = (jnp.concatenate(pair, axis=-1) for pair in ((gaps[..., :1], gaps), (gaps, gaps[..., -1:])))
    nearest = jnp.nanmin(jnp.stack([below, above]), axis=0)
    spacing = jnp.nan_to_num(jnp.nanmean(decode(packed.codes, nearest)))
    if getattr(quantizer, "normalization", "none") != "standardize":
        return spacing
    # These levels are in units of the weights' deviation.
    return spacing * jnp.mean(weight_statistics(weights, getattr(quantizer, "channel_axes", ()))[1])


def scales(qstate: States) -> dict[str, jax.Array]:
    """The learnable part of the states: `{path: scale}`, to optimise beside the parameters."""
    return {path: state.scale for path, state in qstate.items()}


def with_scales(qstate: States, new_scales: Mapping[str, jax.Array]) -> dict[str, QuantizerState]:
    """The states with other scales, kept positive."""
    return {
        path: dataclasses.replace(state, scale=jnp.maximum(new_scales[path], jnp.finfo(state.scale.dtype).tiny))
        for path, state in qstate.items()
    }


def _map(plan: Plan, params: Any, change: Callable[[str, Quantizer, Any], Any]) -> Any:
    tree = jax.tree.structure(params)
    changed = []
    for (path, leaf), (_, spec) in zip(_matched(plan, params), plan.entries, strict=True):
        changed.append(leaf if spec is None else change(path, spec, leaf))
    return jax.tree.unflatten(tree, changed)


def _matched(plan: Plan, params: Any) -> list[tuple[str, Any]]:
    """The leaves, after a check that the plan was made for this tree."""
    leaves = leaf_paths(params)
    if [path for path, _ in leaves] != list(plan):
        found, planned = {path for path, _ in leaves}, set(plan)
        raise ValueError(
            "the plan is for another tree: "
            f"in the plan only {sorted(planned - found)}, in the tree only {sorted(found - planned)}"
        )
    return leaves


def _check_finite(path: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(leaf))):
        raise ValueError(f"{path!r} holds NaN or infinity; can't fit a codebook to it")
