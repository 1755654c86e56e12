"""Ranges of activations as a packed file's description has them."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qsv.quant import ActivationQuantizer, ActivationRange, QuantizedActivations


def activations_to_json(activations: QuantizedActivations) -> dict[str, Any]:
    """Bits, kind and `{path: [low, high]}` as JSON-compatible fields.

    Raises:
        ValueError: a range is of single channels, not finite or the wrong way round.
    """
    ranges = {}
    for path, own in activations.ranges.items():
        if np.size(own.low) != 1 or np.size(own.high) != 1:
            raise ValueError(f"a packed file holds one range a layer, {path} has {np.size(own.high)}")
        ranges[path] = [float(np.ravel(own.low)[0]), float(np.ravel(own.high)[0])]
    fields = {"bits": activations.quantizer.bits, "symmetric": activations.quantizer.symmetric, "ranges": ranges}
    activations_from_json(fields)
    return fields


def activations_from_json(fields: Mapping[str, Any]) -> QuantizedActivations:
    """What `activations_to_json` described; raises ValueError or KeyError on anything else."""
    ranges = {}
    for path, (low, high) in fields["ranges"].items():
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ValueError(f"the range of {path} must be finite, low end first, got {low} to {high}")
        ranges[path] = ActivationRange(jnp.float32(low), jnp.float32(high))
    return QuantizedActivations(ActivationQuantizer(fields["bits"], fields["symmetric"]), ranges)
