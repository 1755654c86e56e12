"""Quantized weights in an ONNX graph: bit-packed codes that the runtime unpacks once, when it loads the file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from qsv.deploy.onnx.graph import Graph
from qsv.quant import QTensor

# A code is stored in parts of so many bits, the binary digits of its width, so that none lies across two bytes.
_PARTS = (8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class _Entry:
    bits: int
    codes: np.ndarray
    placeholder: str


class PackedWeights:
    """The weights of a graph; the codes of all that have the same bits lie in one tensor.

    Unpacking is made of shifts and masks that any runtime has. onnxruntime computes what depends on constants alone
    when a session is created, so that a run costs what it would with float weights.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._entries: list[_Entry] = []
        self._placed: dict[tuple[int, tuple[int, ...]], str] = {}
        self._decoded: dict[tuple[int, tuple[int, ...]], str] = {}

    def decode(self, weight: QTensor, order: Sequence[int]) -> str:
        """A float32 tensor with the weight's axes in an order."""
        key = (id(weight), tuple(order))
        if key not in self._decoded:
            with self._graph.first():
                self._decoded[key] = self._decode(weight, order)
        return self._decoded[key]

    def int8(self, weight: QTensor, levels: np.ndarray, order: Sequence[int], signs: np.ndarray) -> str:
        """An int8 tensor with the weight's axes in an order, outputs first; times a sign, or 0, for every output.

        Args:
            weight: its codes.
            levels: int8, of the codebook's shape.
            order: of the axes.
            signs: [outputs], -1, 0 or 1.
        """
        with self._graph.first():
            indices, table = self._indices(weight, levels, order)
            if np.any(signs != 1):
                # Tables of the levels, of their negatives and of zeros, one behind the other.
                which = np.choose(signs + 1, [1, 2, 0]).astype(np.int32) * len(table)
                offsets = which.reshape(-1, *[1] * (len(order) - 1))
                indices = self._graph.add("Add", indices, self._narrow(offsets))
                table = np.concatenate([table, -table, np.zeros_like(table)])
            return str(self._graph.add("Gather", self._graph.constant(table), indices))

    def _indices(self, weight: QTensor, codebook: np.ndarray, order: Sequence[int]) -> tuple[str, np.ndarray]:
        """Places in a table of all levels, int32 of the codes' shape, and the table."""
        indices = self._codes(weight, order)
        if codebook.ndim == 1:
            return indices, codebook
        tables = np.transpose(codebook, (*order, codebook.ndim - 1))
        offsets = np.arange(tables[..., 0].size, dtype=np.int32).reshape(tables.shape[:-1]) << weight.bits
        return str(self._graph.add("Add", indices, self._narrow(offsets))), tables.reshape(-1)

    def _narrow(self, values: np.ndarray) -> str:
        """Values from 0 on as int32, stored in as few bytes each as they need."""
        narrow = values.astype(np.min_scalar_type(values.max()))
        return str(self._graph.add("Cast", self._graph.constant(narrow), to=onnx.TensorProto.INT32))

    def _decode(self, weight: QTensor, order: Sequence[int]) -> str:
        scale = np.asarray(weight.scale, np.float32)
        indices, codebook = self._indices(weight, np.asarray(weight.codebook, np.float32), order)
        if scale.size == 1:
            return str(self._graph.add("Gather", self._graph.constant(codebook * scale.reshape(())), indices))
        levels = self._graph.add("Gather", self._graph.constant(codebook), indices)
        return str(self._graph.add("Mul", levels, self._graph.constant(np.transpose(scale, order))))

    def _codes(self, weight: QTensor, order: Sequence[int]) -> str:
        """Codes with the weight's axes in an order, int32; where they come from is written by `finish`."""
        key = (id(weight), tuple(order))
        if key not in self._placed:
            codes = np.ascontiguousarray(np.transpose(np.asarray(weight.codes), order))
            self._entries.append(_Entry(weight.bits, codes, self._graph.new_name()))
            shape = self._graph.constant(np.array(codes.shape, np.int64))
            self._placed[key] = self._graph.add("Reshape", self._entries[-1].placeholder, shape)
        return self._placed[key]

    def finish(self) -> None:
        """Put the unpacking of all codes before everything else."""
        with self._graph.body() as nodes:
            for bits in sorted({entry.bits for entry in self._entries}):
                entries = [entry for entry in self._entries if entry.bits == bits]
                stream = np.concatenate([entry.codes.reshape(-1) for entry in entries])
                sizes = self._graph.constant(np.array([entry.codes.size for entry in entries], np.int64))
                names = [entry.placeholder for entry in entries]
                self._graph.append("Split", [self._unpacked(stream, bits), sizes], names, axis=0)
        self._graph.prepend(nodes)

    def _unpacked(self, codes: np.ndarray, bits: int) -> str:
        """An int32 vector of codes."""
        graph, parts, rest = self._graph, [], bits
        for width in _PARTS:
            if bits & width:
                rest -= width
                parts.append(self._part((codes >> rest) & (2**width - 1), width, rest))
        total = parts[0]
        for part in parts[1:]:
            total = graph.add("Add", total, part)
        return total

    def _part(self, values: np.ndarray, width: int, shift: int) -> str:
        """An int32 vector of values of `width` bits, times 2^shift."""
        graph, each = self._graph, 8 // width
        padded = np.zeros(-(-len(values) // each) * each, np.uint8)
        padded[: len(values)] = values
        places = np.arange(each, dtype=np.uint8) * width
        packed = np.bitwise_or.reduce(padded.reshape(-1, each) << places, axis=1)
        # Not BitShift: OpenVINO 2026.4 rounds it.
        bytes_ = graph.add("Cast", graph.constant(packed[:, None]), to=onnx.TensorProto.INT32)
        shifted = graph.add("Div", bytes_, graph.constant((1 << places.astype(np.int32))[None]))
        # Not BitwiseAnd: OpenVINO would do it in every run.
        masked = graph.add("Mod", shifted, graph.constant(np.int32(2**width)))
        wide: Any = graph.add("Reshape", masked, graph.constant(np.array([-1], np.int64)))
        if len(padded) != len(values):
            end = graph.constant(np.array([len(values)], np.int64))
            wide = graph.add("Slice", wide, graph.constant(np.zeros(1, np.int64)), end)
        return str(graph.add("Mul", wide, graph.constant(np.int32(2**shift))) if shift else wide)
