"""The DF-ResNet family: published sizes, padding, strides, input that is refused."""

import jax
import jax.numpy as jnp
import pytest

from qsv.models import DFResNet, Network, count_parameters
from qsv.models.df_resnet import DEPTHS

# Millions of parameters with 80 Mel bands and embedding size 256 (WeSpeaker).
PUBLISHED_MILLIONS = {60: 4.05, 114: 6.53, 183: 9.20, 237: 11.68}


@pytest.mark.parametrize("depth", PUBLISHED_MILLIONS)
def test_parameter_counts_of_gemini_are_the_published_ones(depth):
    shapes = jax.eval_shape(DFResNet(depth).init, jax.random.key(0), jnp.zeros((1, 32, 80)))
    assert count_parameters(shapes["params"]) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[depth], abs=0.006)


@pytest.mark.parametrize(("original", "gemini"), [(56, 60), (110, 114), (179, 183), (233, 237)])
def test_the_original_differs_in_strides_alone(original, gemini):
    features = jnp.zeros((1, 32, 80))
    kernels = [
        jax.eval_shape(DFResNet(depth, width=2).init, jax.random.key(0), features)["params"]
        for depth in (original, gemini)
    ]
    # Twice the frequencies at the end are pooled.
    assert kernels[0]["embedding"]["kernel"].shape[0] == 2 * kernels[1]["embedding"]["kernel"].shape[0]
    for params in kernels:
        del params["embedding"]
    assert jax.tree.map(jnp.shape, kernels[0]) == jax.tree.map(jnp.shape, kernels[1])


@pytest.mark.parametrize(("depth", "frames"), [(56, 57), (60, 50)])
def test_padding_never_changes_an_embedding(check_padding, random_variables, depth, frames):
    model = DFResNet(depth, width=2, embedding_size=8)
    features = jax.random.normal(jax.random.key(0), (2, frames, 80))
    check_padding(jax.jit(model.apply), random_variables(model, mels=80), features)


def test_depthwise_kernels_have_one_input_channel():
    shapes = jax.eval_shape(DFResNet(60, width=4).init, jax.random.key(0), jnp.zeros((1, 32, 80)))["params"]
    assert shapes["stage3_block9"]["conv2"]["conv"]["kernel"].shape == (3, 3, 1, 64)


def test_networks_are_named_by_their_depth():
    names = {f"df_resnet{depth}" if depth in (56, 110, 179, 233) else f"gemini_df_resnet{depth}" for depth in DEPTHS}
    assert {Network(name).module().depth for name in names} == set(DEPTHS)


def test_unknown_depths_and_sizes_are_refused():
    features = jnp.zeros((1, 32, 80))
    with pytest.raises(ValueError, match="depth must be one of"):
        DFResNet(57).init(jax.random.key(0), features)
    with pytest.raises(ValueError, match="width and embedding_size must be positive"):
        DFResNet(60, width=0).init(jax.random.key(0), features)
