"""The ResNet family: published sizes, padding, pooling, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.frontend import KaldiFbank
from qsv.models import Network, ResNet, count_parameters, model_names, temporal_statistics_pooling

# Millions of parameters with 80 Mel bands and embedding size 256 (WeSpeaker).
PUBLISHED_MILLIONS = {18: 4.11, 34: 6.63, 50: 11.13, 101: 15.89, 152: 19.81, 221: 23.79, 293: 28.62}


@pytest.mark.parametrize("depth", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(depth):
    shapes = jax.eval_shape(ResNet(depth).init, jax.random.key(0), jnp.zeros((1, 32, 80)))
    assert count_parameters(shapes["params"]) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[depth], abs=0.01)


def trained_like(variables):
    """Random running statistics and biases, so that padding that leaks is seen."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return tree.unflatten(
        [
            x * (1 + 0.3 * jax.random.uniform(k, x.shape)) + 0.1 * jax.random.uniform(k, x.shape) if x.ndim == 1 else x
            for k, x in zip(keys, leaves, strict=True)
        ]
    )


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("frames", [50, 57, 64])
def test_padding_never_changes_an_embedding(check_padding, random_variables, depth, frames):
    model = ResNet(depth, width=4, embedding_size=16)
    features = jax.random.normal(jax.random.key(0), (2, frames, 80))
    check_padding(jax.jit(model.apply), random_variables(model, mels=80), features)


def test_pooling_by_hand():
    # One frequency, two channels, frames 1 and 3 valid.
    features = jnp.array([[[[1.0, 10.0], [3.0, 10.0], [99.0, 99.0]]]])
    mask = jnp.array([[True, True, False]])
    expected = [[2.0, 10.0, np.sqrt(2.0 + 1e-7), np.sqrt(1e-7)]]
    np.testing.assert_allclose(temporal_statistics_pooling(features, mask), expected, rtol=1e-6)
    np.testing.assert_allclose(temporal_statistics_pooling(features[:, :, :2]), expected, rtol=1e-6)


def test_pooling_is_channel_major_then_frequency():
    features = jnp.arange(6.0).reshape(1, 3, 1, 2)  # [batch, frequency, frames, channels]
    np.testing.assert_array_equal(temporal_statistics_pooling(features)[0, :6], [0, 2, 4, 1, 3, 5])


def test_pooling_of_one_frame_has_a_finite_gradient():
    gradient = jax.grad(lambda x: temporal_statistics_pooling(x).sum())(jnp.ones((1, 2, 1, 3)))
    assert np.all(np.isfinite(gradient))


def test_bfloat16_computation_keeps_float32_parameters_and_embeddings():
    model = ResNet(10, width=4, embedding_size=8, dtype=jnp.bfloat16)
    features = jax.random.normal(jax.random.key(0), (2, 40, 80))
    variables = model.init(jax.random.key(1), features)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    wide = ResNet(10, width=4, embedding_size=8).apply(variables, features)
    narrow = model.apply(variables, features)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.05 * float(np.abs(wide).max()))


def test_unknown_depth_width_and_model_are_refused():
    features = jnp.zeros((1, 16, 80))
    with pytest.raises(ValueError, match="depth must be one of"):
        ResNet(19).init(jax.random.key(0), features)
    with pytest.raises(ValueError, match="positive"):
        ResNet(18, width=0).init(jax.random.key(0), features)
    with pytest.raises(ValueError, match="resnet34"):
        Network("resnet35")
    with pytest.raises(ValueError, match="colour"):
        Network("resnet18", {"colour": 3})


def test_network_embeds_padded_waveforms_like_single_ones():
    network = Network("resnet10", {"width": 4, "embedding_size": 16}, KaldiFbank(window="hamming"))
    variables = trained_like(network.init(jax.random.key(0)))
    waveform = 0.1 * jax.random.normal(jax.random.key(1), (3, 9000))
    lengths = jnp.array([9000, 7777, 4000])
    together = network.embed(variables, waveform, lengths)
    for row, length in enumerate(lengths):
        alone = network.embed(variables, waveform[row : row + 1, :length])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_network_json_round_trip():
    network = Network("resnet34", {"width": 8}, KaldiFbank(num_mels=40))
    again = Network.from_json(network.to_json())
    assert again == network and hash(again) == hash(network)
    assert "resnet293" in model_names()
