"""Fewer bytes for what stays float: batch normalisations folded to a factor and an offset, values in float16."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from qsv.models.batch_norm import EPSILON

_LARGEST_RELATIVE_ERROR = 2.0**-11

Leaves = dict[tuple[str, ...], Any]


def fold_batch_norms(
    params: Mapping[str, Any], batch_stats: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Batch normalisations with all they do in scale and bias: their running statistics become 0 and 1 - 1e-5.

        a = scale / sqrt(var + 1e-5),   b = bias - mean a

    The packed file stores a constant tensor as one number, so half of a normalisation's bytes go. The network's output
    stays the same up to rounding. It can't be trained further with batch statistics.

    Args:
        params: parameter tree, quantized or not.
        batch_stats: running statistics.

    Returns:
        Both trees; normalisations without scale and bias stay as they are.
    """
    leaves: Leaves = traverse_util.flatten_dict(dict(params))
    statistics: Leaves = traverse_util.flatten_dict(dict(batch_stats))
    for *path, name in list(statistics):
        scale, bias, mean, var = ((*path, part) for part in ("scale", "bias", "mean", "var"))
        if name != "mean" or scale not in leaves or bias not in leaves:
            continue
        wide = {key: np.asarray(leaf, np.float64) for key, leaf in ((mean, statistics[mean]), (var, statistics[var]))}
        slope = np.asarray(leaves[scale], np.float64) / np.sqrt(wide[var] + EPSILON)
        leaves[bias] = (np.asarray(leaves[bias], np.float64) - wide[mean] * slope).astype(np.float32)
        leaves[scale] = slope.astype(np.float32)
        statistics[mean] = np.zeros(slope.shape, np.float32)
        statistics[var] = np.full(slope.shape, 1 - EPSILON, np.float32)
    return traverse_util.unflatten_dict(leaves), traverse_util.unflatten_dict(statistics)


def in_half_precision(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with its float32 leaves in float16, but for those of which a value would change by more than 2^-11.

    That is relative to the value, or where it is below 2e-4 of the leaf's largest, to that. QTensors stay, and so do
    leaves of one value, which the packed file stores as one number.
    """
    return traverse_util.unflatten_dict(
        {path: _narrowed(leaf) for path, leaf in traverse_util.flatten_dict(dict(tree)).items()}
    )


def _narrowed(leaf: Any) -> Any:
    if not hasattr(leaf, "__array__") or np.asarray(leaf).dtype != np.float32:
        return leaf
    wide = np.asarray(leaf)
    if wide.size and np.ptp(wide) == 0:
        return leaf
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    allowed = _LARGEST_RELATIVE_ERROR * np.abs(wide) + 1e-7 * np.max(np.abs(wide), initial=0)
    return narrow if np.all(np.abs(narrow.astype(np.float32) - wide) <= allowed) else leaf
