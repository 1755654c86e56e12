"""How many multiplications each layer takes."""

import math
from typing import Any

import flax.linen as nn
import jax

from qsv.models import LAYER_INPUTS, Network


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
        return outputs

    def apply(variables: Any, waveform: jax.Array) -> Any:
        features, _ = network.frontend(waveform)
        with nn.intercept_methods(record):
            return network.module().apply(variables, features, mutable=[LAYER_INPUTS])

    samples = round(seconds * network.frontend.sample_rate_hz)
    _, recorded = jax.eval_shape(apply, variables, jax.ShapeDtypeStruct((1, samples), "float32"))
    for layer, inputs in recorded.get(LAYER_INPUTS, {}).items():
        for part, x in inputs.items():
            kernel = variables["params"][layer][part]["kernel"]
            counts[f"{layer}/{part}/kernel"] = math.prod(x.shape[:-1]) * math.prod(kernel.shape)
    return counts
