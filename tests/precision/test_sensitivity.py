"""What bits cost, by three measures, and the tables made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.frontend import MelSpectrogram
from qsv.models import Network
from qsv.precision import (
    Budget,
    DistortionSensitivity,
    DriftSensitivity,
    HessianSensitivity,
    TraceEstimate,
    allocate,
    embedding_loss,
    hessian_vector_product,
    layer_choices,
    layer_multiplications,
)
from qsv.quant import KMeans, Rule, Uniform, fake_quantize, init, leaf_paths, quantize, resolve

PATHS = ("stem/conv/kernel", "stage4_block1/conv1/conv/kernel", "embedding/kernel")


@pytest.fixture(scope="module")
def network():
    return Network("resnet10", {"width": 4, "embedding_size": 8})


@pytest.fixture(scope="module")
def variables(network):
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def waveform():
    return np.random.default_rng(0).normal(0, 0.1, (4, 4000)).astype(np.float32)


def test_the_hessian_weighs_the_squared_error(variables):
    leaves = dict(leaf_paths(variables["params"]))
    traces = {PATHS[0]: TraceEstimate(6.0, 0.1, 10, 3), PATHS[1]: TraceEstimate(-1.0, 0.1, 10, 3)}
    sensitivity = HessianSensitivity(variables["params"], traces)
    quantizer = KMeans(2)
    weights = np.asarray(leaves[PATHS[0]])
    error = np.sum(np.square(quantizer.fake_quantize(weights, quantizer.init(weights)) - weights))
    assert sensitivity(PATHS[0], quantizer) == pytest.approx(2.0 * error, rel=1e-5)
    assert sensitivity(PATHS[1], quantizer) == 0
    with pytest.raises(ValueError, match="no trace for 'embedding/kernel'"):
        sensitivity("embedding/kernel", quantizer)


@pytest.mark.parametrize("kind", ["distortion", "drift"])
def test_more_bits_cost_less(network, variables, waveform, kind):
    sensitivity = (
        DistortionSensitivity(variables["params"])
        if kind == "distortion"
        else DriftSensitivity(network, variables, [waveform])
    )
    for path in PATHS:
        costs = [sensitivity(path, KMeans(bits)) for bits in (1, 2, 4, 8)]
        assert costs == sorted(costs, reverse=True) and costs[-1] < 1e-3 < costs[0]


def test_drift_is_that_of_the_embeddings(network, variables, waveform):
    plan = resolve([Rule(PATHS[1], KMeans(2)), Rule(".*", None)], variables["params"])
    params = fake_quantize(plan, variables["params"], init(plan, variables["params"]))
    one, other = (
        np.asarray(network.embed({**variables, "params": p}, waveform)) for p in (variables["params"], params)
    )
    cosines = np.sum(one * other, axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    found = DriftSensitivity(network, variables, [waveform])(PATHS[1], KMeans(2))
    assert found == pytest.approx(1 - cosines.mean(), abs=1e-6)


def test_the_label_free_loss_is_flat_but_curved_at_the_float_network(network, variables, waveform):
    loss = embedding_loss(network, variables)
    params = variables["params"]
    direction = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    gradient = jax.grad(loss)(params, waveform)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-4
    product = hessian_vector_product(loss, params, direction, waveform)
    curvature = sum(
        float(jnp.vdot(one, other))
        for one, other in zip(jax.tree.leaves(direction), jax.tree.leaves(product), strict=True)
    )
    # A small step along the direction raises the loss by half its square times the curvature.
    step = 1e-3
    moved = jax.tree.map(lambda leaf, change: leaf + step * change, params, direction)
    assert float(loss(moved, waveform)) == pytest.approx(curvature * step**2 / 2, rel=0.1)


def test_tables_are_counted_in_the_bytes(variables):
    params = variables["params"]
    quantizers = [KMeans(2), Uniform(4), KMeans(3, channel_axes=(-1,))]
    layers = layer_choices(params, PATHS, quantizers, DistortionSensitivity(params))
    for layer in layers:
        assert layer.weights == dict(leaf_paths(params))[layer.path].size
        for quantizer in quantizers:
            plan = resolve([Rule(layer.path, quantizer), Rule(".*", None)], params)
            packed = dict(leaf_paths(quantize(plan, params, init(plan, params))))[layer.path]
            bits = -(-packed.code_bits // 8) * 8 + packed.table_bits
            assert layer.choice(quantizer.bits).size_bytes == bits // 8
    assert allocate(layers, Budget(max_bits=2.5)).average_bits <= 2.5
    with pytest.raises(ValueError, match="no leaves"):
        layer_choices(params, ["stem"], quantizers, DistortionSensitivity(params))


def test_bit_operations_are_multiplications_times_bits(network, variables):
    multiplications = layer_multiplications(network, variables, seconds=1.0)
    kernels = [path for path, _ in leaf_paths(variables["params"]) if path.endswith("/kernel")]
    assert set(multiplications) == set(kernels)
    # 98 frames of 80 bands; 3x3 taps from one channel to four. The embedding is computed once.
    assert multiplications["stem/conv/kernel"] == 98 * 80 * 9 * 4
    assert multiplications["embedding/kernel"] == dict(leaf_paths(variables["params"]))["embedding/kernel"].size
    sensitivity = DistortionSensitivity(variables["params"])
    (layer,) = layer_choices(
        variables["params"],
        PATHS[:1],
        [KMeans(2)],
        sensitivity,
        multiplications=multiplications,
        activation_bits=8,
    )
    assert layer.choice(2).bops == 98 * 80 * 9 * 4 * 2 * 8


def test_an_lstm_multiplies_in_every_frame_of_every_window():
    arguments = {"hidden_size": 6, "num_layers": 2, "embedding_size": 4, "window_frames": 20, "hop_frames": 10}
    network = Network("ge2e", arguments, MelSpectrogram())
    variables = network.init(jax.random.key(0))
    counts = layer_multiplications(network, variables, seconds=0.3)
    windows = counts["embedding/kernel"] // (6 * 4)
    assert windows > 0
    assert counts["lstm1/input/kernel"] == windows * 20 * 40 * 24
    assert counts["lstm2/hidden/kernel"] == windows * 20 * 6 * 24
