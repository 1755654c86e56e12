"""Packed files as ONNX models: the embeddings that onnxruntime makes of them, their bytes, their metadata."""

import json

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

from qsv.deploy import PackedModel, load_packed, save
from qsv.deploy.onnx import export_onnx, to_onnx
from qsv.frontend import KaldiFbank, LogMelSpectrogram, MelSpectrogram, SpeechBrainFbank
from qsv.models import Network
from qsv.quant import (
    KMeans,
    QTensor,
    Rule,
    init,
    leaf_paths,
    resolve,
    with_leaves,
)

SMALL = {"embedding_size": 8}
NETWORKS = {
    "resnet18": Network("resnet18", {"width": 4, **SMALL}),
    "resnet50": Network("resnet50", {"width": 4, **SMALL}),
    "resnet36": Network("resnet36", {"width": 8, **SMALL}, KaldiFbank(energy=True)),
    "df_resnet56": Network("df_resnet56", {"width": 4, **SMALL}),
    "ecapa": Network("ecapa", {"channels": 16, **SMALL}, KaldiFbank(window="hamming")),
    "ecapa_speechbrain": Network("ecapa_speechbrain", {"channels": 16, **SMALL}, SpeechBrainFbank()),
    "campplus": Network("campplus", {"growth_rate": 4, "bn_size": 1, "init_channels": 8, **SMALL}),
    "eres2netv2": Network("eres2netv2", {"width": 8, **SMALL}),
    "ge2e": Network("ge2e", {"hidden_size": 8, **SMALL}, MelSpectrogram()),
    "dnsmos": Network("dnsmos", {}, LogMelSpectrogram()),
}


def packed_model(network, bits=4):
    """A network of random codes, floats and statistics; bits of None are for float weights."""
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        if not path.endswith("kernel"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        scale = np.float32(1 / np.sqrt(np.prod(shape[:-1])))
        if bits is None:
            return scale * rng.normal(size=shape).astype(np.float32)
        codes, levels = rng.integers(0, 2**bits, shape, np.uint8), np.sort(rng.normal(size=2**bits))
        return QTensor(codes, levels.astype(np.float32), scale, bits, shape, "float32")

    variables = jax.eval_shape(network.init, jax.random.key(0))
    made = with_leaves(variables, {path: leaf(path, shape.shape) for path, shape in leaf_paths(variables)})
    return PackedModel(network, made["params"], made["batch_stats"], None, {}, {}, "0")


def session(model, **options):
    data = to_onnx(model, **options).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def assert_alike(found, expected):
    """As near as float32 sums in another order are."""
    assert found.shape == expected.shape and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# JAX compiles these for up to a minute each.
DEEP = ("resnet36", "resnet50", "df_resnet56", "campplus", "eres2netv2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in DEEP else name for name in NETWORKS]
)
def test_embeddings_of_features_are_those_of_jax(name):
    model = packed_model(NETWORKS[name])
    run = session(model, waveform=False)
    features = np.random.default_rng(1).normal(size=(2, 203, model.network.frontend.num_features)).astype(np.float32)
    expected = np.asarray(jax.jit(model.network.module().apply)(model.variables(), features))
    assert_alike(run.run(None, {"features": features})[0], expected)


@pytest.mark.parametrize("name", ["resnet18", "resnet36", "ecapa_speechbrain", "ge2e", "dnsmos"])
def test_embeddings_of_waveforms_are_those_of_jax(name):
    model = packed_model(NETWORKS[name])
    run = session(model)
    for batch, samples in ((2, 20_123), (1, 8_000)):
        waveform = np.random.default_rng(2).normal(scale=0.05, size=(batch, samples)).astype(np.float32)
        expected = np.asarray(model.network.embed(model.variables(), waveform))
        assert_alike(run.run(None, {"waveform": waveform})[0], expected)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_file_is_little_more_than_codes_tables_and_floats(bits):
    model = packed_model(Network("resnet34", {"width": 16}), bits)
    leaves = [leaf for _, leaf in leaf_paths(model.packed_params)]
    floats = sum(leaf.size for leaf in leaves if not isinstance(leaf, QTensor))
    stored = sum(leaf.storage_bits // 8 for leaf in leaves if isinstance(leaf, QTensor)) + 4 * floats
    size = len(to_onnx(model, waveform=False).SerializeToString())
    # Nodes of a hundred layers take 14 kB, whatever the width of the network.
    assert size < stored + 14_000


def test_a_model_says_what_it_is(tmp_path):
    network = NETWORKS["resnet18"]
    variables = network.init(jax.random.key(0))
    plan = resolve([Rule(".*/kernel", KMeans(2)), Rule(".*", None)], variables["params"])
    qstate = init(plan, variables["params"])
    save(
        tmp_path / "model.safetensors",
        network,
        plan,
        variables["params"],
        qstate,
        variables["batch_stats"],
        threshold=0.25,
    )
    size = export_onnx(tmp_path / "model.onnx", load_packed(tmp_path / "model.safetensors"))
    assert (tmp_path / "model.onnx").stat().st_size == size
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    (own,) = (entry.value for entry in model.metadata_props if entry.key == "qsv")
    description = json.loads(own)
    assert Network.from_json(description["network"]) == network
    assert description["threshold"] == 0.25
    assert description["plan"] == {"KMeans(bits=2)": list(plan.quantized)}
    (first,), (last,) = model.graph.input, model.graph.output
    assert (first.name, last.name) == ("waveform", "embedding")
    assert [axis.dim_param or axis.dim_value for axis in first.type.tensor_type.shape.dim] == ["batch", "samples"]
    assert [axis.dim_param or axis.dim_value for axis in last.type.tensor_type.shape.dim] == ["batch", 8]


def test_a_float_network_can_be_exported():
    model = packed_model(NETWORKS["resnet18"], None)
    features = np.random.default_rng(1).normal(size=(1, 40, 80)).astype(np.float32)
    expected = np.asarray(jax.jit(model.network.module().apply)(model.variables(), features))
    assert_alike(session(model, waveform=False).run(None, {"features": features})[0], expected)
