"""How much memory one utterance's inference takes, by an accounting that is spelled out."""

import dataclasses
import math
from typing import Any

import flax.linen as nn

from qsv.models import Network
from qsv.precision.operations import trace_shapes


@dataclasses.dataclass(frozen=True)
class InferenceMemory:
    """Bytes of an inference.

    Attributes:
        weights: of all parameters, as they are stored.
        maps: of the outputs of all convolutions together, each value in the bits of the maps.
        peak: the largest sum of one layer's input and output, the network's input in float32.
        values: how many values the maps have.
    """

    weights: int
    maps: int
    peak: int
    values: int

    @property
    def total(self) -> int:
        """Weights and all maps: what a device needs that keeps every map, Nilsson et al.'s accounting as we read it."""
        return self.weights + self.maps

    @property
    def total_at_peak(self) -> int:
        """Weights and the largest layer's maps: what a device needs that frees maps as soon as they were used."""
        return self.weights + self.peak


def inference_memory(
    network: Network, variables: Any, *, weight_bytes: int, map_bits: int, seconds: float
) -> InferenceMemory:
    """The memory of one utterance's inference; nothing is computed.

    Pooling is counted as done where the convolution is: what it hands on is smaller than what it takes.

    Args:
        network: the network.
        variables: its variables, or their shapes.
        weight_bytes: of the parameters with codes, tables and what stays float.
        map_bits: bits of a value that a convolution hands on: 32 for float, 1 for binary maps.
        seconds: length of the utterance.

    Source: Nilsson et al. 2024 (arXiv 2407.04578) report 25 times less memory for 8-bit weights and binary maps; the
    same ratio comes out of weights and all convolutions' outputs of a clip of 5 s.
    """
    maps: list[tuple[int, int]] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs = call(*args, **kwargs)
        if context.method_name == "__call__" and isinstance(context.module, nn.Conv):
            maps.append((math.prod(args[0].shape), math.prod(outputs.shape)))
        return outputs

    trace_shapes(network, variables, record, seconds=seconds)
    if not maps:
        raise ValueError(f"{network.name} has no convolutions, whose maps are counted")
    values = sum(output for _, output in maps)
    input_bits = [32] + [map_bits] * (len(maps) - 1)
    peak = max(math.ceil((i * bits + o * map_bits) / 8) for (i, o), bits in zip(maps, input_bits, strict=True))
    return InferenceMemory(weight_bytes, math.ceil(values * map_bits / 8), peak, values)
