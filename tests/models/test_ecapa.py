"""ECAPA-TDNN: published sizes, padding, reflection, short utterances, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.frontend import KaldiFbank, SpeechBrainFbank
from qsv.models import ECAPA, Network, count_parameters
from qsv.models.ecapa_layers import DIALECTS, AttentiveStatisticsPooling, SERes2Block, pad_frames

SMALL = {
    "channels": 12,
    "embedding_size": 12,
    "aggregation_channels": 24,
    "se_channels": 6,
    "attention_channels": 5,
    "scale": 3,
}
DIALECT_NAMES = sorted(DIALECTS)


def trained_like(variables):
    """Random statistics, scales and biases, so that padding that leaks is seen."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return tree.unflatten(
        [
            x * (1 + 0.3 * jax.random.uniform(k, x.shape)) + 0.1 * jax.random.uniform(k, x.shape) if x.ndim == 1 else x
            for k, x in zip(keys, leaves, strict=True)
        ]
    )


@functools.cache
def small(dialect, **overrides):
    """A narrow network for features of 20 bands, its jitted `apply` and its variables."""
    model = ECAPA(dialect, **{**SMALL, **overrides})
    variables = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 16, 20)))
    return model, jax.jit(model.apply), trained_like(variables)


@pytest.mark.parametrize(
    ("name", "arguments", "millions"),
    [
        ("ecapa", {}, 6.19),
        ("ecapa", {"channels": 1024}, 14.66),
        ("ecapa_speechbrain", {"channels": 1024, "aggregation_channels": 3072}, 20.77),
    ],
)
def test_parameter_counts_are_the_published_ones(name, arguments, millions):
    shapes = jax.eval_shape(Network(name, arguments).init, jax.random.key(0))
    assert count_parameters(shapes["params"]) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("dialect", "global_context"), [("wespeaker", True), ("speechbrain", True), ("speechbrain", False)]
)
def test_padding_never_changes_an_embedding(dialect, global_context):
    features = jax.random.normal(jax.random.key(0), (2, 60, 20))
    _, apply, variables = small(dialect, global_context=global_context)
    lengths = np.array([60, 41])
    mask = jnp.arange(83) < lengths[:, None]
    padded = jnp.where(mask[..., None], jnp.pad(features, ((0, 0), (0, 23), (0, 0))), 3.0)
    together = apply(variables, padded, mask)
    for row, length in enumerate(lengths):
        alone = apply(variables, features[row : row + 1, :length])[0]
        np.testing.assert_allclose(together[row], alone, rtol=1e-5, atol=1e-5)
    leaked = apply(variables, padded, jnp.ones_like(mask))
    assert np.abs(leaked - together).max(axis=1).min() > 1e-2


@pytest.mark.parametrize("dialect", DIALECT_NAMES)
@pytest.mark.parametrize("frames", [1, 3])
def test_utterances_shorter_than_the_padding_have_finite_embeddings(dialect, frames):
    features = jax.random.normal(jax.random.key(0), (1, 4, 20))
    _, apply, variables = small(dialect)
    alone = apply(variables, features[:, :frames])
    assert np.all(np.isfinite(alone))
    masked = apply(variables, features, jnp.arange(4)[None] < frames)
    np.testing.assert_allclose(masked, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECT_NAMES)
def test_a_row_without_valid_frames_is_finite(dialect):
    features = jnp.ones((2, 9, 20))
    _, apply, variables = small(dialect)
    mask = jnp.array([[True] * 9, [False] * 9])
    assert np.all(np.isfinite(apply(variables, features, mask)))


def test_reflection_by_hand():
    frames = jnp.array([1.0, 2.0, 3.0, 99.0, 99.0]).reshape(1, 5, 1)
    mask = jnp.array([[True, True, True, False, False]])
    reflected = pad_frames(frames, mask, 2, reflect=True)[0, :, 0]
    np.testing.assert_array_equal(reflected[:7], [3, 2, 1, 2, 3, 2, 1])
    assert float(jnp.max(reflected)) == 3
    zeroed = pad_frames(frames, mask, 1, reflect=False)[0, :, 0]
    np.testing.assert_array_equal(zeroed, [0, 1, 2, 3, 0, 0, 0])


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_reflection_follows_numpy_however_short_the_utterance(frames):
    values = np.arange(1.0, frames + 1)
    expected = np.pad(values, 4, mode="reflect")
    unmasked = pad_frames(jnp.asarray(values).reshape(1, -1, 1), None, 4, reflect=True)
    np.testing.assert_array_equal(unmasked[0, :, 0], expected)
    padded = jnp.asarray(np.pad(values, (0, 3), constant_values=99.0)).reshape(1, -1, 1)
    masked = pad_frames(padded, jnp.arange(frames + 3)[None] < frames, 4, reflect=True)
    np.testing.assert_array_equal(masked[0, : frames + 8, 0], expected)


