"""Microsoft's DNSMOS P.808 read into ours: the same features, the same scores."""

import importlib.util
import pathlib

import numpy as np
import pytest
import soundfile

from qsv.deploy import Embedder, QualityEstimator
from qsv.interop import import_checkpoint, read_onnx_weights
from qsv.models import Network, count_parameters

onnx = pytest.importorskip("onnx")


def write_onnx(path, tensors, products=()):
    """A graph that multiplies by the tensors named in `products`, and holds all."""
    nodes = [onnx.helper.make_node("MatMul", ["x", name], [f"y{place}"]) for place, name in enumerate(products)]
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "graph", [], [], initializers)
    onnx.save(onnx.helper.make_model(graph), path)


@pytest.fixture
def p808(tmp_path):
    """A file with the names and shapes of model_v8, and its tensors."""
    rng = np.random.default_rng(0)
    prefix, tensors, inputs = "mos_estimator_small_1/", {}, 1
    for place, channels in enumerate((32, 32, 32, 32, 64)):
        tensors[f"conv2d_{5 + place}/kernel:0"] = rng.normal(size=(channels, inputs, 3, 3))
        tensors[f"conv2d_{5 + place}/bias:0"] = rng.normal(size=channels)
        inputs = channels
    products = []
    for place, units in enumerate((64, 64, 1)):
        name = f"{prefix}dense_{3 + place}/MatMul/ReadVariableOp/resource:0"
        products.append(name)
        tensors[name] = rng.normal(size=(64, units))
        tensors[f"{prefix}dense_{3 + place}/BiasAdd/ReadVariableOp/resource:0"] = rng.normal(size=units)
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    write_onnx(tmp_path / "model_v8.onnx", tensors, products)
    return tmp_path / "model_v8.onnx", tensors


def test_every_tensor_finds_its_leaf(p808):
    path, tensors = p808
    imported = import_checkpoint(path)
    assert imported.family == "DNSMOS P.808" and imported.network == Network.of_size("dnsmos_p808")
    params = imported.variables["params"]
    assert count_parameters(params) == 54_945
    kernel = tensors["conv2d_9/kernel:0"]
    np.testing.assert_array_equal(params["conv5"]["kernel"], kernel.transpose(2, 3, 1, 0))
    for layer, number in (("dense1", 3), ("dense2", 4), ("score", 5)):
        name = f"mos_estimator_small_1/dense_{number}/MatMul/ReadVariableOp/resource:0"
        np.testing.assert_array_equal(params[layer]["kernel"], tensors[name])


def test_only_factors_are_transposed(tmp_path):
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_onnx(tmp_path / "two.onnx", {"factor": kernel, "other": kernel}, ["factor"])
    weights = read_onnx_weights(tmp_path / "two.onnx")
    np.testing.assert_array_equal(weights["factor"], kernel.T)
    np.testing.assert_array_equal(weights["other"], kernel)


@pytest.mark.parametrize("content", [b"", b"no graph at all", bytes(range(256))])
def test_what_is_no_onnx_is_refused(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.onnx"):
        read_onnx_weights(path)


def test_a_cut_file_and_tensors_elsewhere_are_refused(p808, tmp_path):
    path, _ = p808
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model_v8.onnx"):
        import_checkpoint(path)
    tensor = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "kernel")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    graph = onnx.helper.make_graph([], "graph", [], [], [tensor])
    (tmp_path / "outside.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(ValueError, match="keeps kernel in another file"):
        read_onnx_weights(tmp_path / "outside.onnx")


def test_scores_of_real_speech_are_the_official_ones(speech_dir):
    """speechmos 0.0.1.1 itself on clips of 2 to 16 s, front end and segments included."""
    dnsmos = pytest.importorskip("speechmos.dnsmos")
    folder = pathlib.Path(importlib.util.find_spec("speechmos").submodule_search_locations[0])
    imported = import_checkpoint(folder / "dnsmos_models" / "model_v8.onnx")
    estimate = QualityEstimator(Embedder(imported.network, imported.variables))
    files = sorted((speech_dir / "librispeech251").glob("*/*"))[:25] + sorted((speech_dir / "an4").glob("*/*"))[:25]
    rng = np.random.default_rng(0)
    differences = []
    for place, file in enumerate(files):
        waveform, rate = soundfile.read(file, dtype="float32")
        # No longer than 16 s when repeated: speechmos loses segments 7 to 23 by the rounding of (7 + 9.01) * 16000.
        waveform = np.resize(waveform, (2, 4, 7, 8, 10, 13, 16)[place % 7] * rate)
        # Every second clip is noisy, so that scores spread.
        waveform = np.clip(waveform + place % 2 * 0.05 * rng.normal(size=waveform.shape), -1, 1).astype(np.float32)
        differences.append(abs(estimate(waveform, rate) - dnsmos.run(waveform, rate)["p808_mos"]))
    assert len(differences) == 50
    assert max(differences) <= 1e-3
