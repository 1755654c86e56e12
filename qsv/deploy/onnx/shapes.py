"""Operations that move, cut, join and index axes, and ONNX's for them."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from qsv.deploy.onnx.graph import Graph, is_known
from qsv.deploy.onnx.tensors import (
    Tensor,
    Value,
    as_tensor,
    broadcast,
    inverse,
    onnx_type,
    plain,
    reordered,
    same_shape,
    same_size,
    straight,
)


def broadcast_in_dim(graph: Graph, equation: Any, operand: np.ndarray | Tensor, *sizes: Value) -> Tensor:
    """New axes and axes of size 1 stay as they are until somebody needs their full size."""
    shape, places = tuple(equation.outvars[0].aval.shape), equation.params["broadcast_dimensions"]
    operand = as_tensor(graph, operand)
    new = [axis for axis in range(len(shape)) if axis not in places]
    # An axis of the operand keeps its place among the others; a new one follows the axis that it follows in JAX.
    order = [places[axis] for axis in operand.order]
    for axis in new:
        order.insert(order.index(axis - 1) + 1 if axis else 0, axis)
    name, values = operand.name, graph.known(operand.name)
    if new:
        inserted = [order.index(axis) for axis in new]
        if values is None:
            name = graph.add("Unsqueeze", name, graph.constant(np.array(inserted, np.int64)))
        else:
            name = graph.constant(np.expand_dims(values, tuple(inserted)))
    own = {places[axis] for axis in operand.stretched}
    grown = {place for axis, place in enumerate(places) if not same_size(operand.shape[axis], shape[place])}
    stretched = {axis for axis in own | grown | set(new) if not same_size(shape[axis], 1)}
    return Tensor(name, shape, tuple(order), frozenset(stretched))


def transpose(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """No node: the tensor stays, its axes are called otherwise."""
    place = inverse(equation.params["permutation"])
    order = tuple(place[axis] for axis in operand.order)
    stretched = frozenset(place[axis] for axis in operand.stretched)
    return Tensor(operand.name, tuple(equation.outvars[0].aval.shape), order, stretched)


def reshape(graph: Graph, equation: Any, operand: Tensor, *sizes: Value) -> Tensor:
    """`reshape` and `squeeze`; unknown sizes are computed."""
    shape = tuple(equation.outvars[0].aval.shape)
    if same_shape(shape, operand.shape):
        return operand
    kept = [axis for axis in range(operand.rank) if not same_size(operand.shape[axis], 1)]
    if same_shape(shape, [operand.shape[axis] for axis in kept]):
        return _squeezed(graph, operand, kept)
    order = _merged_order(operand, shape)
    if order is None:
        operand, order = plain(graph, operand), straight(len(shape))
    old, new = [operand.shape[axis] for axis in operand.order], [shape[axis] for axis in order]
    name = graph.add("Reshape", broadcast(graph, operand).name, _target(graph, old, new))
    return Tensor(name, shape, order)


def _merged_order(operand: Tensor, shape: Sequence[Any]) -> tuple[int, ...] | None:
    """The order of new axes where each is one old axis, or several that lie side by side; None for other shapes."""
    runs: list[range] = []
    end = 0
    for size in shape:
        start, product = end, 1
        while end < operand.rank and (end == start or not same_size(product, size)):
            product, end = product * operand.shape[end], end + 1
        if end == start or not same_size(product, size):
            return None
        runs.append(range(start, end))
    order = sorted(range(len(runs)), key=lambda new: operand.order.index(runs[new][0]))
    lying = itertools.chain.from_iterable(runs[new] for new in order)
    return tuple(order) if tuple(lying) == operand.order else None


def _target(graph: Graph, old: Sequence[Any], new: Sequence[Any]) -> str:
    """The shape for ONNX's Reshape: 0 keeps the axis of that place, -1 is what is left."""
    target: list[Any] = [
        0 if axis < len(old) and not is_known(size) and same_shape(old[: axis + 1], new[: axis + 1]) else size
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
    if not axes:
        return operand
    whole = broadcast(graph, operand, axes)
    # Sizes for all axes: where some are named, onnxruntime 1.31 confuses them when it moves transpositions.
    sizes = graph.shape([edges[axis][side] for side in (0, 1) for axis in whole.order])
    fill = graph.constant(np.asarray(value)) if not isinstance(value, Tensor) else value.name
    name = graph.add("Pad", whole.name, sizes, fill)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), whole.order, whole.stretched)


def rev(graph: Graph, equation: Any, operand: Tensor) -> Tensor:
    """`rev`: the axes backwards."""
    axes = [axis for axis in equation.params["dimensions"] if axis not in operand.stretched]
    if not axes:
        return operand
    places = np.array([operand.order.index(axis) for axis in axes], np.int64)
    last, first = np.full(len(axes), -1, np.int64), np.full(len(axes), np.iinfo(np.int64).min, np.int64)
    name = graph.add("Slice", operand.name, *map(graph.constant, (last, first, places, last)))
    return Tensor(name, operand.shape, operand.order, operand.stretched)


def gather(graph: Graph, equation: Any, operand: np.ndarray | Tensor, indices: np.ndarray | Tensor) -> Tensor:
    """`gather` of whole slices along one axis, as indexing by an array makes it."""
    parameters, out = equation.params, tuple(equation.outvars[0].aval.shape)
    numbers, shape = parameters["dimension_numbers"], equation.invars[0].aval.shape
    sizes = parameters["slice_sizes"]
    axis = numbers.start_index_map[0] if len(numbers.start_index_map) == 1 else -1
    batched = numbers.operand_batching_dims
    if isinstance(indices, np.ndarray) and indices.ndim == 1 and not numbers.collapsed_slice_dims and not batched:
        starts = dict(zip(numbers.start_index_map, indices, strict=True))
        return _window(graph, as_tensor(graph, operand), starts, out)
    is_take = (
        axis >= 0
        and tuple(numbers.collapsed_slice_dims) == (axis,)
        and not batched
        and all(place == axis or same_size(sizes[place], size) for place, size in enumerate(shape))
    )
    rank_indices = len(equation.invars[1].aval.shape) - 1
    # ONNX puts the axes of the indices where the axis was.
    expected = (*range(axis), *range(axis + rank_indices, len(out)))
    if not is_take or tuple(numbers.offset_dims) != expected:
        raise NotImplementedError(f"gather with {numbers}")
    data = plain(graph, as_tensor(graph, operand))
    if isinstance(indices, Tensor):
        last = graph.constant(np.array([-1], np.int64))
        places = graph.add("Squeeze", plain(graph, indices).name, last)
    else:
        places = graph.constant(indices[..., 0].astype(np.int64))
    return Tensor(graph.add("Gather", data.name, places, axis=axis), out, straight(len(out)))


def _window(graph: Graph, operand: Tensor, starts: dict[int, Any], shape: tuple[Any, ...]) -> Tensor:
    """A part of the operand, from known places on, as indexing by a slice of unknown length makes it."""
    places = {axis: int(start) for axis, start in starts.items() if axis not in operand.stretched}
    name = graph.add(
        "Slice",
        operand.name,
        graph.constant(np.array(list(places.values()), np.int64)),
        graph.shape([start + shape[axis] for axis, start in places.items()]),
        graph.constant(np.array([operand.order.index(axis) for axis in places], np.int64)),
    )
    return Tensor(name, shape, operand.order, operand.stretched)


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
