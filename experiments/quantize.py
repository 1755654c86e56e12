"""Quantize a trained network, ours or another toolkit's: codebooks, fine-tuning, recalibration, packed file.

From somebody's checkpoint and a folder of any speech, without labels, to a small file and its report:

    python -m experiments.quantize --pretrained=campplus_cn_en_common.pt --bits=4 --data_dir=FOLDER_OF_WAVS

KMQAT, with the training's own speakers and classifier:

    python -m experiments.quantize --pretrained=runs/an4e_resnet18 --scheme=kmeans --bits=4 \
        --flagfile=experiments/flags/an4e_quantize.txt --data_dir=DATA/an4 --data_dir=DATA/librispeech251 \
        --noise_dir=DATA/noise --exclude_speakers=DATA/an4_eval_speakers.txt --workdir=runs/an4e_kmeans4

With `--steps=0` nothing is trained (post-training quantization), and with `--calibration_crops=0` too no speech
is needed. The same command again resumes; one whose other settings would change the outcome is refused. The run's
folder holds `model.safetensors` (the packed file), `report.md` (agreement with the float network; every tensor's
scheme, bits and bytes), `calibration.safetensors`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `run.json` and
`settings.json` (what shaped the run).
"""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments.calibration_file import calibrated_layers
from experiments.configuration import launch, require, setting, write_run_record
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization, finetune, unquantized
from experiments.models import MODEL_FILE, FloatModel, load_float_model, model_name
from experiments.patterns import check_pins, pinned_bits
from experiments.run_settings import claim_folder, shaping_settings
from experiments.scoring import calibrated_threshold
from experiments.speech import is_readable
from qsv.data import Corpus
from qsv.deploy import Embedder, SizeReport, save
from qsv.models import count_parameters
from qsv.quant import (
    AdaptiveBinary,
    AdditivePowerOfTwo,
    KMeans,
    Plan,
    PowerOfTwo,
    Quantizer,
    Rule,
    StaticBinary,
    Uniform,
    resolve,
)

_QUANTIZERS = {"kmeans": KMeans, "uniform": Uniform, "pot": PowerOfTwo, "apot": AdditivePowerOfTwo}
_BINARY: dict[str, Any] = {
    "sign": StaticBinary(balanced=False, backward="clipped"),
    "static_binary": StaticBinary(),
    "adaptive_binary": AdaptiveBinary(),
}
SCHEMES, BINARY_SCHEMES = tuple(_QUANTIZERS), tuple(_BINARY)


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Flags of a quantization."""

    workdir: str = setting(
        "",
        "Folder of the run, by default runs/NAME_SCHEME_BITS; an interrupted run there is resumed.",
        incidental=True,
    )
    pretrained: str = setting(
        "",
        "Float network to quantize: a training's folder, a model file, or a checkpoint of WeSpeaker, SpeechBrain, "
        "3D-Speaker or Resemblyzer.",
    )
    scheme: str = setting(
        "kmeans",
        "Levels of the weights. sign, static_binary and adaptive_binary have 1 bit.",
        choices=SCHEMES + BINARY_SCHEMES,
    )
    bits: int = setting(4, "Bits a weight; 1..8 for kmeans, 2..8 for uniform, pot and apot.", minimum=1)
    pin: tuple[str, ...] = setting(
        (), "BITS:PATTERN, other bits for kernels whose paths match a regular expression; the last that matches counts."
    )
    compact: bool = setting(
        True, "Fold batch normalisations, and store what stays float in float16 where that is precise enough."
    )
    finetune: FinetuneConfig = FinetuneConfig()

    def __post_init__(self) -> None:
        check_pins(self.pin)

    def quantizer(self) -> Quantizer:
        """The specification of every quantized kernel that isn't pinned."""
        if self.scheme in _BINARY:
            return self._binary_quantizer()
        options: dict[str, Any] = {
            "bits": self.bits,
            "channel_axes": (-1,) if self.finetune.per_channel else (),
            "normalization": self.finetune.normalization,
        }
        if self.scheme == "kmeans":
            options |= {
                "refresh_rate": self.finetune.refresh_rate,
                "share_codebook": self.finetune.per_channel,
                "integer_levels": self.finetune.integer_levels,
            }
        return _QUANTIZERS[self.scheme](**options)

    def _binary_quantizer(self) -> Quantizer:
        settings, spec = self.finetune, _BINARY[self.scheme]
        if self.bits != 1:
            raise ValueError(f"--scheme={self.scheme} has 1 bit a weight, give --bits=1 (got {self.bits})")
        if settings.normalization != "none":
            raise ValueError(f"--scheme={self.scheme} knows no --normalization={settings.normalization}")
        if self.scheme == "static_binary" and settings.calibration_crops and settings.rounding == "compensated":
            raise ValueError(
                "--scheme=static_binary needs --rounding=nearest: its signs depend on the mean of all weights"
            )
        return dataclasses.replace(spec, channel_axes=(-1,) if settings.per_channel else ())

    def policy(self) -> list[Rule]:
        """Kernels are quantized; normalisation parameters, biases and `float_layers` stay float."""
        kept = [Rule(pattern, None) for pattern in self.finetune.float_layers]
        return [*kept, Rule(".*/kernel", self.quantizer()), Rule(".*", None)]

    def plan(self, params: Any) -> Plan:
        """Quantizers of a network's parameters.

        Raises:
            ValueError: a pattern matches no kernel, or the scheme hasn't the bits.
        """
        plan = resolve(self.policy(), params)
        pinned = {
            path: dataclasses.replace(self, bits=bits).quantizer()
            for path, bits in pinned_bits(self.pin, list(plan.quantized)).items()
        }
        return Plan(tuple((path, pinned.get(path, quantizer)) for path, quantizer in plan.entries))


