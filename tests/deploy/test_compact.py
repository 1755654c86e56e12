"""Folded batch normalisations and half precision: the same network in fewer bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.deploy import file_report, load, load_packed, save
from qsv.deploy.compact import fold_batch_norms, in_half_precision
from qsv.models import Network
from qsv.quant import KMeans, QTensor, Rule, init, quantize, resolve


def random_variables(network):
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        low, high = (0.5, 2.0) if path[-1].key in ("var", "scale") else (-0.3, 0.3)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0)))


@pytest.mark.parametrize(
    "network",
    [Network("resnet10", {"width": 4, "embedding_size": 8}), Network("ecapa", {"channels": 16, "embedding_size": 8})],
    ids=lambda network: network.name,
)
def test_a_folded_network_gives_the_same_embeddings(network):
    variables = random_variables(network)
    params, batch_stats = fold_batch_norms(variables["params"], variables["batch_stats"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch_stats):
        assert np.ptp(leaf) == 0, path
    waveform = jax.random.normal(jax.random.key(1), (2, 8000)) / 10
    expected = network.embed(variables, waveform)
    folded = network.embed({"params": params, "batch_stats": batch_stats}, waveform)
    assert np.abs(folded - expected).max() <= 1e-4 * np.linalg.norm(expected, axis=1).min()


def test_a_normalisation_without_scale_and_bias_stays():
    statistics = {"norm": {"mean": np.arange(3.0), "var": np.arange(3.0) + 1}}
    assert fold_batch_norms({}, statistics) == ({}, statistics)


def test_folding_is_the_textbook_formula():
    params = {"norm": {"scale": np.float32([1, 2]), "bias": np.float32([3, 4])}, "other": {"bias": np.float32([5])}}
    statistics = {"norm": {"mean": np.float32([0.5, -1]), "var": np.float32([4, 0.25])}}
    folded, constant = fold_batch_norms(params, statistics)
    np.testing.assert_allclose(folded["norm"]["scale"], [0.5, 4], rtol=1e-4)
    np.testing.assert_allclose(folded["norm"]["bias"], [3 - 0.25, 4 + 4], rtol=1e-4)
    np.testing.assert_array_equal(constant["norm"]["mean"], 0)
    np.testing.assert_allclose(constant["norm"]["var"] + 1e-5, 1, rtol=1e-7)
    assert folded["other"]["bias"] == 5 and params["norm"]["scale"][0] == 1


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.0, -0.37, 3e4], np.float16),
        ([1.0, 1e-9], np.float16),
        ([1.0, 7e4], np.float32),
        ([3e-8, 5.1e-8], np.float32),
        ([0.3, 0.3], np.float32),
    ],
    ids=repr,
)
def test_what_half_precision_would_damage_stays(values, dtype):
    leaf = in_half_precision({"a": {"b": np.float32(values)}})["a"]["b"]
    assert leaf.dtype == dtype
    np.testing.assert_allclose(np.float32(leaf), values, rtol=2**-11, atol=1e-7 * max(np.abs(values)))


def test_quantized_weights_and_other_types_stay():
    params = {"kernel": jnp.linspace(-1, 1, 32).reshape(4, 8), "bias": jnp.arange(8, dtype=jnp.bfloat16)}
    plan = resolve([Rule("kernel", KMeans(2)), Rule(".*", None)], params)
    narrow = in_half_precision(quantize(plan, params, init(plan, params)))
    assert isinstance(narrow["kernel"], QTensor) and narrow["bias"].dtype == jnp.bfloat16


def test_a_compact_file_is_smaller_and_embeds_alike(tmp_path):
    network = Network("resnet10", {"width": 4, "embedding_size": 8})
    variables = random_variables(network)
    plan = resolve([Rule(".*/kernel", KMeans(4)), Rule(".*", None)], variables["params"])
    qstate = init(plan, variables["params"])
    reports = {}
    for name, compact in (("plain", False), ("compact", True)):
        arguments = (network, plan, variables["params"], qstate, variables["batch_stats"])
        reports[name] = save(tmp_path / name, *arguments, compact=compact)
        assert file_report(tmp_path / name) == reports[name]
    assert reports["compact"].code_bytes == reports["plain"].code_bytes
    assert reports["compact"].float_bytes < 0.3 * reports["plain"].float_bytes
    waveform = np.random.default_rng(1).normal(0, 0.1, 8000).astype(np.float32)
    plain, compact = (load(tmp_path / name)(waveform, 16000) for name in reports)
    assert plain @ compact >= 0.99999 * np.linalg.norm(plain) * np.linalg.norm(compact)
    assert load_packed(tmp_path / "compact").variables()["params"]["stem"]["norm"]["scale"].dtype == np.float32
