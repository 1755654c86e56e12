"""Activations seen, or put on the levels of codes, without a change of the network."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import flax.linen as nn
import jax

from qsv.quant import QuantizedActivations

# A point is the path of a module, for its first input, or that with this suffix, for its output.
OUTPUT = ":output"


@contextlib.contextmanager
def quantized_activations(activations: QuantizedActivations | None) -> Iterator[None]:
    """Inside, activations at points with a range are put on their levels whenever a Linen module is applied.

    Works under `jax.jit` and `jax.grad`, with the activations as arguments of what is transformed: ranges can be
    learnt. None does nothing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from qsv.quant import ActivationQuantizer, ActivationRange
    >>> net = nn.Sequential([nn.Dense(1, use_bias=False, kernel_init=nn.initializers.ones, name="dense")])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 1)))
    >>> ranges = {"layers_0": ActivationRange(jnp.float32(0), jnp.float32(3))}
    >>> with quantized_activations(QuantizedActivations(ActivationQuantizer(2), ranges)):
    ...     float(net.apply(variables, jnp.full((1, 1), 1.4))[0, 0])
    1.0
    """
    if activations is None:
        yield
        return
    ranges = activations.ranges
    with at_points(ranges, lambda point, values: activations.quantizer.fake_quantize(values, ranges[point])):
        yield


@contextlib.contextmanager
def at_points(points: Collection[str], change: Callable[[str, jax.Array], jax.Array]) -> Iterator[None]:
    """Inside, activations at points go through a function of the point and the values."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        if path in points:
            args = (change(path, args[0]), *args[1:])
        out = call(*args, **kwargs)
        return change(path + OUTPUT, out) if path + OUTPUT in points else out

    with nn.intercept_methods(intercept):
        yield
