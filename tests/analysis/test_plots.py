"""Figures are drawn for what users have, and refused for nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

import qsv
from qsv.analysis import plot_flips, plot_layers, plot_score_drift, plot_trade_off, plot_weight_histograms

PNG = b"\x89PNG"


@pytest.fixture
def trials():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4 == 0
    reference = rng.normal(size=400) + 2 * labels
    return reference, {"4 bits": reference + 0.1 * rng.normal(size=400), "2 bits": rng.normal(size=400)}, labels


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(3, 8)).astype(np.float32) for name in ("a", "b", "c", "d", "e")}


def check(path):
    assert path.read_bytes().startswith(PNG)
    text = path.with_suffix(".svg").read_text()
    assert text.startswith("<?xml")
    return text


def test_scores_and_flips(tmp_path, trials):
    reference, systems, labels = trials
    plot_score_drift(reference, systems, labels, tmp_path / "new" / "drift.png")
    plot_flips(reference, systems, labels, tmp_path / "flips.png")
    plot_flips(reference, systems, labels, tmp_path / "own.png", own_thresholds=True)
    check(tmp_path / "new" / "drift.png")
    assert check(tmp_path / "flips.png") != check(tmp_path / "own.png")


@pytest.mark.parametrize("quantizer", [qsv.KMeans(2), qsv.Uniform(3, channel_axes=(-1,)), qsv.KMeans(6)])
def test_weights_and_their_levels(tmp_path, weights, quantizer):
    packed = {name: quantizer.quantize(jnp.asarray(w), quantizer.init(jnp.asarray(w))) for name, w in weights.items()}
    plot_weight_histograms(weights, packed, tmp_path / "weights.png")
    check(tmp_path / "weights.png")


def test_layers_and_trade_offs(tmp_path):
    rows = {"4 bits": {"stem": 0.1, "embedding": 0.3}, "2 bits": {"stem": 0.2, "block": 0.2, "embedding": 0.4}}
    plot_layers(rows, tmp_path / "layers.png", ylabel="Relative error", reference=0.05)
    plot_trade_off(
        {"cascade": ([0, 1], [2, 1])}, {"float": (1, 1)}, tmp_path / "front.png", xlabel="BOPs", ylabel="EER (%)"
    )
    text = check(tmp_path / "layers.png")
    # What the first network lacks is drawn where the other has it.
    assert text.index("<!-- stem -->") < text.index("<!-- block -->") < text.index("<!-- embedding -->")
    check(tmp_path / "front.png")


def test_nothing_is_not_plotted(tmp_path):
    path = tmp_path / "nothing.png"
    with pytest.raises(ValueError, match="no layer"):
        plot_weight_histograms({}, {}, path)
    for nothing in ({}, {"float": {}}):
        with pytest.raises(ValueError, match="no layer"):
            plot_layers(nothing, path, ylabel="")
    with pytest.raises(ValueError, match="no network"):
        plot_score_drift([0.0], {}, [1], path)
    with pytest.raises(ValueError, match="no network"):
        plot_flips([0.0], {}, [1], path)
    with pytest.raises(ValueError, match="nothing"):
        plot_trade_off({}, {}, path, xlabel="", ylabel="")
    assert not path.exists()
