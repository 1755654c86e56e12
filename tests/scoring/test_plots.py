import sys

import numpy as np
import pytest

from qsv.scoring import eer, min_dcf, plot_det


def trials(distance, size=3000):
    labels = np.arange(size) % 3 == 0
    return np.random.default_rng(0).normal(size=size) + distance * labels, labels


def test_svg_names_every_system_and_its_figures(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    systems = {"float": trials(3.0), "2 bits": trials(1.0), "perfect": ([2, 3, 0, 1], [1, 1, 0, 0])}
    plot_det(systems, tmp_path / "det.svg", p_target=0.05, title="A corpus")
    text = (tmp_path / "det.svg").read_text()
    for name, (scores, labels) in systems.items():
        cost = min_dcf(scores, labels, p_target=0.05)
        assert f"{name}: EER {100 * eer(scores, labels):.2f} %, minDCF {cost:.3f}" in text
    for label in ("A corpus", "False alarms (%)", "Misses (%)", "p_target = 0.05"):
        assert label in text


def test_png_is_drawn_without_pyplot(tmp_path):
    sys.modules.pop("matplotlib.pyplot", None)
    plot_det({"one": trials(2.0)}, tmp_path / "det.png")
    assert (tmp_path / "det.png").read_bytes().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="no system"):
        plot_det({}, tmp_path / "det.png")
    with pytest.raises(ValueError, match="system 'broken': need both classes"):
        plot_det({"fine": trials(1.0), "broken": ([1.0], [1])}, tmp_path / "det.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'qsv\[demo\]'"):
        plot_det({"one": trials(1.0)}, tmp_path / "det.png")
