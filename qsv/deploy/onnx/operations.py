"""JAX operations that ONNX has too: arithmetic, comparisons, shapes and reductions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.lax import FftType
from onnx import helper

from qsv.deploy.onnx.graph import Graph, is_known
from qsv.deploy.onnx.tensors import Tensor, Value, broadcast, inverse, plain, reordered, same_size, straight

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
            if neutral and isinstance(other, Tensor) and list(map(str, other.shape)) == list(map(str, out.shape)):
                return other
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
            values, same = _shrunk(values)
            narrow &= same
            values = np.transpose(values, order)
        names.append(graph.constant(values))
    stretched = frozenset(axis for axis in narrow if not same_size(shape[axis], 1))
    return Tensor(make(*names), shape, order, stretched)


def _shrunk(values: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """Values with axes along which they are equal in size 1, and these axes."""
    same = set()
    for axis in range(values.ndim):
        first = values.take(range(min(1, values.shape[axis])), axis)
        if first.size and np.array_equal(np.broadcast_to(first, values.shape), values):
            values = first
            same.add(axis)
    return values, same


def convert(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`convert_element_type`."""
    dtype = equation.outvars[0].aval.dtype
    if equation.invars[0].aval.dtype == dtype:
        return operand
    name = graph.add("Cast", operand.name, to=onnx_type(dtype))
    return Tensor(name, operand.shape, operand.order, operand.stretched)


def onnx_type(dtype: Any) -> int:
    """ONNX's number of a type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def broadcast_in_dim(graph: Graph, equation: Any, operand: Value, *sizes: Value) -> Tensor:
    """New axes and axes of size 1 stay as they are until somebody needs their full size."""
    shape, places = tuple(equation.outvars[0].aval.shape), equation.params["broadcast_dimensions"]
    if not isinstance(operand, Tensor):
        operand = constant_tensor(graph, np.asarray(operand))
    new = [axis for axis in range(len(shape)) if axis not in places]
    # An axis of the operand keeps its place among the others; new ones come in at their own.
    order = [places[axis] for axis in operand.order]
    for axis in new:
        order.insert(axis, axis)
    name = operand.name
    if new:
        name = graph.add("Unsqueeze", name, graph.constant(np.array([order.index(axis) for axis in new], np.int64)))
    own = {places[axis] for axis in operand.stretched}
    grown = {place for axis, place in enumerate(places) if not same_size(operand.shape[axis], shape[place])}
    stretched = {axis for axis in own | grown | set(new) if not same_size(shape[axis], 1)}
    return Tensor(name, shape, tuple(order), frozenset(stretched))


def constant_tensor(graph: Graph, values: np.ndarray) -> Tensor:
    """A known array as a tensor, shrunk where it is the same along an axis."""
    small, same = _shrunk(values) if values.ndim else (values, set())
    stretched = frozenset(axis for axis in same if values.shape[axis] != 1)
    return Tensor(graph.constant(small), values.shape, straight(values.ndim), stretched)


def transpose(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """No node: the tensor stays, its axes are called otherwise."""
    place = inverse(equation.params["permutation"])
    order = tuple(place[axis] for axis in operand.order)
    stretched = frozenset(place[axis] for axis in operand.stretched)
    return Tensor(operand.name, tuple(equation.outvars[0].aval.shape), order, stretched)


def reshape(graph: Graph, equation: Any, operand: Tensor, *sizes: Value) -> Tensor:
    """`reshape` and `squeeze`; unknown sizes are computed."""
    shape = tuple(equation.outvars[0].aval.shape)
    if len(shape) == operand.rank and all(map(same_size, shape, operand.shape)):
        return operand
    kept = [axis for axis in range(operand.rank) if not same_size(operand.shape[axis], 1)]
    if list(map(str, shape)) == [str(operand.shape[axis]) for axis in kept]:
        return _squeezed(graph, operand, kept)
    name = graph.add("Reshape", plain(graph, operand).name, _target(graph, operand.shape, shape))
    return Tensor(name, shape, straight(len(shape)))


def _target(graph: Graph, old: Sequence[Any], new: Sequence[Any]) -> str:
    """The shape for ONNX's Reshape: 0 keeps the axis of that place, -1 is what is left."""
    target: list[Any] = [
        0 if axis < len(old) and not is_known(size) and all(map(same_size, old[: axis + 1], new[: axis + 1])) else size
        for axis, size in enumerate(new)
    ]
    unknown = [axis for axis, size in enumerate(target) if not is_known(size)]
    if len(unknown) == 1:
        target[unknown[0]] = -1
    if len(unknown) <= 1:
        return graph.constant(np.array(target, np.int64))
    return graph.shape(new)


def _squeezed(graph: Graph, operand: Tensor, kept: Sequence[int]) -> Tensor:
    """A tensor without axes of size 1."""
    gone = [axis for axis in range(operand.rank) if axis not in kept]
    name = operand.name
    if gone:
        places = sorted(operand.order.index(axis) for axis in gone)
        name = graph.add("Squeeze", name, graph.constant(np.array(places, np.int64)))
    order = tuple(kept.index(axis) for axis in operand.order if axis in kept)
    stretched = frozenset(kept.index(axis) for axis in operand.stretched)
    return Tensor(name, tuple(operand.shape[axis] for axis in kept), order, stretched)


