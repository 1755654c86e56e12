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

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from qsv.deploy.container import Container, named_leaves, reading, store_leaves, to_json, write
from qsv.deploy.packed_activations import activations_from_json, activations_to_json
from qsv.models.network import Network
from qsv.quant import Plan, QuantizedActivations, dequantize

FORMAT = "qsv-packed"
FORMAT_VERSION = 2
# Of files with quantized activations: a reader that doesn't know of these must not take them for float.
ACTIVATIONS_VERSION = 3


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
    leaves = named_leaves(packed_params, prefix="params/") | named_leaves(batch_stats, prefix="batch_stats/")
    _check_shapes(network, {name: tuple(leaf.shape) for name, leaf in leaves.items()})
    tensors, quantized = store_leaves(leaves)
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite or None, got {threshold}")
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "network": network.to_json(),
        "threshold": None if threshold is None else float(threshold),
        "provenance": dict(provenance or {}),
        "quantized": {name.removeprefix("params/"): fields for name, fields in quantized.items()},
        "plan": paths_by_quantizer(plan_description or {}),
    }
    if activations is not None:
        description |= {"format_version": ACTIVATIONS_VERSION, "activations": activations_to_json(activations)}
    if Network.from_json(json.loads(to_json(description))["network"]) != network:
        raise ValueError(f"arguments of {network} must be JSON values; others can't be read back")
    return write(path, description, tensors)


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
    with reading(path, expected_format=FORMAT, versions=(FORMAT_VERSION, ACTIVATIONS_VERSION)) as container:
        return _model(container)


def _model(container: Container) -> PackedModel:
    """The model in a container; raises an error unless all of its parts fit together."""
    description = container.description
    network = Network.from_json(description["network"])
    quantized = {f"params/{leaf_path}": fields for leaf_path, fields in description["quantized"].items()}
    _check_shapes(network, container.shapes(quantized))
    trees = traverse_util.unflatten_dict(container.leaves(quantized), sep="/")
    return PackedModel(
        network,
        trees["params"],
        trees.get("batch_stats", {}),
        description["threshold"],
        {leaf_path: spec for spec, paths in description["plan"].items() for leaf_path in paths},
        description["provenance"],
        description["qsv_version"],
        activations_from_json(description["activations"])
        if description["format_version"] == ACTIVATIONS_VERSION
        else None,
    )


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
