"""Convolutions and products of matrices: what multiplies by weights."""

import itertools
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.tensors import Tensor, Value, as_tensor, broadcast, channels_first, reordered, straight

# (weight, order of its axes) -> name of the float tensor
Decode = Callable[[Value, Sequence[int]], str]


def convolution(graph: Graph, decode: Decode, equation: Any, operand: np.ndarray | Tensor, kernel: Value) -> Tensor:
    """`conv_general_dilated`: ONNX's Conv, with the channels before the spatial axes."""
    lhs, rhs, result = equation.params["dimension_numbers"]
    attributes = convolution_attributes(equation)
    inputs = reordered(graph, broadcast(graph, as_tensor(graph, operand)), lhs)
    name = graph.add("Conv", inputs.name, decode(kernel, rhs), **attributes)
    return Tensor(name, tuple(equation.outvars[0].aval.shape), tuple(result))


def convolution_attributes(equation: Any) -> dict[str, Any]:
    """What ONNX's Conv is told of strides, padding, dilation and groups; NotImplementedError where it can't be."""
    parameters, padding = equation.params, equation.params["padding"]
    if any(step != 1 for step in parameters["lhs_dilation"]) or parameters["batch_group_count"] != 1:
        raise NotImplementedError("a transposed convolution")
    return {
        "strides": list(parameters["window_strides"]),
        "pads": [*(low for low, _ in padding), *(high for _, high in padding)],
        "dilations": list(parameters["rhs_dilation"]),
        "group": parameters["feature_group_count"],
    }


def dot_general(graph: Graph, decode: Decode, equation: Any, left: np.ndarray | Tensor, right: Value) -> Tensor:
    """`dot_general`: a dense layer as MatMul, or as Conv where its input has channels first.

    Another product with a matrix is a MatMul too; the rest is Einsum, which runtimes compute less fast.
    """
    out = tuple(equation.outvars[0].aval.shape)
    if isinstance(left, Tensor) and not isinstance(right, Tensor) and is_dense(equation):
        return _dense(graph, decode, left, right, out)
    rank_left, rank_right = (len(variable.aval.shape) for variable in equation.invars)
    sides = [
        broadcast(graph, side) if isinstance(side, Tensor) else Tensor(decode(side, straight(rank)), (), straight(rank))
        for side, rank in ((left, rank_left), (right, rank_right))
    ]
    contracted, (batch, _) = equation.params["dimension_numbers"]
    if not batch and len(contracted[0]) == 1 and min(rank_left, rank_right) == 2:
        return _matrix_product(graph, sides, [axis for (axis,) in contracted], out)
    text = _einsum(equation.params, sides[0].order, sides[1].order)
    return Tensor(graph.add("Einsum", *(side.name for side in sides), equation=text), out, straight(len(out)))


def is_dense(equation: Any) -> bool:
    """Whether a `dot_general` multiplies the last axis by a matrix, as a dense layer does."""
    contracted, (batch_left, _) = equation.params["dimension_numbers"]
    rank_left, rank_right = (len(variable.aval.shape) for variable in equation.invars)
    return not batch_left and rank_right == 2 and tuple(map(tuple, contracted)) == ((rank_left - 1,), (0,))


def _dense(graph: Graph, decode: Decode, inputs: Tensor, kernel: Value, out: tuple[Any, ...]) -> Tensor:
    rank = inputs.rank
    whole = broadcast(graph, inputs, [rank - 1])
    if rank > 2 and inputs.order == channels_first(rank):
        weights = decode(kernel, (1, 0))
        axes = graph.constant(np.arange(2, rank, dtype=np.int64))
        name = graph.add("Conv", whole.name, graph.add("Unsqueeze", weights, axes))
        return Tensor(name, out, inputs.order, whole.stretched)
    name = graph.add("MatMul", reordered(graph, whole, straight(rank)).name, decode(kernel, (0, 1)))
    return Tensor(name, out, straight(rank), whole.stretched)


def _matrix_product(graph: Graph, sides: Sequence[Tensor], contracted: Sequence[int], out: tuple[Any, ...]) -> Tensor:
    """The sum over an axis of each side, one of which is a matrix; the other one's axes stay as they lie."""
    numbers = itertools.count()
    # Of each side's own axes: {axis: its place in the result}.
    places = [
        {axis: next(numbers) for axis in range(len(side.order)) if axis != gone}
        for side, gone in zip(sides, contracted, strict=True)
    ]
    right = 1 if len(sides[1].order) == 2 else 0
    left = 1 - right
    own = [axis for axis in sides[left].order if axis != contracted[left]]
    (column,) = places[right]
    name = graph.add(
        "MatMul",
        reordered(graph, sides[left], (*own, contracted[left])).name,
        reordered(graph, sides[right], (contracted[right], column)).name,
    )
    return Tensor(name, out, (*(places[left][axis] for axis in own), places[right][column]))


def _einsum(parameters: Any, order_left: Sequence[int], order_right: Sequence[int]) -> str:
    """JAX's result has the batch axes first, then the left's own, then the right's."""
    rank_left, rank_right = len(order_left), len(order_right)
    (contracted_left, contracted_right), (batch_left, batch_right) = parameters["dimension_numbers"]
    left = list(string.ascii_lowercase[:rank_left])
    right = list(string.ascii_uppercase[:rank_right])
    for a, b in zip((*contracted_left, *batch_left), (*contracted_right, *batch_right), strict=True):
        right[b] = left[a]
    result = [left[axis] for axis in batch_left]
    result += [left[axis] for axis in range(rank_left) if axis not in (*contracted_left, *batch_left)]
    result += [right[axis] for axis in range(rank_right) if axis not in (*contracted_right, *batch_right)]
    operands = (
        "".join(letters[axis] for axis in order) for letters, order in ((left, order_left), (right, order_right))
    )
    return f"{','.join(operands)}->{''.join(result)}"
