"""The packed file: a network, its quantized parameters and all that is needed to run it, without pickle.

It is a safetensors file, so any safetensors reader opens it. Its tensors, little-endian and in C order, are

    params/PATH:codes      [ceil(n * bits / 8)] U8  n codes of `bits` bits, lowest bit first, without gaps
    params/PATH:codebook   [..., 2**bits] F32       ascending; other axes the weight's, or one where shared
    params/PATH:scale      [...] F32                a scalar, or axes the weight's, or one where shared
    params/PATH            F32, BF16 or F16         a parameter that stays float
    batch_stats/PATH       F32, BF16 or F16         running statistics

and a weight is `codebook[..., code] * scale`, multiplied in float32. The safetensors metadata has one key,
"qsv", with this JSON text:

    {"sha256": hex digits, "format": "qsv-packed", "format_version": 1, "qsv_version": "0.1.0",
     "network": {"name", "arguments", "frontend"}, "threshold": number or null, "provenance": {...},
     "quantized": {PATH: {"bits", "shape", "dtype"}}, "plan": {"KMeans(bits=4)": [PATH, ...]}}

The digest covers this text with the digest itself left empty, and then every tensor in the order of the
names: first the JSON text `["NAME","F32",[2,3]]`, then its bytes.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.packed_tensor import FLOATS, PARTS, Tensors, checked_float, restore, store
from qsv.models.network import Network
from qsv.quant import Plan, QTensor, dequantize

FORMAT = "qsv-packed"
FORMAT_VERSION = 1

_KEY = "qsv"
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
    """

    network: Network
    packed_params: dict[str, Any]
    batch_stats: dict[str, Any]
    threshold: float | None
    plan_description: dict[str, str]
    provenance: dict[str, Any]
    qsv_version: str

    def variables(self) -> dict[str, Any]:
        """`{"params", "batch_stats"}` with the weights dequantized, as `Network.embed` takes them."""
        return {"params": dequantize(self.packed_params), "batch_stats": self.batch_stats}


def describe_plan(plan: Plan) -> dict[str, str]:
    """{path: `KMeans(bits=4)`} of a plan's quantized leaves; options at their defaults are left out."""
    return {path: _describe_quantizer(quantizer) for path, quantizer in plan.quantized.items()}


def save_packed(
    path: str | os.PathLike[str],
    network: Network,
    packed_params: Any,
    batch_stats: Any,
    *,
    plan_description: Mapping[str, str] | None = None,
    threshold: float | None = None,
    provenance: Mapping[str, Any] | None = None,
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
    paths_of: dict[str, list[str]] = {}
    for leaf_path, text in (plan_description or {}).items():
        paths_of.setdefault(text, []).append(leaf_path)
    description = {
        "sha256": "",
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "qsv_version": _qsv_version(),
        "network": network.to_json(),
        "threshold": None if threshold is None else float(threshold),
        "provenance": dict(provenance or {}),
        "quantized": quantized,
        "plan": paths_of,
    }
    text = _json(description)
    if Network.from_json(json.loads(text)["network"]) != network:
        raise ValueError(f"arguments of {network} must be JSON values; others can't be read back")
    description["sha256"] = _digest(text, tensors)
    data = safetensors.numpy.save(tensors, {_KEY: _json(description)})
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
    tensors, text = _read_safetensors(data)
    description = json.loads(text)
    if description.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT!r}, got {description.get('format')!r}")
    version = description["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(f"has format version {version!r}, this qsv reads {FORMAT_VERSION}; install a newer qsv")
    found = description["sha256"]
    if _digest(text.replace(found, "", 1), tensors) != found:
        raise ValueError("is damaged: its SHA-256 doesn't match its content; copy or export it again")

    network = Network.from_json(description["network"])
    quantized = {f"params/{leaf_path}": fields for leaf_path, fields in description["quantized"].items()}
    leaves: dict[str, Any] = {name: restore(name, fields, tensors) for name, fields in quantized.items()}
    leaves |= {name: checked_float(name, array) for name, array in tensors.items() if ":" not in name}
    extra = {name for name in tensors if ":" in name} - {f"{name}:{part}" for name in quantized for part in PARTS}
    if extra:
        raise ValueError(f"has tensors that its description doesn't name: {sorted(extra)[:4]}")
    _check_shapes(network, {name: tuple(leaf.shape) for name, leaf in leaves.items()})
    trees = traverse_util.unflatten_dict(leaves, sep="/")
    return PackedModel(
        network,
        trees["params"],
        trees.get("batch_stats", {}),
        description["threshold"],
        {leaf_path: spec for spec, paths in description["plan"].items() for leaf_path in paths},
        description["provenance"],
        description["qsv_version"],
    )


def _read_safetensors(data: bytes) -> tuple[Tensors, str]:
    """The tensors, and the text of the description."""
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"isn't a whole safetensors file ({error})") from error
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(_KEY)
    if text is None:
        raise ValueError(f"is a safetensors file without the metadata {_KEY!r}; expected one from qsv.deploy.save")
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} is {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        tensors[name] = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, text


def _digest(text: str, tensors: Tensors) -> str:
    """Hex digits of the SHA-256 over the description, then every name, type, shape and content."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(_json([name, _DTYPE_NAMES[array.dtype], list(array.shape)]).encode())
        digest.update(array.tobytes())
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
