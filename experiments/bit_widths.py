"""Quantize one float model to several schemes and bit widths, evaluate each, and tabulate.

    python -m experiments.bit_widths --pretrained=runs/an4e_resnet18 --flagfile=experiments/flags/an4e_quantize.txt \
        --data_dir=DATA/an4 --data_dir=DATA/librispeech251 --noise_dir=DATA/noise \
        --exclude_speakers=DATA/an4_eval_speakers.txt --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt \
        --workdir=runs/an4e --output=results/an4e.json

Every model gets a folder `SCHEME_BITS` below `--workdir`; those already there are evaluated, not trained again.
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import quantize
from experiments.configuration import launch, machine, require, setting, write_json
from experiments.evaluate import TestConfig, TestSet, load_test_set, measure, score
from experiments.finetuning import FinetuneConfig
from experiments.models import MODEL_FILE, FloatModel, load_float_model
from experiments.tables import bit_width_table, plot_error_against_size
from qsv.data import CorpusLayout
from qsv.deploy import is_packed, load, save
from qsv.models import count_parameters
from qsv.quant import Rule, resolve
from qsv.scoring import plot_det


@dataclasses.dataclass(frozen=True)
class BitWidthsConfig:
    """Flags of the comparison."""

    workdir: str = setting("", "Folder for the quantized models.")
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    schemes: tuple[str, ...] = setting(("kmeans", "uniform"), f"Levels, of {', '.join(quantize.SCHEMES)}.")
    bit_widths: tuple[str, ...] = setting(("8", "4", "3", "2"), "Bits a weight.")
    test_dir: str = setting("", "Folder (or list file) of the test speech.")
    test_layout: str = setting(
        "folder", "How it is laid out, see --data_layout.", choices=[layout.value for layout in CorpusLayout]
    )
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = TestConfig()

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            if scheme not in quantize.SCHEMES:
                raise ValueError(f"--schemes must be of {', '.join(quantize.SCHEMES)}, got {scheme!r}")
        for bits in self.bit_widths:
            if not bits.isdigit():
                raise ValueError(f"--bit_widths must be integers, got {bits!r}")


def run(config: BitWidthsConfig) -> dict[str, Any]:
    """Quantize and evaluate; returns and writes the results."""
    require(workdir=config.workdir, pretrained=config.pretrained, test_dir=config.test_dir)
    workdir = pathlib.Path(config.workdir)
    test_set = load_test_set(config.test_dir, CorpusLayout(config.test_layout), config.test)
    quantizations = [
        quantize.QuantizeConfig(
            workdir=str(workdir / f"{scheme}_{bits}"),
            pretrained=config.pretrained,
            scheme=scheme,
            bits=int(bits),
            finetune=config.finetune,
        )
        for scheme in config.schemes
        for bits in config.bit_widths
    ]
    for quantization in quantizations:
        quantization.quantizer()  # Out-of-range bits are refused before anything is trained.
    float_model = load_float_model(config.pretrained)
    float_path, parameters = _float_file(float_model, workdir), count_parameters(float_model.params)
    reference = score(load(float_path), test_set)
    rows = [_row("float", 32, float_path, parameters, reference, test_set, None)]
    scores = {"float": reference}
    for quantization in quantizations:
        path = pathlib.Path(quantization.workdir) / MODEL_FILE
        if not path.exists():
            quantize.run(quantization)
        name = f"{quantization.scheme} {quantization.bits} bits"
        scores[name] = score(load(path), test_set)
        row = _row(quantization.scheme, quantization.bits, path, parameters, scores[name], test_set, reference)
        rows.append(row)
        print(f"{name}: EER {row['eer_percent']:.2f} %, {row['file_bytes']:,} bytes")

    results = {
        "experiment": "bit_widths",
        "parameters": parameters,
        "float_parameter_bytes": 4 * parameters,
        "steps": config.finetune.steps,
        "rows": rows,
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or workdir / "results.json"), results)
    print(bit_width_table(results))
    labels = test_set.trials.labels
    shown = {"float", *[f"kmeans {bits} bits" for bits in config.bit_widths]}
    plot_det({name: (s, labels) for name, s in scores.items() if name in shown}, workdir / "det.png")
    plot_error_against_size(results, workdir / "error_against_size.png")
    return results


def _float_file(model: FloatModel, workdir: pathlib.Path) -> pathlib.Path:
    """The float model in our format, so that its size compares; written where it came from another toolkit."""
    if is_packed(model.path):
        return model.path
    path = workdir / "float" / MODEL_FILE
    plan = resolve([Rule(".*", None)], model.params)
    save(path, model.network, plan, model.params, {}, model.batch_stats)
    return path


def _row(
    scheme: str,
    bits: int,
    path: pathlib.Path,
    parameters: int,
    scores: np.ndarray,
    test_set: TestSet,
    reference: np.ndarray | None,
) -> dict[str, Any]:
    """One line of the results."""
    size = path.stat().st_size
    return {
        "scheme": scheme,
        "bits": bits,
        "file_bytes": size,
        "compression_ratio": 4 * parameters / size,
        **measure(scores, test_set, reference),
    }


if __name__ == "__main__":
    launch(BitWidthsConfig, run)
