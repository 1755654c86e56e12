"""Layer metrics by hand, drift against a network's own outputs, correlation."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import qsv
from qsv.analysis import (
    Distortion,
    activation_drift,
    in_units_of_levels,
    nearest_levels,
    packed_weight_statistics,
    rank_correlation,
    smoothness,
    standardized_paths,
    weight_statistics,
    with_layers_of,
)
from qsv.deploy.packed_file import describe_plan
from qsv.models import Network
from qsv.quant import QTensor, leaf_paths, with_leaves


@pytest.fixture(scope="module")
def network():
    return Network.of_size("resnet10", width=2, embedding_size=4)


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def plan(variables):
    return qsv.resolve([qsv.Rule(".*/kernel", qsv.Uniform(3)), qsv.Rule(".*", None)], variables["params"])


@pytest.fixture
def waveforms():
    return [0.1 * jax.random.normal(jax.random.key(seed), (2, 4000)) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("sums", "expected"),
    [
        ((4.0, 4.0, 0.0), (0.0, 1.0, np.inf)),
        ((4.0, 1.0, 1.0), (0.5, 1.0, 20 * np.log10(2))),
        ((1.0, 1.0, 2.0), (np.sqrt(2), 0.0, -20 * np.log10(np.sqrt(2)))),
        ((0.0, 0.0, 0.0), (0.0, 1.0, np.inf)),
        ((0.0, 1.0, 1.0), (np.inf, 0.0, -np.inf)),
        ((1.0, 0.0, 1.0), (1.0, 0.0, 0.0)),
    ],
)
def test_distortion_by_hand(sums, expected):
    found = Distortion.of_sums(*sums)
    assert (found.relative_error, found.cosine, found.sqnr_db) == pytest.approx(expected)


def test_weight_statistics_of_a_kernel_by_hand():
    params = {"kernel": jnp.array([-1.0, -0.4, 0.1, 1.0])}
    plan = qsv.resolve([qsv.Rule(".*", qsv.StaticBinary())], params)
    state = qsv.init(plan, params)
    levels = np.asarray(qsv.fake_quantize(plan, params, state)["kernel"])
    (row,) = weight_statistics(plan, params, state)
    error = np.linalg.norm(levels - params["kernel"]) / np.linalg.norm(params["kernel"])
    assert (row.path, row.size, row.bits) == ("kernel", 4, 1)
    assert row.distortion.relative_error == pytest.approx(error, rel=1e-5)
    assert row.code_entropy_bits == pytest.approx(1)
    assert row.kurtosis == pytest.approx(stats.kurtosis(params["kernel"]), rel=1e-5)


def test_packed_networks_have_the_statistics_of_their_states(variables, plan):
    params, state = variables["params"], qsv.init(plan, variables["params"])
    rows = weight_statistics(plan, params, state)
    assert packed_weight_statistics(params, qsv.quantize(plan, params, state)) == rows
    assert [row.path for row in rows] == list(plan.quantized)


def test_what_training_did_to_the_weights_is_no_distortion_of_the_levels(variables, plan):
    params = variables["params"]
    packed = qsv.quantize(plan, params, qsv.init(plan, params))
    flipped = jax.tree.map(
        lambda leaf: dataclasses.replace(leaf, codes=leaf.codes[::-1]) if isinstance(leaf, QTensor) else leaf,
        packed,
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    expected = packed_weight_statistics(params, packed)
    found = packed_weight_statistics(params, flipped)
    assert [row.distortion for row in found] == [row.distortion for row in expected]
    rounded = dict(leaf_paths(nearest_levels(params, flipped)))
    for path, values in leaf_paths(qsv.dequantize(packed)):
        np.testing.assert_allclose(rounded[path], values, rtol=1e-6)


@pytest.mark.parametrize("axes", [(), (-1,)])
def test_standardized_levels_are_brought_to_the_unit_of_the_float_weights(axes):
    weights = 3 + 0.1 * jax.random.normal(jax.random.key(0), (5, 5, 8))
    quantizer = qsv.Uniform(8, channel_axes=axes, normalization="standardize")
    plan = qsv.resolve([qsv.Rule(".*", quantizer)], {"kernel": weights})
    state = qsv.init(plan, {"kernel": weights})
    packed = qsv.quantize(plan, {"kernel": weights}, state)
    standardized = standardized_paths(describe_plan(plan))
    assert standardized == ["kernel"]
    rounded = nearest_levels({"kernel": weights}, packed, standardized=standardized)["kernel"]
    np.testing.assert_allclose(rounded, weights, atol=3e-3)
    (row,) = weight_statistics(plan, {"kernel": weights}, state)
    error = np.linalg.norm(rounded - weights) / np.linalg.norm(weights)
    assert row.distortion.relative_error == pytest.approx(error, rel=1e-4)
    own = in_units_of_levels({"kernel": weights}, packed, standardized=standardized)["kernel"]
    np.testing.assert_allclose(own, packed["kernel"].dequantize(), atol=0.03)


def test_packed_networks_of_another_shape_are_refused(variables, plan):
    params = variables["params"]
    packed = qsv.quantize(plan, params, qsv.init(plan, params))
    other = with_leaves(params, {"stem/conv/kernel": jnp.zeros((3, 3, 1, 5))})
    with pytest.raises(ValueError, match=r"'stem/conv/kernel' is \(3, 3, 1, 2\) in the quantized network"):
        packed_weight_statistics(other, packed)


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [(stats.norm(3, 7), 1.0), (stats.laplace(), 0.8 / np.sqrt(2)), (stats.uniform(), 0.8 * np.sqrt(3))],
)
def test_smoothness_of_known_densities(distribution, expected):
    values = distribution.rvs(200_000, random_state=0)
    # A kernel's width takes a little off a peak.
    assert smoothness(values) == pytest.approx(expected, rel=0.12)


def test_smoothness_falls_with_a_second_peak_and_is_zero_for_constants():
    rng = np.random.default_rng(0)
    peaks = np.concatenate([rng.normal(-1, 0.2, 5000), rng.normal(1, 0.2, 5000)])
    assert smoothness(peaks) < 0.7 * smoothness(rng.normal(size=10_000))
    assert smoothness(np.ones(5)) == smoothness(np.zeros(0)) == 0


def test_a_network_does_not_drift_from_itself(network, variables, waveforms):
    rows = activation_drift(network, variables, variables, waveforms)
    assert [row.distortion.relative_error for row in rows] == [0.0] * len(rows)
    kernels = [path for path, _ in leaf_paths(variables["params"]) if path.endswith("kernel")]
    assert {f"{row.path}/kernel" for row in rows} == set(kernels)
    assert (rows[0].path, rows[-1].path) == ("stem/conv", "embedding")


@pytest.mark.parametrize(("bits", "path"), [(3, "stage2_block1/conv2/conv"), (8, "stem/conv")])
def test_drift_is_that_of_captured_outputs(network, variables, waveforms, bits, path):
    plan = qsv.resolve([qsv.Rule(".*/kernel", qsv.Uniform(bits)), qsv.Rule(".*", None)], variables["params"])
    params = qsv.fake_quantize(plan, variables["params"], qsv.init(plan, variables["params"]))
    changed = {**variables, "params": params}
    rows = {row.path: row.distortion for row in activation_drift(network, variables, changed, waveforms)}

    def outputs(own):
        captured = []
        for waveform in waveforms:
            features, _ = network.frontend(waveform)
            _, state = network.module().apply(
                own, features, capture_intermediates=lambda module, _: isinstance(module, nn.Conv | nn.Dense)
            )
            captured.append(functools.reduce(dict.__getitem__, path.split("/"), state["intermediates"])["__call__"][0])
        return np.asarray(jnp.stack(captured), np.float64).ravel()

    before, after = outputs(variables), outputs(changed)
    own = rows[path]
    # In float32 the error at 8 bits would be lost in the rounding of |x|^2 + |q|^2 - 2 x . q.
    assert own.relative_error == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-4)
    assert own.cosine == pytest.approx(before @ after / np.linalg.norm(before) / np.linalg.norm(after), rel=1e-5)


def test_drift_starts_at_the_layer_that_changed(network, variables, plan, waveforms):
    params = qsv.fake_quantize(plan, variables["params"], qsv.init(plan, variables["params"]))
    one = with_layers_of(variables["params"], params, ["stage3_block1/conv1/conv/kernel"])
    rows = activation_drift(network, variables, {**variables, "params": one}, waveforms)
    errors = {row.path: row.distortion.relative_error for row in rows}
    # The shortcut beside it sees what came before.
    after = {path for path in errors if path.startswith(("stage3", "stage4", "embedding"))}
    assert {path for path, error in errors.items() if error} == after - {"stage3_block1/shortcut/conv"}


def test_drift_of_lstm_layers(waveforms):
    network = Network.of_size("ge2e", width=4, embedding_size=4)
    variables = network.init(jax.random.key(0))
    params = variables["params"]
    changed = with_leaves(params, {"lstm2/input/kernel": 1.5 * params["lstm2"]["input"]["kernel"]})
    rows = activation_drift(network, variables, {**variables, "params": changed}, waveforms)
    assert [row.path for row in rows] == ["lstm1", "lstm2", "lstm3", "embedding"]
    assert rows[0].distortion.relative_error == 0 < rows[1].distortion.relative_error


def test_drift_needs_speech_and_exchanged_layers_must_exist(network, variables):
    with pytest.raises(ValueError, match="at least one batch"):
        activation_drift(network, variables, variables, [])
    with pytest.raises(ValueError, match="are no leaves"):
        with_layers_of(variables["params"], variables["params"], ["nothing"])


def test_rank_correlation_is_spearmans_with_an_interval_around_it():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x**3 + 0.3 * rng.normal(size=60)
    found = rank_correlation(x, y)
    assert found.estimate == pytest.approx(stats.spearmanr(x, y).statistic)
    assert 0.5 < found.low < found.estimate < found.high <= 1
    assert rank_correlation(x, -y).estimate == pytest.approx(-found.estimate)
    assert rank_correlation(x, rng.normal(size=60)).low < 0 < rank_correlation(x, rng.normal(size=60)).high


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [([1, 2], [1, 2], "at least three"), ([1, 2, 3], [1, 2], "two lists"), ([1, 1, 1], [1, 2, 3], "all equal")],
)
def test_lists_without_a_correlation_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        rank_correlation(x, y)
