"""CAM++: published sizes, padding, context, training statistics, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from qsv.models import CAMPPlus, Network, count_parameters
from qsv.models.campplus_layers import Segments, halve_frequencies

# Millions of parameters with 80 Mel bands.
PUBLISHED_MILLIONS = {192: 6.85, 512: 7.18}
NARROW = {"embedding_size": 16, "growth_rate": 8, "bn_size": 2, "init_channels": 8}
SHALLOW = ((2, 1), (3, 2), (1, 2))


@pytest.mark.parametrize("embedding_size", PUBLISHED_MILLIONS)
def test_parameter_counts_are_the_published_ones(embedding_size):
    shapes = jax.eval_shape(CAMPPlus(embedding_size).init, jax.random.key(0), jnp.zeros((1, 32, 80)))
    millions = count_parameters(shapes["params"]) / 1e6
    assert millions == pytest.approx(PUBLISHED_MILLIONS[embedding_size], abs=0.005)


@pytest.fixture(scope="module")
def shallow():
    """Fewer layers, which compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsv.models.campplus.DENSE_BLOCKS", SHALLOW)
        yield


@pytest.fixture(scope="module")
def variables(shallow, random_variables):
    return random_variables(CAMPPlus(**NARROW))


@pytest.fixture(scope="module")
def apply(shallow):
    return jax.jit(CAMPPlus(**NARROW).apply)


@pytest.fixture(scope="module")
def train(shallow, make_training):
    return make_training(CAMPPlus(**NARROW))


# Odd and even, of one segment of 100 frames at half the rate, and of three of which the last is short.
@pytest.mark.parametrize("frames", [1, 57, 198, 411])
def test_padding_never_changes_an_embedding(check_padding, apply, variables, frames):
    check_padding(apply, variables, jax.random.normal(jax.random.key(0), (2, frames, 16)))


def test_context_is_the_mean_of_the_utterance_plus_that_of_the_segment():
    x = np.random.default_rng(0).normal(size=(2, 230, 3)).astype(np.float32)
    mask = np.arange(230) < np.array([[230], [130]])
    context = Segments.of(230, jnp.asarray(mask), jnp.float32).context(jnp.asarray(x))
    for row, length in enumerate((230, 130)):
        for segment in range(-(-length // 100)):
            frames = x[row, 100 * segment : min(100 * segment + 100, length)]
            expected = x[row, :length].mean(0) + frames.mean(0)
            np.testing.assert_allclose(context[row, segment], expected, rtol=1e-4, atol=1e-6)
    whole = Segments.of(230, None, jnp.float32).context(jnp.asarray(x))
    np.testing.assert_allclose(whole[:1], context[:1], rtol=1e-6)


def test_training_normalises_by_the_statistics_that_it_stores(apply, train, variables):
    features = jax.random.normal(jax.random.key(1), (4, 64, 16))
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    (_, (embedding, updated)), _ = train(variables["params"], zeros, features)
    # Running statistics r become 0.9 r + 0.1 times the batch's.
    statistics = jax.tree.map(lambda leaf: leaf / 0.1, updated)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(statistics))
    expected = apply({**variables, "batch_stats": statistics}, features)
    # Normalised over four utterances only, the embedding magnifies rounding.
    np.testing.assert_allclose(embedding, expected, atol=1e-3)


def test_gradients_are_finite_and_reach_every_weight(train, variables):
    stats = variables["batch_stats"]
    _, gradient = train(variables["params"], stats, jax.random.normal(jax.random.key(1), (4, 64, 16)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path
    for features in (jnp.zeros((2, 64, 16)), jax.random.normal(jax.random.key(2), (2, 1, 16))):
        _, gradient = train(variables["params"], stats, features)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_statistics_of_a_split_batch_are_of_the_whole(train, variables):
    features = jax.random.normal(jax.random.key(1), (4, 24, 16))
    (_, whole), _ = train(variables["params"], variables["batch_stats"], features)
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split, everywhere = PartitionSpec("data"), PartitionSpec()
    model = CAMPPlus(**NARROW, batch_axis="data")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=(split, everywhere))
    def step(features):
        embedding, updated = model.apply(variables, features, train=True, mutable=["batch_stats"])
        return embedding, updated["batch_stats"]

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), jax.jit(step)(features), whole)


def test_bfloat16_computation_keeps_float32_parameters_and_embeddings(apply, variables):
    features = jax.random.normal(jax.random.key(0), (2, 64, 16))
    narrow = jax.jit(CAMPPlus(**NARROW, dtype=jnp.bfloat16).apply)(variables, features)
    wide = apply(variables, features)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.1 * float(np.abs(wide).max()))


@pytest.mark.parametrize("frequencies", [6, 7])
def test_strided_convolution_has_xlas_value_and_derivatives(frequencies):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, frequencies, 5, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)), jnp.float32)

    def xla(x, kernel):
        return lax.conv_general_dilated(x, kernel, (2, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def derivatives(function):
        gradient = jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1))
        return function(x, kernel), gradient(x, kernel), jax.jvp(gradient, (x, kernel), (jnp.cos(x), jnp.sin(kernel)))

    both = derivatives(halve_frequencies), derivatives(xla)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *both)


def test_weights_of_every_kind_have_readable_paths(variables):
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert {
        "head/stem/conv/kernel",
        "head/block1/conv1/conv/kernel",
        "head/block1/shortcut/conv/kernel",
        "head/downsample/norm/scale",
        "tdnn/kernel",
        "block1_layer2/bottleneck/kernel",
        "block2_layer3/local/kernel",
        "block3_layer1/context2/bias",
        "transit3/kernel",
        "embedding/kernel",
    } <= paths
    assert all(path.endswith(("/kernel", "/bias", "/scale")) for path in paths)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="multiple of 8 Mel bands, got 81"):
        CAMPPlus().init(jax.random.key(0), jnp.zeros((1, 16, 81)))
    with pytest.raises(ValueError, match="growth_rate must be positive"):
        CAMPPlus(growth_rate=0).init(jax.random.key(0), jnp.zeros((1, 16, 80)))
    assert Network("campplus", {"embedding_size": 192}).embedding_size == 192
