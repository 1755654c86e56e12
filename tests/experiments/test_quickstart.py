"""The quickstart from nothing to its report."""

import json

import pytest

from experiments import quickstart
from qsv.deploy import load_packed


def test_smoke_preset_leaves_a_report_plots_and_models(tmp_path):
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("matplotlib")
    report = quickstart.run(quickstart.QuickstartConfig(workdir=str(tmp_path), preset="smoke"))
    text = report.read_text()
    for row in ("| float | none | 32 |", "| kmeans | tensor | 4 | 2 |", "| uniform | tensor | 4 | 2 |"):
        assert row in text
    for plot in ("error_against_size.png", "det.png"):
        assert f"]({plot})" in text
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    sizes = {}
    for name in ("float", "kmeans_4", "uniform_4"):
        path = tmp_path / name / "model.safetensors"
        assert load_packed(path).threshold is not None
        sizes[name] = path.stat().st_size
    assert max(sizes["kmeans_4"], sizes["uniform_4"]) < sizes["float"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["scheme"]: row["file_bytes"] for row in results["rows"]} == {
        name.partition("_")[0]: size for name, size in sizes.items()
    }
