"""What a network's layers are given: seen, or put on the levels of codes, without a change of the network."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from qsv.quant import QuantizedActivations

OnInput = Callable[[str, jax.Array], jax.Array]


@contextlib.contextmanager
def quantized_inputs(activations: QuantizedActivations | None) -> Iterator[None]:
    """Inside, the inputs of layers with a range are put on their levels whenever a Linen module is applied.

    Works under `jax.jit` and `jax.grad`, with the activations as arguments of what is transformed: ranges can be
    learnt. None does nothing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from qsv.quant import ActivationQuantizer, ActivationRange
    >>> net = nn.Sequential([nn.Dense(1, use_bias=False, kernel_init=nn.initializers.ones, name="dense")])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 1)))
    >>> ranges = {"layers_0": ActivationRange(jnp.float32(0), jnp.float32(3))}
    >>> with quantized_inputs(QuantizedActivations(ActivationQuantizer(2), ranges)):
    ...     float(net.apply(variables, jnp.full((1, 1), 1.4))[0, 0])
    1.0
    """
    if activations is None:
        yield
        return

    def quantize(path: str, values: jax.Array) -> jax.Array:
        if path not in activations.ranges:
            return values
        return activations.quantizer.fake_quantize(values, activations.ranges[path])

    with on_layer_inputs(quantize):
        yield


@contextlib.contextmanager
def on_layer_inputs(on_input: OnInput) -> Iterator[None]:
    """Inside, the input of every convolution and dense layer goes through a function of its path and values."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Conv | nn.Dense):
            return call(*args, **kwargs)
        return call(on_input("/".join(layer.path), args[0]), *args[1:], **kwargs)

    with nn.intercept_methods(intercept):
        yield
