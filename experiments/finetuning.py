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
from experiments.speech import SpeechConfig, is_readable, make_loader
from qsv.data import Corpus, Utterance
from qsv.deploy import Embedder
from qsv.models import Network
from qsv.quant import Plan, fake_quantize, init
from qsv.training import (
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
    scale_rate: float = setting(1.0, "Learning rate of the scales relative to the weights'.", minimum=0.0)
    scale_start_fraction: float = setting(0.05, "Share of the steps before scales are learnt.", minimum=0.0)
    calibration_batches: int = setting(
        16,
        "Batches of augmented speech for --weighted_codebooks, --rounding, --bias_correction and --recalibration; "
        "0 does none of them.",
        minimum=0,
    )
    weighted_codebooks: bool = setting(True, "Weigh weights by the mean square of their inputs in fitting levels.")
    rounding: Rounding = setting(
        "compensated",
        "compensated: before any training, choose levels so that each layer's output changes least (GPTQ).",
        choices=["nearest", "compensated"],
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
        if self.calibration_batches and self.rounding == "compensated" and self.normalization != "none":
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
            bias_correction=self.bias_correction,
            recalibration=self.recalibration,
        )

    @property
    def needs_speech(self) -> bool:
        """Whether anything is trained or recalibrated."""
        return bool(self.steps or self.calibration_batches)


def finetune(
    config: FinetuneConfig,
    model: FloatModel,
    corpus: Corpus,
    plan: Plan,
    *,
    workdir: pathlib.Path,
    description: str,
) -> tuple[Any, Any, Any]:
    """Calibrate, train and recalibrate, as far as the flags want it; resumes what was interrupted.

    Returns:
        Parameters, batch statistics and quantizer states.
    """
    calibration = calibration_waveforms(config, corpus, model.network)
    if calibration:
        params, batch_stats, qstate = calibrate(model.network, model.variables, plan, calibration, config.calibration)
    else:
        params, batch_stats, qstate = model.params, model.batch_stats, init(plan, model.params)
    if config.steps:
        start = dataclasses.replace(model, params=params, batch_stats=batch_stats)
        state = jax.device_get(_train(config, model, start, corpus, plan, qstate, workdir, description))
        params, batch_stats, qstate = state.params, state.batch_stats, state.qstate
        if not config.frozen_statistics and calibration and config.recalibration != "none":
            quantized = fake_quantize(plan, params, qstate)
            batch_stats = recalibrate(model.network, model.variables, quantized, calibration, config.recalibration)
    return params, batch_stats, qstate


def _train(
    config: FinetuneConfig,
    model: FloatModel,
    start: FloatModel,
    corpus: Corpus,
    plan: Plan,
    qstate: Any,
    workdir: pathlib.Path,
    description: str,
) -> TrainState:
    """Quantization-aware training from `start`, codebooks refreshed on the way; the float `model` is the teacher."""
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
        transformation=optimizer.transformation(learning_rate),
        spec_augment=optimization.make_spec_augment(),
        dtype=optimization.dtype,
        train_statistics=not config.frozen_statistics,
    )
    state = TrainState.create(
        params=start.params,
        head=head,
        batch_stats=start.batch_stats,
        transformation=task.transformation,
        seed=config.seed,
        qstate=qstate,
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


def calibration_waveforms(config: FinetuneConfig, corpus: Corpus, network: Network) -> list[np.ndarray]:
    """Some training batches [batch, samples] int16, always the same; none where none are asked for."""
    if not config.calibration_batches:
        return []
    loader = make_loader(config.speech, corpus, seed=config.seed + 1, sample_rate_hz=network.frontend.sample_rate_hz)
    waveforms = [batch["waveform"] for batch in itertools.islice(loader, config.calibration_batches)]
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
