"""Where a network's activations become codes, found by tracing it."""

import dataclasses
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from qsv.models.batch_norm import BatchNorm
from qsv.models.jaxprs import called
from qsv.models.network import Network
from qsv.models.quantized_activations import OUTPUT

# Enough for every pooling.
_FRAMES = 64
_MADE, _NORMALISED, _READ = "made ", "normalised ", "read"
# What keeps codes codes: permutations and copies of values, and limits, which a range has anyway.
_TRANSPARENT = ("max", "min", "clamp", "reshape", "transpose", "copy", "squeeze", "stop_gradient")


@dataclasses.dataclass(frozen=True)
class ActivationPoints:
    """Points of a network at which integer arithmetic needs codes; a point is a name that a range can have.

    Attributes:
        inputs: {path of a convolution or dense layer: point of its input}. That is the path of the outermost module
            that is given the very same array: a residual block whose first layer and shortcut read it share one point.
        outputs: {path of such a layer: point of its output}, `PATH:output`, for layers whose output, after the batch
            normalisation behind it if that alone reads it, is read by something else than rectifiers and layers: by a
            sum, a product, a concatenation. PATH is of the normalisation, or of the layer.
        rectified: points of outputs that rectifiers alone read, so that codes of what is negative would be wasted.
    """

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    rectified: frozenset[str]


def activation_points(network: Network) -> ActivationPoints:
    """The points of a network, in the order of computation; it is only traced."""
    features = jax.ShapeDtypeStruct((1, _FRAMES, network.frontend.num_features), np.float32)
    arguments = (jax.eval_shape(network.init, jax.random.key(0)), features)
    inputs = _input_points(network.module().apply, arguments)
    norms, closed = _marked(network.module().apply, arguments, set(inputs.values()))
    readers = _Readers(closed)
    outputs, rectified = {}, set()
    for layer in inputs:
        name, path = _MADE + layer, layer
        # One that isn't alone, such as the first of a dense block, belongs to what comes after it.
        if layer in norms and readers.is_read_once(name):
            name, path = _NORMALISED + layer, norms[layer]
        if not readers.are_codes(name):
            outputs[layer] = path + OUTPUT
            if readers.is_rectified(name):
                rectified.add(path + OUTPUT)
    return ActivationPoints(inputs, outputs, frozenset(rectified))


def _input_points(apply: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, str]:
    """{path of a layer: path of the outermost module that is given the same array}, in the order of computation."""
    points: dict[str, str] = {}
    calls: list[tuple[str, Any]] = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__" or not args:
            return call(*args, **kwargs)
        path = "/".join(context.module.path)
        calls.append((path, args[0]))
        if isinstance(context.module, nn.Conv | nn.Dense):
            points[path] = next(own for own, value in calls if own and value is args[0])
        try:
            return call(*args, **kwargs)
        finally:
            calls.pop()

    with nn.intercept_methods(intercept):
        jax.eval_shape(apply, *arguments)
    return points


def _marked(
    apply: Callable[..., Any], arguments: tuple[Any, ...], points: Collection[str]
) -> tuple[dict[str, str], Any]:
    """{layer: path of the batch normalisation of its output}, and the traced function with names for what points read,
    for what layers make and for what these normalisations do.
    """
    norms: dict[str, str] = {}
    made: list[tuple[str, Any]] = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        path, module = "/".join(context.module.path), context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        given = checkpoint_name(args[0], _READ) if path in points else args[0] if args else None
        out = call(given, *args[1:], **kwargs) if args else call(**kwargs)
        if isinstance(module, nn.Conv | nn.Dense):
            out = checkpoint_name(out, _MADE + path)
            made.append((path, out))
        elif isinstance(module, BatchNorm | nn.BatchNorm):
            for layer, value in made:
                if value is given:
                    out = checkpoint_name(out, _NORMALISED + layer)
                    norms[layer] = path
        return out

    with nn.intercept_methods(intercept):
        return norms, jax.make_jaxpr(apply)(*arguments)


class _Value:
    """An array of the traced function; one variable of a function that is called twice is two of them.

    Attributes:
        scalar: the number, where it is a literal.
    """

    def __init__(self, scalar: float | None = None) -> None:
        self.scalar = scalar


_Visit = tuple[Any, list[_Value], list[_Value]]


class _Readers:
    """Who reads which value of a traced function, calls written out."""

    def __init__(self, closed: Any) -> None:
        self._consumers: dict[_Value, list[_Visit]] = {}
        self._named: dict[str, _Value] = {}
        for equation, inputs, outputs in _equations(closed.jaxpr, [_Value() for _ in closed.jaxpr.invars]):
            for value in inputs:
                self._consumers.setdefault(value, []).append((equation, inputs, outputs))
            if equation.primitive.name == "name":
                self._named[equation.params["name"]] = outputs[0]

    def is_read_once(self, name: str) -> bool:
        """Whether one operation alone reads a value."""
        return len(self._consumers.get(self._named[name], ())) == 1

    def are_codes(self, name: str) -> bool:
        """Whether a value goes to points alone; that of the network goes nowhere."""
        return self._goes_to_points(self._named[name])

    def is_rectified(self, name: str) -> bool:
        """Whether rectifiers alone read a value."""
        readers = self._consumers.get(self._named[name], ())
        return bool(readers) and all(
            equation.primitive.name == "max" and any(value.scalar == 0 for value in inputs)
            for equation, inputs, _ in readers
        )

    def _goes_to_points(self, value: _Value) -> bool:
        for equation, inputs, outputs in self._consumers.get(value, ()):
            name = equation.primitive.name
            if name == "name" and equation.params["name"] == _READ:
                continue
            is_transparent = name in _TRANSPARENT and all(own is value or own.scalar is not None for own in inputs)
            if not (name == "name" or is_transparent) or not self._goes_to_points(outputs[0]):
                return False
        return True


def _equations(jaxpr: Any, arguments: Sequence[_Value]) -> Generator[_Visit, None, list[_Value]]:
    """(equation, its inputs, its outputs), calls written out; returns the outputs of all."""
    values = {variable: _Value() for variable in jaxpr.constvars} | dict(zip(jaxpr.invars, arguments, strict=True))
    for equation in jaxpr.eqns:
        inputs = [_value(own, values) for own in equation.invars]
        function = called(equation)
        if function is not None:
            outputs = yield from _equations(function.jaxpr, inputs)
        else:
            outputs = [_Value() for _ in equation.outvars]
            yield equation, inputs, outputs
        values |= dict(zip(equation.outvars, outputs, strict=True))
    return [_value(own, values) for own in jaxpr.outvars]


def _value(variable: Any, values: Mapping[Any, _Value]) -> _Value:
    if isinstance(variable, Literal):
        return _Value(float(variable.val) if np.ndim(variable.val) == 0 else None)
    return values[variable]
