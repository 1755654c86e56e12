"""PyTorch's files and safetensors without PyTorch, and without running what is in them."""

import io
import os
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import numpy as np
import safetensors

from qsv.interop.data_pickle import UnsafePickleError
from qsv.interop.torch_pickle import read_torch_pickle
from qsv.interop.torch_tensors import DTYPES, ByteOrder, elements_of, with_arrays

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_LEGACY_START = pickle.dumps(_LEGACY_MAGIC, protocol=2)
_ZIP_START = b"PK\x03\x04"
_MAX_SAFETENSORS_HEADER = 100_000_000
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` or safetensors wrote, as plain data.

    No PyTorch is needed, and nothing in the file is run: of its pickle, only tensors and plain data are understood.

    Args:
        path: a zip file (PyTorch 1.6 and later), the older format of PyTorch 0.4 and later, or safetensors; told
            apart by their content.

    Returns:
        Nested dicts, lists, tuples, strings and numbers with a NumPy array for each tensor, of the tensor's dtype
        (bfloat16 and 8-bit floats from ml_dtypes) and in C order. Tensors that are one share an array. Of
        safetensors, a dict of arrays.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafePickleError: its pickle names a function or class that isn't data; the error names it.
        ValueError: it is of another format, damaged, or claims more than it holds; the error names the file.

    Source: the formats as torch/serialization.py writes them (behaviour, not code).
    """
    data = pathlib.Path(path).read_bytes()
    try:
        if data.startswith(_ZIP_START):
            return _read_zip(data)
        if data.startswith(_LEGACY_START):
            return _read_legacy(data)
        if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= _MAX_SAFETENSORS_HEADER:
            return _read_safetensors(data)
        raise ValueError(_unknown(data))
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{os.fspath(path)}: {error}", error.name) from error
    # Whatever a file made by somebody else holds, the caller gets one type of error.
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _unknown(data: bytes) -> str:
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; get it with `git lfs pull`"
    expected = "expected a zip file of torch.save, its older format, or safetensors"
    return f"has an unknown format, {expected}; its {len(data):,} bytes begin with {data[:16]!r}"


def _read_zip(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        folder, members = _zip_members(archive, len(data))

        def content(name: str) -> bytes:
            if name not in members:
                raise ValueError(f"lacks {folder}/{name[:80]}; it is damaged, copy or download it again")
            return archive.read(members[name])

        order = content("byteorder") if "byteorder" in members else b"little"
        if order not in (b"little", b"big"):
            raise ValueError(f"has byte order {order[:20]!r}, expected little or big")
        value, _ = read_torch_pickle(io.BytesIO(content("data.pkl")))
        named: ByteOrder = "little" if order == b"little" else "big"
        return with_arrays(value, lambda storage: content(f"data/{storage.key}"), named)


def _zip_members(archive: zipfile.ZipFile, file_bytes: int) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """The one folder of the archive, and {name in it: member}; raises ValueError for what PyTorch wouldn't write."""
    # First, for these compress their code.
    if any(name.partition("/")[2].startswith(("constants.pkl", "code/")) for name in archive.namelist()):
        raise ValueError(
            "is a TorchScript archive, which is a program; load it with torch.jit.load and torch.save its state_dict()"
        )
    members: dict[str, zipfile.ZipInfo] = {}
    folders = set()
    for info in archive.infolist():
        folder, slash, name = info.filename.partition("/")
        folders.add(folder)
        if not slash or not folder or ".." in info.filename.split("/") or "\\" in info.filename:
            raise ValueError(f"has a member {info.filename[:80]!r}, which torch.save wouldn't write")
        if name in members:
            raise ValueError(f"has two members {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise ValueError(f"has a compressed or encrypted member {info.filename[:80]!r}; torch.save stores them")
        members[name] = info
    if len(folders) != 1 or "data.pkl" not in members:
        raise ValueError("is a zip file, but not of torch.save: it has no single folder with data.pkl")
    total = sum(info.file_size for info in members.values())
    if total > file_bytes:
        raise ValueError(f"has {file_bytes:,} bytes, but its members claim {total:,}")
    return folders.pop(), members


def _read_legacy(data: bytes) -> Any:
    """Pickles of magic number, version, the writing machine, the value and the storages' keys; then the storages."""
    stream = io.BytesIO(data)
    _, version, _ = (read_torch_pickle(stream)[0] for _ in range(3))
    if version != _LEGACY_VERSION:
        raise ValueError(f"has another version of the old format than {_LEGACY_VERSION}")
    value, storages = read_torch_pickle(stream)
    keys, _ = read_torch_pickle(stream)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("is damaged: its list of storages isn't that of its tensors")
    contents: dict[str, memoryview] = {}
    position = stream.tell()
    for key in keys:
        storage = storages[key]
        if data[position : position + 8] != struct.pack("<q", storage.numel):
            raise ValueError(f"is damaged: storage {key} should begin with its size, {storage.numel} elements")
        contents[key] = memoryview(data)[position + 8 : position + 8 + storage.num_bytes]
        position += 8 + storage.num_bytes
    # Little-endian whatever machine wrote it.
    return with_arrays(value, lambda storage: contents[storage.key], "little")


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    for name, entry in safetensors.deserialize(data):
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} is {entry['dtype']}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
        arrays[name] = elements_of(entry["data"], DTYPES[dtype], "little").reshape(entry["shape"]).copy()
    return arrays