def run(config: QuantizeConfig) -> pathlib.Path:
    """Quantize, or resume; returns the packed file."""
    return finish(config, prepare(config))


def prepare(config: QuantizeConfig) -> Quantization:
    """Everything up to the calibration; quantizations that differ in their steps alone can share it."""
    require(pretrained=config.pretrained)
    model = load_float_model(config.pretrained)
    path = _workdir(config) / MODEL_FILE
    if model.path.resolve() == path.resolve():
        raise ValueError(f"--workdir={path.parent} would overwrite --pretrained; choose another folder")
    plan = config.plan(model.params)
    claim_folder(path.parent, shaping_settings(config))
    return calibrated_layers(config.finetune, unquantized(config.finetune, model), plan, path.parent)


def finish(config: QuantizeConfig, start: Quantization) -> pathlib.Path:
    """Everything after the calibration; returns the packed file."""
    workdir = _workdir(config)
    claim_folder(workdir, shaping_settings(config))
    write_run_record(workdir, "quantize", config)
    description = f"{config.scheme} {config.bits} bits"
    quantization = finetune(config.finetune, start, workdir=workdir, description=description)
    written = write_model(quantization, workdir / MODEL_FILE, compact=config.compact)
    report = _report(config, start.model, written)
    (workdir / "report.md").write_text(report, encoding="utf-8")
    print(f"wrote {written.path} and report.md beside it")
    return written.path


def _workdir(config: QuantizeConfig) -> pathlib.Path:
    return pathlib.Path(config.workdir or default_workdir(config))


