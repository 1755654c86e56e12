"""Measure a model on verification trials: EER, minDCF, intervals, a DET plot.

    python -m experiments.evaluate --model=runs/an4e_resnet18 --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt \
        --output=runs/an4e_resnet18/eval.json

`--model` is a run's folder or a model file, float or packed, or an ONNX file of `experiments.export`, which the runtime
of devices runs. Without `--trials` every pair of the folder's utterances
is a trial. With `--reference` both models are scored on the same trials and their difference gets an interval too.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.models import load_embedder
from experiments.speech import is_readable
from qsv.data import Corpus, CorpusLayout, Trials, all_pairs, check_trials, load_corpus, read_trials
from qsv.deploy import Embedder
from qsv.deploy.runtime import OnnxEmbedder
from qsv.deploy.runtime.backends import BACKENDS
from qsv.scoring import (
    ResampledMetrics,
    as_norm,
    cosine_scores,
    eer_of_rates,
    eer_threshold,
    min_dcf_of_rates,
    plot_det,
    resample_metrics,
    speaker_means,
)


@dataclasses.dataclass(frozen=True)
class TestConfig:
    """Trials and scoring."""

    # Not a test class of pytest's.
    __test__ = False

    test_dir: str = setting("", "Folder (or list file, see --test_layout) of the test speech.")
    test_layout: str = setting(
        "folder",
        "How --test_dir and --cohort_dir are laid out: folder is SPEAKER/**/UTT.{wav,flac,ogg,mp3}, voxceleb is "
        "VoxCeleb's, list is a file of `SPEAKER PATH` lines, prepared a corpus of experiments.prepare (FOLDER:SPLIT).",
        choices=[layout.value for layout in CorpusLayout],
    )
    trials: str = setting(
        "", "Trial list, lines of `LABEL ENROLMENT TEST`; every pair of the folder's utterances when absent."
    )
    cohort_dir: str = setting(
        "", "Folder of other speakers' speech, for --subtract_mean and --as_norm; never the test speakers'."
    )
    subtract_mean: bool = setting(False, "Subtract the cohort's mean embedding before the cosine.")
    as_norm: bool = setting(False, "Normalise scores by the nearest cohort speakers (AS-norm).")
    top_n: int = setting(300, "Cohort speakers nearest to an utterance that AS-norm uses.", minimum=1)
    p_target: float = setting(0.01, "Prior of a target trial in minDCF.", minimum=0.0)
    resample: str = setting(
        "speakers",
        "What the bootstrap draws: speakers, since trials of one speaker are alike, or trials.",
        choices=["speakers", "trials"],
    )
    resamples: int = setting(1000, "Bootstrap resamples.", minimum=2)

    def __post_init__(self) -> None:
        if not 0 < self.p_target < 1:
            raise ValueError(f"--p_target must be between 0 and 1, got {self.p_target}")


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
class TestSet:
    """Trials with all that scoring needs to know of them."""

    __test__ = False

    corpus: Corpus
    trials: Trials
    cohort: Corpus | None
    config: TestConfig

    @functools.cached_property
    def speakers(self) -> np.ndarray:
        """Speaker of every name of the trials."""
        return np.array([self.corpus.utterance(name).speaker for name in self.trials.names])


def load_test_set(config: TestConfig) -> TestSet:
    """Read corpus and trials, and check them before anything is embedded.

    Raises:
        MissingUtterancesError: the trials name utterances that the folder doesn't have; carries all of them.
        ValueError: one class only, an empty folder, or a cohort that is asked for but not given.
    """
    require(test_dir=config.test_dir)
    layout = CorpusLayout(config.test_layout)
    corpus = load_corpus(config.test_dir, layout)
    if config.trials:
        trials = read_trials(config.trials)
        check_trials(trials, corpus)
    else:
        trials = all_pairs(corpus.utterances)
    if config.resample == "speakers":
        _check_speakers(corpus, trials)
    cohort = None
    if config.as_norm or config.subtract_mean:
        require(cohort_dir=config.cohort_dir)
        cohort = load_corpus(config.cohort_dir, layout)
    return TestSet(corpus, trials, cohort, config)


def _check_speakers(corpus: Corpus, trials: Trials) -> None:
    """Raise ValueError where a label contradicts the folders' speakers: their bootstrap would be meaningless."""
    speakers = np.array([corpus.utterance(name).speaker for name in trials.names])
    same = speakers[trials.enrolment] == speakers[trials.test]
    wrong = np.flatnonzero(same != trials.labels)
    if wrong.size:
        first = wrong[0]
        raise ValueError(
            f"{wrong.size} trials contradict the speakers' folders, first {int(trials.labels[first])} "
            f"{trials.names[trials.enrolment[first]]} {trials.names[trials.test[first]]}; where folders aren't "
            "speakers, give --resample=trials"
        )


