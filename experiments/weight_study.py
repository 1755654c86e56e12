"""Which levels which network takes: schemes and bits on several networks, beside the look of their weights.

    python -m experiments.weight_study --pretrained=runs/an4e_resnet18 --pretrained=runs/an4e_ecapa \
        --flagfile=experiments/flags/an4e_quantize.txt --data_dir=DATA/an4 --data_dir=DATA/librispeech251 \
        --noise_dir=DATA/noise --exclude_speakers=DATA/an4_eval_speakers.txt --test_dir=DATA/an4 \
        --trials=DATA/an4_eval_trials.txt --mismatched_dir=DATA/emodb --workdir=runs/study \
        --output=results/weight_study.json

Every network is quantized to all schemes and bits, with and without fine-tuning, and tested on the test speech and on
speech of another kind (`--mismatched_dir`: every pair of its utterances). Each network has its folder below
`--workdir`, laid out as by `experiments.bit_widths`; models already there are evaluated, not made again.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np
from scipy import stats

from experiments import bit_widths, quantize
from experiments.bit_widths import BitWidthsConfig
from experiments.configuration import launch, machine, require, setting, write_json
from experiments.finetune_config import FinetuneConfig
from experiments.models import load_float_model, model_name
from experiments.study_tables import weight_study_table
from experiments.testing import TestConfig
from qsv.analysis import (
    LayerWeights,
    packed_weight_statistics,
    plot_trade_off,
    rank_correlation,
    standardized_paths,
)
from qsv.deploy import load_packed


@dataclasses.dataclass(frozen=True)
class WeightStudyConfig:
    """Flags of the study."""

    workdir: str = setting("", "Folder for the quantized models.")
    pretrained: tuple[str, ...] = setting((), "Float network, as in experiments.quantize.")
    schemes: tuple[str, ...] = setting(quantize.SCHEMES, f"Levels, of {', '.join(quantize.SCHEMES)}.")
    bit_widths: tuple[str, ...] = setting(
        ("8", "5", "4", "3", "2"), "Bits a weight, or BITS:STEPS where these bits need fine-tuning of another length."
    )
    mismatched_dir: str = setting("", "Folder of other speech to test on too, such as of another language.")
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = TestConfig()

    def comparison(self, pretrained: str, test: TestConfig) -> BitWidthsConfig:
        """The models of one network on one test."""
        folder = pathlib.Path(self.workdir) / model_name(pretrained)
        return BitWidthsConfig(
            workdir=str(folder),
            pretrained=pretrained,
            schemes=self.schemes,
            bit_widths=self.bit_widths,
            post_training=bool(self.finetune.steps),
            output=str(folder / f"{pathlib.Path(test.test_dir).name}.json"),
            finetune=self.finetune,
            test=test,
        )

    def tests(self) -> list[TestConfig]:
        """The test and the mismatched one."""
        if not self.mismatched_dir:
            return [self.test]
        return [self.test, dataclasses.replace(self.test, test_dir=self.mismatched_dir, trials="")]


def run(config: WeightStudyConfig) -> dict[str, Any]:
    """Make what is missing, evaluate, and set the errors beside the weights; returns and writes the results."""
    require(workdir=config.workdir, pretrained=config.pretrained, test_dir=config.test.test_dir)
    names = [model_name(pretrained) for pretrained in config.pretrained]
    if len(set(names)) < len(names):
        raise ValueError(f"--pretrained networks need folders or files of different names, got {names}")
    networks = [_study(config, pretrained) for pretrained in config.pretrained]
    results = {
        "experiment": "weight_study",
        "tests": [pathlib.Path(test.test_dir).name for test in config.tests()],
        "networks": networks,
        "distortion_and_errors": _correlations_of_models(networks),
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or pathlib.Path(config.workdir) / "results.json"), results)
    print(weight_study_table(results))
    _plot(results, pathlib.Path(config.workdir) / "distortion.png")
    return results


def _study(config: WeightStudyConfig, pretrained: str) -> dict[str, Any]:
    """One network: its weights, and the errors of all that was made of it."""
    comparisons = [config.comparison(pretrained, test) for test in config.tests()]
    measured = [bit_widths.run(comparison)["rows"] for comparison in comparisons]
    params = load_float_model(pretrained).params
    rows = []
    for index, variant in enumerate(comparisons[0].variants(), start=1):
        layers = _layers(params, variant.path)
        rows.append(
            {
                **variant.description(),
                "file_bytes": measured[0][index]["file_bytes"],
                "tests": [_errors(rows_of_test[index]) for rows_of_test in measured],
                **_summary(layers),
            }
        )
    layers = _layers(params, comparisons[0].variants()[0].path)
    return {
        "network": model_name(pretrained),
        "layers": len(layers),
        "weights": sum(layer.size for layer in layers),
        "median_kurtosis": float(np.median([layer.kurtosis for layer in layers])),
        "median_smoothness": float(np.median([layer.smoothness for layer in layers])),
        "smoothness_quartiles": np.quantile([layer.smoothness for layer in layers], [0.25, 0.75]).tolist(),
        "float_tests": [_errors(rows_of_test[0]) for rows_of_test in measured],
        "rows": rows,
    }


def _layers(params: Any, path: pathlib.Path) -> list[LayerWeights]:
    """The float weights beside a model's levels."""
    model = load_packed(path)
    standardized = standardized_paths(model.plan_description)
    return packed_weight_statistics(params, model.packed_params, standardized=standardized)


