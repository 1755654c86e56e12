"""Speech quality with one bit an activation: a network after DNSMOS, float and quantized, on labelled clips.

    python -m experiments.speech_quality --corpus=runs/noisy_speech --workdir=runs/quality --output=results/quality.json

trains float networks for every number of passes in `--epochs` and ones with binary activation maps for every `--betas`
too, keeps the best of either kind on the validation clips, and fine-tunes the binary one with quantized weights at
every `--bit_widths`. The table has the errors on the test clips, each against float, and the memory that an inference
takes. What is in `--workdir` already is evaluated, not trained again; an interrupted training is resumed, and what was
made with other settings is refused. The corpus is what `experiments.quality_corpus` makes, or any folder with a
`labels.csv` of the columns path, split, speaker and the label's.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.models import MODEL_FILE, load_float_model
from experiments.quantize import SCHEMES, QuantizeConfig
from experiments.run_settings import claim_folder, holds_model, shaping_settings
from experiments.running import run_or_resume
from experiments.speech import names_digest
from experiments.study_tables import quality_table
from qsv.analysis import RegressionFigures, plot_predictions, regression_figures
from qsv.data import Corpus, read_labels, training_loader
from qsv.data.mixtures import LABELS_FILE
from qsv.deploy import load, save
from qsv.deploy.size_report import file_report
from qsv.models import Network, count_parameters, fold_norms, model_names
from qsv.precision import inference_memory
from qsv.quant import Plan, Rule, init, resolve
from qsv.scoring import Interval
from qsv.training import (
    Optimizer,
    Periods,
    Regression,
    Task,
    TrainState,
    data_mesh,
    learning_rate_schedule,
    make_train_step,
)

# Networks with float weights don't depend on them.
_OF_FINE_TUNING = ("scheme", "finetune_epochs", "finetune_rate")


@dataclasses.dataclass(frozen=True)
class SpeechQualityConfig:
    """Flags of a study of speech quality."""

    corpus: str = setting("", f"Folder with {LABELS_FILE} and its clips.")
    label: str = setting("pesq", "Column to predict.")
    workdir: str = setting("", "Folder for the networks.", incidental=True)
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.", incidental=True)
    model: str = setting("dnsmos", "Network.", choices=model_names("quality"))
    scheme: str = setting("uniform", "Levels of the weights.", choices=SCHEMES)
    # A network's folder is named after these three.
    bit_widths: tuple[str, ...] = setting(("8", "4", "2"), "Bits a weight beside binary maps.", incidental=True)
    betas: tuple[str, ...] = setting(
        ("0.1", "0.3", "1"), "Narrowness of the surrogate derivative of binary maps.", incidental=True
    )
    epochs: tuple[str, ...] = setting(
        ("7", "15", "30"),
        "Passes over the training clips, each number for a network of its own: many are too many for float activations "
        "and few too few for binary ones.",
        incidental=True,
    )
    scale: str = setting(
        "decibel",
        "Of the Mel spectrogram: decibels below the clip's loudest value, or the natural logarithm, which depends on "
        "the volume and is far from zero.",
        choices=["decibel", "natural"],
    )
    normalized: bool = setting(
        True, "Train float weights with batch normalisation, which is folded into the convolutions afterwards."
    )
    dropout: float = setting(
        0.0, "Share of the channels that training drops; a global maximum is then another than in use.", minimum=0.0
    )
    finetune_epochs: float = setting(6.0, "Passes with quantized weights.", minimum=0.0)
    finetune_rate: float = setting(0.1, "Learning rate of these relative to --learning_rate.", minimum=0.0)
    learning_rate: float = setting(5e-3, "Learning rate of Adam at first; it falls along a cosine.", minimum=0.0)
    clip_seconds: float = setting(5.0, "Length of a clip; others are cut or repeated in training.", minimum=0.1)
    batch_size: int = setting(32, "Clips in a step, over all devices.", minimum=1)
    seed: int = setting(0, "Seed of weights, order and dropout.", minimum=0)
    log_steps: int = setting(20, "Steps between two lines of metrics.", minimum=1, incidental=True)
    save_steps: int = setting(500, "Steps between two checkpoints; 0 saves the last only.", minimum=0, incidental=True)
    loader_threads: int = setting(2, "Threads that decode.", minimum=0, incidental=True)
    cache_mbytes: int = setting(1536, "Memory for decoded clips in megabytes.", minimum=0, incidental=True)
    resamples: int = setting(1000, "Resamples of the speakers for the intervals.", minimum=1, incidental=True)

    def __post_init__(self) -> None:
        if self.dropout >= 1:
            raise ValueError(f"--dropout must be less than 1, got {self.dropout}")
        lists = (("betas", self.betas, float), ("epochs", self.epochs, float), ("bit_widths", self.bit_widths, int))
        for name, values, kind in lists:
            try:
                positive = bool(values) and all(0 < kind(value) < math.inf for value in values)
            except ValueError:
                positive = False
            if not positive:
                raise ValueError(f"--{name} must be positive numbers, got {list(values)}")


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of one split."""

    corpus: Corpus
    labels: dict[str, float]

    @classmethod
    def read(cls, config: SpeechQualityConfig, split: str) -> "Clips":
        """Of the corpus of a config."""
        return cls(*read_labels(pathlib.Path(config.corpus) / LABELS_FILE, config.label, split=split))

    @property
    def targets(self) -> np.ndarray:
        """[clips] labels in the order of the corpus."""
        return np.array([self.labels[utterance.name] for utterance in self.corpus.utterances])


