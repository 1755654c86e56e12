"""Post-training quantization: what each part of a calibration does to a small network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.frontend import MelSpectrogram
from qsv.models import Network
from qsv.quant import KMeans, Rule, fake_quantize, leaf_paths, quantize, resolve
from qsv.training import Calibration, calibrate

NOTHING = Calibration(
    weighted_codebooks=False, rounding="nearest", sequential=False, bias_correction=False, recalibration="none"
)


@pytest.fixture(scope="module")
def network():
    return Network("resnet10", {"width": 4, "embedding_size": 8})


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def waveforms():
    return list(np.random.default_rng(0).normal(0, 3000, (4, 8, 4000)).astype(np.int16))


@pytest.fixture(scope="module")
def small_lstm():
    arguments = {"hidden_size": 12, "num_layers": 2, "embedding_size": 8, "window_frames": 20, "hop_frames": 10}
    return Network("ge2e", arguments, MelSpectrogram())


def plan_of(variables, pattern=".*/kernel", bits=2):
    return resolve([Rule(pattern, KMeans(bits)), Rule(".*", None)], variables["params"])


def embeddings(network, variables, waveforms):
    return np.concatenate([network.embed(variables, waveform / np.float32(32768)) for waveform in waveforms])


def quantized_variables(plan, calibrated):
    params = fake_quantize(plan, calibrated.params, calibrated.qstate)
    return {"params": params, "batch_stats": calibrated.batch_stats}


def relative_error(network, variables, plan, waveforms, config, test=None):
    """Of the embeddings, squared."""
    calibrated = calibrate(network, variables, plan, waveforms, config)
    test = waveforms if test is None else test
    expected = embeddings(network, variables, test)
    found = embeddings(network, quantized_variables(plan, calibrated), test)
    return np.sum(np.square(found - expected)) / np.sum(np.square(expected))


def test_corrected_biases_keep_the_mean_output(network, variables, waveforms):
    plan = plan_of(variables, "embedding/kernel", bits=1)
    expected = embeddings(network, variables, waveforms).mean(axis=0)
    errors = {}
    for corrected in (False, True):
        calibrated = calibrate(
            network, variables, plan, waveforms, dataclasses.replace(NOTHING, bias_correction=corrected)
        )
        found = embeddings(network, quantized_variables(plan, calibrated), waveforms).mean(axis=0)
        errors[corrected] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert errors[True] < 1e-3 < 0.02 < errors[False]


def test_weighted_levels_are_nearer_where_the_inputs_are_loud(network, variables, waveforms):
    # Embeddings of the network with one output's weight at a time are the inputs of the embedding layer.
    plan = plan_of(variables, "embedding/kernel")
    errors = {w: relative_error_of_columns(network, variables, plan, waveforms, w) for w in (False, True)}
    assert errors[True] < errors[False]


def relative_error_of_columns(network, variables, plan, waveforms, weighted):
    """Squared errors of the embedding layer's weights, weighted by the mean squares of their inputs."""
    calibrated = calibrate(
        network, variables, plan, waveforms, dataclasses.replace(NOTHING, weighted_codebooks=weighted)
    )
    kernel = variables["params"]["embedding"]["kernel"]
    error = np.asarray(kernel - quantized_variables(plan, calibrated)["params"]["embedding"]["kernel"])
    size = len(kernel)
    probe = {**variables["params"], "embedding": {"kernel": jnp.eye(size), "bias": jnp.zeros(size)}}
    wide = dataclasses.replace(network, arguments={**network.arguments, "embedding_size": size})
    inputs = embeddings(wide, {**variables, "params": probe}, waveforms)
    return np.sum(np.mean(np.square(inputs), axis=0)[:, None] * np.square(error))


def test_compensated_rounding_lowers_the_error(network, variables, waveforms):
    plan = plan_of(variables)
    nearest = relative_error(network, variables, plan, waveforms, NOTHING)
    compensated = relative_error(
        network, variables, plan, waveforms, dataclasses.replace(NOTHING, rounding="compensated")
    )
    assert compensated < 0.7 * nearest


