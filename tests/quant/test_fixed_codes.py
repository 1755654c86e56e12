"""Codes that stay while their levels are trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.quant import FixedCodes, KMeans, StaticBinary, Uniform

QUANTIZERS = [KMeans(4), Uniform(3), KMeans(2, channel_axes=(-1,)), KMeans(3, channel_axes=(-1,), share_codebook=True)]


@pytest.fixture
def weights():
    return jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)), jnp.float32)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_levels_and_codes_are_the_quantizers_own(weights, quantizer):
    fixed = FixedCodes(quantizer)
    state = fixed.init(weights)
    units = fixed.fixed(weights, state)
    np.testing.assert_allclose(
        fixed.fake_quantize(units, state), quantizer.fake_quantize(weights, state), rtol=1e-6, atol=1e-7
    )
    packed = fixed.quantize(units, state)
    np.testing.assert_array_equal(packed.codes, quantizer.quantize(weights, state).codes)
    np.testing.assert_array_equal(packed.dequantize(), fixed.fake_quantize(units, state))
    assert fixed.bits == quantizer.bits


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_codes_stay_whatever_becomes_of_the_scale(weights, quantizer, factor):
    fixed = FixedCodes(quantizer)
    state = fixed.init(weights)
    units = fixed.fixed(weights, state)
    trained = dataclasses.replace(state, scale=factor * state.scale)
    codes = quantizer.quantize(weights, state).codes
    np.testing.assert_array_equal(fixed.quantize(units, trained).codes, codes)
    released = fixed.released(units, trained)
    np.testing.assert_array_equal(quantizer.quantize(released, trained).codes, codes)
    np.testing.assert_allclose(
        quantizer.fake_quantize(released, trained), fixed.fake_quantize(units, trained), rtol=1e-6, atol=1e-7
    )
    assert fixed.refresh(units, trained) is trained


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_the_gradient_of_the_scale_is_that_of_the_levels(weights, quantizer):
    fixed = FixedCodes(quantizer)
    state = fixed.init(weights)
    units = fixed.fixed(weights, state)
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=weights.shape), jnp.float32)

    def loss(u, scale):
        return jnp.sum(cotangent * fixed.fake_quantize(u, dataclasses.replace(state, scale=scale)))

    to_units, to_scale = jax.grad(loss, argnums=(0, 1))(units, state.scale)
    assert not np.any(to_units)
    expected = cotangent * quantizer.fake_quantize(weights, state) / state.scale
    axes = tuple(axis for axis in range(3) if state.scale.ndim and state.scale.shape[axis] == 1)
    expected = expected.sum(axis=axes, keepdims=True) if state.scale.ndim else expected.sum()
    np.testing.assert_allclose(to_scale, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantizer", [KMeans(4, normalization="standardize"), StaticBinary()], ids=repr)
def test_levels_that_follow_the_weights_are_refused(quantizer):
    with pytest.raises(ValueError, match="depend on its weights"):
        FixedCodes(quantizer)
