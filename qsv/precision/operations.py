"""How many multiplications each layer takes."""

import math
from typing import Any

import flax.linen as nn
import jax

from qsv.models import GE2E, Network
from qsv.quant import QTensor, leaf_paths


def layer_multiplications(network: Network, variables: Any, *, seconds: float) -> dict[str, int]:
    """Multiplications with each kernel for one utterance; nothing is computed.

    Args:
        network: the network.
        variables: its variables, or their shapes.
        seconds: length of the utterance.

    Returns:
        {path of a kernel: multiplications}, for every convolution (groups included), dense layer and LSTM kernel.
    """
    counts: dict[str, int] = {}

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        outputs, layer = call(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(layer, nn.Conv | nn.Dense):
            path = "/".join((*layer.path, "kernel"))
            kernel = layer.variables["params"]["kernel"]
            # Each output value is a sum over all axes of the kernel but the last.
            counts[path] = counts.get(path, 0) + math.prod(outputs.shape) * math.prod(kernel.shape[:-1])
        if context.method_name == "stacked_lstm" and isinstance(layer, GE2E):
            sequence, weights = args
            for index, (below, own, _) in enumerate(weights, start=1):
                for part, kernel in (("input", below), ("hidden", own)):
                    counts[f"lstm{index}/{part}/kernel"] = math.prod(sequence.shape[:2]) * math.prod(kernel.shape)
        return outputs

    trace_shapes(network, variables, record, seconds=seconds)
    return counts


def trace_shapes(network: Network, variables: Any, intercept: Any, *, seconds: float) -> None:
    """Go through a network for one utterance with a Linen interceptor; nothing is computed."""

    def apply(variables: Any, waveform: jax.Array) -> Any:
        features, _ = network.frontend(waveform)
        with nn.intercept_methods(intercept):
            return network.module().apply(variables, features)

    samples = round(seconds * network.frontend.sample_rate_hz)
    jax.eval_shape(apply, variables, jax.ShapeDtypeStruct((1, samples), "float32"))


def bit_operations(
    network: Network, variables: Any, packed_params: Any, *, seconds: float, activation_bits: int = 32
) -> int:
    """BOPs of one utterance: its multiplications, times the bits of both factors.

    Args:
        network: the network.
        variables: its variables as floats, or their shapes.
        packed_params: the parameter tree, with a `QTensor` for every quantized leaf; all others count 32 bits.
        seconds: length of the utterance.
        activation_bits: bits of what the weights are multiplied with; 32 where only weights are quantized.

    Source: BOPs = b_w b_a MACs, as in HAWQ-V3, Yao et al. 2021 (arXiv 2011.10680).
    """
    bits = {path: leaf.bits if isinstance(leaf, QTensor) else 32 for path, leaf in leaf_paths(packed_params)}
    counts = layer_multiplications(network, variables, seconds=seconds)
    return sum(count * bits[path] * activation_bits for path, count in counts.items())
