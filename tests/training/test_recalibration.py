"""Recalibrated statistics are the average of the batches' own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.models import Network
from qsv.training import recalibrate_batch_stats, shifted_batch_stats


@pytest.fixture
def network():
    return Network("resnet10", {"width": 2, "embedding_size": 8})


def test_first_layer_by_hand(network):
    variables = network.init(jax.random.key(0))
    waveforms = [0.1 * jax.random.normal(jax.random.key(i), (4, 3200)) for i in range(2)]
    stats = recalibrate_batch_stats(network, variables["params"], variables["batch_stats"], waveforms)
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    means, variances = [], []
    for waveform in waveforms:
        features, _ = network.frontend(waveform)
        out = jax.lax.conv_general_dilated(
            features.swapaxes(1, 2)[..., None],
            kernel,
            (1, 1),
            [(1, 1)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        means.append(out.mean(axis=(0, 1, 2)))
        variances.append(out.var(axis=(0, 1, 2)))
    np.testing.assert_allclose(stats["stem"]["norm"]["mean"], np.mean(means, axis=0), atol=1e-5)
    np.testing.assert_allclose(stats["stem"]["norm"]["var"], np.mean(variances, axis=0), rtol=1e-4)


def test_repairs_a_scaled_kernel(network):
    """Doubling a kernel before a normalisation changes nothing once its statistics are measured again."""
    variables = network.init(jax.random.key(0))
    waveforms = [0.1 * jax.random.normal(jax.random.key(1), (4, 3200))]
    before = recalibrate_batch_stats(network, variables["params"], variables["batch_stats"], waveforms)
    scaled = jax.tree.map(lambda leaf: leaf, variables["params"])
    scaled["stem"]["conv"]["kernel"] = 2 * scaled["stem"]["conv"]["kernel"]
    after = recalibrate_batch_stats(network, scaled, variables["batch_stats"], waveforms)
    first = network.embed({"params": variables["params"], "batch_stats": before}, waveforms[0])
    second = network.embed({"params": scaled, "batch_stats": after}, waveforms[0])
    np.testing.assert_allclose(second, first, rtol=1e-3, atol=1e-3)


def test_shifted_statistics_keep_what_quantization_does_not_change(network):
    variables = network.init(jax.random.key(0))
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    waveforms = [0.1 * jax.random.normal(jax.random.key(i), (4, 3200)) for i in range(2)]
    params = variables["params"]
    same = shifted_batch_stats(network, params, params, stats, iter(waveforms))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.allclose(a, b, rtol=1e-6)), same, stats))
    scaled = {**params, "stem": {**params["stem"], "conv": {"kernel": 2 * params["stem"]["conv"]["kernel"]}}}
    shifted = shifted_batch_stats(network, params, scaled, stats, waveforms)["stem"]["norm"]
    own = recalibrate_batch_stats(network, params, stats, waveforms)["stem"]["norm"]
    np.testing.assert_allclose(shifted["mean"], stats["stem"]["norm"]["mean"] + own["mean"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(shifted["var"], 4 * stats["stem"]["norm"]["var"], rtol=1e-4)


def test_channels_dead_on_the_speech_keep_their_variance(network):
    variables = network.init(jax.random.key(0))
    stats = jax.tree.map(lambda leaf: leaf + 0.5, variables["batch_stats"])
    waveforms = [0.1 * jax.random.normal(jax.random.key(i), (4, 3200)) for i in range(2)]
    params = variables["params"]
    kernel = params["stem"]["conv"]["kernel"]
    for share in (0, 1e-4):
        dead = {**params, "stem": {**params["stem"], "conv": {"kernel": kernel.at[..., 0].multiply(share)}}}
        for first, second in ((params, dead), (dead, params)):
            shifted = shifted_batch_stats(network, first, second, stats, waveforms)["stem"]["norm"]["var"]
            np.testing.assert_allclose(shifted, stats["stem"]["norm"]["var"], rtol=1e-5)


def test_int16_waveforms_and_no_batches(network):
    variables = network.init(jax.random.key(0))
    waveform = 0.1 * jax.random.normal(jax.random.key(1), (2, 3200))
    integers = jnp.round(waveform * 32768).astype(jnp.int16)
    args = (network, variables["params"], variables["batch_stats"])
    wide = recalibrate_batch_stats(*args, [integers.astype(jnp.float32) / 32768])
    np.testing.assert_allclose(
        recalibrate_batch_stats(*args, [integers])["stem"]["norm"]["mean"], wide["stem"]["norm"]["mean"]
    )
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batch_stats(*args, [])
