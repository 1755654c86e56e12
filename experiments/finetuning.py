"""How a network is quantized, whatever the quantizers: calibration without a gradient, and fine-tuning."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments.classifier import class_directions
from experiments.finetune_config import FinetuneConfig
from experiments.models import FloatModel
from experiments.running import run_or_resume
from experiments.speech import make_loader, training_corpus
from qsv.data import Corpus
from qsv.deploy import Embedder
from qsv.models import Network
from qsv.precision import restricted
from qsv.quant import (
    FixedCodes,
    Plan,
    QuantizedActivations,
    Quantizer,
    Rule,
    fake_quantize,
    init,
    leaf_paths,
    level_spacings,
    resolve,
    with_leaves,
)
from qsv.training import (
    Calibrated,
    Classification,
    Distillation,
    Periods,
    Task,
    TrainState,
    calibrate,
    data_mesh,
    make_refresh,
    make_train_step,
    recalibrate,
)

_CALIBRATION_BATCH = 32


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A network on its way from float to quantized.

    Attributes:
        model: the float network, the teacher.
        corpus: the speech; None where none is needed.
        waveforms: what calibrations hear, batches [batch, samples] int16.
        plan: quantizers of its parameters.
        calibrated: the network as it is now.
        head: the classifier of `--loss=margin`, else {}.
        activations: codes of the inputs of layers, whose ranges are learnt too; None where these are float.
    """

    model: FloatModel
    corpus: Corpus | None
    waveforms: list[np.ndarray]
    plan: Plan
    calibrated: Calibrated
    head: Any
    activations: QuantizedActivations | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """`{"params", "batch_stats"}` with quantized weights."""
        params, batch_stats, qstate = self.calibrated
        return {"params": fake_quantize(self.plan, params, qstate), "batch_stats": batch_stats}

    @property
    def embedder(self) -> Embedder:
        """The network as it is now."""
        return Embedder(self.model.network, self.variables, activations=self.activations)


def unquantized(config: FinetuneConfig, model: FloatModel) -> Quantization:
    """The float network, and the speech as far as the flags want it."""
    corpus = training_corpus(config.speech, labelled=config.loss == "margin") if config.needs_speech else None
    waveforms = [] if corpus is None else calibration_waveforms(config, corpus, model.network)
    head: Any = {}
    if config.loss == "margin" and config.steps and corpus is not None:
        head = class_directions(model, corpus, sub_centers=config.optimization.sub_centers)
    plan = resolve([Rule(".*", None)], model.params)
    return Quantization(model, corpus, waveforms, plan, Calibrated(model.params, model.batch_stats, {}), head)


def quantize_layers(config: FinetuneConfig, before: Quantization, plan: Plan) -> Quantization:
    """Go on to a plan: what isn't quantized as it says is, calibrated on what the other layers make of the speech.

    Layers that have the plan's quantizer already stay as they are. Those that have another one, such as of more bits,
    get the new one: with compensated rounding for the levels that they have, since it takes the network's outputs for
    a model, with rounding to the nearest for the weights behind them, of which levels far from zero don't tell how
    near they are to another sign. The number of steps has no part in it.
    """
    known = before.plan.quantized
    kept = {path for path, quantizer in plan.quantized.items() if known.get(path) == quantizer}
    new = restricted(plan, lambda path: path not in kept)
    params, batch_stats, qstate = before.calibrated
    variables = before.variables
    if config.rounding == "nearest":
        changed = {path: leaf for path, leaf in leaf_paths(params) if path in known and path not in kept}
        variables["params"] = with_leaves(variables["params"], changed)
    if before.waveforms and new.quantized:
        calibrated = calibrate(before.model.network, variables, new, before.waveforms, config.calibration)
    else:
        calibrated = Calibrated(variables["params"], batch_stats, init(new, variables["params"]))
    # Layers that stay went in as the levels that they have; what is trained further is what is behind these.
    behind = {path: leaf for path, leaf in leaf_paths(params) if path in kept}
    after = Calibrated(
        with_leaves(calibrated.params, behind),
        calibrated.batch_stats,
        {path: qstate[path] if path in kept else calibrated.qstate[path] for path in plan.quantized},
    )
    return dataclasses.replace(before, plan=plan, calibrated=after)


