"""Arithmetic, comparisons, reductions and spectra, and ONNX's operations for them."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.lax import FftType

from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.tensors import (
    Tensor,
    Value,
    broadcast,
    channels_first,
    onnx_type,
    plain,
    reordered,
    same_shape,
    same_size,
    shrunk,
    straight,
)

_ELEMENTWISE = {
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "max": "Max",
    "min": "Min",
    "and": "And",
    "or": "Or",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "neg": "Neg",
    "not": "Not",
    "abs": "Abs",
    "sign": "Sign",
    "floor": "Floor",
    "round": "Round",
    "exp": "Exp",
    "log": "Log",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "sqrt": "Sqrt",
    "erf": "Erf",
}
# What leaves an array as it is: (operation, the known operand, its place).
_NEUTRAL = {("add", 0.0, 0), ("add", 0.0, 1), ("sub", 0.0, 1), ("mul", 1.0, 0), ("mul", 1.0, 1), ("div", 1.0, 1)}


def elementwise(graph: Graph, equation: Any, *operands: Value) -> Value:
    """Operations on arrays of one shape, or with scalars."""
    name, out = equation.primitive.name, equation.outvars[0].aval
    for place, operand in enumerate(operands):
        if not isinstance(operand, Tensor) and len(operands) == 2:
            values, other = np.asarray(operand), operands[1 - place]
            neutral = values.size and (name, float(values.flat[0]), place) in _NEUTRAL and np.ptp(values) == 0
            if neutral and isinstance(other, Tensor) and same_shape(other.shape, out.shape):
                return other
    rectified = _rectified(name, out, operands)
    if rectified is not None:
        # Runtimes have a kernel for it, and fuse it with what comes before.
        return Tensor(graph.add("Relu", rectified.name), rectified.shape, rectified.order, rectified.stretched)
    match name:
        case "ne":
            return _apply(graph, out, lambda a, b: graph.add("Not", graph.add("Equal", a, b)), operands)
        case "rsqrt":
            return _apply(graph, out, lambda a: graph.add("Reciprocal", graph.add("Sqrt", a)), operands)
        case "square":
            return _apply(graph, out, lambda a: graph.add("Mul", a, a), operands)
        case "log1p":
            one = graph.constant(np.ones((), out.dtype))
            return _apply(graph, out, lambda a: graph.add("Log", graph.add("Add", a, one)), operands)
        case "rem":
            return _apply(graph, out, lambda a, b: graph.add("Mod", a, b, fmod=1), operands)
        case "integer_pow":
            exponent = graph.constant(np.asarray(equation.params["y"], out.dtype))
            return _apply(graph, out, lambda a: graph.add("Pow", a, exponent), operands)
        case "select_n":
            # JAX's first case is that of false.
            return _apply(graph, out, lambda which, no, yes: graph.add("Where", which, yes, no), operands)
        case "clamp":
            return _apply(graph, out, lambda low, x, high: graph.add("Clip", x, low, high), operands)
    return _apply(graph, out, lambda *names: graph.add(_ELEMENTWISE[name], *names), operands)


def _rectified(name: str, out: Any, operands: Sequence[Value]) -> Tensor | None:
    """The operand of max(x, 0); None for all else."""
    if name != "max" or out.dtype != np.float32:
        return None
    left, right = operands
    for own, other in ((left, right), (right, left)):
        zero = isinstance(other, np.ndarray) and other.ndim == 0 and float(other) == 0
        if zero and isinstance(own, Tensor) and same_shape(own.shape, out.shape):
            return own
    return None


ELEMENTWISE = (
    *_ELEMENTWISE,
    *("ne", "rsqrt", "square", "log1p", "rem", "integer_pow", "select_n", "clamp"),
)


def _apply(graph: Graph, out: Any, make: Callable[..., str], operands: Sequence[Value]) -> Tensor:
    """A node over operands that are broadcast by ONNX, in the order of axes of the first that isn't JAX's."""
    shape, usual = tuple(out.shape), straight(len(out.shape))
    orders = [operand.order for operand in operands if isinstance(operand, Tensor) and operand.rank]
    order = next((one for one in orders if one != usual), usual)
    # Of size 1 in all operands.
    narrow = set(usual)
    names = []
    for operand in operands:
        if isinstance(operand, Tensor):
            own = operand
            if operand.rank:
                own = reordered(graph, operand, order)
                narrow &= own.stretched | {axis for axis, size in enumerate(own.shape) if same_size(size, 1)}
            names.append(own.name)
            continue
        values = np.asarray(operand)
        if values.ndim:
            values, same = shrunk(values)
            narrow &= same
            values = np.transpose(values, order)
        names.append(graph.constant(values))
    stretched = frozenset(axis for axis in narrow if not same_size(shape[axis], 1))
    return Tensor(make(*names), shape, order, stretched)


def convert(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`convert_element_type`."""
    dtype = equation.outvars[0].aval.dtype
    if equation.invars[0].aval.dtype == dtype:
        return operand
    name = graph.add("Cast", operand.name, to=onnx_type(dtype))
    return Tensor(name, operand.shape, operand.order, operand.stretched)


