"""The study of schemes on several networks: its rows, its second test, what it refuses."""

import dataclasses
import json
import pathlib

import pytest

from experiments import weight_study
from experiments.finetune_config import FinetuneConfig
from experiments.tables import with_tables
from experiments.testing import TestConfig
from experiments.weight_study import WeightStudyConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory, float_run, speech):
    return WeightStudyConfig(
        workdir=str(tmp_path_factory.mktemp("study")),
        pretrained=(str(float_run),),
        schemes=("uniform", "pot"),
        bit_widths=("4", "2"),
        mismatched_dir=str(speech.train),
        finetune=FinetuneConfig(steps=0, calibration_crops=0),
        test=TestConfig(test_dir=str(speech.test), resamples=20, resample="trials"),
    )


@pytest.fixture(scope="module")
def results(config):
    return weight_study.run(config)


def test_every_scheme_and_width_has_a_row_with_both_tests(config, results):
    (network,) = results["networks"]
    assert [(row["scheme"], row["bits"]) for row in network["rows"]] == [
        (scheme, bits) for scheme in config.schemes for bits in (4, 2)
    ]
    assert all(len(row["tests"]) == len(results["tests"]) == 2 for row in network["rows"])
    assert network["network"] == pathlib.Path(config.pretrained[0]).stem


def test_fewer_bits_move_the_weights_more(results):
    errors = {(row["scheme"], row["bits"]): row["median_relative_error"] for row in results["networks"][0]["rows"]}
    for scheme in ("uniform", "pot"):
        assert 0 < errors[scheme, 4] < errors[scheme, 2] < 1
    assert -1 <= results["networks"][0]["rows"][0]["smoothness_and_error"]["estimate"] <= 1


def test_models_are_correlated_within_their_network_only():
    def network(name, ratios):
        rows = [
            {"steps": steps, "median_relative_error": error, "tests": [{"eer_ratio": ratio}]}
            for error, ratio, steps in zip((0.1, 0.2, 0.3, 0.4), ratios, (0, 0, 0, 9), strict=True)
        ]
        return {"network": name, "rows": rows}

    # Over both networks together it would be 0.24.
    networks = [network("one", (1, 2, 3, 0)), network("other", (13, 12, 11, 50)), network("equal", (1, 1, 1, 2))]
    assert weight_study._correlations_of_models(networks) == {"one": pytest.approx(1), "other": pytest.approx(-1)}


def test_the_errors_are_those_of_bit_widths(config, results):
    for place, test in enumerate(config.tests()):
        comparison = config.comparison(config.pretrained[0], test)
        kept = json.loads(pathlib.Path(comparison.output).read_text())["rows"]
        assert kept[0]["eer_percent"] == results["networks"][0]["float_tests"][place]["eer_percent"]
        found = [row["tests"][place]["eer_percent"] for row in results["networks"][0]["rows"]]
        assert found == [row["eer_percent"] for row in kept[1:]]


def test_the_table_and_the_plot_are_written(config, results):
    folder = pathlib.Path(config.workdir)
    table = with_tables("<!-- table results.json -->\n<!-- end table -->\n", folder)
    assert table.count("| pot |") == 2 and "median smoothness" in table
    (network,) = results["networks"]
    found = network["rows"][0]["smoothness_and_error"]
    assert f"| {found['estimate']:.2f} ({found['low']:.2f} to {found['high']:.2f}) |" in table
    low, high = network["float_tests"][0]["eer_percent_interval"]
    assert f"({low:.2f} to {high:.2f}) |" in table
    assert (folder / "distortion.png").stat().st_size > 10_000


def test_networks_of_one_name_are_refused(config):
    with pytest.raises(ValueError, match="different names"):
        weight_study.run(dataclasses.replace(config, pretrained=("a/model.pt", "b/model.pt")))
    with pytest.raises(ValueError, match="--workdir, --pretrained, --test_dir must be given"):
        weight_study.run(WeightStudyConfig())
