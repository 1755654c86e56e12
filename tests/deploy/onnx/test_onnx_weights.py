"""Quantized weights in ONNX graphs: the bits that a file holds and the weights that a runtime makes of them."""

import dataclasses

import jax
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qsv.deploy.integer import int8_levels
from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.weights import PackedWeights
from qsv.quant import AdaptiveBinary, KMeans, PowerOfTwo, StaticBinary, Uniform

WEIGHTS = jax.random.normal(jax.random.key(0), (3, 5, 7))
LARGE = jax.random.normal(jax.random.key(3), (200, 300))


def decoded(packed, orders):
    """The arrays of an ONNX graph that decodes quantized weights in orders of their axes, and the graph's bytes."""
    graph = Graph()
    weights = PackedWeights(graph)
    outputs = []
    for number, (weight, order) in enumerate(zip(packed, orders, strict=True)):
        graph.append("Identity", [weights.decode(weight, order)], [f"y{number}"])
        dims = [weight.shape[axis] for axis in order]
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, dims))
    weights.finish()
    data = graph.model([], outputs, metadata={}).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {}), len(data)


@pytest.mark.parametrize(
    "quantizer",
    [
        *(KMeans(bits) for bits in range(1, 9)),
        KMeans(3, channel_axes=(-1,), share_codebook=True),
        KMeans(4, channel_axes=(-1,)),
        KMeans(2, channel_axes=(0, -1)),
        Uniform(6, channel_axes=(1,)),
        PowerOfTwo(4),
        StaticBinary(),
        AdaptiveBinary(channel_axes=(-1,)),
    ],
    ids=repr,
)
def test_the_graph_decodes_the_very_weights(quantizer):
    packed = quantizer.quantize(WEIGHTS, quantizer.init(WEIGHTS))
    orders = [(0, 1, 2), (2, 0, 1), (1, 2, 0)]
    found, _ = decoded([packed] * 3, orders)
    for array, order in zip(found, orders, strict=True):
        np.testing.assert_array_equal(array, np.transpose(packed.dequantize(), order))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_bits_and_no_more(bits):
    weights = jax.random.normal(jax.random.key(1), (40_000,))
    quantizer = Uniform(bits) if bits > 1 else StaticBinary()
    packed = quantizer.quantize(weights, quantizer.init(weights))
    _, size = decoded([packed], [(0,)])
    # The levels, and a dozen nodes.
    assert size < 40_000 * bits / 8 + 4 * 2**bits + 1500


def test_weights_of_many_sizes_and_widths_lie_together():
    keys = jax.random.split(jax.random.key(2), 6)
    packed = []
    for number, key in enumerate(keys):
        quantizer = KMeans(1 + number % 3)
        weights = jax.random.normal(key, (number + 1, 3))
        packed.append(quantizer.quantize(weights, quantizer.init(weights)))
    found, _ = decoded(packed, [(1, 0)] * 6)
    for array, weight in zip(found, packed, strict=True):
        np.testing.assert_array_equal(array, np.asarray(weight.dequantize()).T)


@pytest.mark.parametrize(
    "quantizer", [KMeans(4, integer_levels=True), KMeans(2, channel_axes=(-1,), integer_levels=True)], ids=repr
)
def test_int8_kernels_of_one_weight_share_its_codes(quantizer):
    packed = quantizer.quantize(LARGE, quantizer.init(LARGE))
    levels, _ = int8_levels(packed)
    whole = dataclasses.replace(packed, codebook=levels.astype(np.float32), scale=np.float32(1))
    graph = Graph()
    weights = PackedWeights(graph)
    signs = [np.ones(300, np.int64), np.arange(300) % 3 - 1]
    for number, own in enumerate(signs):
        graph.append("Identity", [weights.int8(packed, levels, (1, 0), own)], [f"y{number}"])
    weights.finish()
    outputs = [helper.make_tensor_value_info(f"y{number}", TensorProto.INT8, [300, 200]) for number in (0, 1)]
    data = graph.model([], outputs, metadata={}).SerializeToString()
    found = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {})
    for array, own in zip(found, signs, strict=True):
        np.testing.assert_array_equal(array, (np.asarray(whole.dequantize()) * own).T)
    # Three tables of levels, a byte or two for the place of each output's, and a dozen nodes.
    assert len(data) < 60_000 * quantizer.bits / 8 + 4 * levels.size + 3 * 300 + 2000