def squeeze(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """Axes of size 1 go."""
    gone = equation.params["dimensions"]
    return _squeezed(graph, operand, [axis for axis in range(operand.rank) if axis not in gone])


def concatenate(graph: Graph, equation: Any, *operands: np.ndarray | Tensor) -> Tensor:
    """`concatenate`, in the order of axes that the first computed operand has."""
    out, axis = equation.outvars[0].aval, equation.params["dimension"]
    order = next(operand.order for operand in operands if isinstance(operand, Tensor))
    names = [
        reordered(graph, broadcast(graph, o), order).name
        if isinstance(o, Tensor)
        else graph.constant(np.transpose(o, order))
        for o in operands
    ]
    return Tensor(graph.add("Concat", *names, axis=order.index(axis)), tuple(out.shape), order)


def split(graph: Graph, equation: Any, operand: Tensor) -> list[Tensor]:
    """`split` along one axis."""
    axis = equation.params["axis"]
    whole = broadcast(graph, operand, [axis])
    sizes = graph.constant(np.array(equation.params["sizes"], np.int64))
    outs = equation.outvars
    names = graph.add("Split", whole.name, sizes, outputs=len(outs), axis=whole.order.index(axis))
    names = [names] if len(outs) == 1 else names
    return [
        Tensor(name, tuple(out.aval.shape), whole.order, whole.stretched) for name, out in zip(names, outs, strict=True)
    ]


def slice_(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`slice`; stretched axes that it cuts are stretched to what is left."""
    shape, parameters = tuple(equation.outvars[0].aval.shape), equation.params
    strides = parameters["strides"] or (1,) * operand.rank
    cut = [
        axis
        for axis in range(operand.rank)
        if axis not in operand.stretched and not (same_size(shape[axis], operand.shape[axis]) and strides[axis] == 1)
    ]
    name = operand.name
    if cut:
        starts, ends = ([parameters[key][axis] for axis in cut] for key in ("start_indices", "limit_indices"))
        name = graph.add(
            "Slice",
            name,
            graph.shape(starts),
            graph.shape(ends),
            graph.constant(np.array([operand.order.index(axis) for axis in cut], np.int64)),
            graph.constant(np.array([strides[axis] for axis in cut], np.int64)),
        )
    return Tensor(name, shape, operand.order, operand.stretched)


def pad(graph: Graph, equation: Any, operand: Tensor, value: Value) -> Tensor:
    """`pad` without gaps between elements; negative edges cut."""
    edges = equation.params["padding_config"]
    if any(is_known(inner) and inner for _, _, inner in edges):
        raise NotImplementedError("pad between elements")
    axes = [axis for axis, (low, high, _) in enumerate(edges) if not (same_size(low, 0) and same_size(high, 0))]
    whole = broadcast(graph, operand, axes)
    places = graph.constant(np.array([whole.order.index(axis) for axis in axes], np.int64))
    sizes = graph.shape([edges[axis][side] for side in (0, 1) for axis in axes])
    fill = graph.constant(np.asarray(value)) if not isinstance(value, Tensor) else value.name
    name = graph.add("Pad", whole.name, sizes, fill, places)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), whole.order, whole.stretched)


def rev(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`rev`: the axes backwards."""
    axes = [axis for axis in equation.params["dimensions"] if axis not in operand.stretched]
    places = np.array([operand.order.index(axis) for axis in axes], np.int64)
    last, first = np.full(len(axes), -1, np.int64), np.full(len(axes), np.iinfo(np.int64).min, np.int64)
    name = graph.add("Slice", operand.name, *map(graph.constant, (last, first, places, last)))
    return Tensor(name, operand.shape, operand.order, operand.stretched)


def max_pool(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`reduce_window_max` over axes amid those of the batch, first, and the channels, last."""
    parameters, rank = equation.params, operand.rank
    window, strides, padding = (parameters[key] for key in ("window_dimensions", "window_strides", "padding"))
    gaps = (*parameters["base_dilation"], *parameters["window_dilation"])
    if any(gap != 1 for gap in gaps) or {window[0], window[-1], strides[0], strides[-1]} != {1}:
        raise NotImplementedError(f"max pooling by windows of {window}")
    order = (0, rank - 1, *range(1, rank - 1))
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
    whole = broadcast(graph, operand, axes) if kind == "ReduceSum" else operand
    places = graph.constant(np.array([whole.order.index(axis) for axis in axes], np.int64))
    name = graph.add(kind, whole.name, places, keepdims=0)
    kept = [axis for axis in range(operand.rank) if axis not in axes]
    order = tuple(kept.index(axis) for axis in whole.order if axis in kept)
    stretched = frozenset(kept.index(axis) for axis in whole.stretched if axis in kept)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), order, stretched)


def iota(graph: Graph, equation: Any, *sizes: Value) -> Tensor:
    """0, 1, 2 ... along one axis."""
    shape, axis = tuple(equation.outvars[0].aval.shape), equation.params["dimension"]
    zero, one = graph.constant(np.int64(0)), graph.constant(np.int64(1))
    name = graph.add("Range", zero, graph.size(shape[axis]), one)
    name = graph.add("Cast", name, to=onnx_type(equation.params["dtype"]))
    others = [other for other in range(len(shape)) if other != axis]
    if others:
        name = graph.add("Unsqueeze", name, graph.constant(np.array(others, np.int64)))
    stretched = frozenset(other for other in others if not same_size(shape[other], 1))
    return Tensor(name, shape, straight(len(shape)), stretched)


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
    name = graph.add("DFT", graph.add("Unsqueeze", whole.name, axis), axis=whole.rank - 1, onesided=1)
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
