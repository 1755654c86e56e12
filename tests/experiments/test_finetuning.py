"""Post-training calibration: what each of its parts does to a small network."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.finetuning import FinetuneConfig, calibrate
from experiments.models import MODEL_FILE, FloatModel
from experiments.quantize import QuantizeConfig
from qsv.models import Network
from qsv.quant import KMeans, Rule, fake_quantize, init, resolve
from qsv.training import input_moments

NOTHING = FinetuneConfig(weighted_codebooks=False, rounding="nearest", bias_correction=False, recalibration="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    network = Network("resnet10", {"width": 4, "embedding_size": 8})
    variables = network.init(jax.random.key(0))
    return FloatModel(tmp_path_factory.mktemp("model") / MODEL_FILE, network, **variables)


@pytest.fixture(scope="module")
def waveforms():
    return list(np.random.default_rng(0).normal(0, 3000, (2, 4, 4000)).astype(np.int16))


@pytest.fixture(scope="module")
def moments(model, waveforms):
    return input_moments(model.network, model.variables, waveforms)


def plan_of(model, pattern, bits=2):
    return resolve([Rule(pattern, KMeans(bits)), Rule(".*", None)], model.params)


def mean_embedding(model, params, waveforms):
    variables = {"params": params, "batch_stats": model.batch_stats}
    return np.mean(
        [model.network.embed(variables, waveform / np.float32(32768)) for waveform in waveforms], axis=(0, 1)
    )


def test_without_speech_only_the_levels_are_fitted(model):
    plan = plan_of(model, ".*/kernel")
    params, batch_stats, qstate = calibrate(FinetuneConfig(), model, plan, [])
    assert params is model.params and batch_stats is model.batch_stats
    for path, state in init(plan, model.params).items():
        np.testing.assert_array_equal(state.codebook, qstate[path].codebook)


def test_corrected_biases_keep_the_mean_output(model, waveforms):
    plan = plan_of(model, "embedding/kernel", bits=1)
    expected = mean_embedding(model, model.params, waveforms)
    errors = {}
    for corrected in (False, True):
        config = dataclasses.replace(NOTHING, bias_correction=corrected)
        params, _, qstate = calibrate(config, model, plan, waveforms)
        found = mean_embedding(model, fake_quantize(plan, params, qstate), waveforms)
        errors[corrected] = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert errors[True] < 1e-3 < 0.02 < errors[False]


def test_weighted_levels_are_nearer_where_the_inputs_are_loud(model, waveforms, moments):
    plan = plan_of(model, ".*/kernel")
    errors = {}
    for weighted in (False, True):
        config = dataclasses.replace(NOTHING, weighted_codebooks=weighted)
        params, _, qstate = calibrate(config, model, plan, waveforms)
        quantized = fake_quantize(plan, params, qstate)
        kernel, levels = (np.asarray(tree["embedding"]["kernel"]) for tree in (model.params, quantized))
        loudness = np.diagonal(moments["embedding/kernel"].second)[:, None]
        errors[weighted] = np.sum(loudness * np.square(kernel - levels))
    assert errors[True] < errors[False]


def test_compensated_rounding_lowers_the_output_error_of_every_layer(model, waveforms, moments):
    plan = plan_of(model, ".*/kernel")
    nearest = calibrate(NOTHING, model, plan, waveforms)
    compensated = calibrate(dataclasses.replace(NOTHING, rounding="compensated"), model, plan, waveforms)
    lower = []
    for path in plan.quantized:
        *parents, name = path.split("/")
        errors = []
        for params, _, qstate in (nearest, compensated):
            before, after = model.params, fake_quantize(plan, params, qstate)
            for parent in parents:
                before, after = before[parent], after[parent]
            error = np.asarray(before[name] - after[name]).reshape(-1, before[name].shape[-1])
            errors.append(np.einsum("io,ij,jo", error, moments[path].second, error))
        lower.append(errors[1] < errors[0])
    assert all(lower)


def test_shifted_statistics_follow_the_quantized_network(model, waveforms):
    plan = plan_of(model, ".*/kernel")
    _, batch_stats, _ = calibrate(dataclasses.replace(NOTHING, recalibration="shift"), model, plan, waveforms)
    changed = [
        not np.array_equal(old, new)
        for old, new in zip(jax.tree.leaves(model.batch_stats), jax.tree.leaves(batch_stats), strict=True)
    ]
    assert all(changed)


def test_channel_scales_share_the_codebook():
    config = QuantizeConfig(bits=3, finetune=FinetuneConfig(per_channel=True))
    assert config.quantizer() == KMeans(3, channel_axes=(-1,), share_codebook=True)


def test_normalised_weights_need_nearest_rounding():
    with pytest.raises(ValueError, match="--normalization=restore needs --rounding=nearest"):
        FinetuneConfig(normalization="restore")
    FinetuneConfig(normalization="restore", rounding="nearest")
