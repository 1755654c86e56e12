"""Moments of the inputs of kernels."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from qsv.frontend import MelSpectrogram
from qsv.models import Network
from qsv.models.ge2e import lstm, lstm_sequences
from qsv.quant import leaf_paths
from qsv.training import input_moments


@pytest.fixture(scope="module")
def network():
    return Network("resnet10", {"width": 2, "embedding_size": 8})


@pytest.fixture(scope="module")
def variables(network):
    return jax.jit(network.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def waveforms():
    return np.random.default_rng(0).normal(0, 3000, (2, 3, 4000)).astype(np.int16)


def test_moments_predict_the_energy_of_every_layers_output(network, variables, waveforms):
    moments = input_moments(network, variables, waveforms[:1])
    kernels = {path: leaf for path, leaf in leaf_paths(variables["params"]) if path.endswith("/kernel")}
    assert set(moments) == set(kernels)
    outputs = {}

    def record(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, nn.Conv | nn.Dense):
            outputs["/".join((*context.module.path, "kernel"))] = result - context.module.variables["params"].get(
                "bias", 0
            )
        return result

    features, _ = network.frontend(waveforms[0].astype(np.float32) / 32768)
    with nn.intercept_methods(record):
        network.module().apply(variables, features)
    for path, kernel in kernels.items():
        flat = np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])
        assert moments[path].second.shape == (len(flat), len(flat))
        energy = np.einsum("io,ij,jo->o", flat, moments[path].second, flat)
        rows = outputs[path].reshape(-1, kernel.shape[-1])
        np.testing.assert_allclose(energy, np.mean(np.square(rows), axis=0), rtol=2e-3, err_msg=path)
        np.testing.assert_allclose(moments[path].mean @ flat, np.mean(rows, axis=0), rtol=2e-3, atol=1e-4)
        assert moments[path].bias == ("embedding/bias" if path == "embedding/kernel" else None)


def test_moments_of_an_lstm_are_those_of_a_loop_over_its_frames(waveforms):
    network = Network(
        "ge2e", {"hidden_size": 6, "num_layers": 2, "embedding_size": 4, "window_frames": 20, "hop_frames": 10}
    )
    network = dataclasses.replace(network, frontend=MelSpectrogram())
    variables = network.init(jax.random.key(0))
    moments = input_moments(network, variables, waveforms[:1])
    assert set(moments) == {path for path, _ in leaf_paths(variables["params"]) if path.endswith("/kernel")}
    assert {moments[f"lstm1/{part}/kernel"].bias for part in ("input", "hidden")} == {"lstm1/hidden/bias"}

    kernels = [
        (layer["input"]["kernel"], layer["hidden"]["kernel"], layer["hidden"]["bias"])
        for layer in (variables["params"]["lstm1"], variables["params"]["lstm2"])
    ]
    sequence = np.random.default_rng(1).normal(size=(7, 3, 40)).astype(np.float32)
    expected = [lstm(sequence[:count], kernels[:1]) for count in range(1, 8)]
    np.testing.assert_allclose(lstm_sequences(sequence, kernels)[0], expected, atol=1e-6)
    first, second = lstm_sequences(sequence, kernels)
    np.testing.assert_allclose(second[-1], lstm(sequence, kernels), atol=1e-6)
    # The second layer's input is the first one's hidden state, which the first sees a frame later.
    below, own = moments["lstm2/input/kernel"].second, moments["lstm1/hidden/kernel"].second
    assert below.shape == own.shape == (6, 6)
    assert np.trace(below) == pytest.approx(np.trace(own), rel=0.2)


def test_batches_are_averaged(network, variables, waveforms):
    both = input_moments(network, variables, waveforms)
    each = [input_moments(network, variables, [waveform]) for waveform in waveforms]
    for path, moment in both.items():
        mean = (each[0][path].second + each[1][path].second) / 2
        np.testing.assert_allclose(moment.second, mean, rtol=1e-5, atol=1e-6)


def test_no_batches_are_refused(network, variables):
    with pytest.raises(ValueError, match="at least one batch"):
        input_moments(network, variables, [])
