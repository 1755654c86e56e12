"""Networks in integers: kernels without loss, agreement with the fake-quantized network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.deploy import IntegerNetwork, integer_layer
from qsv.models import Network, at_points, quantized_activations
from qsv.quant import (
    ActivationQuantizer,
    KMeans,
    PowerOfTwo,
    Rule,
    Uniform,
    fake_quantize,
    init,
    quantize,
    resolve,
)
from qsv.training import calibrate_activations

WEIGHTS = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))


@pytest.mark.parametrize(
    "quantizer",
    [
        Uniform(8),
        Uniform(4),
        Uniform(2),
        Uniform(8, channel_axes=(-1,)),
        PowerOfTwo(4),
        KMeans(4, integer_levels=True),
        KMeans(8, integer_levels=True),
        KMeans(3, channel_axes=(-1,), share_codebook=True, integer_levels=True),
        KMeans(2, channel_axes=(-1,), integer_levels=True),
    ],
)
def test_a_kernel_in_int8_is_the_kernel(quantizer):
    packed = quantizer.quantize(WEIGHTS, quantizer.init(WEIGHTS))
    layer = integer_layer(packed)
    assert layer.weights.dtype == jnp.int8 and layer.scale.shape in ((), (6,))
    np.testing.assert_allclose(layer.scale * layer.weights, packed.dequantize(), rtol=1e-5, atol=1e-6)


def test_integer_levels_cost_next_to_nothing():
    errors = []
    for integer in (False, True):
        quantizer = KMeans(4, integer_levels=integer)
        errors.append(float(jnp.sum(jnp.square(quantizer.fake_quantize(WEIGHTS, quantizer.init(WEIGHTS)) - WEIGHTS))))
    assert errors[1] < 1.02 * errors[0]


@pytest.mark.parametrize("size", [18, 300, 5000])
def test_levels_that_fall_together_cost_no_more_than_a_step(size):
    """256 levels, of few weights or crowded around zero, on the 255 places of the grid."""
    weights = jax.random.normal(jax.random.key(0), (size,))
    free, whole = KMeans(8), KMeans(8, integer_levels=True)
    state = whole.init(weights)
    distinct = np.unique(state.codebook)
    np.testing.assert_array_equal(state.codebook[: len(distinct)], distinct)
    np.testing.assert_array_equal(state.codebook[len(distinct) :], distinct[-1])
    error = jnp.abs(whole.fake_quantize(weights, state) - weights).max()
    unrounded = jnp.abs(free.fake_quantize(weights, free.init(weights)) - weights).max()
    assert error <= unrounded + state.scale / 127


def test_integer_levels_stay_so_when_the_codebook_is_refreshed():
    for quantizer in (KMeans(4, integer_levels=True), KMeans(4, (-1,), share_codebook=True, integer_levels=True)):
        state = quantizer.refresh(WEIGHTS + 0.1, quantizer.init(WEIGHTS))
        np.testing.assert_allclose(state.codebook * 127, np.round(state.codebook * 127), atol=1e-4)


def test_levels_off_the_grid_and_scales_of_inputs_are_refused():
    with pytest.raises(ValueError, match="int8 grid"):
        integer_layer(KMeans(4).quantize(WEIGHTS, KMeans(4).init(WEIGHTS)))
    quantizer = Uniform(8, channel_axes=(-2,))
    with pytest.raises(ValueError, match="of its 6 outputs"):
        integer_layer(quantizer.quantize(WEIGHTS, quantizer.init(WEIGHTS)))


CAMPPLUS = Network("campplus", {"growth_rate": 4, "bn_size": 1, "init_channels": 8, "embedding_size": 8})


def made(network, *, bits, **settings):
    """A network with random statistics: (fake-quantized variables, activations, in integers, a waveform)."""
    variables = network.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch_stats = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype("f"), variables["batch_stats"])
    params = variables["params"]
    plan = resolve([Rule(".*/kernel", KMeans(bits, integer_levels=True)), Rule(".*", None)], params)
    qstate = init(plan, params)
    fake = {"params": fake_quantize(plan, params, qstate), "batch_stats": batch_stats}
    waveforms = [0.1 * jax.random.normal(jax.random.key(seed), (1, 2400)) for seed in (1, 2)]
    activations = calibrate_activations(network, fake, waveforms, ActivationQuantizer(8, **settings))
    integer = IntegerNetwork.of(network, quantize(plan, params, qstate), batch_stats, activations)
    return fake, activations, integer, waveforms[0]


def of_width(name, width):
    return Network.of_size(name, width=width, embedding_size=8)


@pytest.mark.parametrize(
    ("network", "bits", "settings"),
    [
        (of_width("resnet10", 2), 8, {}),
        (of_width("resnet10", 2), 4, {"symmetric": True}),
        pytest.param(of_width("df_resnet56", 4), 4, {}, marks=pytest.mark.slow),
        (of_width("ecapa", 16), 4, {}),
        pytest.param(CAMPPLUS, 4, {}, marks=pytest.mark.slow),
    ],
    ids=["resnet10", "resnet10 symmetric", "df_resnet56", "ecapa", "campplus"],
)
def test_integers_and_fake_quantization_agree_within_a_step(network, bits, settings):
    """Every layer, given the integers' own inputs: steps of one layer would add up in the next."""
    fake, activations, integer, waveform = made(network, bits=bits, **settings)
    quantizer, ranges = activations.quantizer, activations.ranges
    codes = integer.codes(waveform)
    seen = {}

    def keep(point, values):
        seen[point] = quantizer.quantize(values, ranges[point])
        return quantizer.dequantize(codes[point], ranges[point])

    features, _ = network.frontend(waveform)
    with at_points(ranges, keep):
        expected = network.module().apply(fake, features)
    assert set(codes) == set(seen) == set(ranges) and len(codes) > 5
    assert any(point.endswith(":output") for point in codes)
    for path, own in codes.items():
        difference = np.abs(own.astype(np.int32) - seen[path].astype(np.int32))
        assert difference.max() <= 1, path
        # Halves between two codes alone, which float sums round either way.
        assert np.mean(difference > 0) < 0.01, path
    np.testing.assert_allclose(integer.embed(waveform), expected, atol=1e-4 * np.abs(expected).max())


def test_the_whole_network_agrees_with_the_fake_quantized_one():
    network = of_width("resnet10", 2)
    fake, activations, integer, waveform = made(network, bits=8)
    features, _ = network.frontend(waveform)
    with quantized_activations(activations):
        expected = network.module().apply(fake, features)
    np.testing.assert_allclose(integer.embed(waveform), expected, atol=0.02 * np.abs(expected).max())


def test_a_layer_without_a_range_is_refused():
    *_, integer, _ = made(of_width("resnet10", 2), bits=4)
    with pytest.raises(ValueError, match="1 layers have no range of their input, such as stem/conv"):
        ranges = {path: own for path, own in integer.activations.ranges.items() if path != "stem"}
        dataclasses.replace(integer, activations=dataclasses.replace(integer.activations, ranges=ranges))
