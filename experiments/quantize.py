"""Quantize a trained network: codebooks, fine-tuning (KMQAT), recalibration, evaluation, packed file.

    python -m experiments.quantize --model=runs/an4e_resnet18 --scheme=kmeans --bits=4 \
        --flagfile=experiments/flags/an4e_quantize.txt --data_dir=DATA/an4 --data_dir=DATA/librispeech251 \
        --noise_dir=DATA/noise --exclude_speakers=DATA/an4_eval_speakers.txt --workdir=runs/an4e_kmeans4

With `--steps=0` nothing is trained (post-training quantization), and with `--recalibration_batches=0` too no speech
is needed. The same command again resumes. The run's folder holds `model.safetensors` (the packed file), `size.md`
(every tensor's scheme, bits and bytes), `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `run.json`.
"""

import dataclasses
import itertools
import pathlib
from typing import Any

import jax
import numpy as np

from experiments.configuration import launch, require, setting, write_run_record
from experiments.evaluate import calibrated_threshold
from experiments.models import MODEL_FILE, load_float_model, model_file, read_head
from experiments.optimization import OptimizationConfig
from experiments.speech import SpeechConfig, is_readable, make_loader, report_bad_files, training_corpus
from qsv.data import Corpus, Utterance
from qsv.deploy import Embedder, save
from qsv.models import Network
from qsv.quant import (
    AdditivePowerOfTwo,
    KMeans,
    Plan,
    PowerOfTwo,
    Quantizer,
    Rule,
    Uniform,
    fake_quantize,
    init,
    resolve,
)
from qsv.training import (
    Checkpoints,
    MetricWriter,
    Periods,
    Task,
    TrainState,
    data_mesh,
    fit,
    make_refresh,
    make_train_step,
    put_replicated,
    recalibrate_batch_stats,
)

_QUANTIZERS = {"kmeans": KMeans, "uniform": Uniform, "pot": PowerOfTwo, "apot": AdditivePowerOfTwo}
SCHEMES = tuple(_QUANTIZERS)
_UTTERANCES_PER_SPEAKER_MEAN = 8


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a network is quantized, whatever the scheme and the bits."""

    per_channel: bool = setting(False, "A scale (for kmeans a codebook) for each output channel.")
    normalization: str = setting(
        "none",
        "Standardize weights before quantizing: standardize never undoes it, restore does.",
        choices=["none", "standardize", "restore"],
    )
    float_layers: tuple[str, ...] = setting((), "Regular expression over paths of kernels to leave float.")
    steps: int = setting(1000, "Fine-tuning steps; 0 for post-training quantization.", minimum=0)
    refresh_steps: int = setting(50, "Steps between two refreshes of the codebooks; 0 for never.", minimum=0)
    refresh_rate: float = setting(1.0, "Weight of the new codebook in a refresh.", minimum=0.0)
    scale_rate: float = setting(1.0, "Learning rate of the scales relative to the weights'.", minimum=0.0)
    scale_start_fraction: float = setting(0.05, "Share of the steps before scales are learnt.", minimum=0.0)
    recalibration_batches: int = setting(
        20,
        "Batches that recalibrate the batch normalisations before and after fine-tuning; 0 for none.",
        minimum=0,
    )
    seed: int = setting(0, "Seed of crops and augmentation.", minimum=0)
    log_steps: int = setting(10, "Steps between two lines of metrics.", minimum=1)
    save_steps: int = setting(500, "Steps between two checkpoints; 0 saves the last only.", minimum=0)
    speech: SpeechConfig = SpeechConfig()
    optimization: OptimizationConfig = OptimizationConfig(
        learning_rate=1e-3,
        final_learning_rate=1e-6,
        schedule="cosine",
        warmup_fraction=0.0,
        margin_rise_start=0.0,
        margin_rise_end=0.0,
    )


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Flags of a quantization."""

    workdir: str = setting("", "Folder of the run; an interrupted run there is resumed.")
    model: str = setting("", "Float model: a training's folder or a model file.")
    scheme: str = setting("kmeans", "Levels of the weights.", choices=SCHEMES)
    bits: int = setting(4, "Bits a weight; 1..8 for kmeans, 2..8 for the others.", minimum=1)
    finetune: FinetuneConfig = FinetuneConfig()

    def quantizer(self) -> Quantizer:
        """The specification of every quantized kernel."""
        options: dict[str, Any] = {
            "bits": self.bits,
            "channel_axes": (-1,) if self.finetune.per_channel else (),
            "normalization": self.finetune.normalization,
        }
        if self.scheme == "kmeans":
            options["refresh_rate"] = self.finetune.refresh_rate
        return _QUANTIZERS[self.scheme](**options)

    def policy(self) -> list[Rule]:
        """Kernels are quantized; normalisation parameters, biases and `float_layers` stay float."""
        kept = [Rule(pattern, None) for pattern in self.finetune.float_layers]
        return [*kept, Rule(".*/kernel", self.quantizer()), Rule(".*", None)]


