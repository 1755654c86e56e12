"""The benchmark of Hessian-vector products, on a tiny network."""

import json

import pytest

from experiments import benchmark_hessian
from experiments.tables import with_tables


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
    assert [row["name"] for row in results["rows"]] == ["gradient", "product", "together"]
    for row in results["rows"]:
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high
    assert results["rows"][0]["ratio"] == 1
    assert results["traces"] is None


def test_the_table_says_what_a_product_and_the_traces_cost(tmp_path, results):
    traces = {"layers": 36, "probes": 90, "seconds": 61.0, "wanted_error": 0.1, "largest_error": 0.12}
    (tmp_path / "hessian.json").write_text(json.dumps(results | {"traces": traces | {"layers_within": 35}}))
    table = with_tables("<!-- table hessian.json -->\n<!-- end table -->", tmp_path)
    assert f"| {results['rows'][1]['ratio']:.2f} (" in table and "each of 4 products at one point" in table
    assert "resnet10 of random weights, 4 crops of 0.3 s; 2 interleaved rounds" in table
    assert "36 layers by 90 products in 61 s, 35 of them within 10 %, the largest standard error 12 %" in table
