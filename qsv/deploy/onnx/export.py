"""Export of a packed file to ONNX."""

import dataclasses
import json
import os
from typing import Any

import jax
import numpy as np
import onnx
from jax.ad_checkpoint import checkpoint_name
from onnx import helper

from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.compact import fold_batch_norms
from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.integers import POINT
from qsv.deploy.onnx.lowering import Lowering
from qsv.deploy.onnx.tensors import Tensor, Value, Weight, plain, straight
from qsv.deploy.packed_file import PackedModel, paths_by_quantizer
from qsv.deploy.runtime.model_file import FORMAT, FORMAT_VERSION, METADATA_KEY, sealed
from qsv.deploy.symbolic_shapes import features_shape, min_samples, waveform_shape
from qsv.frontend import FrontEnd
from qsv.models import at_points
from qsv.quant import QTensor, leaf_paths, with_leaves


def to_onnx(model: PackedModel, *, waveform: bool = True) -> onnx.ModelProto:
    """The network of a packed file as an ONNX model.

    Its input is "waveform", [batch, samples] float32 in [-1, 1], or "features", [batch, frames, features] float32;
    its output "embedding", [batch, embedding_size] float32, not length normalised. All rows of a batch are of one
    length; batch and length are free.

    Quantized weights are stored as codes of their bits and as levels, which the graph decodes; a runtime that computes
    what is constant when it loads the file, as onnxruntime does, runs as fast as with float weights. Metadata "qsv"
    is a JSON text with the network, the plan and the threshold.

    Where activations are quantized, the graph is of int8 kernels between QuantizeLinear and DequantizeLinear, with
    batch normalisations folded into the kernels' scales and biases: onnxruntime runs such layers in integers.

    Args:
        model: from `qsv.deploy.load_packed`.
        waveform: whether the front end is part of it.

    Raises:
        NotImplementedError: the network uses an operation that has no counterpart here.
        ValueError: activations are quantized, but a kernel's levels aren't on an int8 grid.
    """
    graph, network = Graph(), model.network
    lowering = Lowering(graph, model.activations)
    dims: tuple[str | int, ...]
    if waveform:
        name, dims = "waveform", ("batch", "samples")
        features = _front_end(lowering, network.frontend, name)
    else:
        name, dims = "features", ("batch", "frames", network.frontend.num_features)
        graph.bind_axes(name, {"b": 0, "t": 1})
        features = Tensor(name, features_shape(network.frontend.num_features), straight(3))
    embedding = plain(graph, _network(lowering, model, features))
    graph.append("Identity", [embedding.name], ["embedding"])
    lowering.weights.finish()
    float32 = onnx.TensorProto.FLOAT
    return graph.model(
        [helper.make_tensor_value_info(name, float32, dims)],
        [helper.make_tensor_value_info("embedding", float32, ["batch", network.embedding_size])],
        metadata={METADATA_KEY: json.dumps(_description(model, name))},
    )


def _front_end(lowering: Lowering, frontend: FrontEnd, name: str) -> Tensor:
    """The features of a waveform."""
    lowering.graph.bind_axes(name, {"b": 0, "s": 1})
    shape = waveform_shape(frontend, network_follows=False)
    features = lowering.call(lambda waveform: frontend(waveform)[0], Tensor(name, shape, straight(2)))
    # The network has symbols of its own: sizes of sizes would be beyond what JAX can compare.
    lowering.graph.bind("t", features.shape[1])
    return dataclasses.replace(features, shape=features_shape(frontend.num_features))


def _network(lowering: Lowering, model: PackedModel, features: Tensor) -> Tensor:
    """The embeddings of features."""
    params, batch_stats = fold_batch_norms(model.packed_params, model.batch_stats)
    floats = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), batch_stats)
    leaves = dict(leaf_paths(params))
    points = model.activations.ranges if model.activations else ()

    def embed(features: jax.Array, *values: jax.Array) -> Any:
        own = with_leaves(params, dict(zip(leaves, values, strict=True)))
        with at_points(points, lambda point, own: checkpoint_name(own, POINT + point)):
            return model.network.module().apply({"params": own, "batch_stats": floats}, features)

    return lowering.call(embed, features, *map(_value, leaves.values()))


def export_onnx(path: str | os.PathLike[str], model: PackedModel, *, waveform: bool = True) -> int:
    """Write `to_onnx` of a model, sealed and atomically; returns the bytes of the file."""
    made = to_onnx(model, waveform=waveform)
    (description,) = (entry.value for entry in made.metadata_props if entry.key == METADATA_KEY)
    data = sealed(made.SerializeToString(), description)
    write_atomically(path, data)
    return len(data)


def _value(leaf: Any) -> Value:
    if isinstance(leaf, QTensor):
        return Weight(leaf, tuple(leaf.shape))
    return np.asarray(leaf, np.float32)


def _description(model: PackedModel, name: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "qsv_version": model.qsv_version,
        "network": model.network.to_json(),
        "input": name,
        "sample_rate_hz": model.network.frontend.sample_rate_hz,
        "min_samples": min_samples(model.network.frontend),
        "embedding_size": model.network.embedding_size,
        "threshold": model.threshold,
        "activation_bits": model.activation_bits,
        "plan": paths_by_quantizer(model.plan_description),
        "provenance": model.provenance,
    }