def test_inputs_of_the_quantized_network_lower_the_error_of_new_speech(network, variables, waveforms):
    network = dataclasses.replace(network, arguments={**network.arguments, "width": 8})
    variables = network.init(jax.random.key(0))
    plan = plan_of(variables, bits=3)
    test = list(np.random.default_rng(1).normal(0, 3000, (2, 8, 4000)).astype(np.int16))
    config = dataclasses.replace(NOTHING, rounding="compensated", weighted_codebooks=True, recalibration="shift")
    apart = relative_error(network, variables, plan, waveforms, config, test)
    in_turn = relative_error(network, variables, plan, waveforms, dataclasses.replace(config, sequential=True), test)
    assert in_turn < 0.9 * apart


def test_recurrent_kernels_are_calibrated_too(small_lstm, waveforms):
    variables = small_lstm.init(jax.random.key(0))
    plan = plan_of(variables)
    nearest = relative_error(small_lstm, variables, plan, waveforms, NOTHING)
    calibrated = relative_error(small_lstm, variables, plan, waveforms, Calibration())
    apart = dataclasses.replace(Calibration(), sequential=False)
    assert calibrated < 0.9 * relative_error(small_lstm, variables, plan, waveforms, apart) < 0.5 * nearest
    biases = calibrate(small_lstm, variables, plan, waveforms).params["lstm1"]["hidden"]["bias"]
    assert not np.array_equal(biases, variables["params"]["lstm1"]["hidden"]["bias"])


def test_parameters_stay_near_the_float_ones_within_their_cells(network, variables, waveforms):
    plan = plan_of(variables, bits=3)
    config = dataclasses.replace(NOTHING, rounding="compensated")
    params, _, qstate = calibrate(network, variables, plan, waveforms, config)
    kept = []
    for (path, old), (_, new) in zip(leaf_paths(variables["params"]), leaf_paths(params), strict=True):
        if path in plan.quantized:
            kept.append(np.mean(np.isclose(old, new, rtol=1e-5)))
            level = plan[path].fake_quantize(new, qstate[path])
            assert np.all(np.abs(new - level) <= np.abs(old - level) + 1e-6), path
    assert 0.5 < np.mean(kept) < 1


def test_many_bits_change_nothing(network, variables, waveforms):
    assert relative_error(network, variables, plan_of(variables, bits=8), waveforms, Calibration()) < 1e-3


@pytest.mark.parametrize("sequential", [False, True])
def test_shifted_statistics_follow_the_quantized_network(network, variables, waveforms, sequential):
    plan = plan_of(variables)
    config = dataclasses.replace(NOTHING, recalibration="shift", sequential=sequential)
    batch_stats = calibrate(network, variables, plan, waveforms, config).batch_stats
    changed = [
        not np.array_equal(old, new)
        for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(batch_stats), strict=True)
    ]
    assert all(changed)


def test_replaced_statistics_are_those_of_the_speech(network, variables, waveforms):
    plan = plan_of(variables)
    config = dataclasses.replace(NOTHING, recalibration="replace", bias_correction=True)
    walked = calibrate(network, variables, plan, waveforms, config).batch_stats
    direct = calibrate(
        network, variables, plan, waveforms, dataclasses.replace(NOTHING, recalibration="replace")
    ).batch_stats
    # The first layer's statistics don't depend on those of others.
    first, second = (np.asarray(stats["stem"]["norm"]["mean"]) for stats in (walked, direct))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_what_no_layer_uses_is_quantized_by_itself(network, variables, waveforms):
    plan = resolve([Rule(".*/scale", KMeans(2)), Rule(".*", None)], variables["params"])
    calibrated = calibrate(network, variables, plan, waveforms)
    assert set(calibrated.qstate) == set(plan.quantized)
    quantize(plan, calibrated.params, calibrated.qstate)


def test_no_speech_is_refused(network, variables):
    with pytest.raises(ValueError, match="at least one batch of speech"):
        calibrate(network, variables, plan_of(variables), [])
