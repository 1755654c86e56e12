"""One bit a weight: naive sign, static and adaptive levels, from the float network or by way of one of a few bits.

    python -m experiments.binary --pretrained=runs/an4e_resnet18 --flagfile=experiments/flags/an4e_quantize.txt \
        --data_dir=DATA/an4 --data_dir=DATA/librispeech251 --noise_dir=DATA/noise \
        --exclude_speakers=DATA/an4_eval_speakers.txt --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt \
        --workdir=runs/an4e_binary --output=results/an4e_binary.json

`--from_bits=2` adds networks that are quantized to so many bits by k-means and trained first, for half of the steps;
`--mixed_bits=1.5` adds one of so many bits a weight on the average, more for the layers that need them. Static levels
are always rounded to the nearest, which is all that they can be. Every model gets a folder below `--workdir`; those
already there are evaluated, not made again, and refused where they were made with other settings. A single one:
`experiments.quantize --scheme=adaptive_binary --bits=1`.
"""

import dataclasses
import pathlib
import re
from typing import Any

from experiments import mixed_precision
from experiments.allocation import AllocationConfig
from experiments.comparison import compare
from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import unquantized
from experiments.models import MODEL_FILE, FloatModel, load_embedder, load_float_model
from experiments.quantize import BINARY_SCHEMES, QuantizeConfig, description_lines, write_model
from experiments.run_settings import claim_folder, holds_model, shaping_settings
from experiments.running import free_programs
from experiments.scoring import score
from experiments.sensitivity import SensitivityConfig
from experiments.stages import StagesConfig, finetune_in_stages
from experiments.tables import binary_table
from experiments.testing import TestConfig, load_test_set
from qsv.precision import Stage
from qsv.scoring import eer

_MIXED_BITS = ("1", "2", "3", "4")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of network that is compared.

    Attributes:
        scheme: its levels.
        from_bits: bits that it is trained with first; None for one bit at once.
        mean_bits: bits a weight on the average of mixed precision; 0 for one bit in every layer.
    """

    scheme: str
    from_bits: int | None = None
    mean_bits: float = 0.0

    @property
    def name(self) -> str:
        """In folders' names and tables."""
        if self.mean_bits:
            return f"{self.scheme}_{self.mean_bits:g}_bits"
        return self.scheme if self.from_bits is None else f"{self.scheme}_from_{self.from_bits}_bits"


@dataclasses.dataclass(frozen=True)
class BinaryConfig:
    """Flags of the comparison."""

    workdir: str = setting("", "Folder for the models.")
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    schemes: tuple[str, ...] = setting(BINARY_SCHEMES, f"Levels, of {', '.join(BINARY_SCHEMES)}.")
    from_bits: tuple[str, ...] = setting((), "Bits of a k-means network to start from, beside the float one.")
    mixed_bits: tuple[str, ...] = setting(
        (), "Mean bits a weight of k-means networks whose layers have 1 to 4 bits, such as 1.5."
    )
    seeds: int = setting(1, "Seeds of the fine-tuning, from --seed on.", minimum=1)
    compact: bool = setting(
        True, "Fold batch normalisations, and store what stays float in float16 where that is precise enough."
    )
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    sensitivities: SensitivityConfig = SensitivityConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    test: TestConfig = TestConfig()

    def __post_init__(self) -> None:
        for scheme in self.schemes:
            if scheme not in BINARY_SCHEMES:
                raise ValueError(f"--schemes must be of {', '.join(BINARY_SCHEMES)}, got {scheme!r}")
        for bits in self.from_bits:
            if not bits.isdecimal() or not 2 <= int(bits) <= 8:
                raise ValueError(f"--from_bits must be 2 to 8, got {bits!r}")
        for bits in self.mixed_bits:
            if not re.fullmatch(r"\d+(\.\d+)?", bits) or not 1 < float(bits) < 4:
                raise ValueError(f"--mixed_bits must be between 1 and 4, got {bits!r}")

    def folder(self, kind: Kind, seed: int) -> pathlib.Path:
        """Where a model is."""
        return pathlib.Path(self.workdir) / f"{kind.name}_seed{seed}"

    def kinds(self) -> list[Kind]:
        """All that are compared."""
        starts = (None, *map(int, self.from_bits))
        binary = [Kind(scheme, from_bits=start) for scheme in self.schemes for start in starts]
        return binary + [Kind("kmeans", mean_bits=float(bits)) for bits in self.mixed_bits]

    def mixed(self, kind: Kind, seed: int) -> mixed_precision.MixedPrecisionConfig:
        """How a network of mixed precision is made; all share their sensitivities."""
        return mixed_precision.MixedPrecisionConfig(
            workdir=str(self.folder(kind, seed)),
            pretrained=self.pretrained,
            compact=self.compact,
            allocation=AllocationConfig(target_bits=kind.mean_bits, candidate_bits=_MIXED_BITS),
            sensitivities=self.sensitivities.kept_in(self.workdir),
            stages=StagesConfig(stages="one_shot"),
            finetune=dataclasses.replace(self.finetune, seed=seed),
        )