def run(config: SpeechQualityConfig) -> dict[str, Any]:
    """Train what is missing and evaluate; returns and writes the results."""
    require(corpus=config.corpus, workdir=config.workdir)
    plans = {int(bits): QuantizeConfig(scheme=config.scheme, bits=int(bits)).policy() for bits in config.bit_widths}
    train, validation, test = (Clips.read(config, split) for split in ("train", "validation", "test"))
    networks: dict[str, dict[str, tuple[Network, float]]] = {"float": {}, "binary maps": {}}
    for epochs in config.epochs:
        networks["float"][f"float_epochs{epochs}"] = (_network(config), float(epochs))
        for beta in config.betas:
            network = _network(config, maps="binary", beta=float(beta))
            networks["binary maps"][f"binary_maps_beta{beta}_epochs{epochs}"] = (network, float(epochs))
    validated, paths = {}, {}
    for kind, candidates in networks.items():
        trained = {
            name: _trained(config, name, network, train, passes) for name, (network, passes) in candidates.items()
        }
        figures = {name: _validated(path, validation) for name, path in trained.items()}
        best = min(figures, key=lambda name: figures[name]["mse"])
        paths[kind] = trained[best]
        validated |= {name: {**own, "chosen": name == best} for name, own in figures.items()}
    for bits, policy in plans.items():
        paths[f"binary maps, {bits} bits"] = _quantized(config, bits, policy, paths["binary maps"], train)

    predictions = {name: _predicted(path, test) for name, path in paths.items()}
    speakers = [utterance.speaker for utterance in test.corpus.utterances]
    measured = regression_figures(predictions, test.targets, groups=speakers, num_resamples=config.resamples)
    results = {
        "experiment": "speech_quality",
        "network": config.model,
        "parameters": count_parameters(load(paths["float"]).variables["params"]),
        "label": config.label,
        "scheme": config.scheme,
        "clips": {"train": len(train.corpus), "validation": len(validation.corpus), "test": len(test.corpus)},
        "test_speakers": len(set(speakers)),
        "clip_seconds": config.clip_seconds,
        "finetune_epochs": config.finetune_epochs,
        "validation": validated,
        "rows": [_row(config, name, path, measured[name]) for name, path in paths.items()],
        "machine": machine(),
    }
    write_run_record(config.workdir, "speech_quality", config, clips=len(train.corpus))
    write_json(pathlib.Path(config.output or pathlib.Path(config.workdir) / "results.json"), results)
    print(quality_table(results))
    shown = dict(list(predictions.items())[:3])
    plot_predictions(shown, test.targets, pathlib.Path(config.workdir) / "predictions.png", label=config.label.upper())
    return results


def _network(config: SpeechQualityConfig, **arguments: Any) -> Network:
    """The network that is trained, with arguments of its module."""
    frontend = dataclasses.replace(Network(config.model).frontend, scale=config.scale)
    return Network(config.model, {"dropout": config.dropout, **arguments}, frontend)


def _settings(config: SpeechQualityConfig, clips: Clips) -> dict[str, Any]:
    """What shapes a network that its folder's name doesn't tell."""
    labelled = [f"{name} {label}" for name, label in clips.labels.items()]
    return shaping_settings(config) | {"corpus": names_digest(labelled)}


def _trained(config: SpeechQualityConfig, name: str, network: Network, clips: Clips, epochs: float) -> pathlib.Path:
    """A network with float weights, trained unless it is there."""
    folder = pathlib.Path(config.workdir) / name
    path = folder / MODEL_FILE
    settings = {flag: value for flag, value in _settings(config, clips).items() if flag not in _OF_FINE_TUNING}
    if holds_model(folder, settings):
        return path
    claim_folder(folder, settings)
    trained = dataclasses.replace(network, arguments={**network.arguments, "normalized": config.normalized})
    variables = trained.init(jax.random.key(config.seed))
    # At first every clip is predicted to be an average one.
    score = variables["params"]["score"]
    score["bias"] = jnp.full_like(score["bias"], float(np.mean(clips.targets)))
    float_rules = [Rule(".*", None)]
    plan = resolve(float_rules, variables["params"])
    state = _train(config, folder, trained, plan, variables, clips, epochs=epochs, rate=config.learning_rate)
    params = fold_norms(state.params, state.batch_stats)
    save(path, network, resolve(float_rules, params), params, {}, {})
    return path


