"""Ranges of activations: levels, exact gradients, calibration, binary maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.quant import ActivationQuantizer, ActivationRange, binary_activation, calibrate_range

AFFINE, SYMMETRIC = ActivationQuantizer(), ActivationQuantizer(symmetric=True)
QUANTIZERS = [AFFINE, SYMMETRIC, ActivationQuantizer(4), ActivationQuantizer(2, symmetric=True)]


def a_range(low, high):
    return ActivationRange(jnp.float32(low), jnp.float32(high))


@pytest.fixture
def values():
    return jnp.asarray(np.random.default_rng(0).normal(0.5, 1.0, (64, 5)), jnp.float32)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
@pytest.mark.parametrize("ends", [(-1.0, 2.0), (0.0, 3.0), (-2.0, 0.0), (0.5, 1.0)])
def test_values_are_on_few_levels_with_zero_among_them(values, quantizer, ends):
    own = a_range(*ends)
    found = quantizer.fake_quantize(values, own)
    assert len(np.unique(found)) <= 2**quantizer.bits - quantizer.symmetric
    np.testing.assert_array_equal(quantizer.fake_quantize(found, own), found)
    np.testing.assert_array_equal(quantizer.dequantize(quantizer.quantize(values, own), own), found)
    assert quantizer.fake_quantize(jnp.zeros(3), own).tolist() == [0, 0, 0]


def test_codes_by_hand():
    own = a_range(-1.0, 2.0)
    quantizer = ActivationQuantizer(2)
    values = jnp.array([-5.0, -1.0, -0.4, 0.6, 2.0, 9.0])
    assert quantizer.grid(own) == (1.0, 1.0)
    codes = quantizer.quantize(values, own)
    assert codes.dtype == jnp.uint8 and codes.tolist() == [0, 0, 1, 2, 3, 3]
    assert quantizer.dequantize(codes, own).tolist() == [-1, -1, 0, 1, 2, 2]
    signed = ActivationQuantizer(3, symmetric=True)
    codes = signed.quantize(values, own)
    assert codes.dtype == jnp.int8 and codes.tolist() == [-3, -2, -1, 1, 3, 3]


def test_error_within_the_range_is_at_most_half_a_step(values):
    for quantizer in (AFFINE, SYMMETRIC):
        own = a_range(float(values.min()), float(values.max()))
        scale, _ = quantizer.grid(own)
        # The zero point is rounded, so that an end may lie half a step beyond the codes.
        assert float(jnp.abs(quantizer.fake_quantize(values, own) - values).max()) <= 1.001 * float(scale)


def test_affine_gradients_are_the_closed_form():
    quantizer, own = ActivationQuantizer(2), a_range(-1.0, 2.0)
    values = jnp.array([-5.0, -0.4, 0.6, 9.0])
    cotangent = jnp.array([1.0, 10.0, 100.0, 1000.0])
    _, pullback = jax.vjp(quantizer.fake_quantize, values, own)
    to_values, to_range = pullback(cotangent)
    np.testing.assert_allclose(to_values, [0, 10, 100, 0])
    residual = (10 * 0.4 + 100 * 0.4) / 3
    np.testing.assert_allclose(to_range.high, 1000 + residual, rtol=1e-5)
    np.testing.assert_allclose(to_range.low, 1 - residual, rtol=1e-5)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_an_end_at_zero_stays_there(quantizer):
    values = jnp.array([0.0, 0.4, 0.6, 9.0])
    gradient = jax.grad(lambda own, values: quantizer.fake_quantize(values, own).sum())
    positive, negative = gradient(a_range(0.0, 2.0), values), gradient(a_range(-2.0, 0.0), -values)
    assert positive.low == 0 < positive.high
    assert negative.high == 0 < negative.low


@pytest.mark.parametrize("negative", [False, True])
def test_symmetric_gradients_go_to_the_larger_end(negative):
    quantizer = ActivationQuantizer(3, symmetric=True)
    own = a_range(-3.0, 1.0) if negative else a_range(-1.0, 3.0)
    values, cotangent = jnp.array([-5.0, 0.6, 9.0]), jnp.array([1.0, 10.0, 100.0])
    _, pullback = jax.vjp(quantizer.fake_quantize, values, own)
    to_values, to_range = pullback(cotangent)
    np.testing.assert_allclose(to_values, [0, 10, 0])
    of_scale = -1 + 10 * 0.4 / 3 + 100
    expected = (-of_scale, 0) if negative else (0, of_scale)
    np.testing.assert_allclose((to_range.low, to_range.high), expected, rtol=1e-5)


def test_gradient_of_the_range_agrees_with_its_finite_difference_on_average(values):
    """The rounding averages out over many values, what is left is the clipping."""
    many = jnp.asarray(np.random.default_rng(1).uniform(0, 4, 200_000), jnp.float32)

    def loss(high):
        return jnp.mean(jnp.square(AFFINE.fake_quantize(many, ActivationRange(jnp.float32(0), high)) - many))

    difference = (loss(jnp.float32(2.05)) - loss(jnp.float32(1.95))) / 0.1
    assert float(jax.grad(loss)(jnp.float32(2.0))) == pytest.approx(float(difference), rel=0.02)


def test_ranges_by_channel_have_their_own_gradients(values):
    own = calibrate_range([values], AFFINE, method="min_max", channel_axis=-1)
    assert own.low.shape == own.high.shape == (1, 5)
    found = AFFINE.fake_quantize(values, own)
    alone = [AFFINE.fake_quantize(values[:, i], a_range(own.low[0, i], own.high[0, i])) for i in range(5)]
    np.testing.assert_allclose(found, np.stack(alone, axis=1), atol=1e-6)
    gradient = jax.grad(lambda r: jnp.sum(AFFINE.fake_quantize(values, r) * jnp.arange(5.0)))(own)
    assert gradient.high.shape == (1, 5) and gradient.high[0, 0] == 0


def test_jit_traces_once_and_gives_the_same(values):
    traced = []

    @jax.jit
    def apply(x, own):
        traced.append(1)
        return AFFINE.fake_quantize(x, own)

    for high in (1.0, 2.0):
        own = a_range(-1.0, high)
        np.testing.assert_allclose(apply(values, own), AFFINE.fake_quantize(values, own), atol=1e-6)
    assert len(traced) == 1


def test_bfloat16_stays_bfloat16(values):
    narrow = values.astype(jnp.bfloat16)
    assert AFFINE.fake_quantize(narrow, a_range(-1, 2)).dtype == jnp.bfloat16
    assert binary_activation(narrow).dtype == jnp.bfloat16
    assert jax.grad(lambda x: AFFINE.fake_quantize(x, a_range(-1, 2)).sum())(narrow).dtype == jnp.bfloat16


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_an_empty_range_gives_zeros(values, quantizer):
    assert not np.any(quantizer.fake_quantize(jnp.zeros(4), a_range(0, 0)))
    gradient = jax.grad(lambda own: quantizer.fake_quantize(values, own).sum())(a_range(0, 0))
    assert np.isfinite([gradient.low, gradient.high]).all()


def test_calibrations_of_heavy_tails():
    rng = np.random.default_rng(0)
    batches = [np.maximum(rng.standard_t(3, (100, 100)), 0).astype(np.float32) for _ in range(3)]
    ranges = {method: calibrate_range(batches, ActivationQuantizer(4), method=method) for method in ("min_max", "mse")}
    ranges["percentile"] = calibrate_range(batches, ActivationQuantizer(4), method="percentile", percentile=99.0)
    everything = np.concatenate(batches)
    assert ranges["min_max"].high == everything.max() and all(own.low == 0 for own in ranges.values())
    np.testing.assert_allclose(ranges["percentile"].high, np.quantile(everything, 0.995), rtol=0.02)

    def error(own):
        found = ActivationQuantizer(4).fake_quantize(jnp.asarray(everything), own)
        return float(jnp.mean(jnp.square(found - everything)))

    errors = {method: error(own) for method, own in ranges.items()}
    assert errors["mse"] < errors["min_max"] and errors["mse"] <= errors["percentile"]
    # No share of the whole range is much better than the one that was found.
    scanned = [error(a_range(0.0, share * float(everything.max()))) for share in np.linspace(0.1, 1, 50)]
    assert errors["mse"] <= 1.02 * min(scanned)


def test_ranges_take_zero_in():
    own = calibrate_range([np.array([2.0, 3.0])], AFFINE, method="min_max")
    assert (own.low, own.high) == (0, 3)
    own = calibrate_range([np.array([-3.0, -2.0])], SYMMETRIC)
    assert own.high == 0 and own.low < -2.9


@pytest.mark.parametrize("signed", [False, True])
def test_binary_maps_and_their_surrogate(signed):
    values = jnp.array([-2.0, -0.0, 0.0, 0.1, 3.0])
    low = -1 if signed else 0
    assert binary_activation(values, 5.0, signed).tolist() == [low, low, low, 1, 1]
    gradient = jax.grad(lambda x: jnp.sum(3 * binary_activation(x, 5.0, signed)))(values)
    np.testing.assert_allclose(gradient, 3 / (5 * np.abs(values) + 1) ** 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationQuantizer(1), "bits must be an integer from 2 to 8"),
        (lambda: calibrate_range([], AFFINE), "at least one value"),
        (lambda: calibrate_range([np.array([np.nan])], AFFINE), "must be finite"),
        (lambda: calibrate_range([np.ones(2)], AFFINE, method="best"), "method must be"),
        (lambda: calibrate_range([np.ones(2)], AFFINE, method="percentile", percentile=0), "percentile must be"),
        (lambda: calibrate_range([np.ones((2, 2))], AFFINE, channel_axis=1), "need method='min_max'"),
        (lambda: binary_activation(jnp.ones(2), 0.0), "beta must be positive"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
