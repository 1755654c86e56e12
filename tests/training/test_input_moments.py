"""Second moments of the inputs of kernels."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from qsv.models import Network
from qsv.quant import leaf_paths
from qsv.training import input_second_moments


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
    moments = input_second_moments(network, variables, waveforms[:1])
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
        assert moments[path].shape == (len(flat), len(flat))
        energy = np.einsum("io,ij,jo->o", flat, moments[path], flat)
        measured = np.mean(np.square(outputs[path].reshape(-1, kernel.shape[-1])), axis=0)
        np.testing.assert_allclose(energy, measured, rtol=2e-3, err_msg=path)


def test_batches_are_averaged(network, variables, waveforms):
    both = input_second_moments(network, variables, waveforms)
    each = [input_second_moments(network, variables, [waveform]) for waveform in waveforms]
    for path, moment in both.items():
        np.testing.assert_allclose(moment, (each[0][path] + each[1][path]) / 2, rtol=1e-5, atol=1e-6)


def test_no_batches_are_refused(network, variables):
    with pytest.raises(ValueError, match="at least one batch"):
        input_second_moments(network, variables, [])
