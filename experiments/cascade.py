"""A cascade of precisions: few bits decide the clear trials, more bits the rest.

    python -m experiments.cascade --stages=runs/campplus/kmeans_2 --stages=runs/campplus/kmeans_4 \
        --stages=runs/campplus/float --dev_dir=DATA/an4 --dev_speakers=DATA/an4_train_speakers.txt \
        --test_dir=DATA/an4 --trials=DATA/an4_eval_trials.txt --workdir=runs/cascade --output=results/cascade.json

Scores of every stage are calibrated on development speakers, and so are the bounds within which a stage passes a trial
on. Neither the trials nor the stages' training may have these speakers: a network tells those it was trained on nearly
perfectly apart, hence calibration on them is far too steep. Where a network is trained on the same corpus, hold some
speakers out by `--exclude_speakers` of `experiments.train` and name them by `--dev_speakers`. Speakers of one name
count as one, in whatever folder.

The work folder gets `cascade.json`, which `qsv.deploy.load_cascade` runs, and `trade_off.png`: of many shares of trials
that each stage passes on, those that no other beats in error and cost on the development speakers, drawn as they do
on the trials. Bit operations are multiplications times the bits of the weight and of the activation, 32 in float.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.models import HEAD_FILE, model_file, model_name, open_tensors
from experiments.scoring import measure, score
from experiments.study_tables import cascade_table
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.analysis import decision_flips, plot_trade_off
from qsv.data import Corpus, CorpusLayout, Trials, all_pairs, audio_duration_seconds, load_corpus
from qsv.deploy import CascadeVerifier, Embedder, PackedModel, load_packed, save_cascade
from qsv.deploy.cascade import resident_bytes
from qsv.precision import bit_operations
from qsv.scoring import (
    Cascade,
    CascadeOutcome,
    act_dcf,
    bayes_threshold,
    bounds_for_escalation,
    bounds_for_flips,
    cllr,
    cosine_scores,
    eer,
    fit_calibration,
    min_cllr,
    run_cascade,
)

# Shares of trials that each stage passes on, of which all combinations are simulated for the curve.
_CURVE_SHARES, _MOST_SIMULATIONS = 21, 500


@dataclasses.dataclass(frozen=True)
class CascadeConfig:
    """Flags of the cascade."""

    workdir: str = setting("", "Folder for the cascade.")
    stages: tuple[str, ...] = setting((), "Model of a stage, cheapest first: a run's folder or a model file.")
    dev_dir: str = setting("", "Folder (or list file) of the development speech: several utterances a speaker.")
    dev_layout: str = setting(
        "folder", "How it is laid out, see --test_layout.", choices=[layout.value for layout in CorpusLayout]
    )
    dev_speakers: str = setting("", "File of the development speakers, one a line; all of --dev_dir when absent.")
    budget: str = setting(
        "flips",
        "What bounds are chosen for: flips keeps decisions that get worse under --max_harmful, escalation the trials "
        "that a stage passes on under --max_escalated.",
        choices=["flips", "escalation"],
    )
    max_harmful: float = setting(1e-3, "Decisions that may get worse, over the trials of each class.", minimum=0.0)
    max_escalated: float = setting(0.3, "Trials that a stage may pass on, over those that reach it.", minimum=0.0)
    prior: float = setting(0.5, "Prior of a target trial that calibration and decisions are for.", minimum=0.0)
    runtime: bool = setting(True, "Run the cascade on the audio as well, and compare its decisions.")
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.")
    test: TestConfig = TestConfig()

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ValueError(f"--prior must be between 0 and 1, got {self.prior}")
        if self.max_escalated > 1:
            raise ValueError(f"--max_escalated must be at most 1, got {self.max_escalated}")


def run(config: CascadeConfig) -> dict[str, Any]:
    """Calibrate, choose bounds, decide the trials; returns and writes the results."""
    require(workdir=config.workdir, stages=config.stages, dev_dir=config.dev_dir, test_dir=config.test.test_dir)
    if len(config.stages) < 2:
        raise ValueError(f"a cascade needs two --stages or more, got {list(config.stages)}")
    if config.test.as_norm or config.test.subtract_mean:
        raise ValueError("a cascade scores by the plain cosine; give neither --as_norm nor --subtract_mean")
    workdir, files = pathlib.Path(config.workdir), [model_file(stage) for stage in config.stages]
    test_set = load_test_set(config.test)
    development = development_corpus(config, test_set)
    models = [load_packed(file) for file in files]
    dev_trials = all_pairs(development.utterances)
    dev_files = [development.utterance(name) for name in dev_trials.names]
    dev_scores, scores = [], []
    for model in models:
        embedder = Embedder.of(model)
        dev_scores.append(cosine_scores(embedder.embed_files(dev_files), dev_trials.enrolment, dev_trials.test))
        scores.append(score(embedder, test_set))
    threshold = bayes_threshold(p_target=config.prior)
    calibrations = tuple(fit_calibration(own, dev_trials.labels, p_target=config.prior) for own in dev_scores)
    if config.budget == "flips":
        bounds = bounds_for_flips(
            calibrations, dev_scores, dev_trials.labels, max_harmful=config.max_harmful, threshold=threshold
        )
    else:
        bounds = bounds_for_escalation(
            calibrations, dev_scores, max_escalated=config.max_escalated, threshold=threshold
        )
    cascade = Cascade(calibrations, bounds, threshold)
    save_cascade(workdir / "cascade.json", files, cascade)
    outcome = run_cascade(cascade, scores)
    costs = _operations(models, test_set)
    llrs = np.stack([calibration(own) for calibration, own in zip(calibrations, scores, strict=True)])
    rows = [
        {
            "name": model_name(str(file)),
            "file_bytes": file.stat().st_size,
            "activation_bits": model.activation_bits,
            "resident_bytes": resident_bytes(model.variables()),
            "relative_operations": cost / costs[-1],
            **_figures(own, test_set, llrs[-1], config.prior),
        }
        for file, model, cost, own in zip(files, models, costs, llrs, strict=True)
    ]
    results = {
        "experiment": "cascade",
        "test": pathlib.Path(config.test.test_dir).name,
        "development": {"speakers": len(development.speakers), "trials": len(dev_trials.labels)},
        "budget": config.budget,
        "budget_value": config.max_harmful if config.budget == "flips" else config.max_escalated,
        "prior": config.prior,
        "bounds": list(bounds),
        "rows": rows,
        "cascade": _figures(outcome.llrs, test_set, llrs[-1], config.prior)
        | _use(outcome, rows, test_set)
        | {"flips": _flips(outcome, llrs[-1], test_set, threshold)},
        "curve": _curve(calibrations, dev_scores, dev_trials, scores, rows, test_set, threshold),
        "runtime": _runtime(CascadeVerifier(files, cascade), outcome, test_set) if config.runtime else None,
        "machine": machine(),
    }
    write_json(pathlib.Path(config.output or workdir / "results.json"), results)
    write_run_record(workdir, "cascade", config)
    _plot(results, workdir / "trade_off.png")
    print(cascade_table(results))
    return results


def development_corpus(config: CascadeConfig, test_set: TestSet) -> Corpus:
    """The development speakers' utterances.

    Raises:
        ValueError: an unknown speaker, fewer than two, or one who is in a trial or in a stage's training.
    """
    corpus = load_corpus(config.dev_dir, CorpusLayout(config.dev_layout))
    if config.dev_speakers:
        wanted = set(pathlib.Path(config.dev_speakers).read_text(encoding="utf-8").split())
        unknown = wanted - set(corpus.speakers)
        if unknown:
            raise ValueError(f"{config.dev_speakers}: speakers {sorted(unknown)} are not in {config.dev_dir}")
        corpus = Corpus.of(utterance for utterance in corpus.utterances if utterance.speaker in wanted)
    shared = sorted(set(corpus.speakers) & set(test_set.speakers.tolist()))
    if shared:
        raise ValueError(
            f"{len(shared)} development speakers are in the trials, such as {shared[:3]}; name others by "
            "--dev_speakers or another --dev_dir"
        )
    known = sorted(set(corpus.speakers) & _training_speakers(config.stages))
    if known:
        raise ValueError(
            f"{len(known)} development speakers are those that a stage was trained on, such as {known[:3]}, which it "
            "tells apart better than unknown ones; name others by --dev_speakers, or train without some"
        )
    if len(corpus.speakers) < 2:
        raise ValueError(f"{config.dev_dir} has {len(corpus.speakers)} development speakers, calibration needs two")
    return corpus


def _training_speakers(stages: Sequence[str]) -> set[str]:
    """Those of the classifiers that lie beside the stages' models."""
    speakers: set[str] = set()
    for stage in stages:
        head = model_file(stage).parent / HEAD_FILE
        if head.exists():
            with open_tensors(head) as file:
                speakers.update(file.metadata()["speakers"].split("\n"))
    return speakers


