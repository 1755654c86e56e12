"""The benchmark of exported files, on a tiny network."""

import json

import pytest

from experiments import benchmark_inference
from experiments.benchmark_inference import InferenceBenchmarkConfig
from experiments.tables import with_tables


@pytest.fixture(scope="module")
def output(make_speech_config, tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "inference.json"
    benchmark_inference.run(
        InferenceBenchmarkConfig(
            model="resnet10",
            width=4,
            frames=("50",),
            threads=("1",),
            rounds=2,
            starts=1,
            output=str(path),
            speech=make_speech_config(crop_seconds=0.6),
        )
    )
    return path


def test_all_files_are_measured(output):
    results = json.loads(output.read_text())
    names = [row["name"] for row in results["rows"]]
    assert names[:4] == ["float", "packed", "integer", "onnxruntime static int8"]
    assert all(name.endswith(" on OpenVINO") for name in names[4:])
    for row in results["rows"]:
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high
        assert 0 < row["start_seconds"] < 30 and 20 < row["peak_mbytes"] < 1000
    assert set(results["verify_seconds"]) == {"packed", "integer"}
    assert all(0 < seconds < 60 for seconds in results["verify_seconds"].values())
    assert results["rows"][0]["ratio"] == 1
    sizes = results["file_bytes"]
    assert results["content_bytes"] < sizes["packed"] < sizes["integer"] < sizes["float"]
    assert results["integer_operations"]["QLinearConv"] == 12 and "Conv" not in results["integer_operations"]


def test_the_table_says_which_file_is_which(output):
    table = with_tables("<!-- table inference.json -->\n<!-- end table -->", output.parent)
    assert "| 50 | 1 | 4-bit weights, 8-bit activations | " in table
    assert "resnet10, from features to embedding; 2 interleaved rounds" in table
    assert "0 convolutions in float" in table


@pytest.mark.parametrize("flags", [{"frames": ()}, {"frames": ("0",)}, {"threads": ("two",)}])
def test_wrong_flags(flags):
    with pytest.raises(ValueError, match="must be positive whole numbers"):
        InferenceBenchmarkConfig(**flags)
