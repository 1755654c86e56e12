"""Quantize one float model to several schemes and bit widths, evaluate each, and tabulate.

    python -m experiments.bit_widths --pretrained=runs/an4e_resnet18 --flagfile=experiments/flags/an4e_quantize.txt \
        --data_dir=DATA/an4 --data_dir=DATA/librispeech251 --noise_dir=DATA/noise \
        --exclude_speakers=DATA/an4_eval_speakers.txt --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt \
        --workdir=runs/an4e --output=results/an4e.json

With `--post_training` each also comes without any training, after calibration alone, and with `--channel_scales`
with a scale for each output channel. Every model gets a folder such as `kmeans_4` or `kmeans_4_channel_ptq` below
`--workdir`; those already there are evaluated, not made again, so that several commands can share the work, and refused
where they were made with other settings. The plots are `det.png` and `error_against_size.png` there, or with
`--output=NAME.json` `NAME_det.png` and `NAME_error_against_size.png`.
"""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np

from experiments import quantize
from experiments.configuration import launch, machine, require, setting, write_json
from experiments.finetune_config import FinetuneConfig
from experiments.models import MODEL_FILE, FloatModel, load_float_model
from experiments.patterns import check_pins
from experiments.run_settings import holds_model, shaping_settings
from experiments.running import free_programs
from experiments.scoring import measure, score
from experiments.size_plot import plot_error_against_size
from experiments.tables import bit_width_table
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.deploy import is_packed, load, save
from qsv.models import count_parameters
from qsv.quant import Rule, resolve
from qsv.scoring import plot_det

_SCHEMES = quantize.SCHEMES + quantize.BINARY_SCHEMES


