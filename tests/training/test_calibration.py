"""Post-training quantization: what each part of a calibration does to a small network."""

import dataclasses

import jax
import numpy as np
import pytest

from qsv.models import Network
from qsv.quant import KMeans, Rule, fake_quantize, resolve
from qsv.training import Calibration, calibrate, input_moments

NOTHING = Calibration(weighted_codebooks=False, rounding="nearest", bias_correction=False, recalibration="none")


@pytest.fixture(scope="module")
def network():
    return Network("resnet10", {"width": 4, "embedding_size": 8})


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def waveforms():
    return list(np.random.default_rng(0).normal(0, 3000, (2, 4, 4000)).astype(np.int16))


@pytest.fixture(scope="module")
def moments(network, variables, waveforms):
    return input_moments(network, variables, waveforms)


def plan_of(variables, pattern, bits=2):
    return resolve([Rule(pattern, KMeans(bits)), Rule(".*", None)], variables["params"])


def mean_embedding(network, variables, params, waveforms):
    variables = {**variables, "params": params}
    return np.mean([network.embed(variables, waveform / np.float32(32768)) for waveform in waveforms], axis=(0, 1))


def test_corrected_biases_keep_the_mean_output(network, variables, waveforms):
    plan = plan_of(variables, "embedding/kernel", bits=1)
    expected = mean_embedding(network, variables, variables["params"], waveforms)
    errors = {}
    for corrected in (False, True):
        config = dataclasses.replace(NOTHING, bias_correction=corrected)
        params, _, qstate = calibrate(network, variables, plan, waveforms, config)
        found = mean_embedding(network, variables, fake_quantize(plan, params, qstate), waveforms)
        errors[corrected] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert errors[True] < 1e-3 < 0.02 < errors[False]


def test_weighted_levels_are_nearer_where_the_inputs_are_loud(network, variables, waveforms, moments):
    plan = plan_of(variables, ".*/kernel")
    errors = {}
    for weighted in (False, True):
        config = dataclasses.replace(NOTHING, weighted_codebooks=weighted)
        params, _, qstate = calibrate(network, variables, plan, waveforms, config)
        quantized = fake_quantize(plan, params, qstate)
        kernel, levels = (np.asarray(tree["embedding"]["kernel"]) for tree in (variables["params"], quantized))
        loudness = np.diagonal(moments["embedding/kernel"].second)[:, None]
        errors[weighted] = np.sum(loudness * np.square(kernel - levels))
    assert errors[True] < errors[False]


def test_compensated_rounding_lowers_the_output_error_of_every_layer(network, variables, waveforms, moments):
    plan = plan_of(variables, ".*/kernel")
    nearest = calibrate(network, variables, plan, waveforms, NOTHING)
    compensated = calibrate(network, variables, plan, waveforms, dataclasses.replace(NOTHING, rounding="compensated"))
    lower = []
    for path in plan.quantized:
        *parents, name = path.split("/")
        errors = []
        for params, _, qstate in (nearest, compensated):
            before, after = variables["params"], fake_quantize(plan, params, qstate)
            for parent in parents:
                before, after = before[parent], after[parent]
            error = np.asarray(before[name] - after[name]).reshape(-1, before[name].shape[-1])
            errors.append(np.einsum("io,ij,jo", error, moments[path].second, error))
        lower.append(errors[1] < errors[0])
    assert all(lower)


def test_shifted_statistics_follow_the_quantized_network(network, variables, waveforms):
    plan = plan_of(variables, ".*/kernel")
    _, batch_stats, _ = calibrate(
        network, variables, plan, waveforms, dataclasses.replace(NOTHING, recalibration="shift")
    )
    changed = [
        not np.array_equal(old, new)
        for old, new in zip(jax.tree.leaves(variables["batch_stats"]), jax.tree.leaves(batch_stats), strict=True)
    ]
    assert all(changed)
