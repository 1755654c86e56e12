"""Networks in 8-bit integers as ONNX graphs: embeddings, what onnxruntime makes of them, their bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name
from onnx import TensorProto, helper

from qsv.deploy import PackedModel
from qsv.deploy.onnx import to_onnx
from qsv.deploy.onnx.graph import Graph
from qsv.deploy.onnx.integers import POINT
from qsv.deploy.onnx.lowering import Lowering
from qsv.deploy.onnx.tensors import Tensor
from qsv.models import Network
from qsv.quant import (
    ActivationQuantizer,
    ActivationRange,
    KMeans,
    QuantizedActivations,
    Rule,
    Uniform,
    dequantize,
    init,
    quantize,
    resolve,
)
from qsv.training import calibrate_activations

SMALL = {"embedding_size": 8}
NETWORKS = {
    "resnet10": Network("resnet10", {"width": 8, **SMALL}),
    "resnet36": Network("resnet36", {"width": 8, **SMALL}),
    "ecapa": Network("ecapa", {"channels": 16, **SMALL}),
    "campplus": Network("campplus", {"growth_rate": 4, "bn_size": 1, "init_channels": 8, **SMALL}),
    "eres2netv2": Network("eres2netv2", {"width": 8, **SMALL}),
}


def packed_model(network, quantizer, *, activation_bits=8, **settings):
    """A network of random statistics in integers; some normalisations have negative slopes, one is zero."""
    rng = np.random.default_rng(0)
    variables = network.init(jax.random.key(0))
    params = jax.tree.map(np.array, variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if path[-1].key == "scale":
            leaf[:] = rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1, 1, 1], leaf.shape)
            leaf[0] = 0
    stats = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype("f"), variables["batch_stats"])
    plan = resolve([Rule(".*/kernel", quantizer), Rule(".*", None)], params)
    packed = quantize(plan, params, init(plan, params))
    fake = {"params": dequantize(packed), "batch_stats": stats}
    speech = [0.1 * jax.random.normal(jax.random.key(seed), (2, 8000)) for seed in (1, 2)]
    activations = calibrate_activations(network, fake, speech, ActivationQuantizer(activation_bits, **settings))
    return PackedModel(network, packed, stats, None, {}, {}, "0", activations)


def session(model, optimized=None, **options):
    settings = onnxruntime.SessionOptions()
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    data = to_onnx(model, **options).SerializeToString()
    return onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])


def assert_alike(model, run):
    """Biases are rounded to units of the sums, so codes differ by a step here and there; less than they differ from
    what they stand for."""
    for batch, samples in ((2, 8000), (1, 12_345)):
        waveform = np.asarray(0.1 * jax.random.normal(jax.random.key(samples), (batch, samples)))
        expected = np.asarray(model.network.embed(model.variables(), jnp.asarray(waveform), None, model.activations))
        (found,) = run.run(None, {"waveform": waveform})
        plain = np.asarray(model.network.embed(model.variables(), jnp.asarray(waveform)))
        assert np.linalg.norm(found - expected) < 2 * np.linalg.norm(plain - expected)
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"activation_bits": 5}])
@pytest.mark.parametrize(
    "quantizer", [KMeans(4, integer_levels=True), Uniform(8, channel_axes=(-1,))], ids=["kmeans4", "uniform8"]
)
def test_embeddings_are_those_of_the_fake_quantized_network(quantizer, settings):
    model = packed_model(NETWORKS["resnet10"], quantizer, **settings)
    assert_alike(model, session(model))


@pytest.mark.parametrize(
    "name", ["ecapa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet36", "campplus", "eres2netv2"))]
)
def test_other_networks(name):
    model = packed_model(NETWORKS[name], KMeans(4, integer_levels=True))
    assert_alike(model, session(model))


def operations(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def assert_no_convolution_in_float(path):
    """Of the resnet10, as onnxruntime optimized it."""
    found = operations(path)
    assert found.count("QLinearConv") == 12 and "Conv" not in found and "FusedConv" not in found


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"activation_bits": 5}])
def test_onnxruntime_runs_every_convolution_in_integers(tmp_path, settings):
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True), **settings)
    session(model, tmp_path / "optimized.onnx", waveform=False)
    assert_no_convolution_in_float(tmp_path / "optimized.onnx")
    # The sums of the residual blocks too, but for the last, which is pooled.
    assert operations(tmp_path / "optimized.onnx").count("QLinearAdd") >= 3


def test_trained_ranges_begin_at_zero_after_rectifiers_and_leave_every_convolution_in_integers(tmp_path):
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True))
    variables, waveform = model.variables(), 0.1 * jax.random.normal(jax.random.key(3), (2, 8000))
    optimizer, activations = optax.adam(0.02), model.activations
    state = optimizer.init(activations)

    @jax.jit
    def step(activations, state):
        def error(own):
            return jnp.sum(jnp.square(model.network.embed(variables, waveform, None, own) - 1))

        updates, state = optimizer.update(jax.grad(error)(activations), state)
        return optax.apply_updates(activations, updates), state

    for _ in range(3):
        activations, state = step(activations, state)
    before, after = model.activations.ranges, activations.ranges
    at_zero = [point for point in before if before[point].low == 0]
    assert 5 < len(at_zero) < len(before)
    assert all(after[point].low == 0 and after[point].high != before[point].high for point in at_zero)
    assert all(after[point].low != before[point].low for point in before if point not in at_zero)
    session(dataclasses.replace(model, activations=activations), tmp_path / "optimized.onnx", waveform=False)
    assert_no_convolution_in_float(tmp_path / "optimized.onnx")


def test_a_rectifier_before_codes_of_negative_values_leaves_the_convolution_in_integers(tmp_path):
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True))
    ranges = {point: ActivationRange(own.low - 0.1, own.high) for point, own in model.activations.ranges.items()}
    model = dataclasses.replace(model, activations=dataclasses.replace(model.activations, ranges=ranges))
    session(model, tmp_path / "optimized.onnx", waveform=False)
    assert_no_convolution_in_float(tmp_path / "optimized.onnx")
    assert_alike(model, session(model))


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("low", [-2.0, 0.0])
@pytest.mark.parametrize(
    "quantizer",
    [ActivationQuantizer(bits, symmetric=symmetric) for bits in (8, 5) for symmetric in (False, True)],
    ids=repr,
)
def test_codes_end_where_those_of_fake_quantization_do(quantizer, low, rectified):
    own = ActivationRange(jnp.float32(low), jnp.float32(3))

    def rectify(x):
        return jnp.maximum(x, 0.0) if rectified else x

    graph, values = Graph(), np.linspace(-4, 4, 1001, dtype=np.float32)
    lowering = Lowering(graph, QuantizedActivations(quantizer, {"here": own}))
    marked = lowering.call(lambda x: checkpoint_name(rectify(x), POINT + "here"), Tensor("x", values.shape, (0,)))
    graph.append("Identity", [marked.name], ["y"])
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape) for name in ("x", "y")]
    data = graph.model(ends[:1], ends[1:], metadata={}).SerializeToString()
    (found,) = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": values})
    np.testing.assert_array_equal(found, quantizer.fake_quantize(rectify(values), own))


def test_openvino_runs_every_convolution_in_integers_and_decodes_weights_once():
    openvino = pytest.importorskip("openvino", reason="OpenVINO isn't installed: pip install 'qsv[openvino]'")
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True))
    core = openvino.Core()
    graph = core.read_model(model=to_onnx(model, waveform=False).SerializeToString(), weights=b"")
    compiled = core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    made = [own.get_rt_info() for own in compiled.get_runtime_model().get_ops()]
    kinds = [(info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in made]
    convolutions = [precision for kind, precision in kinds if kind == "Convolution"]
    assert len(convolutions) == 12 and set(convolutions) <= {"u8", "i8"}
    assert ("Gather", "i8") not in kinds


def test_the_file_holds_codes_of_the_kernels_bits():
    network = Network("resnet34", {"width": 16})
    model = packed_model(network, KMeans(4, integer_levels=True))
    floats = dataclasses.replace(model, activations=None)
    sizes = [len(to_onnx(own, waveform=False).SerializeToString()) for own in (model, floats)]
    # Besides scales and zeros of channels, and two nodes a point.
    assert sizes[0] < sizes[1] + 50_000


def test_kernels_can_be_made_unsigned():
    """What the runtime asks for where a processor has no VNNI; it changes nothing on processors other than x86."""
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True))
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.x64quantprecision", "1")
    data, disabled = to_onnx(model).SerializeToString(), ["CommonSubexpressionElimination"]
    assert_alike(model, onnxruntime.InferenceSession(data, settings, disabled_optimizers=disabled))


def test_levels_off_the_grid_are_refused():
    model = packed_model(NETWORKS["resnet10"], KMeans(4))
    with pytest.raises(ValueError, match="int8 grid"):
        to_onnx(model)


def test_an_offset_beyond_what_sums_can_hold_stays_float():
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True))
    params = jax.tree.map(np.array, model.packed_params)
    params["stem"]["norm"]["scale"][1] = 1e-12
    changed = dataclasses.replace(model, packed_params=params)
    assert_alike(changed, session(changed))
