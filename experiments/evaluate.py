"""Measure a model on verification trials: EER, minDCF, intervals, a DET plot.

    python -m experiments.evaluate --model=runs/an4e_resnet18 --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt \
        --output=runs/an4e_resnet18/eval.json

`--model` is a run's folder or a model file, float or packed, or an ONNX file of `experiments.export`, which the runtime
of devices runs. Without `--trials` every pair of the folder's utterances
is a trial. With `--reference` both models are scored on the same trials and their difference gets an interval too.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.models import load_embedder
from experiments.testing import FileEmbedder, TestConfig, load_test_set, measure, score
from qsv.deploy.runtime import OnnxEmbedder
from qsv.deploy.runtime.backends import BACKENDS
from qsv.scoring import plot_det


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Flags of an evaluation."""

    model: str = setting("", "Model: a run's folder, a model file, float or packed, or an exported ONNX file.")
    reference: str = setting("", "Model to compare with on the same trials, such as the float one.")
    output: str = setting("", "JSON file for the results; printed in any case.")
    det_plot: str = setting("", "Picture file (.png, .pdf, .svg) for a DET plot; needs qsv[demo].")
    backend: str = setting("onnxruntime", "What runs an ONNX file.", choices=BACKENDS)
    test: TestConfig = TestConfig()


@dataclasses.dataclass(frozen=True)
class ExportedEmbedder:
    """An exported file as devices run it, one recording after the other."""

    embedder: OnnxEmbedder

    def embed_files(self, files: Sequence[pathlib.Path]) -> np.ndarray:
        """Embeddings [n, embedding_size] float32; raises what `OnnxEmbedder.embed_file` raises."""
        return np.stack([self.embedder.embed_file(file)[0] for file in tqdm(files, desc="embedding", unit="file")])


def load_file_embedder(name: str, backend: str) -> tuple[FileEmbedder, int]:
    """The embedder of what `load_embedder` reads, or of an exported ONNX file; and its file's bytes."""
    if pathlib.Path(name).suffix != ".onnx":
        return load_embedder(name)
    return ExportedEmbedder(OnnxEmbedder(name, backend=backend)), pathlib.Path(name).stat().st_size


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns what is written."""
    require(model=config.model, test_dir=config.test.test_dir)
    test_set = load_test_set(config.test)
    embedder, file_bytes = load_file_embedder(config.model, config.backend)
    scores = score(embedder, test_set)
    systems = {config.model: scores}
    reference = None
    if config.reference:
        reference = score(load_file_embedder(config.reference, config.backend)[0], test_set)
        systems = {config.reference: reference, **systems}
    figures = {
        "model": config.model,
        "file_bytes": file_bytes,
        **measure(scores, test_set, reference),
        "machine": machine(),
    }
    low, high = figures["eer_percent_interval"]
    print(
        f"EER {figures['eer_percent']:.2f} % ({low:.2f} to {high:.2f}), minDCF({config.test.p_target:g}) "
        f"{figures['min_dcf']:.3f}, {figures['target_trials']:,} target and "
        f"{figures['non_target_trials']:,} non-target trials, {figures['file_bytes']:,} bytes"
    )
    if config.output:
        write_json(pathlib.Path(config.output), figures)
    if config.det_plot:
        plot_det({name: (values, test_set.trials.labels) for name, values in systems.items()}, config.det_plot)
    return figures


if __name__ == "__main__":
    launch(EvaluateConfig, run)
