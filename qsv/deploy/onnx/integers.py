"""Layers in 8-bit integers: codes of activations, kernels of int8, normalisations folded into their scales.

What is written is the form that integer runtimes look for: QuantizeLinear and DequantizeLinear around operations on
floats, which onnxruntime and others replace by operations on codes when they load the file.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from qsv.deploy.integer import int8_levels
from qsv.deploy.onnx.contractions import convolution_attributes, is_dense
from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.tensors import Tensor, Value, Weight, broadcast, channels_first, reordered
from qsv.deploy.onnx.weights import PackedWeights
from qsv.quant import QuantizedActivations

# Marks a point in a traced network.
POINT = "qsv point "
_LARGEST_BIAS = 2**30
# The uint8 that a signed code of zero is written as.
_SIGNED_ZERO = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Deferred:
    """An array that is not written yet, so that what follows can become part of it.

    Attributes:
        base: what it is before the rectifier.
        rectified: whether negative values are set to zero.
    """

    base: "Tensor | Convolution"
    rectified: bool = False

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the JAX array."""
        return self.base.shape


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution of codes with an int8 kernel, times `gain`, plus `offset`.

    Attributes:
        inputs: its operand, channels first.
        input_scale: of the operand's codes.
        kernel: its kernel.
        order: axes of the kernel, outputs and inputs first.
        attributes: of ONNX's Conv.
        shape: of the JAX array.
        result_order: order of axes of ONNX's output.
        spatial_axes: to be appended to the kernel, which is then a matrix.
        gain: [outputs].
        offset: [outputs].
    """

    inputs: Tensor
    input_scale: float
    kernel: Weight
    order: tuple[int, ...]
    attributes: dict[str, Any]
    shape: tuple[Any, ...]
    result_order: tuple[int, ...]
    spatial_axes: int
    gain: np.ndarray
    offset: np.ndarray


class IntegerLayers:
    """Writes quantized activations and the layers that read them.

    Args:
        graph: to write into.
        weights: of the graph.
        activations: the codes.
    """

    def __init__(self, graph: Graph, weights: PackedWeights, activations: QuantizedActivations) -> None:
        self._graph, self._weights, self._activations = graph, weights, activations
        # Scales of tensors that were codes.
        self._scales: dict[str, float] = {}
        self._settled: dict[Deferred, Tensor] = {}

    def equation(self, equation: Any, inputs: Sequence[Any]) -> list[Any] | None:
        """The outputs of an equation that is a matter of codes; None for all others."""
        match equation.primitive.name, inputs:
            case "name", [value]:
                mark = equation.params["name"]
                return [self._quantized(value, mark.removeprefix(POINT)) if mark.startswith(POINT) else value]
            case "max", [value, other] if self._scalar(other) == 0 and isinstance(value, Tensor | Deferred):
                base = value.base if isinstance(value, Deferred) else value
                return [Deferred(base, rectified=True)]
            case "mul" | "add" | "sub" as name, [Deferred(base=Convolution() as base, rectified=False), other]:
                return self._folded(name, base, other)
            case "mul" | "add" as name, [other, Deferred(base=Convolution() as base, rectified=False)]:
                return self._folded(name, base, other)
            case "conv_general_dilated", [Tensor() as operand, Weight() as kernel]:
                return self._convolution(equation, operand, kernel)
            case "dot_general", [Tensor() as operand, Weight() as kernel]:
                return self._dense(equation, operand, kernel)
        return None

    def settled(self, value: Value | Deferred) -> Value:
        """A value that other equations can take."""
        if not isinstance(value, Deferred):
            return value
        if value not in self._settled:
            made = value.base if isinstance(value.base, Tensor) else self._convolved(value.base)
            if value.rectified:
                made = dataclasses.replace(made, name=self._graph.add("Relu", made.name))
            self._settled[value] = made
        return self._settled[value]

    def _quantized(self, value: Tensor | Deferred, point: str) -> Tensor:
        """The values of a point on the levels of its codes."""
        graph, quantizer = self._graph, self._activations.quantizer
        scale, zero_point = (np.float32(part) for part in quantizer.grid(self._activations.ranges[point]))
        # Signed codes are written as unsigned ones: onnxruntime's fast kernels on x86 take these alone.
        shift = _SIGNED_ZERO if quantizer.symmetric else 0
        zero, lowest, highest = (
            int(code) + shift for code in (zero_point, quantizer.lowest_code, quantizer.highest_code)
        )
        if isinstance(value, Deferred) and value.rectified:
            value, lowest = Deferred(value.base), zero
        tensor = self.settled(value)
        assert isinstance(tensor, Tensor)
        if tensor.rank > 2:
            # As convolutions take them, so that nothing comes between codes and layer.
            tensor = reordered(graph, tensor, channels_first(tensor.rank))
        parameters = [graph.constant(scale), graph.constant(np.uint8(zero))]
        codes = graph.add("QuantizeLinear", tensor.name, *parameters)
        if (lowest, highest) != (0, 255):
            # The codes, not the values: onnxruntime computes a layer in float if anything is between it and its codes.
            codes = graph.add("Clip", codes, graph.constant(np.uint8(lowest)), graph.constant(np.uint8(highest)))
        name = graph.add("DequantizeLinear", codes, *parameters)
        self._scales[name] = float(scale)
        return dataclasses.replace(tensor, name=name)

    def _scalar(self, value: Any) -> float | None:
        return float(value) if isinstance(value, np.ndarray) and value.size == 1 else None

    def _folded(self, name: str, base: Convolution, other: Any) -> list[Any] | None:
        """The convolution with a number for each output multiplied or added; None where it is something else."""
        vector = self._of_outputs(other, base)
        if vector is None:
            return None
        gain, offset = base.gain, base.offset
        match name:
            case "mul":
                gain, offset = gain * vector, offset * vector
            case "add":
                offset = offset + vector
            case _:
                offset = offset - vector
        return [Deferred(dataclasses.replace(base, gain=gain, offset=offset))]

    def _of_outputs(self, value: Any, base: Convolution) -> np.ndarray | None:
        """[outputs] float64, where a known value has one number for each, or one for all."""
        outputs, last = len(base.gain), len(base.shape) - 1
        if isinstance(value, Tensor):
            array = self._graph.known(value.name)
            if array is None or array.ndim != len(value.order):
                return None
            # In the order of JAX's axes.
            value = np.transpose(array, np.argsort(value.order)) if array.ndim else array
        if not isinstance(value, np.ndarray) or value.size not in (1, outputs):
            return None
        if value.size > 1 and (value.ndim != last + 1 or value.shape[last] != outputs):
            return None
        return np.broadcast_to(value.reshape(-1).astype(np.float64), outputs)

    def _convolution(self, equation: Any, operand: Tensor, kernel: Weight) -> list[Any] | None:
        if operand.name not in self._scales:
            return None
        lhs, rhs, result = equation.params["dimension_numbers"]
        attributes = convolution_attributes(equation)
        return self._deferred(equation, operand, lhs, kernel, tuple(rhs), attributes, tuple(result), 0)

    def _dense(self, equation: Any, operand: Tensor, kernel: Weight) -> list[Any] | None:
        """A dense layer over frames is a convolution of width one."""
        rank = operand.rank
        if operand.name not in self._scales or rank < 3 or not is_dense(equation):
            return None
        first = channels_first(rank)
        return self._deferred(equation, operand, first, kernel, (1, 0), {}, first, rank - 2)

    def _deferred(
        self,
        equation: Any,
        operand: Tensor,
        operand_order: Sequence[int],
        kernel: Weight,
        order: tuple[int, ...],
        attributes: dict[str, Any],
        result_order: tuple[int, ...],
        spatial_axes: int,
    ) -> list[Any]:
        scale = self._scales[operand.name]
        inputs = reordered(self._graph, broadcast(self._graph, operand), operand_order)
        outputs = kernel.shape[-1]
        made = Convolution(
            inputs,
            scale,
            kernel,
            order,
            attributes,
            tuple(equation.outvars[0].aval.shape),
            result_order,
            spatial_axes,
            np.ones(outputs),
            np.zeros(outputs),
        )
        return [Deferred(made)]

    def _convolved(self, layer: Convolution) -> Tensor:
        """Write a convolution; its bias is in units of its sums, and in float where it is too large for them."""
        graph, outputs = self._graph, len(layer.gain)
        levels, scale = int8_levels(layer.kernel.packed)
        factors = np.abs(layer.gain) * scale
        # A kernel that counts for nothing needs a scale nevertheless.
        factors = np.where(factors > 0, factors, 1.0).astype(np.float32)
        codes = self._weights.int8(layer.kernel.packed, levels, layer.order, np.sign(layer.gain).astype(np.int64))
        with graph.first():
            if layer.spatial_axes:
                axes = np.arange(2, 2 + layer.spatial_axes, dtype=np.int64)
                codes = graph.add("Unsqueeze", codes, graph.constant(axes))
            scales = self._of_every_output(factors)
            # Each kernel has zeros of its own: onnxruntime can't make unsigned kernels of two that share them.
            zeros = graph.add("Expand", graph.constant(np.int8(0)), graph.constant([outputs]))
        arguments = [layer.inputs.name, graph.add("DequantizeLinear", codes, scales, zeros, axis=0)]
        bias = np.round(layer.offset / (np.float32(layer.input_scale) * factors))
        fits = bool(np.all(np.abs(bias) < _LARGEST_BIAS))
        if fits and np.any(bias):
            with graph.first():
                sums = graph.add("Mul", scales, graph.constant(np.float32(layer.input_scale)))
            zeros = graph.constant(np.zeros(outputs, np.int32))
            values = graph.constant(bias.astype(np.int32))
            arguments.append(graph.add("DequantizeLinear", values, sums, zeros, axis=0))
        name = graph.add("Conv", *arguments, **layer.attributes)
        if not fits:
            shape = [1, outputs, *[1] * (len(layer.shape) - 2)]
            name = graph.add("Add", name, graph.constant(layer.offset.astype(np.float32).reshape(shape)))
        return Tensor(name, layer.shape, layer.result_order)

    def _of_every_output(self, values: np.ndarray) -> str:
        """[outputs] float32; values that are all the same are stored once."""
        if len(values) > 1 and np.ptp(values) == 0:
            return str(self._graph.add("Expand", self._graph.constant(values[0]), self._graph.constant([len(values)])))
        return self._graph.constant(values)
