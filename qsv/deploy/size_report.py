"""Where the bytes of a network go, tensor by tensor."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qsv.deploy.container import is_constant
from qsv.deploy.packed_file import load_packed
from qsv.quant import QTensor, leaf_paths, packed_size_bytes

_COLUMNS = ("tensor", "shape", "scheme", "bits", "code bytes", "table bytes", "float bytes")


@dataclasses.dataclass(frozen=True)
class TensorSize:
    """Bytes of one tensor.

    Attributes:
        path: with its collection, such as `params/stem/conv/kernel`.
        shape: of the tensor.
        scheme: text of its quantizer, or the type of a float tensor.
        bits: of a code, or of a float.
        code_bytes: packed codes.
        table_bytes: codebook and scale; constant ones are in the file's header.
        float_bytes: values that are stored as floats; constant ones are in the file's header.
    """

    path: str
    shape: tuple[int, ...]
    scheme: str
    bits: int
    code_bytes: int
    table_bytes: int
    float_bytes: int

    @property
    def stored_bytes(self) -> int:
        """All bytes of the tensor."""
        return self.code_bytes + self.table_bytes + self.float_bytes

    @property
    def is_parameter(self) -> bool:
        """Whether it is a parameter, not a running statistic."""
        return self.path.startswith("params/")


@dataclasses.dataclass(frozen=True)
class SizeReport:
    """Bytes of a network.

    Attributes:
        rows: one for each tensor.
        file_bytes: size of the whole file, None where there is none.
    """

    rows: tuple[TensorSize, ...]
    file_bytes: int | None = None

    @property
    def code_bytes(self) -> int:
        """Packed codes of all tensors."""
        return sum(row.code_bytes for row in self.rows)

    @property
    def table_bytes(self) -> int:
        """Codebooks and scales of all tensors."""
        return sum(row.table_bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        """Parameters and statistics that are stored as floats."""
        return sum(row.float_bytes for row in self.rows)

    @property
    def stored_bytes(self) -> int:
        """All tensors, running statistics included; a file has a header besides."""
        return self.code_bytes + self.table_bytes + self.float_bytes

    @property
    def header_bytes(self) -> int | None:
        """Names, shapes and metadata of the file."""
        return None if self.file_bytes is None else self.file_bytes - self.stored_bytes

    @property
    def num_parameters(self) -> int:
        """Scalars in the parameters, running statistics not included."""
        return sum(math.prod(row.shape) for row in self.rows if row.is_parameter)

    @property
    def float32_bytes(self) -> int:
        """What the parameters alone take in float32: the measure that `compression_ratio` is against."""
        return 4 * self.num_parameters

    @property
    def compression_ratio(self) -> float:
        """`float32_bytes` over `file_bytes`, or over `stored_bytes` where there is no file."""
        return self.float32_bytes / max(self.stored_bytes if self.file_bytes is None else self.file_bytes, 1)

    def to_markdown(self) -> str:
        """A Markdown table, one row for each tensor, and the totals."""
        lines = [_COLUMNS, ("---", "---", "---", *["---:"] * 4), *self._cells()]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"{table}\n\n{self.summary()}\n"

    def summary(self) -> str:
        """The totals in one line."""
        header = "" if self.header_bytes is None else f" + {self.header_bytes:,} header"
        return (
            f"{self.code_bytes:,} code + {self.table_bytes:,} table + {self.float_bytes:,} float{header} "
            f"= {self.stored_bytes if self.file_bytes is None else self.file_bytes:,} bytes; "
            f"{self.num_parameters:,} parameters take {self.float32_bytes:,} bytes in float32, "
            f"{self.compression_ratio:.2f} times as many"
        )

    def _cells(self) -> Iterable[tuple[str, ...]]:
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            counts = (row.bits, row.code_bytes, row.table_bytes, row.float_bytes)
            yield (row.path, shape, row.scheme, *[f"{count:,}" for count in counts])


def size_report(
    packed_params: Any,
    batch_stats: Any,
    *,
    plan_description: Mapping[str, str] | None = None,
    file_bytes: int | None = None,
) -> SizeReport:
    """Bytes of every tensor as the packed file stores it.

    Args:
        packed_params: from `qsv.quantize`, or a float tree.
        batch_stats: tree of running statistics.
        plan_description: {path: text} from `describe_plan`; without it a scheme is just its bits.
        file_bytes: size of the file, if it was written.

    Returns:
        The report, parameters first.
    """
    names = plan_description or {}
    rows = [_row(f"params/{path}", leaf, names.get(path)) for path, leaf in leaf_paths(packed_params)]
    rows += [_row(f"batch_stats/{path}", leaf, None) for path, leaf in leaf_paths(batch_stats)]
    return SizeReport(tuple(rows), file_bytes)


def file_report(path: str | os.PathLike[str]) -> SizeReport:
    """Bytes of a packed file; raises what `load_packed` raises."""
    model = load_packed(path)
    return size_report(
        model.packed_params,
        model.batch_stats,
        plan_description=model.plan_description,
        file_bytes=pathlib.Path(path).stat().st_size,
    )


def _row(path: str, leaf: Any, scheme: str | None) -> TensorSize:
    if isinstance(leaf, QTensor):
        return TensorSize(
            path,
            tuple(leaf.shape),
            scheme or f"{leaf.bits}-bit",
            leaf.bits,
            packed_size_bytes(math.prod(leaf.shape), bits=leaf.bits),
            _stored_bytes(leaf.codebook) + _stored_bytes(leaf.scale),
            0,
        )
    dtype = np.dtype(leaf.dtype)
    return TensorSize(path, tuple(leaf.shape), dtype.name, 8 * dtype.itemsize, 0, 0, _stored_bytes(leaf))


def _stored_bytes(array: Any) -> int:
    """Bytes of an array in the file, which has a constant as a number of its description."""
    array = np.asarray(array)
    return 0 if is_constant(array) else array.nbytes
