"""Networks of speech quality: published sizes, binary maps, padding, dropout."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import DNSMOS, Network, count_parameters, fold_norms, model_names
from qsv.models.dnsmos import halved

SMALL = DNSMOS(channels=(4, 4, 8), pooled=(1, 3), dense=(8,))


@pytest.mark.parametrize(("name", "parameters"), [("dnsmos", 45_697), ("dnsmos_p808", 54_945)])
def test_sizes_are_the_published_ones(name, parameters):
    network = Network.of_size(name)
    assert network.use == "quality" and network.embedding_size == 1
    assert name in model_names("quality") and name not in model_names()
    variables = network.init(jax.random.key(0))
    assert count_parameters(variables["params"]) == parameters
    assert Network.from_json(network.to_json()) == network
    assert network.embed(variables, jnp.zeros((2, 8000))).shape == (2, 1)


def test_binary_maps_are_zeros_and_ones():
    model = SMALL.clone(maps="binary")
    features = jax.random.normal(jax.random.key(1), (2, 17, 12))
    variables = model.init(jax.random.key(0), features)
    seen = {}

    def keep(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.name in ("conv2", "conv3", "dense1"):
            seen[context.module.name] = np.unique(args[0])
        return call(*args, **kwargs)

    with jax.disable_jit(), nn.intercept_methods(keep):
        model.apply(variables, features)
    assert sorted(seen) == ["conv2", "conv3", "dense1"]
    for values in seen.values():
        assert set(values) <= {0.0, 1.0} and len(values) == 2


def test_binary_maps_are_trained_through():
    model = SMALL.clone(maps="binary", beta=1.0)
    features = jax.random.normal(jax.random.key(1), (2, 16, 12))
    variables = model.init(jax.random.key(0), features)
    gradient = jax.grad(lambda params: jnp.sum(model.apply({"params": params}, features)))(variables["params"])
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient["conv1"]))


@pytest.mark.parametrize("maps", ["relu", "binary"])
@pytest.mark.parametrize("frames", [8, 9, 15])
def test_padding_never_changes_a_score(maps, frames):
    model = SMALL.clone(maps=maps)
    features = jax.random.normal(jax.random.key(1), (1, frames, 12))
    variables = model.init(jax.random.key(0), features)
    alone = model.apply(variables, features)
    garbage = jnp.pad(features, ((0, 0), (0, 8), (0, 0)), constant_values=9.0)
    padded = model.apply(variables, garbage, jnp.arange(frames + 8)[None] < frames)
    np.testing.assert_allclose(padded, alone, atol=1e-6)


def test_a_row_without_a_valid_frame_stays_finite():
    features = jnp.ones((1, 8, 12))
    variables = SMALL.init(jax.random.key(0), features)
    assert np.isfinite(SMALL.apply(variables, features, jnp.zeros((1, 8), bool))).all()


def test_dropout_drops_its_share_and_only_in_training():
    features = jnp.ones((64, 8, 12))
    # Of so many channels hardly two examples drop the same.
    model = SMALL.clone(channels=(32, 32, 32), dropout=0.3)
    variables = model.init(jax.random.key(0), features)
    scores = model.apply(variables, features)
    assert np.ptp(scores) == 0
    rngs = {"dropout": jax.random.key(2)}
    dropped = model.apply(variables, features, train=True, rngs=rngs)
    # Each example has a draw of its own.
    assert len(np.unique(dropped)) > 60
    np.testing.assert_array_equal(dropped, model.apply(variables, features, train=True, rngs=rngs))
    kept = model.clone(dropout=0.0).apply(variables, features, train=True)
    np.testing.assert_array_equal(kept, scores)


def test_dropout_leaves_the_mean_of_the_global_maximum():
    """Of single values the maximum of those left, scaled up, would be larger in training than without dropout."""
    model = DNSMOS(channels=(64,), pooled=(1,), dense=(), dropout=0.3)
    features = jnp.tile(jax.random.normal(jax.random.key(1), (1, 40, 24)), (512, 1, 1))
    params = model.init(jax.random.key(0), features)["params"]
    # All maxima count alike, so that the score is their mean.
    params["score"]["kernel"] = jnp.full_like(params["score"]["kernel"], 1 / 64)
    expected = float(model.apply({"params": params}, features)[0, 0])
    dropped = np.asarray(model.apply({"params": params}, features, train=True, rngs={"dropout": jax.random.key(2)}))
    error = dropped.std() / np.sqrt(len(dropped))
    assert expected > 10 * error
    assert abs(dropped.mean() - expected) < 4 * error


@pytest.mark.parametrize("maps", ["relu", "binary"])
def test_folded_norms_compute_the_same_without_any(maps):
    model = SMALL.clone(maps=maps, normalized=True)
    features = jax.random.normal(jax.random.key(1), (8, 16, 12))
    variables = model.init(jax.random.key(0), features)
    for _ in range(30):
        _, statistics = model.apply(variables, features, train=True, mutable=["batch_stats"])
        variables |= statistics
    biases = {name: 0.1 + layer["bias"] for name, layer in variables["params"].items() if name.startswith("norm")}
    assert sorted(biases) == ["norm1", "norm2", "norm3"]
    params = variables["params"] | {name: {"bias": bias} for name, bias in biases.items()}
    expected = model.apply(variables | {"params": params}, features)
    assert np.ptp(expected) > 1e-3
    folded = fold_norms(params, variables["batch_stats"])
    plain = SMALL.clone(maps=maps)
    own = plain.init(jax.random.key(0), features)["params"]
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, own)
    np.testing.assert_allclose(plain.apply({"params": folded}, features), expected, atol=1e-5)


@pytest.mark.parametrize(("normalized", "low", "high"), [(False, 0.7, 1.0), (True, 0.4, 0.6)])
def test_normalised_binary_maps_are_balanced_where_others_are_mostly_ones(normalized, low, high):
    features = jax.random.normal(jax.random.key(1), (64, 16, 12))
    model = DNSMOS(channels=(16, 16), pooled=(1, 2), dense=(), maps="binary", normalized=normalized)
    variables = model.init(jax.random.key(0), features)
    variables["params"]["score"]["kernel"] = jnp.full_like(variables["params"]["score"]["kernel"], 1 / 16)
    scores, _ = model.apply(variables, features, train=True, mutable=["batch_stats"])
    assert low < float(jnp.mean(scores)) < high


def test_the_gradient_of_binary_maps_goes_to_the_value_that_decides():
    """One of four values is positive by far, and two by little: the largest alone makes the maximum a one."""
    features = jnp.array([[[0.1, 5.0], [0.2, -1.0]]])
    model = DNSMOS(channels=(1,), pooled=(1,), dense=(), maps="binary", beta=1.0)
    params = model.init(jax.random.key(0), features)["params"]
    params["conv1"]["kernel"] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    params["score"]["kernel"] = jnp.ones((1, 1))
    gradient = jax.grad(lambda x: jnp.sum(model.apply({"params": params}, x)))(features)
    np.testing.assert_allclose(gradient, [[[0, 1 / 36], [0, 0]]], rtol=1e-6)


def test_too_few_frames_or_unknown_maps_are_refused():
    with pytest.raises(ValueError, match="4 frames and bands at least"):
        SMALL.init(jax.random.key(0), jnp.ones((1, 3, 12)))
    with pytest.raises(ValueError, match="'ternary'"):
        SMALL.clone(maps="ternary").init(jax.random.key(0), jnp.ones((1, 8, 12)))


def test_the_gradient_of_pooling_is_that_of_max_pool_and_no_serial_loop():
    # Whole numbers of a small range are tied often; sizes are odd.
    x = jax.random.randint(jax.random.key(0), (2, 9, 7, 3), 0, 3).astype(jnp.float32)
    weights = jax.random.normal(jax.random.key(1), (2, 4, 3, 3))
    gradient = jax.grad(lambda x: jnp.sum(halved(x) * weights))
    expected = jax.grad(lambda x: jnp.sum(nn.max_pool(x, (2, 2), (2, 2)) * weights))(x)
    np.testing.assert_array_equal(gradient(x), expected)
    np.testing.assert_array_equal(jax.jvp(halved, (x,), (x,))[1], halved(x))
    assert "select_and_scatter" not in str(jax.make_jaxpr(gradient)(x))
    # What exporters trace is one operation.
    assert "reduce_window_max" in str(jax.make_jaxpr(halved)(x))
