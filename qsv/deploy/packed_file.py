"""The packed file: a network, its quantized parameters and all that is needed to run it, without pickle.

It holds these tensors, in C order and little-endian:

    params/PATH:codes      [ceil(n * bits / 8)] U8  n codes of `bits` bits, lowest bit first, without gaps
    params/PATH:codebook   [..., 2**bits] F32       ascending; other axes the weight's, or one where shared
    params/PATH:scale      [...] F32                a scalar, or axes the weight's, or one where shared
    params/PATH            F32, BF16 or F16         a parameter that stays float
    batch_stats/PATH       F32, BF16 or F16         running statistics

and a weight is `codebook[..., code] * scale`, multiplied in float32.

It is a safetensors file, so any safetensors reader opens it. A network has hundreds of tensors, whose names would take
more bytes than the small ones' values; so all of one type lie end to end in one flat tensor that is called like the
type, "U8", "F32", "BF16" or "F16". The metadata has one key, "qsv", with a JSON text, compressed by zlib, in base64:

    {"sha256": hex digits, "format": "qsv-packed", "format_version": 2, "qsv_version": "0.1.0",
     "network": {"name", "arguments", "frontend"}, "threshold": number or null, "provenance": {...},
     "quantized": {PATH: {"bits", "shape", "dtype"}}, "plan": {"KMeans(bits=4)": [PATH, ...]},
     "activations": {"bits", "symmetric", "ranges": {PATH: [LOW, HIGH]}},
     "tensors": [[NAME, TYPE, SHAPE] or [NAME, TYPE, SHAPE, VALUE], ...]}

"activations" is there, and the version 3, where the inputs of layers are quantized too. "tensors" is in the order in
which they lie; one with a VALUE is that number everywhere and lies nowhere. The digest covers the text with the digest
itself left empty, and then the flat tensors in the order of their names: first the JSON text `["F32",[6]]`, then the
bytes.
"""

import base64
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.packed_activations import activations_from_json, activations_to_json
from qsv.deploy.packed_tensor import FLOATS, PARTS, Tensors, checked_float, restore, store
from qsv.models.network import Network
from qsv.quant import Plan, QTensor, QuantizedActivations, dequantize

FORMAT = "qsv-packed"
FORMAT_VERSION = 2
# Of files with quantized activations: a reader that doesn't know of these must not take them for float.
ACTIVATIONS_VERSION = 3

_KEY = "qsv"
# Far more than any network's description; a small file mustn't become a large memory.
_MAX_DESCRIPTION_BYTES = 2**26
_DTYPES: dict[str, Any] = {**FLOATS, "U8": np.uint8}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class PackedModel:
    """What a packed file holds; its arrays are NumPy, bit for bit as they were saved.

    Attributes:
        network: the model, its arguments and its front end.
        packed_params: the parameter tree, with a `QTensor` for every quantized leaf.
        batch_stats: the tree of running statistics.
        threshold: calibrated score above which two utterances are one speaker's, or None.
        plan_description: {path: text of its quantizer} of the quantized leaves.
        provenance: what the writer noted of the file's origin.
        qsv_version: version that wrote it.
        activations: codes of the inputs of layers; None where these are float.
    """

    network: Network
    packed_params: dict[str, Any]
    batch_stats: dict[str, Any]
    threshold: float | None
    plan_description: dict[str, str]
    provenance: dict[str, Any]
    qsv_version: str
    activations: QuantizedActivations | None = None

    @property
    def activation_bits(self) -> int:
        """Bits of what weights are multiplied with: 32 where activations are float."""
        return 32 if self.activations is None else self.activations.quantizer.bits

    def variables(self) -> dict[str, Any]:
        """`{"params", "batch_stats"}` in float32 with the weights dequantized, as `Network.embed` takes them."""
        variables = {"params": dequantize(self.packed_params), "batch_stats": self.batch_stats}
        return jax.tree.map(lambda leaf: leaf.astype(np.float32), variables)


def describe_plan(plan: Plan) -> dict[str, str]:
    """{path: `KMeans(bits=4)`} of a plan's quantized leaves; options at their defaults are left out."""
    return {path: _describe_quantizer(quantizer) for path, quantizer in plan.quantized.items()}


def paths_by_quantizer(plan_description: Mapping[str, str]) -> dict[str, list[str]]:
    """{text: [path, ...]} of `describe_plan`, which takes fewer bytes in a file."""
    paths: dict[str, list[str]] = {}
    for path, text in plan_description.items():
        paths.setdefault(text, []).append(path)
    return paths


