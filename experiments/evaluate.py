"""Measure a model on verification trials: EER, minDCF, intervals, a DET plot.

    python -m experiments.evaluate --model=runs/an4e_resnet18 --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt \
        --output=runs/an4e_resnet18/eval.json

`--model` is a run's folder or a model file, float or packed, or an ONNX file of `experiments.export`, which the runtime
of devices runs. Without `--trials` every pair of the folder's utterances is a trial; more than five million are counted
in bounded memory, without intervals. `--enrolments` says what CN-Celeb's enrolments are made of, `--embeddings` where
`experiments.embed` put the utterances' embeddings. With `--reference` both models are scored on the same trials and
their difference gets an interval too.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.models import load_embedder, model_bytes, model_digest
from experiments.scoring import MANY_TRIALS, FileEmbedder, measure, measure_pairs, score
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.data import Corpus, CorpusLayout, Utterance, load_corpus
from qsv.deploy import EmbeddingStore, StoredEmbeddings
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
    embeddings: str = setting("", "Folder of the test speech's embeddings, as experiments.embed made them of --model.")
    cohort_embeddings: str = setting("", "The same of --cohort_dir.")
    backend: str = setting("onnxruntime", "What runs an ONNX file.", choices=BACKENDS)
    test: TestConfig = TestConfig()


@dataclasses.dataclass(frozen=True)
class ExportedEmbedder:
    """An exported file as devices run it, one recording after the other."""

    embedder: OnnxEmbedder

    def embed_files(self, files: Sequence[Utterance]) -> np.ndarray:
        """Embeddings [n, embedding_size] float32; raises what `OnnxEmbedder.embed_file` raises."""
        return np.stack([self.embedder.embed_file(file.path)[0] for file in tqdm(files, desc="embedding", unit="file")])


def load_file_embedder(name: str, backend: str) -> tuple[FileEmbedder, int]:
    """The embedder of what `load_embedder` reads, or of an exported ONNX file; and its file's bytes."""
    if pathlib.Path(name).suffix != ".onnx":
        return load_embedder(name)
    return ExportedEmbedder(OnnxEmbedder(name, backend=backend)), pathlib.Path(name).stat().st_size


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns what is written."""
    require(model=config.model, test_dir=config.test.test_dir)
    corpus = load_corpus(config.test.test_dir, CorpusLayout(config.test.test_layout))
    if not config.test.trials and len(corpus) * (len(corpus) - 1) // 2 > MANY_TRIALS:
        figures, curves = _of_all_pairs(config, corpus)
    else:
        figures, curves = _of_trials(config, load_test_set(config.test, corpus))
    figures = {"model": config.model, **figures, "machine": machine()}
    print(
        f"EER {figures['eer_percent']:.2f} %{_interval(figures)}, minDCF({config.test.p_target:g}) "
        f"{figures['min_dcf']:.3f}, {figures['target_trials']:,} target and "
        f"{figures['non_target_trials']:,} non-target trials, {figures['file_bytes']:,} bytes"
    )
    if config.output:
        write_json(pathlib.Path(config.output), figures)
    if config.det_plot:
        plot_det(curves, config.det_plot)
    return figures


def _of_trials(config: EvaluateConfig, test_set: TestSet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures, and {system: (scores, labels)} for a plot."""
    embedder, cohort_embedder, file_bytes = _embedders(config)
    scores = score(embedder, test_set, cohort_embedder=cohort_embedder)
    systems, reference = {config.model: scores}, None
    if config.reference:
        reference = score(load_file_embedder(config.reference, config.backend)[0], test_set)
        systems = {config.reference: reference, **systems}
    figures = {"file_bytes": file_bytes, **measure(scores, test_set, reference)}
    return figures, {name: (values, test_set.trials.labels) for name, values in systems.items()}


def _of_all_pairs(config: EvaluateConfig, corpus: Corpus) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of so many pairs that they are only counted."""
    if config.reference or config.det_plot:
        raise ValueError(
            f"the pairs of {len(corpus):,} utterances are only counted; give --trials for --reference and --det_plot"
        )
    embedder, cohort_embedder, file_bytes = _embedders(config)
    return {"file_bytes": file_bytes, **measure_pairs(embedder, corpus, config.test, cohort_embedder)}, {}


def _embedders(config: EvaluateConfig) -> tuple[FileEmbedder, FileEmbedder, int]:
    """Those of the test speech and of the cohort, and the bytes of the model's file."""
    stored = []
    for folder in (config.embeddings, config.cohort_embeddings):
        if folder:
            store = EmbeddingStore.open(folder)
            store.check_model(model_digest(config.model))
            stored.append(StoredEmbeddings(store))
        else:
            stored.append(None)
    test, cohort = stored
    needs_cohort = config.test.as_norm or config.test.subtract_mean
    if test is not None and (cohort is not None or not needs_cohort):
        return test, cohort or test, model_bytes(config.model)
    embedder, file_bytes = load_file_embedder(config.model, config.backend)
    return test or embedder, cohort or embedder, file_bytes


def _interval(figures: Mapping[str, Any]) -> str:
    if "eer_percent_interval" not in figures:
        return ""
    low, high = figures["eer_percent_interval"]
    return f" ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    launch(EvaluateConfig, run)
