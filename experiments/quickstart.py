"""The whole of qsv in some minutes, without a download: train, quantize, measure, report.

    python -m experiments.quickstart

A small float ResNet learns synthetic voices (spoken by eSpeak NG), is quantized to 8, 4, 3 and 2 bits by k-means and
uniform levels, and every model is measured on voices that training never saw. The folder `--workdir` then holds
`report.md`, `error_against_size.png`, `det.png`, and a `model.safetensors` for each model. `--preset=smoke` is the
same in under a minute, for tests; its error rates mean nothing.
"""

import dataclasses
import pathlib
import time
from typing import Any

from experiments import bit_widths, train
from experiments.configuration import launch, setting, write_json
from experiments.finetune_config import FinetuneConfig
from experiments.optimization import OptimizationConfig
from experiments.speech import SpeechConfig
from experiments.tables import bit_width_table
from experiments.testing import TestConfig
from qsv.data.embedded import build_embedded_corpus


@dataclasses.dataclass(frozen=True)
class Preset:
    """How much is done."""

    speakers: int
    test_speakers: int
    utterances: int
    model: str
    width: int
    embedding_size: int
    crop_seconds: float
    batch_size: int
    epochs: float
    finetune_steps: int
    bit_widths: tuple[str, ...]
    resamples: int


PRESETS = {
    "full": Preset(60, 20, 16, "resnet18", 8, 64, 1.0, 32, 11.0, 50, ("8", "4", "3", "2"), 500),
    "smoke": Preset(4, 4, 3, "resnet10", 2, 8, 0.5, 8, 1.0, 2, ("4",), 20),
}


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """Flags of the quickstart."""

    workdir: str = setting("runs/quickstart", "Folder of the run; an interrupted run there is resumed.")
    preset: str = setting("full", "How much is done; smoke is for tests.", choices=tuple(PRESETS))
    seed: int = setting(0, "Seed of voices, weights, crops and augmentation.", minimum=0)


def run(config: QuickstartConfig) -> pathlib.Path:
    """Run everything; returns the report."""
    started = time.monotonic()
    workdir, preset = pathlib.Path(config.workdir), PRESETS[config.preset]
    print(f"making a corpus of {preset.speakers} training and {preset.test_speakers} test voices")
    folder = workdir / "corpus"
    corpus = build_embedded_corpus(
        folder,
        speakers=preset.speakers,
        test_speakers=preset.test_speakers,
        utterances_per_speaker=preset.utterances,
        seed=config.seed,
    )
    speech = SpeechConfig(
        data_dir=(str(folder / "train"),),
        noise_dir=(str(corpus.noise_folder),),
        crop_seconds=preset.crop_seconds,
        batch_size=preset.batch_size,
    )
    model = train.run(_training(config, preset, speech))
    results = bit_widths.run(_comparison(config, preset, speech, model))
    report = workdir / "report.md"
    minutes = (time.monotonic() - started) / 60
    report.write_text(_report(results, preset, minutes), encoding="utf-8")
    write_json(workdir / "results.json", {**results, "minutes": minutes})
    print(f"wrote {report} and two plots beside it, in {minutes:.1f} minutes")
    return report


def _training(config: QuickstartConfig, preset: Preset, speech: SpeechConfig) -> train.TrainConfig:
    return train.TrainConfig(
        workdir=str(pathlib.Path(config.workdir) / "float"),
        model=preset.model,
        width=preset.width,
        embedding_size=preset.embedding_size,
        epochs=preset.epochs,
        seed=config.seed,
        speech=speech,
        optimization=OptimizationConfig(
            optimizer="adamw",
            learning_rate=2e-3,
            final_learning_rate=1e-5,
            schedule="cosine",
            weight_decay=0.05,
            margin_rise_start=0.3,
            margin_rise_end=0.7,
        ),
    )


def _comparison(
    config: QuickstartConfig,
    preset: Preset,
    speech: SpeechConfig,
    model: pathlib.Path,
) -> bit_widths.BitWidthsConfig:
    finetune = FinetuneConfig(
        loss="margin",
        level_rate=0.0,
        frozen_statistics=False,
        steps=preset.finetune_steps,
        refresh_steps=max(1, preset.finetune_steps // 10),
        weighted_codebooks=False,
        rounding="nearest",
        sequential=False,
        bias_correction=False,
        recalibration="replace",
        calibration_crops=min(10, preset.finetune_steps) * speech.batch_size,
        seed=config.seed,
        speech=speech,
        optimization=OptimizationConfig(
            optimizer="adamw",
            learning_rate=3e-4,
            final_learning_rate=1e-6,
            schedule="cosine",
            warmup_fraction=0.0,
            weight_decay=0.01,
            margin_rise_start=0.0,
            margin_rise_end=0.0,
        ),
    )
    return bit_widths.BitWidthsConfig(
        workdir=config.workdir,
        pretrained=str(model),
        bit_widths=preset.bit_widths,
        finetune=finetune,
        test=TestConfig(test_dir=str(pathlib.Path(config.workdir) / "corpus" / "test"), resamples=preset.resamples),
    )


def _report(results: dict[str, Any], preset: Preset, minutes: float) -> str:
    return f"""# Quickstart

A {preset.model} of width {preset.width}, trained on {preset.speakers} synthetic voices and tested on
{preset.test_speakers} others, each in noise. Synthetic voices are no substitute for speech: the table shows what
bits cost, not how well the network would do on people.

{bit_width_table(results)}
![EER against file size](error_against_size.png)

![DET curves](det.png)

Every model is a folder here with its `model.safetensors`. Compare two recordings with one of them:

    python -m experiments.verify --model=kmeans_4 A.wav B.wav

{minutes:.1f} minutes on {results["machine"]["cores"]} cores.
"""


if __name__ == "__main__":
    launch(QuickstartConfig, run, cpu_devices=2)