def default_workdir(config: QuantizeConfig) -> str:
    """Where a run without --workdir goes."""
    return f"runs/{model_name(config.pretrained)}_{config.scheme}_{config.bits}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How like the float network's embeddings the quantized network's are.

    Attributes:
        cosines: [utterances] of whole, clean utterances.
    """

    cosines: np.ndarray

    @property
    def median(self) -> float:
        """Median cosine."""
        return float(np.median(self.cosines))

    def summary(self) -> str:
        """The figures in a sentence."""
        low = np.quantile(self.cosines, 0.05)
        return (
            f"cosine with the float embedding over {len(self.cosines)} whole utterances of the fine-tuning speech: "
            f"median {self.median:.4f}, 5th percentile {low:.4f}"
        )


def measure_agreement(
    float_embedder: Embedder, quantized: Embedder, corpus: Corpus, *, max_utterances: int = 100
) -> Agreement:
    """Cosines between two embedders on evenly picked utterances."""
    own = [utterance for utterance in corpus.utterances if utterance.speed == 1.0]
    evenly = own[:: -(-len(own) // max_utterances)]
    chosen = [utterance for utterance in evenly if is_readable(utterance, quantized.network.frontend)]
    first, second = (one.embed_files(chosen) for one in (float_embedder, quantized))
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return Agreement(np.sum(first * second, axis=1) / np.maximum(lengths, 1e-12))


@dataclasses.dataclass(frozen=True)
class WrittenModel:
    """A packed file and what is known of it.

    Attributes:
        path: the file.
        size: its bytes.
        agreement: with the float network; None without speech.
        threshold: calibrated score of the decision, or None.
    """

    path: pathlib.Path
    size: SizeReport
    agreement: Agreement | None
    threshold: float | None

    def lines(self) -> list[str]:
        """Markdown list of it."""
        lines = [f"- {self.size.summary()}"]
        if self.agreement is not None:
            lines.append(f"- {self.agreement.summary()}")
        return [*lines, f"- threshold: {'none calibrated' if self.threshold is None else f'{self.threshold:.4f}'}"]


def write_model(quantization: Quantization, path: pathlib.Path, *, compact: bool) -> WrittenModel:
    """Write the packed file, with a threshold calibrated on the speech."""
    model, corpus = quantization.model, quantization.corpus
    threshold, agreement = model.threshold, None
    if corpus is not None:
        served = quantization.embedder
        agreement = measure_agreement(Embedder(model.network, model.variables), served, corpus)
        # Where the speech tells no speakers apart, the float model's threshold serves: the scores agree.
        threshold = calibrated_threshold(served, corpus) or threshold
    params, batch_stats, qstate = quantization.calibrated
    size = save(
        path,
        model.network,
        quantization.plan,
        params,
        qstate,
        batch_stats,
        compact=compact,
        threshold=threshold,
        activations=quantization.activations,
    )
    print(size.summary())
    if agreement is not None:
        print(agreement.summary())
    return WrittenModel(path, size, agreement, threshold)


def _report(config: QuantizeConfig, model: FloatModel, written: WrittenModel) -> str:
    """Markdown: what was made of what, and every tensor's bytes."""
    settings = config.finetune
    lines = [
        f"# {pathlib.Path(config.pretrained).name}, {config.scheme}, {config.bits} bits",
        "",
        *description_lines(model, settings),
        *written.lines(),
        "",
        "Error rates: `python -m experiments.evaluate`, on speech that had no part in this.",
        "",
    ]
    return "\n".join(lines) + "\n" + written.size.to_markdown()


def description_lines(model: FloatModel, settings: FinetuneConfig) -> list[str]:
    """Markdown list of a network and of what is done to it."""
    trained = f"{settings.steps} steps, loss {settings.loss}" if settings.steps else "none"
    return [
        f"- network: {model.network.name} {dict(model.network.arguments)}",
        f"- parameters: {count_parameters(model.params):,}",
        f"- front end: {model.network.frontend}",
        f"- calibration: {_calibration(settings)}",
        f"- fine-tuning: {trained}",
    ]


def _calibration(settings: FinetuneConfig) -> str:
    """What the speech was used for before any training."""
    if not settings.calibration_crops:
        return "none"
    parts = [
        "levels weighted by the inputs" if settings.weighted_codebooks else "",
        "compensated rounding" if settings.rounding == "compensated" else "",
        "layer after layer" if settings.sequential else "",
        "bias correction" if settings.bias_correction else "",
        f"statistics: {settings.recalibration}" if settings.recalibration != "none" else "",
    ]
    return f"{settings.calibration_crops} crops; {', '.join(filter(None, parts)) or 'nothing'}"


if __name__ == "__main__":
    launch(QuantizeConfig, run)