def max_pool(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`reduce_window_max` over axes amid those of the batch, first, and the channels, last."""
    parameters, rank = equation.params, operand.rank
    window, strides, padding = (parameters[key] for key in ("window_dimensions", "window_strides", "padding"))
    gaps = (*parameters["base_dilation"], *parameters["window_dilation"])
    if any(gap != 1 for gap in gaps) or {window[0], window[-1], strides[0], strides[-1]} != {1}:
        raise NotImplementedError(f"max pooling by windows of {window}")
    order = channels_first(rank)
    inputs = reordered(graph, broadcast(graph, operand), order)
    pads = [edge[side] for side in (0, 1) for edge in padding[1:-1]]
    name = graph.add("MaxPool", inputs.name, kernel_shape=list(window[1:-1]), strides=list(strides[1:-1]), pads=pads)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), order)


_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin"}
REDUCTIONS = tuple(_REDUCTIONS)


def reduction(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """Sums and extremes over axes."""
    axes = equation.params["axes"]
    kind = _REDUCTIONS[equation.primitive.name]
    # The extreme of one value is that of its repetitions.
    whole = broadcast(graph, operand, axes) if kind == "ReduceSum" else operand
    places = graph.constant(np.array([whole.order.index(axis) for axis in axes], np.int64))
    name = graph.add(kind, whole.name, places, keepdims=0)
    kept = [axis for axis in range(operand.rank) if axis not in axes]
    order = tuple(kept.index(axis) for axis in whole.order if axis in kept)
    stretched = frozenset(kept.index(axis) for axis in whole.stretched if axis in kept)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), order, stretched)


def dim_as_value(graph: Graph, equation: Any) -> Tensor:
    """A size as a number."""
    dtype = equation.outvars[0].aval.dtype
    name = graph.add("Cast", graph.size(equation.params["dim"]), to=onnx_type(dtype))
    return Tensor(name, (), ())


def fft(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """A real transform of the last axis; the tensor has another last axis with the real and the imaginary part."""
    kind, length = equation.params["fft_type"], equation.params["fft_lengths"]
    if FftType(kind) != FftType.RFFT or len(length) != 1:
        raise NotImplementedError(f"fft of type {kind} over {len(length)} axes")
    whole = plain(graph, operand)
    axis = graph.constant(np.array([-1], np.int64))
    # All frequencies, then half of them: OpenVINO 2026.4 takes no notice of DFT's `onesided`.
    spectrum = graph.add("DFT", graph.add("Unsqueeze", whole.name, axis), axis=whole.rank - 1)
    bounds = (np.array([number], np.int64) for number in (0, length[0] // 2 + 1, whole.rank - 1))
    name = graph.add("Slice", spectrum, *map(graph.constant, bounds))
    return Tensor(name, tuple(equation.outvars[0].aval.shape), straight(whole.rank))


def real(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """The real part of what `fft` gave."""
    return _part(graph, operand, 0)


def imag(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """The imaginary part of what `fft` gave."""
    return _part(graph, operand, 1)


def _part(graph: Graph, operand: Tensor, index: int) -> Tensor:
    name = graph.add("Gather", operand.name, graph.constant(np.int64(index)), axis=-1)
    return Tensor(name, operand.shape, operand.order)


def stop_gradient(graph: Graph, equation: Any, operand: Value) -> Value:
    """The values as they are."""
    return operand