def finetune(
    config: FinetuneConfig,
    start: Quantization,
    *,
    workdir: pathlib.Path,
    description: str,
    upcoming: Plan | None = None,
) -> Quantization:
    """Train and recalibrate, as far as the flags want it; resumes what was interrupted.

    Args:
        config: settings.
        start: what is trained further.
        workdir: folder of the checkpoints and metrics.
        description: beside the progress bar.
        upcoming: the final plan, where this one leaves layers float that it quantizes: these train at the rate that
            they will have then.
    """
    if not config.steps:
        return start
    kept = {path: q for path, q in start.plan.quantized.items() if config.keeps_codes(q.bits)}
    trainable = _with_fixed_codes(start, kept)
    factors = _factors(config, trainable, upcoming or start.plan)
    state = jax.device_get(_train(config, trainable, factors, workdir, description))
    params = _released(state.params, state.qstate, kept)
    activations = start.activations and dataclasses.replace(start.activations, ranges=state.ranges)
    trained = dataclasses.replace(
        start,
        calibrated=Calibrated(params, state.batch_stats, state.qstate),
        head=state.head,
        activations=activations,
    )
    if config.frozen_statistics or not start.waveforms or config.recalibration == "none":
        return trained
    model, quantized = start.model, trained.variables["params"]
    batch_stats = recalibrate(model.network, model.variables, quantized, start.waveforms, config.recalibration)
    return dataclasses.replace(trained, calibrated=trained.calibrated._replace(batch_stats=batch_stats))


def _with_fixed_codes(start: Quantization, kept: Mapping[str, Quantizer]) -> Quantization:
    """The network with the codes of some layers fixed, and their weights in units of the scale."""
    params, batch_stats, qstate = start.calibrated
    fixed = {path: FixedCodes(quantizer) for path, quantizer in kept.items()}
    weights = dict(leaf_paths(params))
    units = {path: spec.fixed(weights[path], qstate[path]) for path, spec in fixed.items()}
    plan = Plan(tuple((path, fixed.get(path, quantizer)) for path, quantizer in start.plan.entries))
    return dataclasses.replace(start, plan=plan, calibrated=Calibrated(with_leaves(params, units), batch_stats, qstate))


def _released(params: Any, qstate: Mapping[str, Any], kept: Mapping[str, Quantizer]) -> Any:
    """The weights of layers whose codes were fixed in their own units again."""
    units = dict(leaf_paths(params))
    return with_leaves(
        params, {path: FixedCodes(quantizer).released(units[path], qstate[path]) for path, quantizer in kept.items()}
    )


def _train(
    config: FinetuneConfig, start: Quantization, factors: dict[str, float], workdir: pathlib.Path, description: str
) -> TrainState:
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
        teacher = None
    else:
        objective = Distillation(config.cosine_weight, config.mse_weight, config.feature_weight, config.features)
        teacher = model.variables
    task = Task(
        network=network,
        objective=objective,
        plan=plan,
        learning_rate=learning_rate,
        transformation=optimizer.transformation(learning_rate, factors=factors, range_factors=_widths(config, start)),
        spec_augment=optimization.make_spec_augment(),
        dtype=optimization.dtype,
        parts=optimization.gradient_accumulation,
        recompute=optimization.recompute_blocks,
        train_statistics=not config.frozen_statistics,
        activations=start.activations.quantizer if start.activations else None,
        anneal_steps=config.steps,
    )
    state = TrainState.create(
        params=start.calibrated.params,
        head=start.head,
        batch_stats=start.calibrated.batch_stats,
        transformation=task.transformation,
        seed=config.seed,
        qstate=start.calibrated.qstate,
        ranges=start.activations.ranges if start.activations else None,
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


def _factors(config: FinetuneConfig, start: Quantization, upcoming: Plan) -> dict[str, float]:
    """What makes `level_rate` of the learning rate for the kernels that are quantized, here or in the upcoming plan.

    Kernels of fixed codes don't even decay.
    """
    still = {path: 0.0 for path, quantizer in start.plan.quantized.items() if isinstance(quantizer, FixedCodes)}
    if not config.level_rate or not config.optimization.learning_rate:
        return still
    params, _, qstate = start.calibrated
    later = restricted(upcoming, lambda path: path not in start.plan.quantized)
    spacings = level_spacings(start.plan, params, qstate) | level_spacings(later, params, init(later, params))
    relative = config.level_rate / config.optimization.learning_rate
    return {path: relative * float(spacing) for path, spacing in spacings.items()} | still


def _widths(config: FinetuneConfig, start: Quantization) -> dict[str, float]:
    """What makes `range_rate` of the learning rate for the ranges of activations, in units of their widths."""
    if start.activations is None or not config.optimization.learning_rate:
        return {}
    relative = config.range_rate / (config.optimization.learning_rate * config.scale_rate or 1.0)
    return {path: relative * float(own.high - own.low) for path, own in start.activations.ranges.items()}


def calibration_waveforms(config: FinetuneConfig, corpus: Corpus, network: Network) -> list[np.ndarray]:
    """Batches of crops [batch, samples] int16, always the same; none where none are asked for."""
    if not config.calibration_crops:
        return []
    speech = dataclasses.replace(config.speech, batch_size=min(_CALIBRATION_BATCH, config.calibration_crops))
    rate = network.frontend.sample_rate_hz
    # Every process calibrates for itself, to the same result.
    loader = make_loader(speech, corpus, seed=config.seed + 1, sample_rate_hz=rate, whole=True)
    batches = -(-config.calibration_crops // speech.batch_size)
    waveforms = [batch["waveform"] for batch in itertools.islice(loader, batches)]
    loader.close()
    return waveforms
