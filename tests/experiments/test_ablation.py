"""The ablation: rows for every ingredient, each measured against the float network."""

import json

import pytest

from experiments import ablation
from experiments.finetune_config import FinetuneConfig
from experiments.testing import TestConfig


@pytest.fixture
def make_config(tmp_path, float_run, speech, make_speech_config):
    def make(**changes):
        return ablation.AblationConfig(
            pretrained=str(float_run),
            bits=2,
            output=str(tmp_path / "ablation.json"),
            finetune=FinetuneConfig(speech=make_speech_config(), **changes),
            test=TestConfig(test_dir=str(speech.test), resamples=20),
        )

    return make


def test_every_ingredient_has_a_row(tmp_path, make_config, capsys):
    results = ablation.run(make_config(calibration_crops=64))
    assert json.loads((tmp_path / "ablation.json").read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    names = [name for name, _ in ablation.INGREDIENTS]
    assert [row["ingredient"] for row in results["rows"]] == ["float", *names]
    cosines = {row["ingredient"]: row["median_cosine"] for row in results["rows"][1:]}
    assert cosines["levels fitted to the weights"] < cosines["compensated rounding"] < 1
    table = capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names) and "kmeans, 2 bits, no training" in table


def test_speech_to_calibrate_on_is_needed(make_config):
    with pytest.raises(ValueError, match="give --calibration_crops"):
        ablation.run(make_config(calibration_crops=0))
