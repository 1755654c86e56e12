"""An ONNX graph under construction: nodes, constants without repetition, sizes that are known only at run time."""

import ast
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

OPSET = 18
# The oldest that holds this opset, so that old runtimes take the file.
IR_VERSION = 8

_BINARY = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_CALLS = {"max": "Max", "min": "Min"}


class Graph:
    """Nodes in the order in which they are computed; every name is made here."""

    def __init__(self) -> None:
        # What depends on constants and on sizes alone is computed first, so that loops find it made.
        self._first: list[onnx.NodeProto] = []
        self._main: list[onnx.NodeProto] = []
        self._nodes = self._main
        self._numbers = itertools.count()
        self._constants: dict[tuple[Any, ...], str] = {}
        self._known: dict[str, np.ndarray] = {}
        self._initializers: list[onnx.TensorProto] = []
        self._sizes: dict[str, str] = {}

    def add(self, op: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; returns the name of its output, or a list of so many names."""
        names = [self.new_name() for _ in range(outputs)]
        self.append(op, inputs, names, **attributes)
        return names[0] if outputs == 1 else names

    def append(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """A node whose outputs have names already."""
        self._nodes.append(helper.make_node(op, list(inputs), list(outputs), **attributes))

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Inside, nodes are put before all that are added otherwise; they may depend on such nodes alone."""
        with self._into(self._first):
            yield

    @contextlib.contextmanager
    def body(self) -> Iterator[list[onnx.NodeProto]]:
        """Inside, nodes are put into the list that it gives, for the body of a loop."""
        nodes: list[onnx.NodeProto] = []
        with self._into(nodes):
            yield nodes

    def prepend(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Put nodes that depend on constants alone before all others."""
        self._first[:0] = nodes

    @contextlib.contextmanager
    def _into(self, nodes: list[onnx.NodeProto]) -> Iterator[None]:
        outer, self._nodes = self._nodes, nodes
        try:
            yield
        finally:
            self._nodes = outer

    def new_name(self) -> str:
        """A short one, for a network has thousands; in capitals and digits, so that inputs can have other names."""
        return np.base_repr(next(self._numbers), 36)

    def constant(self, values: Any) -> str:
        """An array; the same one again is the same constant. Floats that float16 holds exactly are stored as such."""
        array = np.asarray(values)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._stored(np.ascontiguousarray(array).reshape(array.shape))
            self._known[self._constants[key]] = array
        return self._constants[key]

    def known(self, name: str) -> np.ndarray | None:
        """The values of a constant; None for what is computed."""
        return self._known.get(name)

    def _stored(self, array: np.ndarray) -> str:
        if array.dtype == np.float32 and array.size > 16:
            with np.errstate(over="ignore"):
                narrow = array.astype(np.float16)
            if np.array_equal(narrow.astype(np.float32), array):
                with self.first():
                    return str(self.add("Cast", self._initializer(narrow), to=onnx.TensorProto.FLOAT))
        return self._initializer(array)

    def _initializer(self, array: np.ndarray) -> str:
        name = self.new_name()
        self._initializers.append(numpy_helper.from_array(array, name))
        return name

    def bind_axes(self, input_name: str, axes: Mapping[str, int]) -> None:
        """Say that symbols are sizes of an input's axes."""
        with self.first():
            shape = self.add("Shape", input_name)
            for symbol, axis in axes.items():
                self._sizes[symbol] = self.add("Gather", shape, self.constant(np.int64(axis)))

    def bind(self, symbol: str, dimension: Any) -> None:
        """Say that a symbol is a size."""
        self._sizes[symbol] = self.size(dimension)

    def size(self, dimension: Any) -> str:
        """An int64 scalar: a number, or an expression of symbols as JAX writes it, such as `floordiv(t + 1, 2)`."""
        text = str(dimension)
        if text not in self._sizes:
            with self.first():
                self._sizes[text] = self._evaluated(ast.parse(text.replace("^", "**"), mode="eval").body)
        return self._sizes[text]

    def shape(self, dimensions: Sequence[Any]) -> str:
        """An int64 vector of sizes."""
        if all(map(is_known, dimensions)):
            return self.constant(np.array(dimensions, np.int64))
        first = self.constant(np.zeros(1, np.int64))
        parts = [self.add("Unsqueeze", self.size(dimension), first) for dimension in dimensions]
        return str(self.add("Concat", *parts, axis=0))

    def _evaluated(self, node: ast.expr) -> str:
        match node:
            case ast.Constant(value=int(value)):
                return self.constant(np.int64(value))
            case ast.Name(id=name):
                return self._sizes[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return str(self.add("Neg", self._evaluated(operand)))
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(power))):
                return self._evaluated(left) if power == 1 else self._product(left, power)
            case ast.BinOp(left=left, op=op, right=right):
                return str(self.add(_BINARY[type(op)], self._evaluated(left), self._evaluated(right)))
            case ast.Call(func=ast.Name(id="floordiv"), args=[left, right]):
                return self._floor_division(self._evaluated(left), self._evaluated(right))
            case ast.Call(func=ast.Name(id="mod"), args=[left, right]):
                return str(self.add("Mod", self._evaluated(left), self._evaluated(right)))
            case ast.Call(func=ast.Name(id=name), args=args):
                return str(self.add(_CALLS[name], *map(self._evaluated, args)))
        raise ValueError(f"can't compute the size {ast.unparse(node)}")

    def _product(self, base: ast.expr, power: int) -> str:
        factor = result = self._evaluated(base)
        for _ in range(power - 1):
            result = self.add("Mul", result, factor)
        return result

    def _floor_division(self, left: str, right: str) -> str:
        """ONNX divides integers towards zero; the remainder of `Mod` has the divisor's sign."""
        return str(self.add("Div", self.add("Sub", left, self.add("Mod", left, right)), right))

    def model(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
        """The finished, checked model."""
        nodes, used = _needed([*self._first, *self._main], [output.name for output in outputs])
        stored = [tensor for tensor in self._initializers if tensor.name in used]
        graph = helper.make_graph(nodes, "qsv", list(inputs), list(outputs), stored)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="qsv"
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        return model


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that outputs depend on, and all names that these read."""
    used, kept = set(outputs), []
    for node in reversed(nodes):
        if used.isdisjoint(node.output):
            continue
        kept.append(node)
        used |= set(node.input) | _read_inside(node)
    return kept[::-1], used


def _read_inside(node: onnx.NodeProto) -> set[str]:
    """Names that bodies of loops read."""
    bodies = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    names: set[str] = set()
    for body in bodies:
        names |= {output.name for output in body.output}
        for inner in body.node:
            names |= set(inner.input) | _read_inside(inner)
    return names


def is_known(dimension: Any) -> bool:
    """Whether a size is a number."""
    return isinstance(dimension, int | np.integer)
