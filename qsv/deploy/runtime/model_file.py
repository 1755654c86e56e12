"""The seal of an ONNX file: a digest at its end, without which, or with a wrong one, it isn't loaded.

ONNX's own format notices few changes: a flipped bit in a weight gives another network, silently. The seal is the last
entry of the file's metadata, which protobuf allows to be appended to a finished file; other programs read the file as
before. It also says how long the entry before it is, the description, so that reading that needs no parser.
"""

import dataclasses
import hashlib
import os
import pathlib

from qsv.data.file_error import FileError

METADATA_KEY = "qsv"
SEAL_KEY = "qsv_seal"
FORMAT = "qsv-onnx"
FORMAT_VERSION = 2

# Of ONNX's ModelProto: field 14, `metadata_props`, and the fields of its entries; all are of protobuf's wire type 2.
_METADATA_TAG = bytes([14 << 3 | 2])
_KEY_TAG, _VALUE_TAG = bytes([1 << 3 | 2]), bytes([2 << 3 | 2])
# The digest, and the bytes of the description.
_DIGEST_DIGITS, _LENGTH_DIGITS = 64, 10


class ModelFileError(FileError):
    """A model file that cannot be used."""


@dataclasses.dataclass(frozen=True)
class SealedModel:
    """What a sealed file holds.

    Attributes:
        data: the whole file, an ONNX model.
        description: JSON text of what the network is.
        digest: SHA-256 of all but the seal's own, 64 hexadecimal digits: the model's identity.
    """

    data: bytes
    description: str
    digest: str


def sealed(data: bytes, description: str) -> bytes:
    """A serialized ONNX model with a seal.

    Args:
        data: the model; its last bytes are the description, as the value of its last metadata entry.
        description: JSON text.

    Raises:
        ValueError: the model doesn't end with the description.
    """
    text = description.encode()
    if not data.endswith(text):
        raise ValueError("the description must be the value of the model's last metadata entry")
    return data + _seal(data, len(text))


def read_sealed(path: str | os.PathLike[str]) -> SealedModel:
    """A sealed model file.

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
    digits = seal[-_LENGTH_DIGITS:]
    if digits.isdigit() and seal == _seal(body, int(digits)):
        digest = seal[-_LENGTH_DIGITS - _DIGEST_DIGITS : -_LENGTH_DIGITS].decode()
        return SealedModel(data, body[len(body) - int(digits) :].decode(), digest)
    if SEAL_KEY.encode() in seal:
        raise ModelFileError(path, "is damaged: its content has changed since it was written")
    raise ModelFileError(path, "is truncated, damaged, or no ONNX file that qsv wrote")


def _seal(data: bytes, description_bytes: int) -> bytes:
    length = f"{description_bytes:0{_LENGTH_DIGITS}d}".encode()
    value = hashlib.sha256(data + length).hexdigest().encode() + length
    key = SEAL_KEY.encode()
    entry = _KEY_TAG + bytes([len(key)]) + key + _VALUE_TAG + bytes([len(value)]) + value
    return _METADATA_TAG + bytes([len(entry)]) + entry


_SEAL_BYTES = len(_seal(b"", 0))
