"""Quantized activations: ranges from speech, what they change, gradients for the ranges."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import Network, ResNet, quantized_activations
from qsv.quant import ActivationQuantizer, binary_activation
from qsv.training import calibrate_activations


@pytest.fixture(scope="module")
def network():
    return Network.of_size("resnet10", width=4, embedding_size=8)


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def waveforms():
    return [0.1 * jax.random.normal(jax.random.key(seed), (2, 8000)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def features(network, waveforms):
    return network.frontend(waveforms[0])[0]


def embed(network, variables, features, activations):
    with quantized_activations(activations):
        return network.module().apply(variables, features)


def test_ranges_cover_what_the_layers_are_given(network, variables, waveforms):
    ranges = calibrate_activations(network, variables, waveforms, ActivationQuantizer(), method="min_max").ranges
    inputs = [point for point in ranges if not point.endswith(":output")]
    assert inputs[0] == "stem" and inputs[-1] == "embedding" and list(ranges)[: len(inputs)] == inputs
    features = jnp.concatenate([network.frontend(waveform)[0] for waveform in waveforms])
    assert float(ranges["stem"].high) == pytest.approx(float(features.max()), rel=1e-5)
    assert float(ranges["stem"].low) == pytest.approx(float(features.min()), rel=1e-5)
    # After a ReLU.
    assert ranges["stage1_block1"].low == 0 < ranges["stage1_block1"].high


def test_fewer_bits_change_the_embedding_more(network, variables, waveforms, features):
    expected = network.module().apply(variables, features)
    errors = []
    for bits in (8, 4, 2):
        quantizer = ActivationQuantizer(bits)
        activations = calibrate_activations(network, variables, waveforms, quantizer)
        errors.append(float(jnp.linalg.norm(embed(network, variables, features, activations) - expected)))
    assert 0 < errors[0] < 0.05 * float(jnp.linalg.norm(expected)) < errors[1] < errors[2]


def test_only_layers_of_the_pattern_are_quantized(network, variables, waveforms, features):
    quantizer = ActivationQuantizer(2)
    activations = calibrate_activations(network, variables, waveforms, quantizer, pattern="stage3.*")
    assert activations.ranges and all(path.startswith("stage3") for path in activations.ranges)
    captured = []

    def see(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
            captured.append(("/".join(context.module.path), len(np.unique(args[0]))))
        return call(*args, **kwargs)

    with quantized_activations(activations), nn.intercept_methods(see):
        network.module().apply(variables, features)
    for path, values in captured:
        assert (values <= 4) == path.startswith("stage3"), path


def test_ranges_are_learnt_under_jit(network, variables, waveforms, features):
    quantizer = ActivationQuantizer(4)
    activations = calibrate_activations(network, variables, waveforms, quantizer, method="min_max")
    expected = network.module().apply(variables, features)
    traced = []

    @jax.jit
    def loss(own):
        traced.append(1)
        return jnp.mean(jnp.square(embed(network, variables, features, own) - expected))

    before, step = float(loss(activations)), 0.02
    for _ in range(10):
        gradient = jax.grad(loss)(activations)
        activations = jax.tree.map(lambda end, g: end - step * jnp.abs(end) * jnp.sign(g), activations, gradient)
    assert float(loss(activations)) < before and len(traced) <= 3


def test_no_layer_is_quantized_outside(network, variables, waveforms, features):
    expected = network.module().apply(variables, features)
    activations = calibrate_activations(network, variables, waveforms, ActivationQuantizer(2))
    embed(network, variables, features, activations)
    np.testing.assert_array_equal(network.module().apply(variables, features), expected)


def test_binary_maps_go_in_through_the_activation(features):
    model = ResNet(10, width=4, embedding_size=8, activation=binary_activation)
    variables = model.init(jax.random.key(0), features)
    _, state = model.apply(variables, features, capture_intermediates=lambda module, _: module.name == "stage2_block1")
    (maps, _), *_ = state["intermediates"]["stage2_block1"]["__call__"]
    assert set(np.unique(maps)) == {0.0, 1.0}
    gradient = jax.grad(lambda p: jnp.sum(model.apply({**variables, "params": p}, features)))(variables["params"])
    assert float(jnp.abs(gradient["stem"]["conv"]["kernel"]).max()) > 0


def test_bad_arguments_are_refused(network, variables, waveforms):
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate_activations(network, variables, [], ActivationQuantizer())
    with pytest.raises(ValueError, match="'nothing' fits no layer"):
        calibrate_activations(network, variables, waveforms, ActivationQuantizer(), pattern="nothing")
