"""Policies, plans, and quantization of whole trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qsv
from qsv.quant import leaf_paths, level_spacings, scales, with_scales


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8)), "bias": jnp.ones(8)},
        "dense": {"kernel": jax.random.normal(keys[1], (16, 5))},
        "norm": {"scale": jax.random.normal(keys[2], (8,))},
    }


POLICY = [
    qsv.Rule("dense/.*", qsv.Uniform(8)),
    qsv.Rule(".*/kernel", qsv.KMeans(4)),
    qsv.Rule(".*", None),
]


def test_first_match_decides(params):
    plan = qsv.resolve(POLICY, params)
    assert dict(plan) == {
        "conv/bias": None,
        "conv/kernel": qsv.KMeans(4),
        "dense/kernel": qsv.Uniform(8),
        "norm/scale": None,
    }
    assert list(plan.quantized) == ["conv/kernel", "dense/kernel"]
    assert hash(plan) == hash(qsv.resolve(POLICY, params))


def test_a_policy_resolves_on_shapes_alone(params):
    shapes = jax.eval_shape(lambda: params)
    assert qsv.resolve(POLICY, shapes) == qsv.resolve(POLICY, params)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([], "no rules"),
        (
            [qsv.Rule(".*/kernel", qsv.KMeans(4))],
            r"no rule covers 'conv/bias' \(8,\); add Rule\('\.\*', None\)",
        ),
        ([qsv.Rule("lstm/.*", qsv.KMeans(4)), qsv.Rule(".*", None)], r"\['lstm/\.\*'\] decide no leaf"),
        ([qsv.Rule(".*", None), qsv.Rule(".*/kernel", qsv.KMeans(4))], "decide no leaf"),
        # A pattern must match the whole path.
        ([qsv.Rule("kernel", qsv.KMeans(4)), qsv.Rule(".*", None)], "decide no leaf"),
    ],
)
def test_bad_policies_are_refused(params, policy, message):
    with pytest.raises(ValueError, match=message):
        qsv.resolve(policy, params)


def test_bad_rules_are_refused(params):
    with pytest.raises(ValueError, match="regular expression"):
        qsv.Rule("(", None)
    with pytest.raises(ValueError, match="quantizer must be"):
        qsv.Rule(".*", 4)
    with pytest.raises(ValueError, match="int32"):
        qsv.resolve([qsv.Rule(".*", qsv.KMeans(4))], {"table": jnp.zeros(3, jnp.int32)})


def test_trained_equals_served_bit_for_bit(params):
    plan = qsv.resolve(POLICY, params)
    qstate = qsv.init(plan, params)
    fake = jax.jit(lambda p, q: qsv.fake_quantize(plan, p, q))(params, qstate)
    packed = qsv.quantize(plan, params, qstate)
    served = qsv.dequantize(packed)
    for (path, trained), (_, loaded) in zip(leaf_paths(fake), leaf_paths(served), strict=True):
        np.testing.assert_array_equal(trained, loaded, err_msg=path)
    assert isinstance(packed["conv"]["kernel"], qsv.QTensor)
    assert packed["conv"]["bias"] is params["conv"]["bias"]
    assert len(np.unique(fake["conv"]["kernel"])) == 16


def test_gradient_reaches_parameters_and_scales(params):
    plan = qsv.resolve(POLICY, params)
    qstate = qsv.init(plan, params)

    def loss(params, learnt):
        quantized = qsv.fake_quantize(plan, params, with_scales(qstate, learnt))
        return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(quantized))

    to_params, to_scales = jax.grad(loss, argnums=(0, 1))(params, scales(qstate))
    assert set(to_scales) == {"conv/kernel", "dense/kernel"}
    assert all(float(jnp.abs(g)) > 0 for g in to_scales.values())
    fake = qsv.fake_quantize(plan, params, qstate)
    np.testing.assert_allclose(to_params["conv"]["kernel"], 2 * fake["conv"]["kernel"], rtol=1e-6)


def test_scales_stay_positive(params):
    plan = qsv.resolve(POLICY, params)
    qstate = qsv.init(plan, params)
    moved = with_scales(qstate, {path: -scale for path, scale in scales(qstate).items()})
    assert all(float(state.scale) > 0 for state in moved.values())


def test_refresh_follows_the_weights(params):
    plan = qsv.resolve(POLICY, params)
    qstate = qsv.init(plan, params)
    grown = jax.tree.map(lambda leaf: 1.3 * leaf, params)
    refreshed = qstate
    for _ in range(20):
        refreshed = qsv.refresh(plan, grown, refreshed)
    kernel, spec = grown["conv"]["kernel"], plan["conv/kernel"]

    def error(states):
        return float(jnp.mean(jnp.square(kernel - spec.fake_quantize(kernel, states["conv/kernel"]))))

    assert error(refreshed) < 0.5 * error(qstate)
    assert error(refreshed) < 1.3 * error(qsv.init(plan, grown))
    assert refreshed["dense/kernel"] is qstate["dense/kernel"]


def test_a_plan_for_another_tree_is_refused(params):
    plan = qsv.resolve(POLICY, params)
    with pytest.raises(ValueError, match=r"in the plan only \['norm/scale'\]"):
        qsv.init(plan, {"conv": params["conv"], "dense": params["dense"]})


def test_weights_that_are_not_finite_are_refused(params):
    plan = qsv.resolve(POLICY, params)
    params["conv"]["kernel"] = params["conv"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="'conv/kernel' holds NaN"):
        qsv.init(plan, params)


def test_packed_trees_pass_through_jit(params):
    plan = qsv.resolve(POLICY, params)
    packed = qsv.quantize(plan, params, qsv.init(plan, params))
    decoded = jax.jit(qsv.dequantize)(packed)
    np.testing.assert_array_equal(decoded["conv"]["kernel"], qsv.dequantize(packed)["conv"]["kernel"])


def test_level_spacings_are_in_the_unit_of_the_weights():
    weights = jnp.asarray(np.random.default_rng(0).normal(0, 0.3, (64, 5)), jnp.float32)
    params = {name: {"kernel": weights} for name in ("plain", "channels", "restored", "float")}
    rules = [
        qsv.Rule("plain/.*", qsv.Uniform(3)),
        qsv.Rule("channels/.*", qsv.KMeans(2, channel_axes=(-1,), share_codebook=True)),
        qsv.Rule("restored/.*", qsv.PowerOfTwo(3, normalization="restore")),
        qsv.Rule(".*", None),
    ]
    plan = qsv.resolve(rules, params)
    qstate = qsv.init(plan, params)
    spacings = level_spacings(plan, params, qstate)
    assert set(spacings) == set(plan.quantized)
    for path, spacing in spacings.items():
        found = np.asarray(qsv.fake_quantize(plan, params, qstate)[path.split("/")[0]]["kernel"])
        nearest = []
        for column in found.T if path.startswith("channels") else [found.ravel()]:
            levels = np.unique(column)
            places, gaps = np.searchsorted(levels, column), np.diff(levels)
            below, above = gaps[np.maximum(places - 1, 0)], gaps[np.minimum(places, len(gaps) - 1)]
            nearest.append(np.minimum(below, above))
        assert float(spacing) == pytest.approx(np.mean(nearest), rel=1e-5)


def test_level_spacings_are_those_of_most_weights_not_of_the_largest():
    weights = jnp.asarray(np.append(np.linspace(-1, 1, 1000), 100.0), jnp.float32)
    plan = qsv.resolve([qsv.Rule(".*", qsv.KMeans(3))], {"kernel": weights})
    qstate = qsv.init(plan, {"kernel": weights})
    assert float(level_spacings(plan, {"kernel": weights}, qstate)["kernel"]) < 1.0
    flat = {"kernel": jnp.zeros(4)}
    assert float(level_spacings(plan, flat, qsv.init(plan, flat))["kernel"]) == 0
