"""Writers of PyTorch's file formats, and checks of what is read from them, where PyTorch is absent."""

import io
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from qsv.interop import read_torch_file

STORAGE_TYPES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Code(bytes):
    """Opcodes that leave one value on the stack."""


def encode(value) -> bytes:
    """The opcodes of a value of dicts, lists, tuples, scalars and `Code`."""
    if isinstance(value, Code):
        return bytes(value)
    if isinstance(value, dict):
        return b"}(" + b"".join(encode(key) + encode(item) for key, item in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(encode, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(encode, value)) + b"t"
    return pickle.dumps(value, protocol=2)[2:-1]


def named(name) -> Code:
    """A global, `module.name`."""
    module, _, own = name.rpartition(".")
    return Code(f"c{module}\n{own}\n".encode())


def call(name, *arguments) -> Code:
    return Code(named(name) + encode(arguments) + b"R")


def storage(key, numel, kind="FloatStorage", *view) -> Code:
    return Code(encode(("storage", named(f"torch.{kind}"), key, "cpu", numel, *view)) + b"Q")


def tensor(stored, shape, strides, offset=0) -> Code:
    ordered_dict = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", stored, offset, shape, strides, False, ordered_dict)


def pickled(value) -> bytes:
    return b"\x80\x02" + encode(value) + b"."


def with_tensors(value, storages, byteorder="little"):
    """The value with `Code` for its arrays, whose bytes are added to `storages`."""
    if isinstance(value, dict):
        return {key: with_tensors(item, storages, byteorder) for key, item in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    key = str(len(storages))
    unit = value.dtype.itemsize // (2 if value.dtype.kind == "c" else 1)
    words = np.ascontiguousarray(value).reshape(-1).view(f"u{unit}")
    storages[key] = (words if byteorder == sys.byteorder else words.byteswap()).tobytes()
    strides = tuple(int(np.prod(value.shape[axis + 1 :], dtype=int)) for axis in range(value.ndim))
    return tensor(storage(key, value.size, STORAGE_TYPES[value.dtype.name]), value.shape, strides)


def zip_bytes(data_pickle, storages, *, folder="archive", extra=(), leave_out=(), **members) -> bytes:
    """A zip file as torch.save writes it; `members` replace or add what lies in its folder, `extra` outside."""
    content = {"data.pkl": data_pickle, "version": b"3\n"}
    content |= {f"data/{key}": raw for key, raw in storages.items()} | members
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, raw in [(f"{folder}/{name}", raw) for name, raw in content.items()] + list(extra):
            if name not in leave_out:
                archive.writestr(name, raw)
    return buffer.getvalue()


def legacy_bytes(data_pickle, storages, *, itemsizes=None, version=1001) -> bytes:
    """A file as PyTorch wrote it before 1.6; storages are of 4-byte elements unless said otherwise."""
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(version, 2)]
    parts += [pickled({"protocol_version": 1001, "little_endian": True}), data_pickle, pickled(list(storages))]
    for key, raw in storages.items():
        parts += [struct.pack("<q", len(raw) // (itemsizes or {}).get(key, 4)), raw]
    return b"".join(parts)


def save_zip(path, value, *, byteorder="little"):
    """Write nested dicts with arrays as torch.save would; returns the path."""
    storages: dict[str, bytes] = {}
    data_pickle = pickled(with_tensors(value, storages, byteorder))
    path.write_bytes(zip_bytes(data_pickle, storages, byteorder=byteorder.encode()))
    return path


@pytest.fixture(scope="session")
def torch_format():
    """The functions of this file."""
    functions = (encode, named, call, storage, tensor, pickled, with_tensors, zip_bytes, legacy_bytes, save_zip)
    return types.SimpleNamespace(Code=Code, bfloat16=ml_dtypes.bfloat16, **{f.__name__: f for f in functions})


@pytest.fixture
def read(tmp_path):
    """Reads a file of these bytes."""

    def read_bytes(data):
        path = tmp_path / "model.pt"
        path.write_bytes(data)
        return read_torch_file(path)

    return read_bytes


@pytest.fixture
def refused(read):
    """Asserts that these bytes are refused with this message, and the file's name."""

    def check(data, message, error=ValueError):
        with pytest.raises(error, match=f"^[^\n]*model.pt: .*{message}"):
            read(data)

    return check


@pytest.fixture(params=["zip", "legacy"])
def write(request, torch_format):
    """(pickle, storages) -> the bytes of a file, in either format."""
    return torch_format.zip_bytes if request.param == "zip" else torch_format.legacy_bytes


@pytest.fixture
def four(torch_format):
    """A file with a tensor in storage 0 of four float32: (what makes the tensor) -> (pickle, storages)."""

    def make(tensor):
        return torch_format.pickled({"weight": tensor}), {"0": np.arange(4, dtype="<f4").tobytes()}

    return make
