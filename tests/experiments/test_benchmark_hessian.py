"""The benchmark of Hessian-vector products, on a tiny network."""

import json

import pytest

from experiments import benchmark_hessian
from experiments.tables import with_tables
from qsv.precision import TraceEstimate


@pytest.fixture(scope="module")
def results(make_speech_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "hessian.json"
    benchmark_hessian.run(
        benchmark_hessian.HessianBenchmarkConfig(
            model="resnet10", width=2, rounds=2, max_probes=0, output=str(output), speech=make_speech_config()
        )
    )
    return json.loads(output.read_text())


def test_all_are_timed(results):
    assert [row["name"] for row in results["rows"]] == ["gradient", "product", "together", "gauss_newton"]
    for row in results["rows"]:
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high
    assert results["rows"][0]["ratio"] == 1
    assert results["traces"] is None


def test_the_table_says_what_a_product_and_the_traces_cost(tmp_path, results):
    fields = {"layers": 36, "probes": 90, "seconds": 61.0, "largest_error": 0.12, "layers_within": 35}
    traces = {kind: fields | {"probes_needed": 1296} for kind in ("hessian", "gauss_newton")}
    (tmp_path / "hessian.json").write_text(json.dumps(results | {"traces": traces | {"wanted_error": 0.1}}))
    table = with_tables("<!-- table hessian.json -->\n<!-- end table -->", tmp_path)
    assert f"| {results['rows'][1]['ratio']:.2f} (" in table and "each of 4 products at one point" in table
    assert "resnet10 of random weights, 4 crops of 0.3 s; 2 interleaved rounds" in table
    assert "layers within 10 %" in table
    for name in ("Hessian", "Gauss-Newton"):
        assert f"| {name} | 90 | 61 | 35 of 36 | 12 | 1,296 |" in table


def test_probes_needed_follow_from_the_largest_error():
    estimates = {"a": TraceEstimate(10.0, 2.0, 50, 4), "b": TraceEstimate(10.0, 0.5, 50, 4)}
    found = benchmark_hessian._errors(estimates, 0.1)
    assert found["layers_within"] == 1 and found["largest_error"] == pytest.approx(0.2)
    assert found["probes_needed"] in (200, 201)


@pytest.mark.slow
def test_traces_of_both_curvatures(make_speech_config):
    found = benchmark_hessian.run(
        benchmark_hessian.HessianBenchmarkConfig(
            model="resnet10", width=2, rounds=2, max_probes=8, speech=make_speech_config()
        )
    )["traces"]
    assert found["hessian"]["probes"] == found["gauss_newton"]["probes"] == 8
    assert found["gauss_newton"]["median_error"] < found["hessian"]["median_error"]
