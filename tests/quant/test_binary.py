"""One-bit quantizers: levels, codes and gradients by their closed forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import GE2E
from qsv.quant import (
    AdaptiveBinary,
    KMeans,
    QuantizerState,
    Rule,
    StaticBinary,
    anneal,
    binarize,
    compensated_rounding,
    dequantize,
    error_decay,
    fake_quantize,
    init,
    quantize,
    refresh,
    resolve,
    scales,
    with_scales,
)

SPECS = [
    StaticBinary(),
    StaticBinary(scale="one"),
    StaticBinary(balanced=False, backward="clipped"),
    StaticBinary(channel_axes=(-1,)),
    AdaptiveBinary(),
    AdaptiveBinary(backward="clipped"),
    AdaptiveBinary(channel_axes=(-1,)),
]


@pytest.fixture
def weights():
    return jnp.asarray(np.random.default_rng(0).normal(0.02, 0.05, (3, 3, 4, 6)), jnp.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_fake_quantized_equals_decoded_and_has_two_levels(spec, compiled, weights):
    wrap = jax.jit if compiled else (lambda call: call)
    state = wrap(spec.init)(weights)
    found = wrap(spec.fake_quantize)(weights, state)
    np.testing.assert_array_equal(found, spec.quantize(weights, state).dequantize())
    per_channel = bool(spec.channel_axes)
    assert all(
        len(np.unique(part)) == 2 for part in (np.moveaxis(np.asarray(found), -1, 0) if per_channel else [found])
    )


def test_static_levels_are_a_power_of_two_around_the_mean(weights):
    spec = StaticBinary()
    values = np.asarray(weights, np.float64)
    expected = 2.0 ** np.round(np.log2(np.abs(values - values.mean()).mean()))
    found = spec.fake_quantize(weights, spec.init(weights))
    np.testing.assert_array_equal(found, np.where(values >= np.float32(values.mean()), expected, -expected))
    one = StaticBinary(scale="one", balanced=False)
    np.testing.assert_array_equal(one.fake_quantize(weights, one.init(weights)), np.where(values >= 0, 1, -1))


def test_adaptive_levels_are_a_deviation_from_the_mean(weights):
    values = np.asarray(weights, np.float64)
    found = AdaptiveBinary().fake_quantize(weights, AdaptiveBinary().init(weights))
    np.testing.assert_allclose(
        np.unique(found), [values.mean() - values.std(), values.mean() + values.std()], rtol=1e-5
    )
    spec = AdaptiveBinary(channel_axes=(-1,))
    each = spec.fake_quantize(weights, spec.init(weights))
    own = values.reshape(-1, 6)
    np.testing.assert_allclose(each.reshape(-1, 6).max(axis=0), own.mean(axis=0) + own.std(axis=0), rtol=1e-5)


def test_importance_moves_the_adaptive_levels_as_repeating_weights_does():
    spec = AdaptiveBinary()
    once = spec.init(jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 3.0, 2.0]))
    repeated = spec.init(jnp.array([1.0, 2.0, 2.0, 2.0, 4.0, 4.0]))
    np.testing.assert_allclose(once.codebook * once.scale, repeated.codebook * repeated.scale, rtol=1e-6)


def slope(x, spec, progress):
    if spec.backward == "clipped":
        return np.abs(x) <= 1
    t = 10 ** (-1 + 2 * progress)
    return max(1 / t, 1) * t * (1 - np.tanh(t * x) ** 2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_gradients_are_the_closed_forms(spec, progress, weights):
    upstream = jnp.asarray(np.random.default_rng(1).normal(size=weights.shape), jnp.float32)
    state = spec.anneal(spec.init(weights), progress)

    def objective(weights, scale):
        return jnp.sum(upstream * spec.fake_quantize(weights, dataclasses.replace(state, scale=scale)))

    found, toward_scale = jax.jit(jax.grad(objective, argnums=(0, 1)))(weights, state.scale)
    values, axes = np.asarray(weights, np.float64), (0, 1, 2) if spec.channel_axes else None
    levels = np.asarray(state.codebook * (state.scale[..., None] if spec.channel_axes else state.scale), np.float64)
    half = (levels[..., 1] - levels[..., 0]) / 2
    if isinstance(spec, StaticBinary):
        center = values.mean(axis=axes, keepdims=bool(axes)) if spec.balanced else 0
        spread = values.std(axis=axes, keepdims=bool(axes))
        expected_scale = np.zeros(state.scale.shape)
    else:
        center, spread = (levels[..., 0] + levels[..., 1]) / 2, half
        unit = np.where(values >= center, np.asarray(state.codebook)[..., 1], np.asarray(state.codebook)[..., 0])
        expected_scale = (np.asarray(upstream) * unit).sum(axis=axes, keepdims=bool(axes))
    expected = np.asarray(upstream) * slope((values - center) / spread, spec, progress) * half / spread
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(toward_scale, expected_scale, rtol=1e-4, atol=1e-4)


def test_the_decay_goes_from_a_line_to_a_step():
    assert [float(value) for value in error_decay(0.0)] == pytest.approx([0.1, 10.0])
    assert [float(value) for value in error_decay(0.5)] == pytest.approx([1.0, 1.0])
    assert [float(value) for value in error_decay(2.0)] == pytest.approx([10.0, 1.0])


def test_annealing_changes_the_backward_pass_alone_and_recompiles_nothing(weights):
    params = {"a": {"kernel": weights}, "b": {"kernel": weights}}
    plan = resolve([Rule("a/.*", AdaptiveBinary()), Rule("b/.*", KMeans(2))], params)
    qstate = init(plan, params)
    traces = []

    @jax.jit
    def gradient(progress):
        traces.append(progress)
        states = anneal(plan, qstate, progress)
        return jax.value_and_grad(lambda tree: sum(map(jnp.sum, jax.tree.leaves(fake_quantize(plan, tree, states)))))(
            params
        )

    (early, first), (late, last) = gradient(0.0), gradient(1.0)
    assert len(traces) == 1
    assert early == late
    assert not np.allclose(first["a"]["kernel"], last["a"]["kernel"])
    np.testing.assert_array_equal(first["b"]["kernel"], last["b"]["kernel"])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_zero_counts_as_positive_and_flat_tensors_survive(spec):
    zeros = jnp.zeros((2, 3))
    state = spec.init(zeros)
    assert np.all(spec.quantize(zeros, state).codes == 1)
    for flat in (zeros, jnp.full((2, 3), 0.25)):
        found, pull_back = jax.vjp(spec.fake_quantize, flat, spec.init(flat))
        assert np.all(np.isfinite(found))
        assert np.all(np.isfinite(pull_back(jnp.ones_like(found))[0]))
    np.testing.assert_array_equal(
        binarize(jnp.array([-0.0, 0.0, -1e-9]), jnp.array([-1.0, 1.0]), 0.0, 1.0), [1.0, 1.0, -1.0]
    )
    assert np.isfinite(spec.init(jnp.zeros((0, 3))).scale).all()


def test_flat_tensors_keep_their_value_where_levels_are_fitted():
    flat = jnp.full((4,), 0.25)
    np.testing.assert_array_equal(AdaptiveBinary().fake_quantize(flat, AdaptiveBinary().init(flat)), flat)


@pytest.mark.parametrize("spec", [StaticBinary(), AdaptiveBinary(), AdaptiveBinary(channel_axes=(-1,))], ids=str)
def test_every_kind_of_layer_is_quantized(spec):
    """Convolutions (plain, depthwise, along time), dense layers and the kernels of an LSTM."""

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), name="plain")(x)
            x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
            x = nn.Conv(6, (5,), name="along_time")(x.reshape(*x.shape[:2], -1))
            return nn.Dense(4, name="dense")(x)

    params = dict(Layers().init(jax.random.key(0), jnp.zeros((1, 10, 4, 1)))["params"])
    params |= GE2E(hidden_size=8, num_layers=2, embedding_size=4).init(jax.random.key(1), jnp.zeros((1, 160, 40)))[
        "params"
    ]
    plan = resolve([Rule(".*/kernel", spec), Rule(".*", None)], params)
    kinds = {path.rpartition("/")[0] for path in plan.quantized}
    assert kinds > {"plain", "depthwise", "along_time", "dense", "lstm1/input", "lstm2/hidden"}
    qstate = init(plan, params)
    qstate = with_scales(refresh(plan, params, qstate), scales(qstate))
    found = fake_quantize(plan, params, qstate)
    jax.tree.map(np.testing.assert_array_equal, found, dequantize(quantize(plan, params, qstate)))
    assert len(np.unique(np.asarray(found["depthwise"]["kernel"])[..., 0])) == 2


def test_refreshed_levels_follow_the_weights(weights):
    for spec in (StaticBinary(), AdaptiveBinary()):
        state = spec.init(weights)
        moved = spec.refresh(4 * weights, state)
        np.testing.assert_allclose(moved.scale, 4 * state.scale, rtol=1e-6)
    slow = AdaptiveBinary(refresh_rate=0.5)
    np.testing.assert_allclose(
        slow.refresh(3 * weights, slow.init(weights)).scale, 2 * slow.init(weights).scale, rtol=1e-6
    )


def test_rows_cannot_be_rounded_one_by_one_around_the_mean_of_all(weights):
    state = QuantizerState(jnp.array([-1.0, 1.0]), jnp.ones(()))
    with pytest.raises(ValueError, match="rows can't be normalised one by one"):
        compensated_rounding(weights, jnp.eye(36), StaticBinary(), state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticBinary(scale="two"), "scale must be 'one' or 'power_of_two', got 'two'"),
        (lambda: AdaptiveBinary(backward="soft"), "backward must be 'ede' or 'clipped', got 'soft'"),
        (lambda: AdaptiveBinary(refresh_rate=0.0), "refresh_rate must be in"),
        (lambda: StaticBinary(channel_axes=-1), "channel_axes must be a tuple"),
        (lambda: binarize(jnp.ones(2), jnp.ones(2), 0.0, 1.0, backward="soft"), "backward must be"),
    ],
)
def test_wrong_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