def _quantized(
    config: SpeechQualityConfig, bits: int, policy: list[Rule], start: pathlib.Path, clips: Clips
) -> pathlib.Path:
    """The network with quantized weights too, fine-tuned unless it is there."""
    folder = pathlib.Path(config.workdir) / f"{start.parent.name}_{config.scheme}_{bits}"
    path = folder / MODEL_FILE
    settings = _settings(config, clips)
    if holds_model(folder, settings):
        return path
    claim_folder(folder, settings)
    model = load_float_model(str(start), use="quality")
    plan = resolve(policy, model.params)
    rate = config.finetune_rate * config.learning_rate
    variables = {"params": model.params, "batch_stats": {}}
    state = _train(config, folder, model.network, plan, variables, clips, epochs=config.finetune_epochs, rate=rate)
    save(path, model.network, plan, state.params, state.qstate, {})
    return path


def _train(
    config: SpeechQualityConfig,
    folder: pathlib.Path,
    network: Network,
    plan: Plan,
    variables: Mapping[str, Any],
    clips: Clips,
    *,
    epochs: float,
    rate: float,
) -> TrainState:
    loader = training_loader(
        clips.corpus,
        batch_size=config.batch_size,
        crop_seconds=config.clip_seconds,
        seed=config.seed,
        sample_rate_hz=network.frontend.sample_rate_hz,
        cache_bytes=config.cache_mbytes * 2**20,
        num_threads=config.loader_threads,
        crops_per_utterance=1,
        labels=clips.labels,
    )
    steps = max(1, round(epochs * loader.steps_per_epoch))
    learning_rate = learning_rate_schedule("cosine", peak=rate, final=rate / 100, num_steps=steps)
    task = Task(
        network=network,
        objective=Regression(),
        plan=plan,
        learning_rate=learning_rate,
        transformation=Optimizer("adamw", weight_decay=0.0).transformation(learning_rate),
        anneal_steps=steps,
    )
    state = TrainState.create(
        params=variables["params"],
        head={},
        batch_stats=variables["batch_stats"],
        transformation=task.transformation,
        seed=config.seed,
        qstate=init(plan, variables["params"]),
    )
    mesh = data_mesh()
    state = run_or_resume(
        state,
        loader,
        make_train_step(task, mesh),
        mesh,
        workdir=folder,
        num_steps=steps,
        periods=Periods(config.log_steps, config.save_steps),
        description=folder.name,
    )
    return jax.device_get(state)


def _predicted(path: pathlib.Path, clips: Clips) -> np.ndarray:
    """[clips] scores."""
    return load(path).embed_files(clips.corpus.utterances)[:, 0]


def _validated(path: pathlib.Path, clips: Clips) -> dict[str, float]:
    predicted = _predicted(path, clips)
    mse = np.mean(np.square(predicted - clips.targets))
    return {"mse": float(mse), "pcc": float(np.corrcoef(predicted, clips.targets)[0, 1])}


def _row(config: SpeechQualityConfig, name: str, path: pathlib.Path, figures: RegressionFigures) -> dict[str, Any]:
    report, embedder = file_report(path), load(path)
    binary = embedder.network.arguments.get("maps") == "binary"
    memory = inference_memory(
        embedder.network,
        embedder.variables,
        weight_bytes=report.stored_bytes,
        map_bits=1 if binary else 32,
        seconds=config.clip_seconds,
    )
    intervals = {"mse": figures.mse, "pcc": figures.pcc, "srcc": figures.srcc}
    if figures.pcc_difference is not None:
        intervals["pcc_difference"] = figures.pcc_difference
    return {
        "name": name,
        **{key: value for label, interval in intervals.items() for key, value in _fields(label, interval).items()},
        "file_bytes": path.stat().st_size,
        "weight_bytes": memory.weights,
        "map_bytes": memory.maps,
        "peak_bytes": memory.peak,
        "memory_bytes": memory.total,
        "memory_bytes_at_peak": memory.total_at_peak,
    }


def _fields(name: str, interval: Interval) -> dict[str, Any]:
    return {name: interval.estimate, f"{name}_interval": [interval.low, interval.high]}


if __name__ == "__main__":
    launch(SpeechQualityConfig, run)
