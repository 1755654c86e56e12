"""The seal of an ONNX file: a digest at its end, without which, or with a wrong one, it isn't loaded.

ONNX's own format notices few changes: a flipped bit in a weight gives another network, silently. The seal is the last
entry of the file's metadata, which protobuf allows to be appended to a finished file; other programs read the file as
before.
"""

import hashlib
import os
import pathlib

METADATA_KEY = "qsv"
SEAL_KEY = "qsv_sha256"
FORMAT = "qsv-onnx"
FORMAT_VERSION = 2

# Of ONNX's ModelProto: field 14, `metadata_props`, and the fields of its entries; all are of protobuf's wire type 2.
_METADATA_TAG = bytes([14 << 3 | 2])
_KEY_TAG, _VALUE_TAG = bytes([1 << 3 | 2]), bytes([2 << 3 | 2])


class ModelFileError(ValueError):
    """A model file that cannot be used; the message names it and says what is wrong.

    Args:
        path: the file.
        reason: what is wrong, without the file's name.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(path, reason)
        self.path = pathlib.Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def sealed(data: bytes) -> bytes:
    """A serialized ONNX model with the digest of all its bytes as a last entry of its metadata."""
    return data + _seal(data)


def read_sealed(path: str | os.PathLike[str]) -> bytes:
    """All bytes of a sealed model file.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: it has no seal, or has changed since it was sealed: any changed, missing or added byte shows.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no model file {os.fspath(path)}")
    if os.path.isdir(path):
        raise ModelFileError(path, "is a folder; expected an ONNX file")
    data = pathlib.Path(path).read_bytes()
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal == _seal(body):
        return data
    if SEAL_KEY.encode() in seal:
        raise ModelFileError(path, "is damaged: its content has changed since it was written")
    raise ModelFileError(path, "is truncated, damaged, or no ONNX file that qsv wrote")


def model_digest(data: bytes) -> str:
    """The digest that the last bytes of a sealed model hold: its identity, 64 hexadecimal digits."""
    return data[-64:].decode("ascii")


def _seal(data: bytes) -> bytes:
    key, value = SEAL_KEY.encode(), hashlib.sha256(data).hexdigest().encode()
    entry = _KEY_TAG + bytes([len(key)]) + key + _VALUE_TAG + bytes([len(value)]) + value
    return _METADATA_TAG + bytes([len(entry)]) + entry


_SEAL_BYTES = len(_seal(b""))
