"""Packed files as StableHLO: embeddings for any batch and length, bytes, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from qsv.data.file_error import FileError
from qsv.deploy import PackedModel, export_stablehlo, load_stablehlo, to_stablehlo
from qsv.frontend import MelSpectrogram, SpeechBrainFbank
from qsv.models import Network
from qsv.quant import ActivationQuantizer, KMeans, QTensor, Rule, Uniform, init, leaf_paths, quantize, resolve
from qsv.training import calibrate_activations

SMALL = {"embedding_size": 8}
NETWORKS = {
    "resnet18": Network("resnet18", {"width": 4, **SMALL}),
    "ecapa_speechbrain": Network("ecapa_speechbrain", {"channels": 16, **SMALL}, SpeechBrainFbank()),
    "ge2e": Network("ge2e", {"hidden_size": 8, **SMALL}, MelSpectrogram()),
}


def packed_model(network, quantizer):
    variables = network.init(jax.random.key(0))
    stats = jax.tree.map(lambda leaf: leaf + 0.1, variables.get("batch_stats", {}))
    plan = resolve([Rule(".*/kernel", quantizer), Rule(".*", None)], variables["params"])
    packed = quantize(plan, variables["params"], init(plan, variables["params"]))
    return PackedModel(network, packed, stats, None, {}, {}, "0")


def noise(*shape):
    return np.random.default_rng(0).normal(scale=0.1, size=shape).astype(np.float32)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("quantizer", [KMeans(3), Uniform(8, channel_axes=(-1,))], ids=["kmeans3", "uniform8"])
def test_embeddings_are_those_of_the_packed_file(name, quantizer):
    model = packed_model(NETWORKS[name], quantizer)
    made = to_stablehlo(model)
    for batch, samples in ((1, 8000), (3, 12_345)):
        waveform = noise(batch, samples)
        expected = np.asarray(model.network.embed(model.variables(), waveform))
        np.testing.assert_allclose(made.call(waveform), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_features_and_quantized_activations():
    model = packed_model(NETWORKS["resnet18"], KMeans(4))
    activations = calibrate_activations(
        model.network, model.variables(), [jnp.asarray(noise(2, 8000))], ActivationQuantizer(8)
    )
    model = dataclasses.replace(model, activations=activations)
    waveform = noise(2, 9000)
    features = np.asarray(model.network.frontend(waveform)[0])
    found = to_stablehlo(model, waveform=False).call(features)
    expected = np.asarray(model.network.embed(model.variables(), waveform, None, activations))
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_file_is_as_small_as_its_codes(tmp_path, bits):
    network = Network("resnet34", {"width": 16})
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def leaf(path, shape):
        if not path.endswith("kernel"):
            return rng.uniform(0.5, 1.5, shape).astype(np.float32)
        levels = np.sort(rng.normal(size=2**bits)).astype(np.float32)
        return QTensor(rng.integers(0, 2**bits, shape, np.uint8), levels, np.float32(1), bits, shape, "float32")

    params = jax.tree_util.tree_map_with_path(
        lambda path, own: leaf("/".join(key.key for key in path), own.shape), shapes["params"]
    )
    stats = jax.tree.map(lambda own: np.ones(own.shape, np.float32), shapes["batch_stats"])
    model = PackedModel(network, params, stats, None, {}, {}, "0")
    size = export_stablehlo(tmp_path / "model.stablehlo", model, waveform=False)
    assert (tmp_path / "model.stablehlo").stat().st_size == size
    leaves = [own for _, own in leaf_paths({"params": params, "batch_stats": stats})]
    stored = sum(own.storage_bits // 8 if isinstance(own, QTensor) else 4 * own.size for own in leaves)
    # The program itself takes the rest, whatever the width of the network.
    assert size < stored + 150_000
    loaded = load_stablehlo(tmp_path / "model.stablehlo")
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    assert [str(axis) for axis in loaded.in_avals[0].shape] == ["b", "t", "80"]


def test_depthwise_convolutions_stay_operations_of_other_devices():
    network = Network("df_resnet56", {"width": 2, **SMALL})
    made = to_stablehlo(packed_model(network, KMeans(3)), waveform=False, platforms=("cuda",))
    program = made.mlir_module()
    assert program.count("feature_group_count = 8 : i64") == 3


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "model.stablehlo"
    export_stablehlo(path, packed_model(NETWORKS["resnet18"], KMeans(3)), waveform=False)
    return path


def test_jax_reads_a_sealed_file(exported):
    features = noise(1, 40, 80)
    found = export.deserialize(bytearray(exported.read_bytes())).call(features)
    np.testing.assert_array_equal(found, load_stablehlo(exported).call(features))


def test_every_flipped_byte_is_refused(exported, tmp_path):
    rng = np.random.default_rng(0)
    data, path = bytearray(exported.read_bytes()), tmp_path / "model"
    # The end, where the seal is, is as likely as all else.
    places = [*rng.integers(0, len(data), 1250), *(len(data) - rng.integers(1, 60, 1250))]
    for place, change in zip(places, rng.integers(1, 256, len(places)), strict=True):
        data[place] ^= int(change)
        path.write_bytes(data)
        with pytest.raises(FileError, match="damaged"):
            load_stablehlo(path)
        data[place] ^= int(change)


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: d + b"\0", lambda d: d[1:]])
def test_missing_and_added_bytes_are_refused(exported, tmp_path, change):
    (tmp_path / "model").write_bytes(change(exported.read_bytes()))
    with pytest.raises(FileError, match="damaged"):
        load_stablehlo(tmp_path / "model")


def test_what_is_no_export_is_refused(tmp_path):
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ValueError, match="text: holds no exported JAX function"):
        load_stablehlo(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_stablehlo(tmp_path / "none")