def _errors(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("eer_percent", "eer_percent_interval", "eer_ratio", "eer_ratio_interval", "min_dcf")
    return {name: row[name] for name in kept if name in row}


def _summary(layers: list[LayerWeights]) -> dict[str, Any]:
    """What a model's levels do to the float weights, and whether smooth layers, or peaked ones, lose less."""
    errors = np.array([layer.distortion.relative_error for layer in layers])
    summary: dict[str, Any] = {
        "median_relative_error": float(np.median(errors)),
        "mean_code_entropy_bits": float(np.average([layer.code_entropy_bits for layer in layers])),
    }
    for name in ("smoothness", "kurtosis"):
        looks = [getattr(layer, name) for layer in layers]
        if len(layers) > 2 and np.ptp(errors) > 0 and np.ptp(looks) > 0:
            summary[f"{name}_and_error"] = dataclasses.asdict(rank_correlation(looks, errors))
    return summary


def _correlations_of_models(networks: list[dict[str, Any]]) -> dict[str, float]:
    """{network: whether its models that moved the weights most err most}, of those that were not trained.

    Without intervals: models of one network share its weights and the trials, so that none could be drawn by itself.
    """
    found = {}
    for network in networks:
        rows = [row for row in network["rows"] if not row["steps"] and "eer_ratio" in row["tests"][0]]
        errors = [row["median_relative_error"] for row in rows]
        ratios = [row["tests"][0]["eer_ratio"] for row in rows]
        if len(rows) > 2 and np.ptp(errors) > 0 and np.ptp(ratios) > 0:
            found[network["network"]] = float(stats.spearmanr(errors, ratios).statistic)
    return found


def _plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """EER against the weights' distortion, a line for each network and scheme without training."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for network in results["networks"]:
        for row in sorted(network["rows"], key=lambda row: row["median_relative_error"]):
            if not row["steps"]:
                x, y = curves.setdefault(f"{network['network']}, {row['scheme']}", ([], []))
                x.append(100 * row["median_relative_error"])
                y.append(row["tests"][0]["eer_percent"])
    if curves:
        plot_trade_off(curves, {}, path, xlabel="Median relative error of a layer's weights (%)", ylabel="EER (%)")


if __name__ == "__main__":
    launch(WeightStudyConfig, run)
