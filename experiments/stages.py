"""Multi-stage fine-tuning: stage after stage, each calibrated, trained and resumable."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

from experiments.calibration_file import calibrated_layers
from experiments.configuration import setting
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization, finetune
from experiments.patterns import matching
from experiments.run_settings import claim_folder
from qsv.deploy import describe_plan
from qsv.precision import Stage, ascending_bits, descending_sensitivity, listed_stages, one_stage
from qsv.quant import Plan

# Stages see other crops than those before them, whatever the seed of the run beside this one.
_SEEDS_BETWEEN_STAGES = 1000


ORDERS = ("ascending_bits", "descending_sensitivity", "one_shot", "listed")


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """In which order layers are quantized."""

    stages: str = setting(
        "ascending_bits",
        "ascending_bits: layers of the fewest bits first, the others adapt; descending_sensitivity: the most sensitive "
        "layers first; one_shot: all at once; listed: as --stage says.",
        choices=ORDERS,
    )
    num_stages: int = setting(3, "At most so many, for ascending_bits and descending_sensitivity.", minimum=1)
    stage: tuple[str, ...] = setting(
        (), "listed: regular expression over paths of the kernels that a stage adds; the rest makes the last stage."
    )
    stage_steps: tuple[str, ...] = setting((), "Steps of a stage, one for each; --steps shared evenly when absent.")
    stage_rate: tuple[str, ...] = setting(
        (), "Learning rates of a stage relative to the run's, one for each; 1 when absent."
    )

    def __post_init__(self) -> None:
        if self.stages not in ORDERS:
            raise ValueError(f"stages must be one of {', '.join(ORDERS)}, got {self.stages!r}")
        for steps in self.stage_steps:
            if not steps.isdecimal():
                raise ValueError(f"--stage_steps must be a whole number, got {steps!r}")
        for rate in self.stage_rate:
            if not re.fullmatch(r"\d*\.?\d+(e-?\d+)?", rate) or not float(rate):
                raise ValueError(f"--stage_rate must be a positive number, got {rate!r}")


def make_stages(config: StagesConfig, plan: Plan, costs: Mapping[str, float], *, steps: int) -> tuple[Stage, ...]:
    """The stages of a plan.

    Args:
        config: the order.
        plan: the final one.
        costs: {path: sensitivity at the plan's bits}.
        steps: of all stages together, unless each has its own.

    Raises:
        ValueError: patterns where none are wanted or the reverse, one that adds no kernel, or steps or rates of
            another number of stages.
    """
    if bool(config.stage) != (config.stages == "listed"):
        raise ValueError("--stages=listed and --stage need each other")
    match config.stages:
        case "ascending_bits":
            stages = ascending_bits(plan, steps=steps, num_stages=config.num_stages)
        case "descending_sensitivity":
            stages = descending_sensitivity(plan, costs, num_stages=config.num_stages, steps=steps)
        case "listed":
            stages = listed_stages(plan, _groups(config.stage, list(plan.quantized)), steps=steps)
        case _:
            stages = one_stage(plan, steps=steps)
    for flag, values in (("stage_steps", config.stage_steps), ("stage_rate", config.stage_rate)):
        if values and len(values) != len(stages):
            raise ValueError(f"{len(values)} values of --{flag} for stages {[stage.name for stage in stages]}")
    own_steps = map(int, config.stage_steps) if config.stage_steps else [stage.steps for stage in stages]
    rates = map(float, config.stage_rate) if config.stage_rate else [stage.learning_rate for stage in stages]
    return tuple(
        dataclasses.replace(stage, steps=steps, learning_rate=rate)
        for stage, steps, rate in zip(stages, own_steps, rates, strict=True)
    )


def _groups(patterns: Sequence[str], paths: list[str]) -> dict[str, list[str]]:
    groups, left = {}, paths
    for number, pattern in enumerate(patterns, start=1):
        groups[f"listed_{number}"] = own = matching(pattern, left, flag="stage")
        left = [path for path in left if path not in own]
    return groups | ({"rest": left} if left else {})


def finetune_in_stages(
    config: FinetuneConfig, start: Quantization, stages: Sequence[Stage], *, workdir: pathlib.Path
) -> Quantization:
    """Quantize and train in stages; a run that was interrupted goes on in the middle of its stage.

    Args:
        config: settings; each stage has steps of its own, and a learning rate relative to the settings'.
        start: from `unquantized`.
        stages: in order; each one's plan has the quantizers of those before it.
        workdir: folder of `stages/NUMBER_NAME/`, each with its calibration, checkpoints and metrics; its caller has
            claimed it.

    Returns:
        The network after the last stage.

    Raises:
        ValueError: a stage was begun with another plan.

    Source: multi-stage fine-tuning, Liu et al. 2024 (arXiv 2406.05359), where a stage's new layers start from fitted
    codebooks alone. Here they are calibrated on what the layers of the stages before make of the speech.
    """
    network = start
    for number, stage in enumerate(stages, start=1):
        folder = workdir / "stages" / f"{number}_{stage.name}"
        own = _stage_config(config, stage, number)
        # The run's settings tell the rest; bits may also come from a file of sensitivities.
        claim_folder(folder, describe_plan(stage.plan))
        network = finetune(
            own,
            calibrated_layers(own, network, stage.plan, folder),
            workdir=folder,
            description=f"stage {number} of {len(stages)}, {stage.name}",
            upcoming=stages[-1].plan,
        )
    return network


def _stage_config(config: FinetuneConfig, stage: Stage, number: int) -> FinetuneConfig:
    rate = stage.learning_rate
    return dataclasses.replace(
        config,
        steps=stage.steps,
        seed=config.seed + _SEEDS_BETWEEN_STAGES * (number - 1),
        level_rate=config.level_rate * rate,
        optimization=dataclasses.replace(
            config.optimization,
            learning_rate=config.optimization.learning_rate * rate,
            final_learning_rate=config.optimization.final_learning_rate * rate,
        ),
    )