def run(config: BinaryConfig) -> dict[str, Any]:
    """Make what is missing, evaluate and compare; returns and writes the results."""
    require(workdir=config.workdir, pretrained=config.pretrained, test_dir=config.test.test_dir)
    test_set = load_test_set(config.test)
    for scheme in config.schemes:
        _quantization(config, scheme, 1).quantizer()  # Refused before anything is trained.
    reference, _ = load_embedder(config.pretrained)
    seeds = range(config.finetune.seed, config.finetune.seed + config.seeds)
    paths = {kind.name: [_made(config, kind, seed) for seed in seeds] for kind in config.kinds()}
    compared = compare(paths, test_set, against=("sign", "static_binary"))
    rows = [{"kind": kind, **row} for kind, row in zip(paths, compared, strict=True)]
    results = {
        "experiment": "binary",
        "test": pathlib.Path(config.test.test_dir).name,
        "steps": config.finetune.steps,
        "seeds": config.seeds,
        "resampled": config.test.resample,
        "float_eer_percent": 100 * eer(score(reference, test_set), test_set.trials.labels),
        "rows": rows,
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or pathlib.Path(config.workdir) / "results.json"), results)
    print(binary_table(results))
    return results


def _made(config: BinaryConfig, kind: Kind, seed: int) -> pathlib.Path:
    """The file of a model, made where it isn't there."""
    folder = config.folder(kind, seed)
    if kind.mean_bits:
        if not holds_model(folder, shaping_settings(config.mixed(kind, seed))):
            mixed_precision.run(config.mixed(kind, seed))
    elif not holds_model(folder, _binary_settings(config, kind, seed)):
        _make_binary(config, kind, seed)
    free_programs()
    return folder / MODEL_FILE


def _binary_settings(config: BinaryConfig, kind: Kind, seed: int) -> dict[str, Any]:
    """What shapes a network of one bit in every layer."""
    return shaping_settings(_quantization(config, kind.scheme, 1)) | {"seed": seed, "from_bits": kind.from_bits}


def _make_binary(config: BinaryConfig, kind: Kind, seed: int) -> None:
    workdir = config.folder(kind, seed)
    settings = dataclasses.replace(_quantization(config, kind.scheme, 1).finetune, seed=seed)
    claim_folder(workdir, _binary_settings(config, kind, seed))
    write_run_record(workdir, "binary", config, kind=kind.name, seed=seed)
    model = load_float_model(config.pretrained)
    network = finetune_in_stages(settings, unquantized(settings, model), _stages(config, model, kind), workdir=workdir)
    written = write_model(network, workdir / MODEL_FILE, compact=config.compact)
    title = f"# {pathlib.Path(config.pretrained).name}, {kind.name.replace('_', ' ')}, 1 bit"
    lines = [title, "", *description_lines(model, settings), *written.lines(), ""]
    (workdir / "report.md").write_text("\n".join(lines) + "\n" + written.size.to_markdown(), encoding="utf-8")


def _stages(config: BinaryConfig, model: FloatModel, kind: Kind) -> tuple[Stage, ...]:
    """One bit at once, or after as many steps with more."""
    steps, plan = config.finetune.steps, _quantization(config, kind.scheme, 1).plan(model.params)
    if kind.from_bits is None:
        return (Stage("1_bit", plan, steps),)
    first = _quantization(config, "kmeans", kind.from_bits).plan(model.params)
    return Stage(f"{kind.from_bits}_bits", first, steps // 2), Stage("1_bit", plan, steps - steps // 2)


def _quantization(config: BinaryConfig, scheme: str, bits: int) -> QuantizeConfig:
    settings = config.finetune
    if scheme == "static_binary":
        settings = dataclasses.replace(settings, rounding="nearest")
    return QuantizeConfig(
        pretrained=config.pretrained, scheme=scheme, bits=bits, compact=config.compact, finetune=settings
    )


if __name__ == "__main__":
    launch(BinaryConfig, run)
