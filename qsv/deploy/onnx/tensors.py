"""What a JAX array is in an ONNX graph: a tensor whose axes may lie in another order, or be broadcast later."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import helper

from qsv.deploy.onnx.graph import Graph, is_known
from qsv.quant import QTensor


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A computed array.

    ONNX's convolutions take channels first where JAX's have them last. Axes are therefore permuted only where an
    operation needs them in a certain order, and broadcast only where one can't do it by itself.

    Attributes:
        name: in the graph.
        shape: of the JAX array; sizes are numbers or symbolic.
        order: the array's axes in the order in which the tensor has them.
        stretched: axes that are of size 1 in the tensor whatever the shape says.
    """

    name: str
    shape: tuple[Any, ...]
    order: tuple[int, ...]
    stretched: frozenset[int] = frozenset()

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized parameter, decoded in the graph.

    Attributes:
        packed: its codes, levels and scales.
        shape: of the JAX array.
    """

    packed: QTensor
    shape: tuple[Any, ...]


# Known values are NumPy arrays; what depends on them alone is computed while exporting.
Value = np.ndarray | Tensor | Weight


def straight(rank: int) -> tuple[int, ...]:
    """The order of axes that JAX has."""
    return tuple(range(rank))


def channels_first(rank: int) -> tuple[int, ...]:
    """The order of axes that ONNX's convolutions have, for arrays whose channels are last."""
    return (0, rank - 1, *range(1, rank - 1))


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The place of every axis in an order."""
    return tuple(order.index(axis) for axis in range(len(order)))


def reordered(graph: Graph, tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor with its axes in another order."""
    if tuple(order) == tensor.order:
        return tensor
    name = graph.add("Transpose", tensor.name, perm=[tensor.order.index(axis) for axis in order])
    return dataclasses.replace(tensor, name=name, order=tuple(order))


def broadcast(graph: Graph, tensor: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    """The tensor with its stretched axes, or some of these, in full size."""
    wanted = tensor.stretched & set(range(tensor.rank) if axes is None else axes)
    if not wanted:
        return tensor
    sizes = [tensor.shape[axis] if axis in wanted else 1 for axis in tensor.order]
    name = graph.add("Expand", tensor.name, graph.shape(sizes))
    return dataclasses.replace(tensor, name=name, stretched=tensor.stretched - wanted)


def plain(graph: Graph, tensor: Tensor) -> Tensor:
    """The tensor as JAX has it."""
    return reordered(graph, broadcast(graph, tensor), straight(tensor.rank))


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are surely equal."""
    return len(a) == len(b) and all(map(same_size, a, b))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are surely equal."""
    return int(a) == int(b) if is_known(a) and is_known(b) else str(a) == str(b)


def constant_tensor(graph: Graph, values: np.ndarray) -> Tensor:
    """A known array as a tensor, shrunk where it is the same along an axis."""
    small, same = shrunk(values) if values.ndim else (values, set())
    stretched = frozenset(axis for axis in same if values.shape[axis] != 1)
    return Tensor(graph.constant(small), values.shape, straight(values.ndim), stretched)


def as_tensor(graph: Graph, value: np.ndarray | Tensor) -> Tensor:
    """The tensor, or a known array as one."""
    return value if isinstance(value, Tensor) else constant_tensor(graph, value)


def shrunk(values: np.ndarray) -> tuple[np.ndarray, set[int]]:
    """Values with axes along which they are equal in size 1, and these axes."""
    same = set()
    for axis in range(values.ndim):
        first = values.take(range(min(1, values.shape[axis])), axis)
        if first.size and np.array_equal(np.broadcast_to(first, values.shape), values):
            values = first
            same.add(axis)
    return values, same


def onnx_type(dtype: Any) -> int:
    """ONNX's number of a type."""
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
