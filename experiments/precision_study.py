"""Mixed precision against the same bits for all layers, at equal file size and equal steps.

    python -m experiments.precision_study --pretrained=campplus_cn_en_common.pt --data_dir=DATA/librispeech251 \
        --noise_dir=DATA/noise --test_dir=DATA/an4 --steps=300 --workdir=runs/study --output=results/study.json

For every width and seed it makes the uniform model, and one of mixed precision that is not larger for every strategy,
which is an order of stages (`one_shot` trains all layers at once). What is in `--workdir` already is evaluated, not
made again, and refused where it was made with other settings. Differences are paired over the trials, and averaged over
the seeds.
"""

import dataclasses
import pathlib
from typing import Any

from experiments import mixed_precision, quantize
from experiments.allocation import AllocationConfig
from experiments.comparison import compare
from experiments.configuration import launch, machine, require, setting, write_json
from experiments.finetune_config import FinetuneConfig
from experiments.models import MODEL_FILE, load_embedder
from experiments.run_settings import holds_model, shaping_settings
from experiments.running import free_programs
from experiments.scoring import score
from experiments.sensitivity import SensitivityConfig
from experiments.stages import StagesConfig
from experiments.tables import precision_table
from experiments.testing import TestConfig, load_test_set
from qsv.scoring import eer

UNIFORM = "uniform"


@dataclasses.dataclass(frozen=True)
class PrecisionStudyConfig:
    """Flags of the comparison; the targets are the uniform models' files."""

    workdir: str = setting("", "Folder for the models.")
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    scheme: str = setting("kmeans", "Levels of the weights.", choices=quantize.SCHEMES)
    bit_widths: tuple[str, ...] = setting(("4", "3", "2"), "Bits of the uniform models, whose sizes are compared at.")
    strategies: tuple[str, ...] = setting(
        ("one_shot", "ascending_bits"), "Orders of the stages of the mixed models, as --stages names them."
    )
    seeds: int = setting(1, "Seeds of the fine-tuning, from --seed on.", minimum=1)
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    allocation: AllocationConfig = AllocationConfig()
    sensitivities: SensitivityConfig = SensitivityConfig()
    stages: StagesConfig = StagesConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = TestConfig()

    def __post_init__(self) -> None:
        for bits in self.bit_widths:
            if not bits.isdecimal():
                raise ValueError(f"--bit_widths must be whole numbers, got {bits!r}")
        for strategy in self.strategies:
            dataclasses.replace(self.stages, stages=strategy)

    def folder(self, strategy: str, bits: int, seed: int) -> pathlib.Path:
        """Where a model is."""
        return pathlib.Path(self.workdir) / f"{strategy}_{bits}_seed{seed}"

    def uniform(self, bits: int, seed: int) -> quantize.QuantizeConfig:
        """How a uniform model is made."""
        return quantize.QuantizeConfig(
            workdir=str(self.folder(UNIFORM, bits, seed)),
            pretrained=self.pretrained,
            scheme=self.scheme,
            bits=bits,
            pin=self.allocation.pin,
            finetune=dataclasses.replace(self.finetune, seed=seed),
        )

    def mixed(self, strategy: str, bits: int, seed: int) -> mixed_precision.MixedPrecisionConfig:
        """How a mixed model of the uniform one's size is made; all share their sensitivities."""
        size = (self.folder(UNIFORM, bits, seed) / MODEL_FILE).stat().st_size
        return mixed_precision.MixedPrecisionConfig(
            workdir=str(self.folder(strategy, bits, seed)),
            pretrained=self.pretrained,
            scheme=self.scheme,
            allocation=dataclasses.replace(self.allocation, target_mbytes=size / 1e6),
            sensitivities=self.sensitivities.kept_in(self.workdir),
            stages=dataclasses.replace(self.stages, stages=strategy),
            finetune=dataclasses.replace(self.finetune, seed=seed),
        )


def run(config: PrecisionStudyConfig) -> dict[str, Any]:
    """Make what is missing, evaluate and compare; returns and writes the results."""
    require(workdir=config.workdir, pretrained=config.pretrained, test_dir=config.test.test_dir)
    if config.allocation.has_target:
        raise ValueError("the sizes are those of the uniform models; give --bit_widths in place of a target")
    test_set = load_test_set(config.test)
    seeds = range(config.finetune.seed, config.finetune.seed + config.seeds)
    reference = score(load_embedder(config.pretrained)[0], test_set)
    rows = []
    for bits in map(int, config.bit_widths):
        made = {seed: _made_of_seed(config, bits, seed) for seed in seeds}
        paths = {strategy: [made[seed][strategy] for seed in seeds] for strategy in (UNIFORM, *config.strategies)}
        compared = compare(paths, test_set, against=(UNIFORM, "one_shot"))
        rows += [{"bits": bits, "strategy": strategy, **row} for strategy, row in zip(paths, compared, strict=True)]
    results = {
        "experiment": "precision_study",
        "test": pathlib.Path(config.test.test_dir).name,
        "steps": config.finetune.steps,
        "seeds": config.seeds,
        "sensitivity": config.sensitivities.sensitivity,
        "resampled": config.test.resample,
        "float_eer_percent": 100 * eer(reference, test_set.trials.labels),
        "rows": rows,
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or pathlib.Path(config.workdir) / "results.json"), results)
    print(precision_table(results))
    return results


def _made_of_seed(config: PrecisionStudyConfig, bits: int, seed: int) -> dict[str, pathlib.Path]:
    """{strategy: file}, made where they aren't there; the uniform one, whose size the others have, comes first."""
    paths = {}
    for strategy in (UNIFORM, *config.strategies):
        folder = config.folder(strategy, bits, seed)
        if strategy == UNIFORM:
            if not holds_model(folder, shaping_settings(config.uniform(bits, seed))):
                quantize.run(config.uniform(bits, seed))
        elif not holds_model(folder, shaping_settings(config.mixed(strategy, bits, seed))):
            mixed_precision.run(config.mixed(strategy, bits, seed))
        paths[strategy] = folder / MODEL_FILE
        free_programs()
    return paths


if __name__ == "__main__":
    launch(PrecisionStudyConfig, run)
