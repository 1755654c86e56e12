"""ResNet-36 and ResNet-200: published sizes, padding, gates, input that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import AttentiveResNet, Network, count_parameters
from qsv.models.attentive_resnet import SqueezeExcitation

# Millions of parameters with 81 features and embedding size 256.
PUBLISHED_MILLIONS = {36: 14.93, 200: 59.94}


@pytest.mark.parametrize("depth", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(depth):
    shapes = jax.eval_shape(AttentiveResNet(depth).init, jax.random.key(0), jnp.zeros((1, 32, 81)))
    assert count_parameters(shapes["params"]) / 1e6 == pytest.approx(PUBLISHED_MILLIONS[depth], abs=0.005)


@pytest.mark.parametrize(("depth", "frames"), [(36, 57), (200, 40)])
def test_padding_never_changes_an_embedding(check_padding, random_variables, depth, frames):
    model = AttentiveResNet(depth, width=2, embedding_size=8, attention_channels=4)
    features = jax.random.normal(jax.random.key(0), (2, frames, 17))
    check_padding(jax.jit(model.apply), random_variables(model, mels=17), features)


def test_only_the_first_two_stages_have_gates():
    shapes = jax.eval_shape(AttentiveResNet(36, width=4).init, jax.random.key(0), jnp.zeros((1, 32, 81)))["params"]
    gated = {name for name, block in shapes.items() if "gate" in block}
    assert gated == {f"stage{stage}_block{block}" for stage, count in ((1, 3), (2, 4)) for block in range(1, count + 1)}


def test_gates_are_those_of_the_mean_over_valid_frames():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5, 2)), jnp.float32)
    mask = jnp.array([[True, True, True, False, False]])
    gate = SqueezeExcitation()
    variables = gate.init(jax.random.key(0), x, mask)
    squeeze, excite = (np.asarray(variables["params"][name]["kernel"]) for name in ("squeeze", "excite"))
    mean = np.asarray(x)[:, :, :3].mean(axis=(1, 2))
    expected = np.asarray(x) / (1 + np.exp(-np.maximum(mean @ squeeze, 0) @ excite))[:, None, None, :]
    np.testing.assert_allclose(gate.apply(variables, x, mask), expected, rtol=1e-5)


def test_networks_take_the_energy_besides_the_bands():
    network = Network.of_size("resnet36", width=2)
    assert network.frontend.num_features == 81
    waveform = 0.1 * jax.random.normal(jax.random.key(0), (1, 8000))
    embedding = network.embed(network.init(jax.random.key(1)), waveform)
    assert embedding.shape == (1, 256) and np.all(np.isfinite(embedding))


def test_unknown_depths_and_sizes_are_refused():
    features = jnp.zeros((1, 32, 81))
    with pytest.raises(ValueError, match=r"depth must be one of \[36, 200\], got 34"):
        AttentiveResNet(34).init(jax.random.key(0), features)
    with pytest.raises(ValueError, match="width and embedding_size must be positive"):
        AttentiveResNet(36, embedding_size=0).init(jax.random.key(0), features)