def save_packed(
    path: str | os.PathLike[str],
    network: Network,
    packed_params: Any,
    batch_stats: Any,
    *,
    plan_description: Mapping[str, str] | None = None,
    threshold: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    activations: QuantizedActivations | None = None,
) -> int:
    """Write a packed file, atomically.

    Args:
        path: the file; one that exists is replaced, a missing folder is made.
        network: the network that the parameters are of.
        packed_params: from `qsv.quantize`; a tree without any QTensor gives a float file of the same format.
        batch_stats: running statistics, `{}` for a network without.
        plan_description: {path: text} from `describe_plan`.
        threshold: calibrated score of the decision, if there is one.
        provenance: JSON-compatible notes, such as the run's name and its error rates.
        activations: codes of the inputs of layers, one range each; None for float.

    Returns:
        Size of the file in bytes.

    Raises:
        ValueError: the parameters aren't those of the network, aren't finite, or the description isn't JSON.
        OSError: the file can't be written; the error says how many bytes it needs. An old file is untouched.
    """
    leaves = _flatten("params", packed_params) | _flatten("batch_stats", batch_stats)
    _check_shapes(network, {name: tuple(leaf.shape) for name, leaf in leaves.items()})
    tensors: Tensors = {}
    quantized = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, QTensor):
            tensors |= store(name, leaf)
            quantized[_path(name)] = {"bits": leaf.bits, "shape": list(leaf.shape), "dtype": leaf.dtype}
        else:
            tensors[name] = checked_float(name, leaf)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite or None, got {threshold}")
    description = {
        "sha256": "",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "qsv_version": _qsv_version(),
        "network": network.to_json(),
        "threshold": None if threshold is None else float(threshold),
        "provenance": dict(provenance or {}),
        "quantized": quantized,
        "plan": paths_by_quantizer(plan_description or {}),
        "tensors": _index(tensors),
    }
    if activations is not None:
        description |= {"format_version": ACTIVATIONS_VERSION, "activations": activations_to_json(activations)}
    text = _json(description)
    if Network.from_json(json.loads(text)["network"]) != network:
        raise ValueError(f"arguments of {network} must be JSON values; others can't be read back")
    flat = _joined(tensors)
    description["sha256"] = _digest(text, flat)
    compressed = zlib.compress(_json(description).encode(), level=9)
    data = safetensors.numpy.save(flat, {_KEY: base64.b64encode(compressed).decode()})
    write_atomically(path, data)
    return len(data)


def load_packed(path: str | os.PathLike[str]) -> PackedModel:
    """Read a packed file and check all of it.

    Args:
        path: written by `save_packed`.

    Returns:
        The model; its QTensors and floats equal the saved ones bit for bit.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't a packed file, is damaged, or needs a newer qsv; the error says file and cause.
    """
    data = pathlib.Path(path).read_bytes()
    try:
        return _decode(data)
    except KeyError as error:
        raise ValueError(f"{os.fspath(path)}: its description lacks {error}") from error
    # Whatever a file made by somebody else holds, the caller gets one type of error.
    except Exception as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a file says of itself that it is a packed file; it may still be damaged."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > os.path.getsize(path):
            return False
        try:
            metadata = json.loads(file.read(length))["__metadata__"]
        except (ValueError, KeyError, TypeError):
            return False
    return isinstance(metadata, dict) and _KEY in metadata


def _decode(data: bytes) -> PackedModel:
    flat, text = _read_safetensors(data)
    description = json.loads(text)
    if description.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT!r}, got {description.get('format')!r}")
    version = description["format_version"]
    if version not in (FORMAT_VERSION, ACTIVATIONS_VERSION):
        raise ValueError(
            f"has format version {version!r}, this qsv reads {FORMAT_VERSION} and {ACTIVATIONS_VERSION}; install a "
            "newer qsv"
        )
    found = description["sha256"]
    if _digest(text.replace(found, "", 1), flat) != found:
        raise ValueError("is damaged: its SHA-256 doesn't match its content; copy or export it again")

    network = Network.from_json(description["network"])
    quantized = {f"params/{leaf_path}": fields for leaf_path, fields in description["quantized"].items()}
    index = description["tensors"]
    shapes = {name: tuple(shape) for name, _, shape, *_ in index if ":" not in name}
    # Before anything is made of it: a constant of any shape takes no bytes in the file.
    _check_shapes(network, shapes | {name: tuple(fields["shape"]) for name, fields in quantized.items()})
    tensors = _split(index, flat)
    leaves: dict[str, Any] = {name: restore(name, fields, tensors) for name, fields in quantized.items()}
    leaves |= {name: checked_float(name, array) for name, array in tensors.items() if ":" not in name}
    extra = {name for name in tensors if ":" in name} - {f"{name}:{part}" for name in quantized for part in PARTS}
    if extra:
        raise ValueError(f"has tensors that its description doesn't name: {sorted(extra)[:4]}")
    trees = traverse_util.unflatten_dict(leaves, sep="/")
    return PackedModel(
        network,
        trees["params"],
        trees.get("batch_stats", {}),
        description["threshold"],
        {leaf_path: spec for spec, paths in description["plan"].items() for leaf_path in paths},
        description["provenance"],
        description["qsv_version"],
        activations_from_json(description["activations"]) if version == ACTIVATIONS_VERSION else None,
    )