def _operations(models: list[PackedModel], test_set: TestSet) -> list[int]:
    """Bit operations of each stage for an utterance of the trials' mean length."""
    seconds = float(np.mean([audio_duration_seconds(utterance.path) for utterance in test_set.utterances]))
    return [
        bit_operations(
            model.network,
            model.variables(),
            model.packed_params,
            seconds=seconds,
            activation_bits=model.activation_bits,
        )
        for model in models
    ]


def _figures(llrs: np.ndarray, test_set: TestSet, reference: np.ndarray, prior: float) -> dict[str, Any]:
    """Errors of log-likelihood ratios, those of the last stage beside them."""
    labels = test_set.trials.labels
    return {
        **measure(llrs, test_set, reference),
        "act_dcf": act_dcf(llrs, labels, p_target=test_set.config.p_target),
        "act_dcf_at_prior": act_dcf(llrs, labels, p_target=prior),
        "cllr": cllr(llrs, labels),
        "min_cllr": min_cllr(llrs, labels),
    }


def _use(outcome: CascadeOutcome, rows: Sequence[Mapping[str, Any]], test_set: TestSet) -> dict[str, Any]:
    """What of the cascade has been used, and what it cost; rows are of the stages alone.

    `..._of_a_trial` is expected of one that comes alone: its utterances are embedded, and the files that it needs read,
    for it. The other figures are of all trials.
    """
    sides = test_set.trials.enrolment, test_set.trials.test
    costs, sizes, resident = (
        [row[name] for row in rows] for name in ("relative_operations", "file_bytes", "resident_bytes")
    )
    embedded = outcome.embedded(*sides)
    return {
        "settled": outcome.settled.tolist(),
        "utterances_embedded": embedded.tolist(),
        # An utterance is settled at the last stage that one of its trials reaches.
        "utterances_settled": (-np.diff(embedded, append=0) / embedded[0]).tolist(),
        "relative_operations": outcome.expected_cost(costs, *sides),
        "relative_operations_of_a_trial": float(np.dot(outcome.reached, costs)),
        "bytes_read": int(np.dot(embedded > 0, sizes)),
        "bytes_read_of_a_trial": float(np.dot(outcome.reached, sizes)),
        "resident_bytes": int(np.dot(embedded > 0, resident)),
    }


