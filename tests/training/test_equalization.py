"""Scales that channels can have: where they are found, that nothing changes, that one scale a tensor suits better."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import Network
from qsv.quant import Rule, Uniform, fake_quantize, init, leaf_paths, resolve, with_leaves
from qsv.training import equalize, scale_freedom

WAVEFORM = 0.1 * jax.random.normal(jax.random.key(1), (1, 4000))
SPEECH = [0.1 * jax.random.normal(jax.random.key(seed), (2, 8000)) for seed in (2, 3)]


def drawn(network, seed=0):
    """Random variables, so that nothing is zero or one by chance."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0))

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return (rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))).astype(np.float32)
        low, high = (0.5, 1.5) if name in ("scale", "var") else (-0.3, 0.3)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def made_uneven(variables, freedom, seed=1):
    """The same function with channels that differ in size by powers of ten, as a training may leave them."""
    rng = np.random.default_rng(seed)
    leaves = {path: np.array(leaf) for path, leaf in leaf_paths(variables)}
    for norm, readers in freedom.readers.items():
        scales = 10 ** rng.uniform(-1, 1, leaves[f"params/{norm}/scale"].shape).astype(np.float32)
        leaves[f"params/{norm}/scale"] *= scales
        leaves[f"params/{norm}/bias"] *= scales
        for reader in readers:
            leaves[f"params/{reader}/kernel"] /= scales[:, None]
    return with_leaves(variables, leaves)


@pytest.fixture(scope="module")
def resnet():
    network = Network.of_size("resnet10", width=4, embedding_size=8)
    variables = drawn(network)
    return network, variables, scale_freedom(network, variables, WAVEFORM)


def test_the_places_of_a_resnet_are_found(resnet):
    _, variables, freedom = resnet
    # Within a block the first normalisation is read by the second convolution alone; what goes round isn't free.
    blocks = [f"stage{stage}_block1" for stage in (1, 2, 3, 4)]
    assert freedom.readers == {f"{block}/conv1/norm": (f"{block}/conv2/conv",) for block in blocks}
    # Every convolution has its normalisation.
    layers = [
        path.removeprefix("params/").removesuffix("/kernel")
        for path, _ in leaf_paths(variables)
        if path.endswith("conv/kernel")
    ]
    assert freedom.norms == {layer: layer.removesuffix("conv") + "norm" for layer in layers}


@pytest.mark.parametrize(("name", "width"), [pytest.param("df_resnet56", 4, marks=pytest.mark.slow), ("ecapa", 16)])
def test_an_equalized_network_computes_the_same(name, width):
    network = Network.of_size(name, width=width, embedding_size=8)
    variables = drawn(network)
    freedom = scale_freedom(network, variables, WAVEFORM)
    assert freedom.norms or freedom.readers
    moved = equalize(network, variables, SPEECH, freedom)
    expected = network.embed(variables, SPEECH[0])
    np.testing.assert_allclose(network.embed(moved, SPEECH[0]), expected, atol=1e-3 * np.abs(expected).max())


def test_channels_become_alike_and_the_embedding_stays(resnet):
    network, variables, freedom = resnet
    moved = equalize(network, variables, SPEECH, freedom)
    expected = network.embed(variables, SPEECH[0])
    np.testing.assert_allclose(network.embed(moved, SPEECH[0]), expected, atol=1e-4 * np.abs(expected).max())
    kernels = dict(leaf_paths(moved["params"]))
    for layer in freedom.norms:
        kernel = np.abs(kernels[f"{layer}/kernel"])
        largest = kernel.max(axis=(0, 1, 2))
        np.testing.assert_allclose(largest, largest.max(), rtol=1e-5)


def test_it_takes_back_what_makes_rounding_costly(resnet):
    network, variables, freedom = resnet
    plan = resolve([Rule(".*conv/kernel", Uniform(bits=4)), Rule(".*", None)], variables["params"])
    expected = network.embed(variables, SPEECH[0])

    def error(own):
        params = fake_quantize(plan, own["params"], init(plan, own["params"]))
        return float(jnp.linalg.norm(network.embed({**own, "params": params}, SPEECH[0]) - expected))

    uneven = made_uneven(variables, freedom)
    assert error(uneven) > 1.5 * error(variables)
    assert error(equalize(network, uneven, SPEECH, freedom)) < 1.1 * error(variables)


@pytest.mark.slow
def test_readers_of_one_normalisation_share_its_scales():
    """CAM++'s second normalisations are read by a convolution and, averaged over time, by a dense layer."""
    network = Network.of_size("campplus", embedding_size=8)
    freedom = scale_freedom(network, network.init(jax.random.key(0)), WAVEFORM)
    second = {norm: own for norm, own in freedom.readers.items() if norm.endswith("/norm2")}
    assert len(second) == 12 + 24 + 16
    for norm, readers in second.items():
        layer = norm.removesuffix("norm2")
        assert sorted(readers) == [f"{layer}context1", f"{layer}local"]


def test_silence_and_no_speech(resnet):
    network, variables, freedom = resnet
    moved = equalize(network, variables, [jnp.zeros((1, 8000))], freedom)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    with pytest.raises(ValueError, match="at least one batch"):
        equalize(network, variables, [], freedom)