class FileEmbedder(Protocol):
    """Whatever makes embeddings [n, embedding_size] of n files."""

    def embed_files(self, files: Sequence[pathlib.Path]) -> np.ndarray: ...


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


def score(embedder: FileEmbedder, test_set: TestSet) -> np.ndarray:
    """Scores of all trials, [trials] float; every utterance is embedded once."""
    config, trials = test_set.config, test_set.trials
    embeddings = embedder.embed_files([test_set.corpus.utterance(name).path for name in trials.names])
    cohort = mean = None
    if test_set.cohort is not None:
        others = embedder.embed_files([utterance.path for utterance in test_set.cohort.utterances])
        cohort = speaker_means(others, [utterance.speaker for utterance in test_set.cohort.utterances])
        mean = others.mean(axis=0) if config.subtract_mean else None
    scores = cosine_scores(embeddings, trials.enrolment, trials.test, mean=mean)
    if not config.as_norm:
        return scores
    top_n = min(config.top_n, len(cohort))
    return as_norm(scores, embeddings, trials.enrolment, trials.test, cohort, top_n=top_n, mean=mean)


def measure(scores: np.ndarray, test_set: TestSet, reference: np.ndarray | None = None) -> dict[str, Any]:
    """EER and minDCF with bootstrap intervals, and the counts behind them.

    Args:
        scores: [trials].
        test_set: the trials.
        reference: [trials] of another model on the same trials; adds the difference of the EERs, and their ratio
            unless the reference makes no error in some resample.

    Returns:
        JSON-compatible figures.
    """
    config, trials = test_set.config, test_set.trials
    resampled = resample([scores] if reference is None else [scores, reference], test_set)
    error, detection = resampled.interval(0), resampled.interval(1)
    targets = int(np.count_nonzero(trials.labels))
    figures = {
        "eer_percent": 100 * error.estimate,
        "eer_percent_interval": [100 * error.low, 100 * error.high],
        "eer_threshold": eer_threshold(scores, trials.labels),
        "min_dcf": detection.estimate,
        "min_dcf_interval": [detection.low, detection.high],
        "p_target": config.p_target,
        "confidence": error.confidence,
        "resampled": config.resample,
        "trials": len(trials.labels),
        "target_trials": targets,
        "non_target_trials": len(trials.labels) - targets,
        "utterances": len(trials.names),
        "speakers": len(set(test_set.speakers.tolist())),
    }
    if reference is not None:
        difference = resampled.difference()
        figures |= {
            "eer_percent_difference": 100 * difference.estimate,
            "eer_percent_difference_interval": [100 * difference.low, 100 * difference.high],
        }
        # Undefined where the reference makes no error in some resample; all else was checked just above.
        with contextlib.suppress(ValueError):
            ratio = resampled.ratio()
            figures |= {"eer_ratio": ratio.estimate, "eer_ratio_interval": [ratio.low, ratio.high]}
    return figures


def resample(systems: Sequence[np.ndarray], test_set: TestSet) -> ResampledMetrics:
    """EER and minDCF of scores [trials] each, on the bootstrap's resamples that the flags ask for."""
    config, trials = test_set.config, test_set.trials
    options: dict[str, Any] = {"resample": config.resample, "num_resamples": config.resamples}
    if config.resample == "speakers":
        options["enrolment_speakers"] = test_set.speakers[trials.enrolment]
        options["test_speakers"] = test_set.speakers[trials.test]
    cost = functools.partial(min_dcf_of_rates, p_target=config.p_target)
    return resample_metrics(systems, trials.labels, metrics=[eer_of_rates, cost], **options)


def calibrated_threshold(embedder: Embedder, corpus: Corpus, *, max_utterances: int = 400) -> float | None:
    """Threshold at the EER of pairs of training utterances, evenly picked; None where they are of one class.

    The network has seen these speakers, so unknown ones score a little lower than this threshold expects.
    """
    own = [utterance for utterance in corpus.utterances if utterance.speed == 1.0]
    evenly = own[:: -(-len(own) // max_utterances)]
    chosen = [utterance for utterance in evenly if is_readable(utterance, embedder.network.frontend)]
    numbers = {name: number for number, name in enumerate(sorted({u.speaker for u in chosen}))}
    speakers = np.array([numbers[utterance.speaker] for utterance in chosen])
    first, second = np.triu_indices(len(chosen), k=1)
    labels = speakers[first] == speakers[second]
    if labels.all() or not labels.any():
        return None
    embeddings = embedder.embed_files(chosen)
    return eer_threshold(cosine_scores(embeddings, first, second), labels)


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
