"""Quantized activations in a packed file: kept to the last bit, applied when embedding, refused where wrong."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qsv.deploy import Embedder, load, load_packed, save
from qsv.deploy.packed_activations import activations_from_json, activations_to_json
from qsv.models import quantized_activations
from qsv.quant import ActivationQuantizer, ActivationRange, QuantizedActivations


@pytest.fixture
def activations():
    low, high = jnp.float32(0.0), jnp.float32(1.7)
    ranges = {
        "stem/conv": ActivationRange(jnp.float32(-3.3), jnp.float32(2.1)),
        "embedding": ActivationRange(low, high),
    }
    return QuantizedActivations(ActivationQuantizer(4), ranges)


def write(trained, path, activations):
    params, stats = trained.variables["params"], trained.variables["batch_stats"]
    save(path, trained.network, trained.plan, params, trained.qstate, stats, activations=activations)
    return path


def test_a_file_keeps_them(trained, tmp_path, activations):
    found = load_packed(write(trained, tmp_path / "model.safetensors", activations))
    assert found.activations.quantizer == activations.quantizer and found.activation_bits == 4
    for path, own in activations.ranges.items():
        assert (found.activations.ranges[path].low, found.activations.ranges[path].high) == (own.low, own.high)
    plain = load_packed(write(trained, tmp_path / "float.safetensors", None))
    assert plain.activations is None and plain.activation_bits == 32


def test_the_embedder_applies_them(trained, tmp_path, activations):
    embedder = load(write(trained, tmp_path / "model.safetensors", activations))
    waveform = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    features, mask = trained.network.frontend(jnp.asarray(waveform)[None])
    with quantized_activations(activations):
        expected = trained.network.module().apply(embedder.variables, features, mask)[0]
    np.testing.assert_allclose(embedder(waveform, 16000), expected, atol=1e-4 * np.abs(expected).max())
    unquantized = Embedder(embedder.network, embedder.variables)(waveform, 16000)
    assert np.abs(unquantized - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0.0, np.inf, "finite"), (2.0, 1.0, "low end first"), (np.zeros(3), np.ones(3), "one range a layer")],
)
def test_wrong_ranges_are_refused(trained, tmp_path, activations, low, high, message):
    wrong = dataclasses.replace(activations, ranges={"embedding": ActivationRange(jnp.asarray(low), jnp.asarray(high))})
    with pytest.raises(ValueError, match=message):
        write(trained, tmp_path / "model.safetensors", wrong)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_description_is_checked(activations):
    fields = activations_to_json(activations)
    assert activations_from_json(fields).ranges["embedding"].high == jnp.float32(1.7)
    with pytest.raises(ValueError, match="bits"):
        activations_from_json({**fields, "bits": 99})
    with pytest.raises(KeyError):
        activations_from_json({"bits": 8})