def _read_safetensors(data: bytes) -> tuple[Tensors, str]:
    """The flat tensors, and the text of the description."""
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"isn't a whole safetensors file ({error})") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    compressed = header.get("__metadata__", {}).get(_KEY)
    if compressed is None:
        raise ValueError(f"is a safetensors file without the metadata {_KEY!r}; expected one from qsv.deploy.save")
    flat = {}
    for name, entry in entries:
        if name not in _DTYPES or entry["dtype"] != name or len(entry["shape"]) != 1:
            raise ValueError(
                f"{name} is {entry['dtype']} {entry['shape']}, expected flat tensors called by their types, "
                f"{', '.join(_DTYPES)}"
            )
        flat[name] = np.frombuffer(entry["data"], _DTYPES[name])
    inflater = zlib.decompressobj()
    text = inflater.decompress(base64.b64decode(compressed, validate=True), _MAX_DESCRIPTION_BYTES)
    if not inflater.eof:
        raise ValueError(f"its description is cut off, or longer than {_MAX_DESCRIPTION_BYTES:,} bytes")
    return flat, text.decode()


def _index(tensors: Tensors) -> list[list[Any]]:
    """[name, type, shape] of every tensor, and its value where it has only one."""
    return [
        [name, _DTYPE_NAMES[array.dtype], list(array.shape), *([float(array.flat[0])] if is_constant(array) else [])]
        for name, array in tensors.items()
    ]


def is_constant(array: np.ndarray) -> bool:
    """Whether a float tensor of several values has one value everywhere, to the last bit."""
    if array.size < 2 or array.dtype == np.uint8:
        return False
    values = np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
    return bool(np.all(values == values[0]))


def _joined(tensors: Tensors) -> Tensors:
    """One flat tensor for each type, of those that aren't constant."""
    parts: dict[str, list[np.ndarray]] = {}
    for array in tensors.values():
        if not is_constant(array):
            parts.setdefault(_DTYPE_NAMES[array.dtype], []).append(array.reshape(-1))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _split(index: list[list[Any]], flat: Tensors) -> Tensors:
    """The tensors that `_joined` joined; raises ValueError unless the index fits the flat tensors exactly."""
    tensors: Tensors = {}
    used = dict.fromkeys(flat, 0)
    for name, dtype, shape, *value in index:
        if name in tensors or dtype not in _DTYPES or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} is described twice or as {dtype} {shape}, expected one of {', '.join(_DTYPES)}")
        if value:
            # A view of one number, so that a small file can't fill the memory.
            tensors[name] = np.broadcast_to(np.asarray(value[0], _DTYPES[dtype]), shape)
            continue
        first, size = used.get(dtype, 0), math.prod(shape)
        used[dtype] = first + size
        if used[dtype] > len(flat.get(dtype, ())):
            raise ValueError(f"{name} of shape {tuple(shape)} lies past the end of the {dtype} tensor")
        tensors[name] = flat[dtype][first : first + size].reshape(shape) if size else np.empty(shape, _DTYPES[dtype])
    for dtype, size in used.items():
        if size != len(flat.get(dtype, ())):
            raise ValueError(f"the {dtype} tensor has {len(flat[dtype])} values, its description names {size}")
    return tensors


def _digest(text: str, flat: Tensors) -> str:
    """Hex digits of the SHA-256 over the description, then every flat tensor's name, shape and content."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(flat):
        digest.update(_json([name, list(flat[name].shape)]).encode())
        digest.update(flat[name].tobytes())
    return digest.hexdigest()


def _flatten(collection: str, tree: Any) -> dict[str, Any]:
    """{collection/path: leaf} of a tree of nested dicts."""
    leaves = {}
    for keys, leaf in traverse_util.flatten_dict(tree).items():
        wrong = [key for key in keys if not isinstance(key, str) or "/" in key or ":" in key]
        if wrong:
            raise ValueError(f"keys of {collection} must be strings without '/' and ':', got {wrong[0]!r} in {keys}")
        leaves["/".join((collection, *keys))] = leaf if isinstance(leaf, QTensor) else np.asarray(leaf)
    return leaves


def _path(name: str) -> str:
    """`params/stem/conv/kernel` to the path in the parameter tree."""
    return name.partition("/")[2]


def _check_shapes(network: Network, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless these are the leaves of the network."""
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    expected = {name: tuple(leaf.shape) for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()}
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"tensors aren't those of {network.name} {dict(network.arguments)}: "
            f"{len(missing)} missing {missing[:4]}, {len(extra)} unexpected {extra[:4]}"
        )
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise ValueError(f"{name} has shape {shape}, {network.name} needs {expected[name]}")


def _describe_quantizer(quantizer: Any) -> str:
    if not dataclasses.is_dataclass(quantizer):
        return repr(quantizer)
    options = [
        f"{field.name}={value!r}"
        for field in dataclasses.fields(quantizer)
        if (value := getattr(quantizer, field.name)) != field.default
    ]
    return f"{type(quantizer).__name__}({', '.join(options)})"


def _json(value: Any) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False, default=_plain_scalar)
    except (TypeError, ValueError) as error:
        raise ValueError(f"network arguments and provenance must be JSON values: {error}") from error


def _plain_scalar(value: Any) -> Any:
    """NumPy and JAX scalars, which metrics often are, as numbers."""
    if isinstance(value, np.generic | jax.Array) and value.ndim == 0:
        return value.item()
    raise TypeError(f"got {value!r}")


def _qsv_version() -> str:
    try:
        return importlib.metadata.version("qsv")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