@dataclasses.dataclass(frozen=True)
class BitWidthsConfig:
    """Flags of the comparison."""

    workdir: str = setting("", "Folder for the quantized models.")
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    schemes: tuple[str, ...] = setting(("kmeans", "uniform"), f"Levels, of {', '.join(_SCHEMES)}.")
    bit_widths: tuple[str, ...] = setting(
        ("8", "4", "3", "2"), "Bits a weight, or BITS:STEPS where these bits need fine-tuning of another length."
    )
    channel_scales: bool = setting(False, "Quantize with a scale for each output channel too.")
    post_training: bool = setting(False, "Quantize without fine-tuning too.")
    pin: tuple[str, ...] = setting((), "BITS:PATTERN, the same bits in all models for kernels whose paths match.")
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = TestConfig()

    def variants(self) -> list["Variant"]:
        """All that are wanted."""
        own = self.finetune.per_channel
        wanted = [
            Variant(self, scheme, bits, per_channel, steps if trained else 0)
            for per_channel in (own, own or self.channel_scales)
            for trained in (not self.post_training, True)
            for scheme in self.schemes
            for bits, steps in map(self._bits_and_steps, self.bit_widths)
        ]
        return list(dict.fromkeys(wanted))

    def _bits_and_steps(self, width: str) -> tuple[int, int]:
        bits, _, steps = width.partition(":")
        return int(bits), int(steps or self.finetune.steps)

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            if scheme not in _SCHEMES:
                raise ValueError(f"--schemes must be of {', '.join(_SCHEMES)}, got {scheme!r}")
        for bits in self.bit_widths:
            if not re.fullmatch(r"\d+(:\d+)?", bits):
                raise ValueError(f"--bit_widths must be BITS or BITS:STEPS, got {bits!r}")
        check_pins(self.pin)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of the models that are compared."""

    comparison: BitWidthsConfig
    scheme: str
    bits: int
    per_channel: bool
    steps: int

    @property
    def folder(self) -> pathlib.Path:
        """Where it is."""
        suffix = "_channel" * self.per_channel + "_ptq" * (not self.steps)
        return pathlib.Path(self.comparison.workdir) / f"{self.scheme}_{self.bits}{suffix}"

    @property
    def name(self) -> str:
        """In plots."""
        scales, trained = ", channel scales" * self.per_channel, "" if self.steps else " post-training"
        return f"{self.scheme} {self.bits} bits{scales}{trained}"

    def config(self) -> quantize.QuantizeConfig:
        """How it is made."""
        return quantize.QuantizeConfig(
            workdir=str(self.folder),
            pretrained=self.comparison.pretrained,
            scheme=self.scheme,
            bits=self.bits,
            pin=self.comparison.pin,
            finetune=dataclasses.replace(self.comparison.finetune, per_channel=self.per_channel, steps=self.steps),
        )

    @property
    def path(self) -> pathlib.Path:
        """Its file."""
        return self.folder / MODEL_FILE

    def description(self) -> dict[str, Any]:
        """What the results say of it."""
        return {
            "scheme": self.scheme,
            "bits": self.bits,
            "scales": "channel" if self.per_channel else "tensor",
            "steps": self.steps,
        }


def run(config: BitWidthsConfig) -> dict[str, Any]:
    """Quantize and evaluate; returns and writes the results."""
    require(workdir=config.workdir, pretrained=config.pretrained, test_dir=config.test.test_dir)
    workdir = pathlib.Path(config.workdir)
    test_set = load_test_set(config.test)
    float_model = load_float_model(config.pretrained)
    for variant in config.variants():
        variant.config().plan(float_model.params)  # Bits and patterns that can't be are refused before any training.
    float_path, parameters = _float_file(float_model, workdir), count_parameters(float_model.params)
    reference = score(load(float_path), test_set)
    description: dict[str, Any] = {"scheme": "float", "bits": 32, "scales": "none", "steps": 0}
    rows = [description | _measured(float_path, parameters, reference, test_set, None)]
    scores = {"float": reference}
    _make(config.variants())
    for variant in config.variants():
        scores[variant.name] = score(load(variant.path), test_set)
        measured = _measured(variant.path, parameters, scores[variant.name], test_set, reference)
        rows.append(variant.description() | measured)
        print(f"{variant.name}: EER {measured['eer_percent']:.2f} %, {measured['file_bytes']:,} bytes")

    results = {
        "experiment": "bit_widths",
        "parameters": parameters,
        "float_parameter_bytes": 4 * parameters,
        "pinned": list(config.pin),
        "test": pathlib.Path(config.test.test_dir).name,
        "rows": rows,
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or workdir / "results.json"), results)
    print(bit_width_table(results))
    labels = test_set.trials.labels
    shown = {name: (s, labels) for name, s in scores.items() if re.fullmatch(r"float|kmeans \d bits", name)}
    # Tests of the same models have their own output each.
    prefix = f"{pathlib.Path(config.output).stem}_" if config.output else ""
    plot_det(shown, workdir / f"{prefix}det.png")
    plot_error_against_size(results, workdir / f"{prefix}error_against_size.png")
    return results


def _make(variants: list[Variant]) -> None:
    """The models that aren't there yet; those that differ in their steps alone share a calibration."""
    missing = [one for one in variants if not holds_model(one.folder, shaping_settings(one.config()))]
    alike: dict[Variant, list[Variant]] = {}
    for variant in missing:
        alike.setdefault(dataclasses.replace(variant, steps=0), []).append(variant)
    for group in alike.values():
        # The last one is trained if any is, so that its start has the speech too.
        start = quantize.prepare(group[-1].config())
        for variant in group:
            quantize.finish(variant.config(), start)
        free_programs()


def _float_file(model: FloatModel, workdir: pathlib.Path) -> pathlib.Path:
    """The float model in our format, so that its size compares; written where it came from another toolkit."""
    if is_packed(model.path):
        return model.path
    path = workdir / "float" / MODEL_FILE
    plan = resolve([Rule(".*", None)], model.params)
    save(path, model.network, plan, model.params, {}, model.batch_stats)
    return path


def _measured(
    path: pathlib.Path, parameters: int, scores: np.ndarray, test_set: TestSet, reference: np.ndarray | None
) -> dict[str, Any]:
    """Bytes and errors."""
    size = path.stat().st_size
    return {
        "file_bytes": size,
        "compression_ratio": 4 * parameters / size,
        **measure(scores, test_set, reference),
    }


if __name__ == "__main__":
    launch(BitWidthsConfig, run)
