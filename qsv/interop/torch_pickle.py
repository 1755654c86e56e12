"""What the pickle inside PyTorch's files may name: tensors, and what is harmless beside them."""

import dataclasses
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from qsv.interop.data_pickle import Global, Vocabulary, read_pickle
from qsv.interop.torch_tensors import DTYPES, Storage, Tensor

_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
    # Bytes, whose type the tensor says.
    "torch.storage.UntypedStorage": "uint8",
    "torch.UntypedStorage": "uint8",
}
_NUMPY_SCALARS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")


def read_torch_pickle(stream: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """The value of the pickle at the stream's position, with a `Tensor` for every tensor, and its storages by key.

    Attributes of a Namespace become a dict, NumPy's scalars Python's.

    Raises:
        UnsafePickleError: it names a global that is neither of a tensor nor of plain data.
        ValueError: it is damaged, or holds a kind of tensor that can't be read.
    """
    storages: dict[str, Storage] = {}

    def noted(persistent_id: Any) -> Storage:
        storage = _storage(persistent_id)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {storage.key[:80]} is said to have several sizes or types")
        return storage

    return read_pickle(stream, Vocabulary(_GLOBALS, noted, _build)), storages


@dataclasses.dataclass
class _NumpyType:
    """`numpy.dtype`, whose byte order is set after it was made."""

    code: str
    order: str = "="


class _Fields(dict[str, Any]):
    """An object whose attributes are its data."""


def _named(value: Any) -> str:
    """A global's name, of anything else the type: its own text could be endless."""
    return value.name if isinstance(value, Global) else type(value).__name__


def _storage(persistent_id: Any) -> Storage:
    """("storage", type, key, location, numel), in the old format with a view of it that is None."""
    if type(persistent_id) is not tuple or len(persistent_id) not in (5, 6) or persistent_id[0] != "storage":
        raise ValueError("its pickle refers to something that isn't a tensor's storage; save a state_dict instead")
    _, kind, key, _, numel, *view = persistent_id
    name = _named(kind)
    if name not in _STORAGES:
        raise ValueError(f"storages of type {name} can't be read, those of {', '.join(_STORAGES)} can")
    if type(key) is not str or type(numel) is not int or not 0 <= numel < 2**60:
        raise ValueError("its pickle refers to a storage by another key than a string, or of a size that can't be")
    if view not in ([], [None]):
        raise ValueError("views of storages, from before PyTorch 0.4, can't be read; save it again with a newer one")
    return Storage(_STORAGES[name], key, numel)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError(f"its pickle makes a tensor of {_named(storage)} instead of a storage")
    return Tensor(storage, storage.dtype, offset, shape, strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> Tensor:
    if metadata:
        raise ValueError("tensors with metadata, such as a negation not yet carried out, can't be read; clone them")
    return _tensor(storage, offset, shape, strides)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    metadata: Any = None,
) -> Tensor:
    name = _named(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"tensors of {name} can't be read, those of {', '.join(DTYPES)} can")
    tensor = _tensor_v2(storage, offset, shape, strides, requires_grad, hooks, metadata)
    return dataclasses.replace(tensor, dtype=name)


def _parameter(data: Any, requires_grad: Any, hooks: Any, state: Any = None) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError(f"its pickle makes a parameter of {_named(data)} instead of a tensor")
    return data


def _with_attributes(rebuild: Any, kind: Any, arguments: Any, state: Any) -> Tensor:
    """A tensor that had attributes of its own, which are left out."""
    if _named(rebuild) not in _REBUILD or type(arguments) is not tuple:
        raise ValueError(f"its pickle makes a tensor by {_named(rebuild)}")
    tensor: Tensor = _REBUILD[_named(rebuild)](*arguments)
    return tensor


def _ordered_dict(pairs: Any = ()) -> dict[str, Any]:
    """Empty and filled later, or of the pairs that Python 2 wrote."""
    if type(pairs) not in (list, tuple):
        raise ValueError(f"its pickle makes an OrderedDict of {_named(pairs)}")
    if not all(type(pair) in (list, tuple) and len(pair) == 2 and type(pair[0]) is str for pair in pairs):
        raise ValueError("its pickle makes an OrderedDict of something else than pairs of a string and a value")
    return dict(pairs)


def _counter(counts: Any = None) -> dict[Any, Any]:
    if counts is not None and type(counts) is not dict:
        raise ValueError(f"its pickle makes a Counter of {_named(counts)}")
    return counts or {}


def _fields() -> _Fields:
    return _Fields()


def _size(axes: Any) -> tuple[Any, ...]:
    if type(axes) not in (list, tuple):
        raise ValueError(f"its pickle makes a torch.Size of {_named(axes)}")
    return tuple(axes)


def _device(kind: Any, index: Any = None) -> str:
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise ValueError(f"its pickle makes a torch.device of {_named(kind)} and {_named(index)}")
    return kind if index is None else f"{kind}:{index}"


def _version(text: Any) -> str:
    if type(text) is not str:
        raise ValueError(f"its pickle makes a version of {_named(text)}")
    return text


def _encoded(text: Any, encoding: Any) -> bytes:
    """The bytes that pickle's older protocols hold as text."""
    if type(text) is not str or encoding != "latin1":
        raise ValueError("its pickle encodes something else than bytes")
    return text.encode("latin1")


def _numpy_type(code: Any, align: Any = False, copy: Any = False) -> _NumpyType:
    if type(code) is not str or code not in _NUMPY_SCALARS:
        raise ValueError("its pickle holds a NumPy value that isn't a number")
    return _NumpyType(code)


def _numpy_scalar(kind: Any, content: Any) -> Any:
    if type(kind) is not _NumpyType or type(content) is not bytes:
        raise ValueError("its pickle makes a NumPy scalar of something else than a type and bytes")
    dtype = np.dtype(kind.code).newbyteorder(kind.order)  # type: ignore[arg-type]
    if len(content) != dtype.itemsize:
        raise ValueError(f"its pickle holds a NumPy {kind.code} of {len(content)} bytes")
    return np.frombuffer(content, dtype)[0].item()


def _build(target: Any, state: Any) -> None:
    """What setting an object's attributes means."""
    if type(target) is _Fields and type(state) is dict:
        target.update(state)
    elif type(target) is _NumpyType and type(state) is tuple and len(state) > 1 and state[1] in ("<", ">", "=", "|"):
        target.order = state[1]
    # Attributes of an OrderedDict, such as a state_dict's `_metadata`, are no weights.
    elif type(target) is not dict or type(state) is not dict:
        raise ValueError(f"its pickle sets attributes of {_named(target)}")


_REBUILD: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_GLOBALS: dict[str, Callable[..., Any] | None] = {
    **_REBUILD,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Tensor": None,
    "torch.nn.parameter.Parameter": None,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.torch_version.TorchVersion": _version,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "argparse.Namespace": _fields,
    "_codecs.encode": _encoded,
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **dict.fromkeys(_STORAGES),
    **{f"torch.{name}": None for name in DTYPES},
}
