"""What every quantizer promises, checked for each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qsv
from qsv.quant import nearest_codes

SPECS = [
    *[qsv.KMeans(bits) for bits in (1, 4, 8)],
    *[qsv.Uniform(bits) for bits in (2, 4, 8)],
    *[qsv.PowerOfTwo(bits) for bits in (4, 8)],
    *[qsv.AdditivePowerOfTwo(bits) for bits in (2, 5)],
    qsv.KMeans(4, channel_axes=(-1,)),
    qsv.KMeans(6, channel_axes=(2, 3)),
    qsv.KMeans(4, method="equal_mass", central_fraction=0.9),
    qsv.Uniform(4, channel_axes=(-1,)),
    qsv.Uniform(4, normalization="standardize"),
    qsv.Uniform(4, normalization="restore"),
    qsv.KMeans(4, channel_axes=(-1,), normalization="restore"),
    qsv.PowerOfTwo(4, channel_axes=(-1,), normalization="standardize"),
]
LEARNT = [spec for spec in SPECS if spec.normalization == "none"]


def kernel(shape=(3, 3, 5, 6), dtype=jnp.float32):
    return (0.1 * jax.random.t(jax.random.key(0), 4.0, shape)).astype(dtype)


@pytest.fixture(params=SPECS, ids=str)
def spec(request):
    return request.param


def test_fake_quantize_equals_dequantized_codes_bit_for_bit(spec):
    weights = kernel()
    state = spec.init(weights)
    packed = spec.quantize(weights, state)
    np.testing.assert_array_equal(spec.fake_quantize(weights, state), packed.dequantize())
    assert packed.codes.dtype == jnp.uint8 and packed.codes.shape == weights.shape
    assert int(packed.codes.max()) < 2**spec.bits


def test_jit_equals_eager_and_traces_once(spec):
    weights = kernel()
    state = spec.init(weights)
    traces = []

    def both(weights, state):
        traces.append(1)
        return spec.fake_quantize(weights, state), spec.quantize(weights, state)

    compiled = jax.jit(both)
    fake, packed = compiled(weights, state)
    compiled(weights * 2, state)
    assert len(traces) == 1
    np.testing.assert_array_equal(fake, packed.dequantize())
    # Statistics of a compiled normalisation may differ by a rounding, codes at a tie with them.
    np.testing.assert_allclose(
        fake, spec.fake_quantize(weights, state), rtol=1e-5 if spec.normalization != "none" else 0
    )


def test_at_most_two_to_the_bits_values(spec):
    values = np.asarray(spec.fake_quantize(kernel(), spec.init(kernel())))
    axes = tuple(axis % 4 for axis in spec.channel_axes)
    channels = np.moveaxis(values, axes, range(len(axes))).reshape(
        int(np.prod([values.shape[axis] for axis in axes])), -1
    )
    for channel in channels:
        assert len(np.unique(channel)) <= 2**spec.bits


@pytest.mark.parametrize("spec", LEARNT, ids=str)
def test_idempotent(spec):
    weights = kernel()
    state = spec.init(weights)
    once = spec.fake_quantize(weights, state)
    np.testing.assert_array_equal(spec.fake_quantize(once, state), once)


def test_bfloat16_weights_give_bfloat16_values(spec):
    weights = kernel(dtype=jnp.bfloat16)
    state = spec.init(weights)
    values = spec.fake_quantize(weights, state)
    assert values.dtype == jnp.bfloat16 and state.codebook.dtype == jnp.float32
    np.testing.assert_array_equal(values, spec.quantize(weights, state).dequantize())


@pytest.mark.parametrize("fill", ["constant", "zero", "outlier", "empty"])
def test_odd_tensors(spec, fill):
    if fill == "empty":
        if spec.channel_axes:
            weights = jnp.zeros((3, 3, 5, 0))
        else:
            weights = jnp.zeros((0, 3, 5, 6))
    else:
        weights = jnp.full((3, 3, 5, 6), 0.0 if fill == "zero" else 0.25)
        if fill == "outlier":
            weights = kernel() * 0.01
            weights = weights.at[0, 0, 0, 0].set(1e4)
    state = spec.init(weights)
    values = spec.fake_quantize(weights, state)
    assert values.shape == weights.shape and bool(jnp.all(jnp.isfinite(values)))
    assert bool(jnp.all(state.scale > 0))
    if fill == "zero":
        np.testing.assert_array_equal(values, weights)
    if fill == "constant" and isinstance(spec, qsv.KMeans) and spec.normalization == "none":
        np.testing.assert_array_equal(values, weights)


def test_refresh_keeps_the_structure_and_never_raises_the_error(spec):
    weights = kernel()
    state = spec.init(weights)
    moved = weights + 0.03 * jax.random.normal(jax.random.key(1), weights.shape)
    refreshed = jax.jit(spec.refresh)(moved, state)
    assert jax.tree.structure(refreshed) == jax.tree.structure(state)
    assert [leaf.shape for leaf in jax.tree.leaves(refreshed)] == [leaf.shape for leaf in jax.tree.leaves(state)]

    def error(state):
        return float(jnp.sum(jnp.square(moved - spec.fake_quantize(moved, state))))

    if spec.normalization == "none":
        assert error(refreshed) <= error(state) * (1 + 1e-5)


def test_vmap_over_tensors(spec):
    stacked = jnp.stack([kernel(), 3 * kernel()])
    states = jax.vmap(spec.init)(stacked)
    together = jax.vmap(spec.fake_quantize)(stacked, states)
    for index in range(2):
        alone = spec.fake_quantize(stacked[index], jax.tree.map(lambda leaf, i=index: leaf[i], states))
        np.testing.assert_allclose(together[index], alone, rtol=1e-5, atol=1e-6)


# Mean squared errors of the optimal (Lloyd-Max) quantizers of a unit Gaussian.
GAUSSIAN_KMEANS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


@pytest.mark.parametrize(("bits", "optimum"), GAUSSIAN_KMEANS.items())
def test_kmeans_reaches_the_gaussian_optimum(bits, optimum):
    weights = jax.random.normal(jax.random.key(2), (400_000,))
    spec = qsv.KMeans(bits)
    error = jnp.mean(jnp.square(weights - spec.fake_quantize(weights, spec.init(weights))))
    assert float(error) == pytest.approx(optimum, rel=0.01)


@pytest.mark.parametrize("spec", [qsv.Uniform(3), qsv.PowerOfTwo(4), qsv.AdditivePowerOfTwo(4)], ids=str)
def test_fitted_scale_is_within_one_percent_of_a_fine_search(spec):
    weights = jax.random.normal(jax.random.key(3), (50_000,))
    state = spec.init(weights)

    def error(scale):
        levels = state.codebook[nearest_codes(weights / scale, state.codebook)] * scale
        return jnp.mean(jnp.square(weights - levels))

    best = jnp.min(jax.lax.map(error, jnp.linspace(0.5, 5.0, 1000)))
    assert float(error(state.scale)) <= 1.01 * float(best)


def test_storage_counts_codes_and_tables():
    weights = kernel((3, 3, 4, 8))
    spec = qsv.Uniform(4, channel_axes=(-1,))
    packed = spec.quantize(weights, spec.init(weights))
    assert packed.code_bits == 288 * 4
    assert packed.table_bits == 32 * (16 + 8)
    assert packed.storage_bits == packed.code_bits + packed.table_bits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qsv.KMeans(0), "1 to 8, got 0"),
        (lambda: qsv.KMeans(9), "1 to 8, got 9"),
        (lambda: qsv.KMeans(4.0), "integer"),
        (lambda: qsv.Uniform(1), "2 to 8, got 1"),
        (lambda: qsv.PowerOfTwo(1), "2 to 8"),
        (lambda: qsv.AdditivePowerOfTwo(True), "integer"),
        (lambda: qsv.KMeans(4, channel_axes=-1), "tuple"),
        (lambda: qsv.Uniform(4, normalization="batch"), "normalization"),
        (lambda: qsv.KMeans(4, refresh_rate=0.0), "refresh_rate"),
        (lambda: qsv.Uniform(4, channel_axes=(5,)).init(jnp.zeros((2, 2))), "2 axes"),
    ],
)
def test_bad_specifications_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_specifications_are_hashable_values():
    assert qsv.KMeans(4) == qsv.KMeans(4) and hash(qsv.KMeans(4)) == hash(qsv.KMeans(4))
    assert qsv.KMeans(4) != qsv.KMeans(3)
    assert isinstance(qsv.KMeans(4), qsv.Quantizer)


def rarely_used():
    """[64, 1] weights and their importances: 20 inputs live behind a rectifier."""
    rng = np.random.default_rng(5)
    return rng.normal(size=(64, 1)), np.where(np.arange(64) < 20, rng.uniform(0.1, 1, 64), 0)[:, None]


def half_zero():
    """[40, 50] weights of which half are exactly zero, and no importances."""
    weights = np.random.default_rng(5).normal(size=(40, 50))
    return np.where(np.random.default_rng(6).random(weights.shape) < 0.5, 0, weights), None


@pytest.mark.parametrize(
    ("spec", "draw"),
    [
        (qsv.KMeans(5), rarely_used),
        (qsv.KMeans(5, channel_axes=(-1,)), rarely_used),
        (qsv.KMeans(5, channel_axes=(-1,), share_codebook=True), rarely_used),
        (qsv.KMeans(8, method="equal_mass"), half_zero),
    ],
    ids=["importances", "importances-by-channel", "importances-shared", "zeros"],
)
def test_levels_that_repeat_below_the_top_cost_nothing(spec, draw):
    weights, importance = (None if array is None else jnp.asarray(array, jnp.float32) for array in draw())
    first = spec.init(weights, importance)
    for state in (first, spec.refresh(1.1 * weights, first)):
        levels = np.asarray(state.codebook * state.scale).ravel()
        errors = np.asarray(spec.fake_quantize(weights, state) - weights)
        nearest = np.abs(np.asarray(weights)[..., None] - levels).min(axis=-1)
        np.testing.assert_allclose(np.abs(errors), nearest, atol=1e-6)
    lower, upper = first.codebook[..., :-1], first.codebook[..., 1:]
    assert ((lower == upper) & (upper < first.codebook[..., -1:])).any()


@pytest.fixture
def uneven():
    """[3, 40, 16] weights whose channels differ in size."""
    rng = np.random.default_rng(21)
    return jnp.asarray(rng.standard_t(5, (3, 40, 16)) * np.exp(rng.normal(size=16)), jnp.float32)


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_a_shared_codebook_lies_between_one_scale_and_a_codebook_a_channel(uneven, bits):
    errors = []
    for spec in (qsv.KMeans(bits), qsv.KMeans(bits, (-1,), share_codebook=True), qsv.KMeans(bits, (-1,))):
        state = spec.init(uneven)
        quantized = spec.fake_quantize(uneven, state)
        np.testing.assert_array_equal(spec.quantize(uneven, state).dequantize(), quantized)
        errors.append(float(jnp.sum(jnp.square(quantized - uneven))))
    assert errors[0] > errors[1] > errors[2]


def test_a_shared_codebook_takes_a_float_a_channel(uneven):
    spec = qsv.KMeans(4, (-1,), share_codebook=True)
    state = spec.init(uneven)
    assert (state.codebook.shape, state.scale.shape) == ((16,), (1, 1, 16))
    assert float(jnp.abs(state.codebook).max()) == 1 and bool(jnp.all(state.scale > 0))
    assert spec.quantize(uneven, state).table_bits == 32 * (16 + 16)


def test_a_shared_codebook_follows_the_weights(uneven):
    spec = qsv.KMeans(3, (-1,), share_codebook=True)
    state = spec.init(uneven)
    moved = jnp.tanh(uneven)
    refreshed = spec.refresh(moved, state)

    def error(state):
        return float(jnp.sum(jnp.square(spec.fake_quantize(moved, state) - moved)))

    assert error(refreshed) < error(state)
    assert float(jnp.abs(refreshed.codebook).max()) == pytest.approx(1)


def test_a_shared_codebook_survives_channels_of_zeros():
    spec = qsv.KMeans(2, (-1,), share_codebook=True)
    for weights in (jnp.zeros((4, 3)), jnp.ones((4, 3)) * jnp.array([0.0, 1.0, -2.0])):
        state = spec.init(weights)
        np.testing.assert_allclose(spec.fake_quantize(weights, state), weights, atol=1e-6)
        assert bool(jnp.all(jnp.isfinite(spec.refresh(weights, state).scale)))


def test_sharing_needs_channels():
    with pytest.raises(ValueError, match="share_codebook needs channel_axes"):
        qsv.KMeans(4, share_codebook=True)


@pytest.mark.parametrize(
    "spec",
    [
        qsv.KMeans(2),
        qsv.KMeans(2, (-1,)),
        qsv.KMeans(2, (-1,), share_codebook=True),
        qsv.Uniform(3),
        qsv.Uniform(3, (-1,)),
        qsv.PowerOfTwo(3),
        qsv.AdditivePowerOfTwo(3),
    ],
    ids=repr,
)
def test_importance_draws_the_levels_to_what_matters(uneven, spec):
    importance = jnp.asarray(np.random.default_rng(22).uniform(size=(3, 40, 1)) ** 4)

    def error(state):
        return float(jnp.sum(importance * jnp.square(spec.fake_quantize(uneven, state) - uneven)))

    assert error(spec.init(uneven, importance)) < error(spec.init(uneven))
    even = spec.init(uneven, jnp.full((), 0.3))
    np.testing.assert_allclose(even.scale, spec.init(uneven).scale, rtol=1e-4)
    with pytest.raises(ValueError, match="doesn't broadcast"):
        spec.init(uneven, jnp.ones(7))