def run(config: QuantizeConfig) -> pathlib.Path:
    """Quantize, or resume; returns the packed file."""
    require(workdir=config.workdir, model=config.model)
    workdir, finetune = pathlib.Path(config.workdir), config.finetune
    path = workdir / MODEL_FILE
    if model_file(config.model).resolve() == path.resolve():
        raise ValueError(f"--workdir={workdir} would overwrite --model; choose another folder")
    float_model = load_float_model(config.model)
    network, params, batch_stats = float_model.network, float_model.packed_params, float_model.batch_stats
    plan = resolve(config.policy(), params)
    qstate = init(plan, params)
    threshold = None
    write_run_record(workdir, "quantize", config)

    if finetune.steps or finetune.recalibration_batches:
        corpus = training_corpus(finetune.speech)
        calibration = _recalibration_waveforms(finetune, corpus, network)

        def recalibrated() -> Any:
            if not calibration:
                return batch_stats
            return recalibrate_batch_stats(network, fake_quantize(plan, params, qstate), batch_stats, calibration)

        batch_stats = recalibrated()
        if finetune.steps:
            state = jax.device_get(_finetune(config, corpus, network, plan, params, batch_stats, qstate))
            params, batch_stats, qstate = state.params, state.batch_stats, state.qstate
            batch_stats = recalibrated()
        served = {"params": fake_quantize(plan, params, qstate), "batch_stats": batch_stats}
        threshold = calibrated_threshold(Embedder(network, served), corpus)

    report = save(path, network, plan, params, qstate, batch_stats, threshold=threshold)
    (workdir / "size.md").write_text(report.to_markdown(), encoding="utf-8")
    print(report.summary())
    print(f"wrote {path}")
    return path


def _finetune(
    config: QuantizeConfig,
    corpus: Corpus,
    network: Network,
    plan: Plan,
    params: Any,
    batch_stats: Any,
    qstate: Any,
) -> TrainState:
    """Quantization-aware training from the float weights, codebooks refreshed on the way."""
    finetune, mesh = config.finetune, data_mesh()
    optimization = finetune.optimization
    loader = make_loader(finetune.speech, corpus, seed=finetune.seed, sample_rate_hz=network.frontend.sample_rate_hz)
    loss = optimization.make_loss(len(corpus.speakers))
    learning_rate = optimization.make_learning_rate(finetune.steps)
    optimizer = optimization.make_optimizer(
        scale_rate=finetune.scale_rate, scale_start=round(finetune.scale_start_fraction * finetune.steps)
    )
    task = Task(
        network=network,
        loss=loss,
        plan=plan,
        margin=optimization.make_margin(finetune.steps),
        learning_rate=learning_rate,
        transformation=optimizer.transformation(learning_rate),
        spec_augment=optimization.make_spec_augment(),
        dtype=optimization.dtype,
    )
    head = read_head(config.model, corpus.speakers, sub_centers=optimization.sub_centers)
    if head is None:
        means = _speaker_means(Embedder(network, {"params": params, "batch_stats": batch_stats}), corpus)
        head = np.repeat(means, optimization.sub_centers, axis=1)
    state = TrainState.create(
        params=params,
        head=jax.numpy.asarray(head),
        batch_stats=batch_stats,
        transformation=task.transformation,
        seed=finetune.seed,
        qstate=qstate,
    )
    checkpoints = Checkpoints(pathlib.Path(config.workdir) / "checkpoints")
    if checkpoints.latest_step is None:
        state = put_replicated(state, mesh)
    else:
        state, position = checkpoints.restore(state, mesh)
        loader.set_state(position)
        print(f"resumed at step {int(state.step)}")
    with MetricWriter(config.workdir) as writer:
        state = fit(
            state,
            loader,
            make_train_step(task, mesh),
            mesh,
            num_steps=finetune.steps,
            periods=Periods(finetune.log_steps, finetune.save_steps, finetune.refresh_steps),
            refresh=make_refresh(plan, mesh),
            checkpoints=checkpoints,
            writer=writer,
            description=f"{config.scheme} {config.bits} bits",
        )
    checkpoints.close()
    report_bad_files(loader.bad_files)
    loader.close()
    return state


def _recalibration_waveforms(finetune: FinetuneConfig, corpus: Corpus, network: Network) -> list[np.ndarray]:
    """Some training batches, the same before and after the fine-tuning; none where none are asked for."""
    if not finetune.recalibration_batches:
        return []
    loader = make_loader(
        finetune.speech, corpus, seed=finetune.seed + 1, sample_rate_hz=network.frontend.sample_rate_hz
    )
    waveforms = [batch["waveform"] for batch in itertools.islice(loader, finetune.recalibration_batches)]
    loader.close()
    return waveforms


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


if __name__ == "__main__":
    launch(QuantizeConfig, run)
