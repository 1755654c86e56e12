"""A traced JAX function as an ONNX graph."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from qsv.deploy.onnx import contractions, loops, operations, shapes
from qsv.deploy.onnx.graph import Graph, is_known
from qsv.deploy.onnx.integers import IntegerLayers
from qsv.deploy.onnx.tensors import Tensor, Value, Weight, straight
from qsv.deploy.onnx.weights import PackedWeights
from qsv.models.convolution import portable_convolutions
from qsv.models.jaxprs import called
from qsv.quant import QuantizedActivations

_OPERATIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(operations.ELEMENTWISE, operations.elementwise),
    **dict.fromkeys(operations.REDUCTIONS, operations.reduction),
    "broadcast_in_dim": shapes.broadcast_in_dim,
    "concatenate": shapes.concatenate,
    "convert_element_type": operations.convert,
    "copy": operations.stop_gradient,
    "copy_p": operations.stop_gradient,
    "dim_as_value": operations.dim_as_value,
    "fft": operations.fft,
    "gather": shapes.gather,
    "name": operations.stop_gradient,
    "imag": operations.imag,
    "iota": shapes.iota,
    "pad": shapes.pad,
    "real": operations.real,
    "reduce_window_max": operations.max_pool,
    "reshape": shapes.reshape,
    "rev": shapes.rev,
    "slice": shapes.slice_,
    "split": shapes.split,
    "squeeze": shapes.squeeze,
    "stop_gradient": operations.stop_gradient,
    "transpose": shapes.transpose,
}
_CONTRACTIONS = {
    "conv_general_dilated": contractions.convolution,
    "dot_general": contractions.dot_general,
}
_LOOPS = {"scan": loops.scan}


class Lowering:
    """Writes equations of a jaxpr into a graph.

    What depends on known arrays alone is computed at once, so that, for one, a normalisation becomes a product and a
    sum. Quantized weights stay codes up to the layer that multiplies by them.
    """

    def __init__(self, graph: Graph, activations: QuantizedActivations | None = None) -> None:
        self.graph = graph
        self.weights = PackedWeights(graph)
        self._integers = IntegerLayers(graph, self.weights, activations) if activations is not None else None

    def call(self, function: Callable[..., jax.Array], *arguments: Value) -> Tensor:
        """The float32 array that a function gives for float32 arrays, of which one is computed in the graph at least.

        Raises:
            NotImplementedError: an operation that no ONNX operation is known for.
        """
        structures = [jax.ShapeDtypeStruct(argument.shape, jnp.float32) for argument in arguments]
        with portable_convolutions():
            traced = jax.jit(function).trace(*structures).jaxpr
        (output,) = map(self._settled, self.run(traced.jaxpr, traced.consts, arguments))
        assert isinstance(output, Tensor)
        return output

    def run(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Value]) -> list[Value]:
        """The outputs of a jaxpr for arguments.

        Raises:
            NotImplementedError: an operation that no ONNX operation is known for.
        """
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, map(np.asarray, constants), strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> Value:
            if isinstance(variable, Literal):
                # A Python number has no type of its own.
                return np.asarray(variable.val, cast(Any, variable.aval).dtype)
            return values[variable]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(variable) for variable in equation.invars])
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> Sequence[Value]:
        name, function = equation.primitive.name, called(equation)
        if function is not None:
            return self.run(function.jaxpr, function.consts, inputs)
        known = all(isinstance(value, np.ndarray) for value in inputs)
        sizes = [size for out in equation.outvars for size in out.aval.shape]
        if known and all(map(is_known, sizes)) and name != "dim_as_value":
            return _computed(equation, inputs)
        if self._integers is not None:
            outputs = self._integers.equation(equation, inputs)
            if outputs is not None:
                return outputs
            inputs = [self._integers.settled(value) for value in inputs]
        if name in _LOOPS:
            return _LOOPS[name](self.graph, self.run, equation, *inputs)
        if name in _CONTRACTIONS:
            operand, kernel = inputs
            return [_CONTRACTIONS[name](self.graph, self.decode, equation, self._decoded(operand), kernel)]
        if name not in _OPERATIONS:
            raise NotImplementedError(f"no ONNX operation is known for JAX's {name!r}")
        plain = [self._decoded(value) for value in inputs]
        outputs = _OPERATIONS[name](self.graph, equation, *plain)
        return outputs if isinstance(outputs, list) else [outputs]

    def decode(self, value: Value, order: Sequence[int]) -> str:
        """The name of a known array or a weight with its axes in an order."""
        if isinstance(value, Weight):
            return self.weights.decode(value.packed, order)
        if isinstance(value, Tensor):
            raise NotImplementedError("a kernel that depends on the input")
        return self.graph.constant(np.transpose(value, order))

    def _settled(self, value: Value) -> Value:
        return value if self._integers is None else self._integers.settled(value)

    def _decoded(self, value: Value) -> np.ndarray | Tensor:
        if not isinstance(value, Weight):
            return value
        order = straight(len(value.shape))
        return Tensor(self.weights.decode(value.packed, order), value.shape, order)


def _computed(equation: Any, inputs: Sequence[Value]) -> list[np.ndarray]:
    """The outputs of an equation whose inputs are all known."""
    function = functools.partial(equation.primitive.bind, **equation.params)
    with jax.ensure_compile_time_eval():
        outputs = function(*inputs)
    return [np.asarray(out) for out in (outputs if equation.primitive.multiple_results else [outputs])]
