"""ERes2NetV2: published sizes, padding, fusion, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import ERes2NetV2, Network, count_parameters
from qsv.models.eres2net import AttentionalFusion

NARROW = {"embedding_size": 16, "width": 8, "scale": 3}


def test_parameter_count_is_the_published_one():
    shapes = jax.eval_shape(ERes2NetV2().init, jax.random.key(0), jnp.zeros((1, 32, 80)))
    assert count_parameters(shapes["params"]) / 1e6 == pytest.approx(17.86, abs=0.01)


@pytest.fixture(scope="module")
def shallow():
    """Fewer blocks, which compile quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qsv.models.eres2net.STAGE_BLOCKS", (1, 1, 2, 1))
        yield


@pytest.fixture(scope="module")
def variables(shallow, random_variables):
    return random_variables(ERes2NetV2(**NARROW))


@pytest.fixture(scope="module")
def apply(shallow):
    return jax.jit(ERes2NetV2(**NARROW).apply)


@pytest.fixture(scope="module")
def train(shallow, make_training):
    return make_training(ERes2NetV2(**NARROW))


@pytest.mark.parametrize("frames", [1, 50, 57])
def test_padding_never_changes_an_embedding(check_padding, apply, variables, frames):
    check_padding(apply, variables, jax.random.normal(jax.random.key(0), (2, frames, 16)))


def test_training_normalises_by_the_statistics_that_it_stores(apply, train, variables):
    features = jax.random.normal(jax.random.key(1), (4, 64, 16))
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    (_, (embedding, updated)), _ = train(variables["params"], zeros, features)
    # Running statistics r become 0.9 r + 0.1 times the batch's.
    statistics = jax.tree.map(lambda leaf: leaf / 0.1, updated)
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(statistics))
    np.testing.assert_allclose(
        embedding, apply({**variables, "batch_stats": statistics}, features), rtol=1e-3, atol=1e-3
    )


def test_gradients_are_finite_and_reach_every_weight(train, variables):
    stats = variables["batch_stats"]
    _, gradient = train(variables["params"], stats, jax.random.normal(jax.random.key(1), (4, 64, 16)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path
    for features in (jnp.zeros((2, 64, 16)), jax.random.normal(jax.random.key(2), (2, 1, 16))):
        _, gradient = train(variables["params"], stats, features)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_fusion_without_attention_is_a_sum():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 3, 5, 8))
    fusion = AttentionalFusion(jnp.float32, None)
    variables = fusion.init(jax.random.key(1), x, y, train=False)
    assert not np.allclose(fusion.apply(variables, x, y, train=False), x + y)
    silent = jax.tree.map(jnp.zeros_like, variables["params"])
    np.testing.assert_allclose(fusion.apply({**variables, "params": silent}, x, y, train=False), x + y, rtol=1e-6)
    # A large bias of the last normalisation takes the first input alone, twice.
    first = {**silent, "excite_norm": {**silent["excite_norm"], "bias": jnp.full(8, 50.0)}}
    np.testing.assert_allclose(fusion.apply({**variables, "params": first}, x, y, train=False), 2 * x, rtol=1e-6)


def test_activations_are_clipped_at_twenty(apply, variables):
    features = 1e3 * jax.random.normal(jax.random.key(0), (1, 24, 16))
    model = ERes2NetV2(**NARROW)
    _, inner = model.apply(variables, features, capture_intermediates=lambda m, _: m.name == "stage4_block1")
    ((activations, _),) = inner["intermediates"]["stage4_block1"]["__call__"]
    assert activations.max() == 20 and activations.min() == 0


def test_bfloat16_computation_keeps_float32_parameters_and_embeddings(apply, variables):
    features = jax.random.normal(jax.random.key(0), (2, 64, 16))
    narrow = jax.jit(ERes2NetV2(**NARROW, dtype=jnp.bfloat16).apply)(variables, features)
    wide = apply(variables, features)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.1 * float(np.abs(wide).max()))


def test_weights_of_every_kind_have_readable_paths(variables):
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert {
        "stem/conv/kernel",
        "stage1_block1/conv1/conv/kernel",
        "stage1_block1/branch3/conv/kernel",
        "stage1_block1/shortcut/conv/kernel",
        "stage3_block2/fusion2/squeeze/kernel",
        "stage4_block1/fusion1/excite_norm/scale",
        "stage3_downsample/kernel",
        "stage_fusion/excite/bias",
        "embedding/kernel",
    } <= paths
    assert not any(path.startswith("stage2") and "fusion" in path for path in paths)
    assert all(path.endswith(("/kernel", "/bias", "/scale")) for path in paths)


def test_what_it_cannot_take_is_refused():
    with pytest.raises(ValueError, match="multiple of 8 Mel bands, got 81"):
        ERes2NetV2().init(jax.random.key(0), jnp.zeros((1, 16, 81)))
    with pytest.raises(ValueError, match="scale must be positive"):
        ERes2NetV2(scale=0).init(jax.random.key(0), jnp.zeros((1, 16, 80)))
    with pytest.raises(ValueError, match="no channels for a branch"):
        ERes2NetV2(width=2).init(jax.random.key(0), jnp.zeros((1, 16, 80)))
    assert Network("eres2netv2").embedding_size == 192
