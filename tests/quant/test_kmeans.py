import re
import time

import jax
import jax.export
import jax.numpy as jnp
import kmeans1d
import numpy as np
import pytest

from qsv.quant import cell_sums
from qsv.quant.kmeans import kmeans_codebook, lloyd_step

GAUSSIAN_OPTIMUM = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}


def distortion(weights, codebook):
    weights = np.asarray(weights, np.float64).ravel()
    codebook = np.asarray(codebook, np.float64)
    nearest = codebook[np.searchsorted((codebook[1:] + codebook[:-1]) / 2, weights)]
    return np.sum((weights - nearest) ** 2)


def optimum(weights, bits):
    _, centroids = kmeans1d.cluster(np.asarray(weights, np.float64).ravel(), 2**bits)
    return distortion(weights, sorted(centroids))


def student_t4(rng, shape):
    return (0.03 * rng.standard_t(4, shape)).astype(np.float32)


def mixture_with_outliers(rng, shape):
    values = rng.normal(size=shape) * rng.choice([0.2, 0.6, 1.5], shape, p=[0.5, 0.35, 0.15])
    outliers = rng.random(shape) < 5e-5
    return np.where(outliers, values * 15, values).astype(np.float32)


def scaled_channels(rng, shape):
    return (rng.normal(size=shape) * np.exp(0.7 * rng.normal(size=shape[-1]))).astype(np.float32)


def resnet34_kernels():
    shapes, channels = [(3, 3, 1, 32)], 32
    for blocks, width in zip((3, 4, 6, 3), (32, 64, 128, 256), strict=True):
        for _ in range(blocks):
            shapes += [(3, 3, channels, width), (3, 3, width, width)]
            shapes += [(1, 1, channels, width)] if channels != width else []
            channels = width
    return shapes


@pytest.mark.parametrize("bits", GAUSSIAN_OPTIMUM)
def test_gaussian_optimum(bits):
    weights = np.random.default_rng(0).normal(size=500_000).astype(np.float32)
    error = distortion(weights, kmeans_codebook(weights, bits=bits)) / weights.size
    assert error == pytest.approx(GAUSSIAN_OPTIMUM[bits], rel=0.01)


@pytest.mark.parametrize("draw", [student_t4, mixture_with_outliers, scaled_channels])
@pytest.mark.parametrize("shape", [(3, 3, 1, 32), (1, 1, 32, 64), (3, 3, 32, 32), (3, 3, 32, 64)])
def test_four_bits_are_near_the_exact_optimum(draw, shape):
    weights = draw(np.random.default_rng(1), shape)
    error = distortion(weights, kmeans_codebook(weights, bits=4)) / optimum(weights, 4)
    assert 1 - 1e-6 < error < 1.001


