"""Mixed precision for a wanted size: sensitivities, bits for every layer, multi-stage fine-tuning, packed file.

    python -m experiments.mixed_precision --pretrained=campplus_cn_en_common.pt --target_mbytes=2 \
        --data_dir=FOLDER_OF_WAVS --noise_dir=FOLDER_OF_NOISE --workdir=runs/campplus_2mb

The run's folder holds `model.safetensors` (the packed file, not larger than the target), `report.md` and
`allocation.png` (every layer's sensitivity, bits and bytes), `allocation.json`, `sensitivity.json` (which runs for
other targets can share by `--sensitivity_file`) and `stages/`, a training each. The same command again resumes; one
whose other settings would change the outcome is refused. With `--test_dir` the model is evaluated beside the float one
too.
"""

import dataclasses
import pathlib
from typing import Any

from experiments.allocation import AllocationConfig, choose, kernels, plan_of
from experiments.allocation_report import allocation_table, plot_allocation
from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import unquantized
from experiments.models import MODEL_FILE, FloatModel, load_float_model
from experiments.quantize import SCHEMES, QuantizeConfig, WrittenModel, description_lines, write_model
from experiments.run_settings import claim_folder, shaping_settings
from experiments.scoring import measure, score
from experiments.sensitivity import Measured, SensitivityConfig, sensitivities
from experiments.stages import StagesConfig, finetune_in_stages, make_stages
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.deploy import Embedder, load
from qsv.precision import Allocation, Stage
from qsv.quant import Quantizer


@dataclasses.dataclass(frozen=True)
class MixedPrecisionConfig:
    """Flags of a mixed-precision quantization."""

    workdir: str = setting("", "Folder of the run; an interrupted run there is resumed.", incidental=True)
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    scheme: str = setting("kmeans", "Levels of the weights.", choices=SCHEMES)
    compact: bool = setting(
        True, "Fold batch normalisations, and store what stays float in float16 where that is precise enough."
    )
    output: str = setting("", "JSON file for the evaluation; --workdir/results.json when absent.", incidental=True)
    allocation: AllocationConfig = AllocationConfig()
    sensitivities: SensitivityConfig = SensitivityConfig()
    stages: StagesConfig = StagesConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = setting(TestConfig(), "Trials.", incidental=True)

    def quantizers(self) -> dict[int, Quantizer]:
        """{bits: specification} of the candidates."""
        every = range(1 if self.scheme == "kmeans" else 2, 9)
        widths = sorted(set(map(int, self.allocation.candidate_bits)) or every)
        return {
            bits: QuantizeConfig(scheme=self.scheme, bits=bits, finetune=self.finetune).quantizer() for bits in widths
        }


def run(config: MixedPrecisionConfig) -> pathlib.Path:
    """Quantize, or resume; returns the packed file."""
    require(workdir=config.workdir, pretrained=config.pretrained)
    config.allocation.require_target()
    workdir, quantizers = pathlib.Path(config.workdir), config.quantizers()
    test_set = _test_set(config)
    model = load_float_model(config.pretrained)
    if model.path.resolve() == (workdir / MODEL_FILE).resolve():
        raise ValueError(f"--workdir={workdir} would overwrite --pretrained; choose another folder")
    claim_folder(workdir, shaping_settings(config))
    network = unquantized(config.finetune, model)
    measured = sensitivities(
        config.sensitivities,
        config.finetune,
        network,
        kernels(min(quantizers.items())[1], config.finetune.float_layers, model.params),
        tuple(quantizers.values()),
        file=config.sensitivities.file(workdir),
    )
    allocation = choose(config.allocation, model, quantizers, measured, compact=config.compact)
    print(f"{allocation.average_bits:.3f} bits a weight; {allocation.size_bytes:,} bytes of codes and tables")
    write_run_record(workdir, "mixed_precision", config)
    costs = {layer.path: layer.choice(allocation.bits[layer.path]).cost for layer in measured.layers}
    plan = plan_of(allocation.bits, quantizers, model)
    stages = make_stages(config.stages, plan, costs, steps=config.finetune.steps)
    trained = finetune_in_stages(config.finetune, network, stages, workdir=workdir)
    write_json(workdir / "allocation.json", dataclasses.asdict(allocation))
    written = write_model(trained, workdir / MODEL_FILE, compact=config.compact)
    report = _report(config, model, measured, allocation, stages, written)
    (workdir / "report.md").write_text(report, encoding="utf-8")
    print(f"wrote {written.path} and report.md beside it")
    too_many = written.path.stat().st_size - config.allocation.target_mbytes * 1e6
    if config.allocation.target_mbytes and too_many > 0:
        print(f"warning: the file is {too_many:,.0f} bytes larger than wanted; give a smaller --target_mbytes")
    if test_set is not None:
        _evaluate(config, model, written, allocation, stages, test_set)
    # Last: the picture needs an extra.
    plot_allocation(measured, allocation, workdir / "allocation.png")
    return written.path


def _test_set(config: MixedPrecisionConfig) -> TestSet | None:
    """Read before anything is trained, so that a wrong trial list doesn't cost hours."""
    if not config.test.test_dir:
        return None
    return load_test_set(config.test)


def _evaluate(
    config: MixedPrecisionConfig,
    model: FloatModel,
    written: WrittenModel,
    allocation: Allocation,
    stages: tuple[Stage, ...],
    test_set: TestSet,
) -> None:
    reference = score(Embedder(model.network, model.variables), test_set)
    figures: dict[str, Any] = {
        "experiment": "mixed_precision",
        "test": pathlib.Path(config.test.test_dir).name,
        "scheme": config.scheme,
        "average_bits": allocation.average_bits,
        "file_bytes": written.path.stat().st_size,
        "stages": {stage.name: stage.steps for stage in stages},
        **measure(score(load(written.path), test_set), test_set, reference),
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or pathlib.Path(config.workdir) / "results.json"), figures)
    low, high = figures["eer_percent_interval"]
    print(
        f"EER {figures['eer_percent']:.2f} % ({low:.2f} to {high:.2f}), "
        f"{figures['eer_percent_difference']:+.2f} against float"
    )


def _report(
    config: MixedPrecisionConfig,
    model: FloatModel,
    measured: Measured,
    allocation: Allocation,
    stages: tuple[Stage, ...],
    written: WrittenModel,
) -> str:
    """Markdown: what was made of what, every layer's bits, every tensor's bytes."""
    settings = config.allocation
    targets = {"MB": settings.target_mbytes, "bits a weight": settings.target_bits, "GBOPs": settings.target_gbops}
    order = ", ".join(f"{stage.name} ({len(stage.plan.quantized)} layers, {stage.steps} steps)" for stage in stages)
    lines = [
        f"# {pathlib.Path(config.pretrained).name}, {config.scheme}, mixed precision",
        "",
        *description_lines(model, config.finetune),
        f"- target: {', '.join(f'{value:g} {unit}' for unit, value in targets.items() if value)}",
        f"- sensitivity: {config.sensitivities.sensitivity}; search: {settings.search}",
        f"- stages: {order}",
        f"- {allocation.average_bits:.3f} bits a weight; {allocation.bops / 1e9:.3g} GBOPs for "
        f"{config.sensitivities.utterance_seconds:g} s",
        *written.lines(),
        "",
        "Error rates: `python -m experiments.evaluate`, on speech that had no part in this.",
        "",
        allocation_table(measured, allocation),
        "",
    ]
    return "\n".join(lines) + "\n" + written.size.to_markdown()


if __name__ == "__main__":
    launch(MixedPrecisionConfig, run)