def _flips(outcome: CascadeOutcome, last: np.ndarray, test_set: TestSet, threshold: float) -> dict[str, int]:
    """Decisions that differ from the last stage's."""
    flips = decision_flips(last, outcome.llrs, test_set.trials.labels, threshold=threshold)["all"]
    return {"harmful": flips.harmful, "beneficial": flips.beneficial}


def _curve(
    calibrations: tuple[Any, ...],
    dev_scores: list[np.ndarray],
    dev_trials: Trials,
    scores: list[np.ndarray],
    rows: Sequence[Mapping[str, Any]],
    test_set: TestSet,
    threshold: float,
) -> list[dict[str, Any]]:
    """The cascade on the trials, at the shares passed on that no others beat on the development trials."""
    costs = [row["relative_operations"] for row in rows]
    found = []
    for shares in _share_grid(len(rows) - 1):
        bounds = bounds_for_escalation(calibrations, dev_scores, max_escalated=shares, threshold=threshold)
        outcome = run_cascade(Cascade(calibrations, bounds, threshold), dev_scores)
        found.append((float(np.dot(outcome.reached, costs)), eer(outcome.llrs, dev_trials.labels), shares, bounds))
    points, least = [], math.inf
    for _, error, shares, bounds in sorted(found):
        if error >= least:
            continue
        least = error
        outcome = run_cascade(Cascade(calibrations, bounds, threshold), scores)
        used = _use(outcome, rows, test_set)
        points.append(
            {
                "max_escalated": list(shares),
                "settled_at_first": used["settled"][0],
                "development_eer_percent": 100 * error,
                "eer_percent": 100 * eer(outcome.llrs, test_set.trials.labels),
                **{name: used[name] for name in used if name.startswith("relative_operations")},
            }
        )
    return points


def _share_grid(stages: int) -> Iterator[tuple[float, ...]]:
    """All combinations of evenly spaced shares, one for each stage that can pass trials on."""
    count = max(2, min(_CURVE_SHARES, int(_MOST_SIMULATIONS ** (1 / stages))))
    return itertools.product(np.round(np.linspace(0, 1, count), 3).tolist(), repeat=stages)


def _runtime(verifier: CascadeVerifier, simulated: CascadeOutcome, test_set: TestSet) -> dict[str, Any]:
    """The same trials from audio: whether every decision is the simulator's, and what was used."""
    trials = test_set.trials
    files = [utterance.path for utterance in test_set.utterances]
    outcome = verifier.verify_trials(files, trials.enrolment, trials.test)
    return {
        "trials": len(trials.labels),
        "decisions_equal": int(np.count_nonzero(outcome.accepted == simulated.accepted)),
        "stages_equal": int(np.count_nonzero(outcome.stages == simulated.stages)),
        "stages": [dataclasses.asdict(use) for use in verifier.use],
    }


def _plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """EER against the operations of a trial."""
    curve = [[point[name] for point in results["curve"]] for name in ("relative_operations_of_a_trial", "eer_percent")]
    points = {row["name"]: (100 * row["relative_operations"], row["eer_percent"]) for row in results["rows"]}
    own = results["cascade"]
    points["chosen bounds"] = (100 * own["relative_operations_of_a_trial"], own["eer_percent"])
    plot_trade_off(
        {"cascade": ([100 * value for value in curve[0]], curve[1])},
        points,
        path,
        xlabel="Bit operations of a trial (% of the last stage's)",
        ylabel="EER (%)",
    )


if __name__ == "__main__":
    launch(CascadeConfig, run)
