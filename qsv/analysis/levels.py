"""The float network's own weights on the levels of a packed one."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qsv.quant import QTensor, leaf_paths, nearest_codes, with_leaves
from qsv.quant.qtensor import decode, scaled_levels
from qsv.quant.quantizer import weight_statistics


def nearest_levels(params: Any, packed: Any, *, standardized: Collection[str] = ()) -> Any:
    """The float network with its own weights moved to the nearest level of a packed one that came from it.

    The packed network's own weights differ where they were trained, or rounded so that they make up for errors of
    other layers; alone in the float network they would do harm that is not their levels'.

    Args:
        params: parameters of the float network.
        packed: the same tree with a `QTensor` in place of every quantized leaf.
        standardized: paths of the leaves whose levels are in units of the weights' deviation from their mean
            (`normalization="standardize"`), as `standardized_paths` finds them.

    Returns:
        A tree like `params`, in its units.

    Raises:
        ValueError: a quantized leaf that the float network doesn't have in this shape.
    """
    return with_leaves(
        params,
        {
            path: _nearest(weights, leaf, standardized=path in standardized)
            for path, (weights, leaf) in quantized_pairs(params, packed).items()
        },
    )


def in_units_of_levels(params: Any, packed: Any, *, standardized: Collection[str] = ()) -> Any:
    """The float weights as they would be in a packed network: those of `standardized` less their mean, over their
    deviation; arguments and errors as for `nearest_levels`.
    """
    pairs = {path: pair for path, pair in quantized_pairs(params, packed).items() if path in standardized}
    return with_leaves(params, {path: _standardized(*pair)[0] for path, pair in pairs.items()})


def standardized_paths(plan_description: Mapping[str, str]) -> list[str]:
    """Paths of the leaves quantized with `normalization="standardize"`, by a packed model's `plan_description`."""
    return [path for path, text in plan_description.items() if "normalization='standardize'" in text]


def quantized_pairs(params: Any, packed: Any) -> dict[str, tuple[jax.Array, QTensor]]:
    """{path: (float weights, the same quantized)}."""
    leaves, pairs = dict(leaf_paths(params)), {}
    for path, leaf in leaf_paths(packed):
        if not isinstance(leaf, QTensor):
            continue
        if path not in leaves or np.shape(leaves[path]) != leaf.shape:
            found = np.shape(leaves[path]) if path in leaves else "nothing"
            raise ValueError(f"{path!r} is {leaf.shape} in the quantized network and {found} in the float one")
        pairs[path] = jnp.asarray(leaves[path]), leaf
    return pairs


def _nearest(weights: jax.Array, packed: QTensor, *, standardized: bool) -> jax.Array:
    values, mean, deviation = _standardized(weights, packed) if standardized else (weights, 0.0, 1.0)
    codes = nearest_codes(values / packed.scale, jnp.asarray(packed.codebook))
    levels = decode(codes, scaled_levels(jnp.asarray(packed.codebook), jnp.asarray(packed.scale)))
    return (levels * deviation + mean).astype(weights.dtype)


def _standardized(weights: jax.Array, packed: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights, mean and deviation, of each channel that has levels of its own."""
    shape = np.broadcast_shapes(np.shape(packed.scale), np.shape(packed.codebook)[:-1])
    mean, deviation = weight_statistics(weights, tuple(axis for axis, size in enumerate(shape) if size > 1))
    return (weights - mean) / deviation, mean, deviation