@pytest.mark.parametrize(("bits", "bound"), [(1, 1.0005), (2, 1.0005), (6, 1.01), (8, 1.02)])
def test_other_bits_are_near_the_exact_optimum(bits, bound):
    weights = student_t4(np.random.default_rng(2), (3, 3, 32, 32))
    assert distortion(weights, kmeans_codebook(weights, bits=bits)) < bound * optimum(weights, bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_small_tensor_is_exact(bits):
    """One channel of a kernel has fewer weights than the histogram has bins."""
    weights = student_t4(np.random.default_rng(3), (3, 3, 32))
    exact = optimum(weights, bits)
    assert distortion(weights, kmeans_codebook(weights, bits=bits)) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("centre", [-1.0, 0.0, 100.0])
def test_narrow_clusters_get_their_levels(centre):
    noise = 1e-3 * np.random.default_rng(4).normal(size=20_000)
    weights = (centre + np.concatenate([noise - 1, noise + 1])).astype(np.float32)
    assert distortion(weights, kmeans_codebook(weights, bits=4)) < 1.01 * optimum(weights, 4)


@pytest.mark.parametrize("outlier", [1e4, -1e12, 1e30])
def test_one_outlier_takes_one_level(outlier):
    bulk = np.random.default_rng(5).normal(size=20_000).astype(np.float32)
    codebook = np.asarray(kmeans_codebook(np.append(bulk, np.float32(outlier)), bits=4))
    position = -1 if outlier > 0 else 0
    assert codebook[position] == np.float32(outlier)
    _, centroids = kmeans1d.cluster(bulk.astype(np.float64), 15)
    assert distortion(bulk, np.delete(codebook, position)) < 1.02 * distortion(bulk, sorted(centroids))


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize(
    "values",
    [
        [],
        [3.5],
        [0.0] * 9,
        [-0.37] * 100,
        [1.0, -1.0] * 50,
        [1.0, np.nextafter(np.float32(1), 2)],
        [-1e-30, 1e30],
    ],
    ids=["empty", "scalar", "zeros", "constant", "two", "adjacent", "far"],
)
def test_few_distinct_values_are_exact(values, bits, method):
    values = np.asarray(values, np.float32)
    codebook = np.asarray(kmeans_codebook(values, bits=bits, method=method))
    assert codebook.shape == (2**bits,)
    assert set(codebook) == (set(values) or {0.0})
    assert np.all(np.diff(codebook) >= 0)


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
def test_as_many_distinct_values_as_levels_in_a_large_tensor(method):
    rng = np.random.default_rng(6)
    distinct = np.sort(rng.normal(size=16).astype(np.float32))
    weights = np.append(rng.choice(distinct[1:], 100_000), distinct[0])
    np.testing.assert_array_equal(kmeans_codebook(weights, bits=4, method=method), distinct)


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_other_dtypes_equal_their_float32(dtype, method):
    weights = jnp.asarray(20 * np.random.default_rng(7).normal(size=(8, 500)), dtype)
    codebook = kmeans_codebook(weights, bits=3, method=method)
    assert codebook.dtype == jnp.float32
    np.testing.assert_array_equal(codebook, kmeans_codebook(weights.astype(jnp.float32), bits=3, method=method))


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
def test_non_finite_weights_are_left_out(method):
    weights = np.random.default_rng(8).normal(size=3000).astype(np.float32)
    broken = np.concatenate([weights, [np.nan, np.inf, -np.inf]]).astype(np.float32)
    np.testing.assert_array_equal(
        kmeans_codebook(broken, bits=4, method=method), kmeans_codebook(weights, bits=4, method=method)
    )
    np.testing.assert_array_equal(kmeans_codebook(np.full(5, np.nan), bits=4, method=method), np.zeros(16))


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
@pytest.mark.parametrize("size", [288, 9000])
def test_jit_and_vmap_equal_the_eager_call(method, size):
    channels = student_t4(np.random.default_rng(9), (3, size))
    eager = np.stack([kmeans_codebook(channel, bits=4, method=method) for channel in channels])
    traces = []

    @jax.jit
    def per_channel(channels):
        traces.append(1)
        return jax.vmap(lambda channel: kmeans_codebook(channel, bits=4, method=method))(channels)

    np.testing.assert_allclose(per_channel(channels), eager, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(per_channel(channels[::-1]), eager[::-1], rtol=1e-6, atol=1e-8)
    assert len(traces) == 1


def test_it_runs_where_float64_is_enabled():
    with jax.enable_x64(True):
        weights = np.random.default_rng(10).normal(size=5000)
        assert kmeans_codebook(weights, bits=5).dtype == jnp.float32
        assert kmeans_codebook(weights, bits=5, method="equal_mass").dtype == jnp.float32
        assert lloyd_step(weights, np.array([-1.0, 1.0])).dtype == jnp.float32


def test_equal_mass_start_by_hand():
    """Of 1..20, the central 0.8 is 3..18; four intervals of four weights have these means."""
    weights = np.random.default_rng(11).permutation(np.arange(1.0, 21.0))
    start = kmeans_codebook(weights, bits=2, method="equal_mass", num_lloyd_steps=0, central_fraction=0.8)
    np.testing.assert_array_equal(start, [4.5, 8.5, 12.5, 16.5])
    moved = kmeans_codebook(weights, bits=2, method="equal_mass", num_lloyd_steps=1, central_fraction=0.8)
    np.testing.assert_allclose(moved, [3.5, 8.5, 12.5, 17.5])


def test_lloyd_step_by_hand():
    """2 is halfway between 1 and 3 and counts for 3; nothing is nearest to 50."""
    moved = lloyd_step(np.array([[0.0, 2.0, 4.0], [99.0, 101.0, 1.0]]), np.array([1.0, 3.0, 50.0, 100.0]))
    np.testing.assert_array_equal(moved, [0.5, 3.0, 50.0, 100.0])


def test_lloyd_steps_only_improve_and_equal_single_steps():
    weights = student_t4(np.random.default_rng(12), (5000,))
    codebook, errors = np.linspace(-0.1, 0.1, 16, dtype=np.float32), []
    three = lloyd_step(weights, codebook, num_steps=3)
    for _ in range(3):
        codebook = lloyd_step(weights, codebook)
        errors.append(distortion(weights, codebook))
    np.testing.assert_allclose(three, codebook, rtol=1e-6)
    assert errors == sorted(errors, reverse=True)
    np.testing.assert_array_equal(lloyd_step(weights, codebook, num_steps=0), codebook)
    np.testing.assert_array_equal(lloyd_step(weights[:0], codebook), codebook)


def test_lloyd_refresh_vmaps_over_channels():
    rng = np.random.default_rng(13)
    weights, codebooks = rng.normal(size=(3, 1000)), np.sort(rng.normal(size=(3, 8)), axis=1)
    together = jax.vmap(lloyd_step)(jnp.asarray(weights), jnp.asarray(codebooks))
    for channel, codebook, expected in zip(weights, codebooks, together, strict=True):
        np.testing.assert_allclose(lloyd_step(channel, codebook), expected, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_sums_of_accelerators_equal_those_of_cpus(weighted):
    rng = np.random.default_rng(14)
    keys = jnp.asarray(np.append(rng.integers(-4, 5, 5000), [np.nan, np.nan]), jnp.float32)
    masses = jnp.asarray(rng.integers(0, 3, 5002), jnp.float32) if weighted else None
    edges = jnp.asarray([-3.0, -1.0, -1.0, 2.0])
    arguments = keys, keys + 0.25, masses, edges, jnp.asarray([-3.0, -2.0, -1.0, 0.0, 3.0])
    scattered, compared = cell_sums._scattered_sums(*arguments), cell_sums._compared_sums(*arguments)
    np.testing.assert_array_equal(scattered[0], compared[0])
    np.testing.assert_allclose(scattered[1], compared[1], rtol=1e-5)
    assert scattered[0].sum() == (masses[:5000].sum() if weighted else 5000)


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
def test_importance_counts_a_weight_as_often(method):
    rng = np.random.default_rng(15)
    weights, counts = rng.standard_t(4, 3000), rng.integers(0, 4, 3000)

    def distortion(codebook):
        return np.sum(counts * np.min(np.square(weights[:, None] - np.asarray(codebook)), axis=1))

    codebook = kmeans_codebook(weights, bits=3, method=method, num_lloyd_steps=50, importance=counts)
    repeated = kmeans_codebook(np.repeat(weights, counts), bits=3, method=method, num_lloyd_steps=50)
    unweighted = kmeans_codebook(weights, bits=3, method=method, num_lloyd_steps=50)
    assert distortion(codebook) <= 1.01 * distortion(repeated)
    assert distortion(codebook) < distortion(unweighted)
    stepped = lloyd_step(weights, repeated, importance=counts)
    np.testing.assert_allclose(stepped, lloyd_step(np.repeat(weights, counts), repeated), rtol=1e-4)


@pytest.mark.parametrize("importance", [0.0, 1e-30, 1e30])
def test_an_even_importance_of_any_size_changes_nothing(importance):
    weights = np.random.default_rng(16).normal(size=(50, 40))
    expected = kmeans_codebook(weights, bits=4)
    np.testing.assert_allclose(kmeans_codebook(weights, bits=4, importance=importance), expected, rtol=1e-4)


def test_an_importance_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"importance \(3,\) doesn't broadcast against weights \(4, 5\)"):
        kmeans_codebook(np.ones((4, 5)), bits=2, importance=np.ones(3))


@pytest.mark.parametrize("method", ["optimal", "equal_mass"])
@pytest.mark.parametrize(("platform", "scatters"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_it_lowers_for_accelerators_without_scattering_the_weights(platform, scatters, method):
    fit = jax.jit(lambda weights: kmeans_codebook(weights, bits=4, method=method))
    weights = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
    text = jax.export.export(fit, platforms=[platform])(weights).mlir_module()
    operands = re.findall(r"stablehlo\.scatter.*?\}\) : \((.*?)\) ->", text, flags=re.DOTALL)
    assert operands and any("36864" in types for types in operands) == scatters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 0}, "bits must be an integer from 1 to 8, got 0"),
        ({"bits": 9}, "bits"),
        ({"bits": 4, "method": "linear"}, "method must be .* got 'linear'"),
        ({"bits": 4, "num_bins": 0}, "num_bins"),
        ({"bits": 4, "num_lloyd_steps": -1}, "num_lloyd_steps"),
        ({"bits": 4, "method": "equal_mass", "central_fraction": 0.0}, "central_fraction"),
        ({"bits": 4, "central_fraction": 0.9}, "method='equal_mass'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans_codebook(np.zeros(3), **arguments)


def test_wrong_arrays():
    with pytest.raises(ValueError, match="real, got complex64"):
        kmeans_codebook(np.zeros(3, np.complex64), bits=4)
    with pytest.raises(ValueError, match=r"\[levels\], got shape \(2, 2\)"):
        lloyd_step(np.zeros(3), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="num_steps"):
        lloyd_step(np.zeros(3), np.zeros(2), num_steps=-1)


@pytest.mark.slow
@pytest.mark.parametrize(("draw", "worst"), [(student_t4, 1.002), (mixture_with_outliers, 1.003)])
def test_all_of_resnet34_against_the_exact_optimum(draw, worst):
    rng = np.random.default_rng(15)
    kernels = [draw(rng, shape) for shape in [*resnet34_kernels(), (5120, 256)]]
    codebooks = [np.asarray(kmeans_codebook(kernel, bits=4)) for kernel in kernels]
    found = [distortion(kernel, codebook) for kernel, codebook in zip(kernels, codebooks, strict=True)]
    exact = [optimum(kernel, 4) for kernel in kernels]
    assert sum(found) < 1.0005 * sum(exact)
    assert max(np.divide(found, exact)) < worst


@pytest.mark.slow
def test_all_of_resnet34_takes_a_second():
    kernels = [student_t4(np.random.default_rng(16), shape) for shape in resnet34_kernels()]

    def seconds():
        start = time.perf_counter()
        jax.block_until_ready([kmeans_codebook(kernel, bits=4) for kernel in kernels])
        return time.perf_counter() - start

    seconds()
    assert min(seconds() for _ in range(3)) < 1.0