@pytest.mark.parametrize("dialect", DIALECT_NAMES)
def test_pooling_with_even_attention_is_the_mean_and_the_deviation(dialect):
    pooling = AttentiveStatisticsPooling(DIALECTS[dialect], attention_channels=3, global_context=True)
    features = jnp.array([[[1.0, 5.0], [3.0, 5.0], [99.0, 99.0]]])
    mask = jnp.array([[True, True, False]])
    variables = pooling.init(jax.random.key(0), features, mask, train=False)
    even = jax.tree.map(jnp.zeros_like, variables)
    floor = np.sqrt(DIALECTS[dialect].floor)
    np.testing.assert_allclose(pooling.apply(even, features, mask, train=False), [[2, 5, 1, floor]], rtol=1e-5)


@pytest.mark.parametrize(("dialect", "deviation"), [("wespeaker", np.sqrt(2)), ("speechbrain", 1.0)])
def test_the_context_of_the_attention_by_hand(dialect, deviation):
    pooling = AttentiveStatisticsPooling(DIALECTS[dialect], attention_channels=3, global_context=True)
    features = jnp.array([[[1.0], [3.0], [99.0]]])
    context = pooling._with_context(features, jnp.array([[True, True, False]]))
    np.testing.assert_allclose(context[0, :2], [[1, 2, deviation], [3, 2, deviation]], rtol=1e-5)


@pytest.mark.parametrize(("dialect", "expected"), [("wespeaker", [2, 3, 2]), ("speechbrain", [2, 2, 3])])
def test_res2_block_by_hand(dialect, expected):
    block = SERes2Block(DIALECTS[dialect], dilation=2, scale=3, se_channels=1)
    ones = jnp.ones((1, 9, 3))
    variables = jax.jit(functools.partial(block.init, train=False))(jax.random.key(0), ones, None)
    params = jax.tree.map(jnp.zeros_like, variables["params"])
    for layer in ("pointwise1", "pointwise2"):
        params[layer]["conv"]["kernel"] = jnp.eye(3)
    for layer in ("branch1", "branch2"):
        params[layer]["conv"]["kernel"] = jnp.array([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    for layer in ("pointwise1", "pointwise2", "branch1", "branch2"):
        params[layer]["norm"]["scale"] = variables["params"][layer]["norm"]["scale"]
    params["excite"]["bias"] = jnp.full(3, 50.0)
    # Every layer is the identity, so the block adds to its input one chunk that passed and two that were summed up.
    out = block.apply({**variables, "params": params}, ones, None, train=False)
    np.testing.assert_allclose(out, np.broadcast_to(expected, (1, 9, 3)), rtol=1e-4)


@pytest.mark.parametrize("dialect", DIALECT_NAMES)
def test_training_moves_the_statistics_and_has_finite_gradients(dialect):
    # A constant channel is where a deviation's gradient would be infinite.
    features = jax.random.normal(jax.random.key(0), (2, 20, 20)).at[..., 3].set(0.5)
    model, _, variables = small(dialect, normalize_embedding=True)

    @jax.jit
    def loss(params):
        stats = variables["batch_stats"]
        embedding, updated = model.apply(
            {"params": params, "batch_stats": stats}, features, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.square(embedding - 1)), updated["batch_stats"]

    (_, stats), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    silent = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradient) if not np.any(leaf)]
    assert not [path for path in silent if path.endswith("['kernel']")]
    moved = jax.tree.map(lambda new, old: bool(np.any(new != old)), stats, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("dialect", DIALECT_NAMES)
def test_bfloat16_computation_keeps_float32_parameters_and_embeddings(dialect):
    features = jax.random.normal(jax.random.key(0), (2, 40, 20))
    _, apply_narrow, variables = small(dialect, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    wide = small(dialect)[1](variables, features)
    narrow = apply_narrow(variables, features)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, atol=0.05 * float(np.abs(wide).max()))


def test_every_weight_is_a_kernel():
    params = jax.eval_shape(Network("ecapa_speechbrain", SMALL).init, jax.random.key(0))["params"]
    weights = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(params) if leaf.ndim > 1]
    assert weights and all(path.endswith("['kernel']") for path in weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dialect": "kaldi"}, "dialect must be one of"),
        ({"channels": 0}, "channels must be positive"),
        ({"channels": 20, "scale": 8}, "scale must be at least 2 and divide channels"),
        ({"scale": 1}, "scale must be at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ECAPA(**arguments).init(jax.random.key(0), jnp.zeros((1, 16, 80)))


def test_a_name_fixes_its_dialect():
    with pytest.raises(ValueError, match="dialect"):
        Network("ecapa", {"dialect": "speechbrain"})


@pytest.mark.parametrize(
    ("name", "frontend"),
    [("ecapa", KaldiFbank(window="hamming")), ("ecapa_speechbrain", SpeechBrainFbank())],
)
def test_network_embeds_padded_waveforms_like_single_ones(name, frontend):
    network = Network(name, SMALL, frontend)
    variables = trained_like(network.init(jax.random.key(0)))
    waveform = 0.1 * jax.random.normal(jax.random.key(1), (2, 9000))
    lengths = jnp.array([9000, 4000])
    together = network.embed(variables, waveform, lengths)
    for row, length in enumerate(lengths):
        alone = network.embed(variables, waveform[row : row + 1, :length])
        np.testing.assert_allclose(together[row], alone[0], rtol=1e-5, atol=1e-5)
    assert Network.from_json(network.to_json()) == network
