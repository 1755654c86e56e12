"""How a network is quantized, whatever the quantizers: calibration without a gradient, and fine-tuning."""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configuration import setting
from experiments.models import FloatModel
from experiments.optimization import OptimizationConfig
from experiments.running import run_or_resume
from experiments.speech import SpeechConfig, is_readable, make_loader, training_corpus
from qsv.data import Corpus, Utterance
from qsv.deploy import Embedder
from qsv.models import Network
from qsv.quant import Plan, fake_quantize, init, level_spacings
from qsv.training import (
    Calibrated,
    Calibration,
    Classification,
    Distillation,
    Periods,
    Recalibration,
    Rounding,
    Task,
    TrainState,
    calibrate,
    data_mesh,
    make_refresh,
    make_train_step,
    recalibrate,
)

_UTTERANCES_PER_SPEAKER_MEAN = 8
_CALIBRATION_BATCH = 32


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a network is quantized, whatever the scheme and the bits."""

    per_channel: bool = setting(False, "A scale for each output channel; the levels are the tensor's.")
    normalization: str = setting(
        "none",
        "Standardize weights before quantizing: standardize never undoes it, restore does.",
        choices=["none", "standardize", "restore"],
    )
    float_layers: tuple[str, ...] = setting((), "Regular expression over paths of kernels to leave float.")
    loss: str = setting(
        "distill",
        "distill: agree with the float network, needs no labels; margin: classify the training speakers (KMQAT).",
        choices=["distill", "margin"],
    )
    cosine_weight: float = setting(1.0, "distill: weight of 1 - cosine between the embeddings.", minimum=0.0)
    mse_weight: float = setting(0.0, "distill: weight of the embeddings' relative squared error.", minimum=0.0)
    feature_weight: float = setting(0.0, "distill: weight of the inner features' relative squared error.", minimum=0.0)
    features: str = setting("", "distill: regular expression over paths of the modules whose outputs are compared.")
    frozen_statistics: bool = setting(True, "Keep the statistics of batch normalisations while fine-tuning.")
    steps: int = setting(1000, "Fine-tuning steps; 0 for post-training quantization.", minimum=0)
    refresh_steps: int = setting(
        0,
        "Steps between two refreshes of the codebooks, as in KMQAT; 0 for never: the calibrated ones stay.",
        minimum=0,
    )
    refresh_rate: float = setting(1.0, "Weight of the new codebook in a refresh.", minimum=0.0)
    level_rate: float = setting(
        2.5e-3,
        "Learning rate of quantized weights in mean distances between their levels, so that as many change their "
        "code whatever the bits and the network; 0 for --learning_rate.",
        minimum=0.0,
    )
    scale_rate: float = setting(1.0, "Learning rate of the scales relative to the weights'.", minimum=0.0)
    scale_start_fraction: float = setting(0.05, "Share of the steps before scales are learnt.", minimum=0.0)
    calibration_crops: int = setting(
        512,
        "Crops of augmented speech for --weighted_codebooks, --rounding, --sequential, --bias_correction and "
        "--recalibration; 0 does none of them. All are in memory at once: for CAM++ 6 GB.",
        minimum=0,
    )
    weighted_codebooks: bool = setting(True, "Weigh weights by the mean square of their inputs in fitting levels.")
    rounding: Rounding = setting(
        "compensated",
        "compensated: before any training, choose levels so that each layer's output changes least (GPTQ).",
        choices=["nearest", "compensated"],
    )
    sequential: bool = setting(
        True, "Calibrate each layer with inputs from the layers quantized before it, and undo what these changed."
    )
    bias_correction: bool = setting(True, "Correct biases by what quantization changes in the mean of their layer.")
    recalibration: Recalibration = setting(
        "shift",
        "Statistics of batch normalisations, before fine-tuning and, unless they are frozen in it, after it. shift: "
        "move them by what quantization changes in the calibration batches; replace: take those batches' own.",
        choices=["shift", "replace", "none"],
    )
    seed: int = setting(0, "Seed of crops and augmentation.", minimum=0)
    log_steps: int = setting(10, "Steps between two lines of metrics.", minimum=1)
    save_steps: int = setting(500, "Steps between two checkpoints; 0 saves the last only.", minimum=0)
    speech: SpeechConfig = SpeechConfig(batch_size=16)
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="adamw",
        learning_rate=2e-4,
        final_learning_rate=1e-6,
        schedule="cosine",
        warmup_fraction=0.0,
        weight_decay=0.0,
        margin_rise_start=0.0,
        margin_rise_end=0.0,
        spec_augment=False,
    )

    def __post_init__(self) -> None:
        if self.calibration_crops and self.rounding == "compensated" and self.normalization != "none":
            raise ValueError(
                f"--normalization={self.normalization} needs --rounding=nearest: standardized weights can't be "
                "rounded one input after the other"
            )

    @property
    def calibration(self) -> Calibration:
        """What is done before any training."""
        return Calibration(
            weighted_codebooks=self.weighted_codebooks,
            rounding=self.rounding,
            sequential=self.sequential,
            bias_correction=self.bias_correction,
            recalibration=self.recalibration,
        )

    @property
    def needs_speech(self) -> bool:
        """Whether anything is trained or recalibrated."""
        return bool(self.steps or self.calibration_crops)


@dataclasses.dataclass(frozen=True)
class Start:
    """What fine-tuning starts from, and what a quantization without it consists of.

    Attributes:
        model: the float network.
        plan: quantizers of its parameters.
        corpus: the speech; None where none is needed.
        waveforms: what the calibration has heard, batches [batch, samples] int16.
        calibrated: the quantized network.
    """

    model: FloatModel
    plan: Plan
    corpus: Corpus | None
    waveforms: list[np.ndarray]
    calibrated: Calibrated


def calibrated_start(config: FinetuneConfig, model: FloatModel, plan: Plan) -> Start:
    """Read the speech and calibrate, as far as the flags want it; the number of steps has no part in it."""
    corpus = training_corpus(config.speech, labelled=config.loss == "margin") if config.needs_speech else None
    waveforms = [] if corpus is None else calibration_waveforms(config, corpus, model.network)
    if waveforms:
        calibrated = calibrate(model.network, model.variables, plan, waveforms, config.calibration)
    else:
        calibrated = Calibrated(model.params, model.batch_stats, init(plan, model.params))
    return Start(model, plan, corpus, waveforms, calibrated)


def finetune(config: FinetuneConfig, start: Start, *, workdir: pathlib.Path, description: str) -> Calibrated:
    """Train and recalibrate, as far as the flags want it; resumes what was interrupted."""
    if not config.steps:
        return start.calibrated
    state = jax.device_get(_train(config, start, workdir, description))
    batch_stats = state.batch_stats
    if not config.frozen_statistics and start.waveforms and config.recalibration != "none":
        quantized, model = fake_quantize(start.plan, state.params, state.qstate), start.model
        batch_stats = recalibrate(model.network, model.variables, quantized, start.waveforms, config.recalibration)
    return Calibrated(state.params, batch_stats, state.qstate)


def _train(config: FinetuneConfig, start: Start, workdir: pathlib.Path, description: str) -> TrainState:
    """Quantization-aware training, codebooks refreshed on the way; the float network is the teacher."""
    model, plan, corpus = start.model, start.plan, start.corpus
    assert corpus is not None
    mesh, network, optimization = data_mesh(), model.network, config.optimization
    loader = make_loader(config.speech, corpus, seed=config.seed, sample_rate_hz=network.frontend.sample_rate_hz)
    learning_rate = optimization.make_learning_rate(config.steps)
    optimizer = optimization.make_optimizer(
        scale_rate=config.scale_rate, scale_start=round(config.scale_start_fraction * config.steps)
    )
    if config.loss == "margin":
        loss = optimization.make_loss(len(corpus.speakers))
        objective: Any = Classification(loss, optimization.make_margin(config.steps))
        head, teacher = _class_directions(config, model, corpus), None
    else:
        objective = Distillation(config.cosine_weight, config.mse_weight, config.feature_weight, config.features)
        head, teacher = {}, model.variables
    task = Task(
        network=network,
        objective=objective,
        plan=plan,
        learning_rate=learning_rate,
        transformation=optimizer.transformation(learning_rate, factors=_factors(config, start)),
        spec_augment=optimization.make_spec_augment(),
        dtype=optimization.dtype,
        train_statistics=not config.frozen_statistics,
    )
    state = TrainState.create(
        params=start.calibrated.params,
        head=head,
        batch_stats=start.calibrated.batch_stats,
        transformation=task.transformation,
        seed=config.seed,
        qstate=start.calibrated.qstate,
    )
    return run_or_resume(
        state,
        loader,
        make_train_step(task, mesh, teacher=teacher),
        mesh,
        workdir=workdir,
        num_steps=config.steps,
        periods=Periods(config.log_steps, config.save_steps, config.refresh_steps),
        refresh=make_refresh(plan, mesh),
        description=description,
    )


def _factors(config: FinetuneConfig, start: Start) -> dict[str, float]:
    """What makes `level_rate` of the learning rate, for every quantized kernel."""
    if not config.level_rate or not config.optimization.learning_rate:
        return {}
    spacings = level_spacings(start.plan, start.calibrated.params, start.calibrated.qstate)
    relative = config.level_rate / config.optimization.learning_rate
    return {path: relative * float(spacing) for path, spacing in spacings.items()}


def calibration_waveforms(config: FinetuneConfig, corpus: Corpus, network: Network) -> list[np.ndarray]:
    """Batches of crops [batch, samples] int16, always the same; none where none are asked for."""
    if not config.calibration_crops:
        return []
    speech = dataclasses.replace(config.speech, batch_size=min(_CALIBRATION_BATCH, config.calibration_crops))
    loader = make_loader(speech, corpus, seed=config.seed + 1, sample_rate_hz=network.frontend.sample_rate_hz)
    batches = -(-config.calibration_crops // speech.batch_size)
    waveforms = [batch["waveform"] for batch in itertools.islice(loader, batches)]
    loader.close()
    return waveforms


def _class_directions(config: FinetuneConfig, model: FloatModel, corpus: Corpus) -> jax.Array:
    """The classifier that the float network was trained with, or else the mean embeddings of the speakers."""
    sub_centers = config.optimization.sub_centers
    head = model.head(corpus.speakers, sub_centers=sub_centers)
    if head is None:
        embedder = Embedder(model.network, model.variables)
        head = np.repeat(_speaker_means(embedder, corpus), sub_centers, axis=1)
    return jnp.asarray(head)


def _speaker_means(embedder: Embedder, corpus: Corpus) -> np.ndarray:
    """Class directions for speakers that the float network was not trained on: [embedding_size, speakers]."""
    by_speaker: dict[str, list[Utterance]] = {speaker: [] for speaker in corpus.speakers}
    for utterance in corpus.utterances:
        by_speaker[utterance.speaker].append(utterance)
    chosen = [
        utterance
        for own in by_speaker.values()
        for utterance in itertools.islice(
            (utterance for utterance in own if is_readable(utterance, embedder.network.frontend)),
            _UTTERANCES_PER_SPEAKER_MEAN,
        )
    ]
    embeddings = embedder.embed_files(chosen)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    sums = np.zeros((len(corpus.speakers), embeddings.shape[1]), np.float32)
    np.add.at(sums, [corpus.label(utterance) for utterance in chosen], embeddings)
    lengths = np.linalg.norm(sums, axis=1)
    # A speaker without a readable file has no direction, but no crops either.
    return sums.T / np.where(lengths > 0, lengths, 1)
