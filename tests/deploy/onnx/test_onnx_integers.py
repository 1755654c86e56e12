"""Networks in 8-bit integers as ONNX graphs: embeddings, what onnxruntime makes of them, their bytes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest

from qsv.deploy import PackedModel
from qsv.deploy.onnx import to_onnx
from qsv.models import Network
from qsv.quant import ActivationQuantizer, KMeans, Rule, Uniform, dequantize, init, quantize, resolve
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


def test_onnxruntime_runs_every_convolution_in_integers(tmp_path):
    model = packed_model(NETWORKS["resnet10"], KMeans(4, integer_levels=True))
    session(model, tmp_path / "optimized.onnx", waveform=False)
    found = operations(tmp_path / "optimized.onnx")
    assert found.count("QLinearConv") == 12 and "Conv" not in found and "FusedConv" not in found
    # The sums of the residual blocks too, but for the last, which is pooled.
    assert found.count("QLinearAdd") >= 3


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
