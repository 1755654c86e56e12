"""The benchmark of loading, on a few synthetic utterances."""

import json

import pytest

from experiments import benchmark_loader
from experiments.benchmark_loader import NOISE, READING, SPEED, LoaderBenchmarkConfig
from experiments.tables import with_tables


def test_every_way_is_measured(tmp_path, make_speech_config):
    path = tmp_path / "loader.json"
    benchmark_loader.run(
        LoaderBenchmarkConfig(workers=("1",), seconds=0.05, output=str(path), speech=make_speech_config(cache_mbytes=0))
    )
    results = json.loads(path.read_text())
    assert [row["name"] for row in results["rows"]] == [READING, SPEED, NOISE, "all, 1 process"]
    assert [row["workers"] for row in results["rows"]] == [0, 0, 0, 1]
    for row in results["rows"]:
        assert row["crops_per_second"] > 1 and row["resident_mbytes"] > 20
    assert "| all, 1 process | 1 |" in with_tables("<!-- table loader.json -->\n<!-- end table -->", tmp_path)


def test_wrong_flags():
    with pytest.raises(ValueError, match="--workers must be whole numbers"):
        LoaderBenchmarkConfig(workers=("many",))
