"""Train a float speaker network.

    python -m experiments.train --flagfile=experiments/flags/an4e_resnet18.txt \
        --data_dir=DATA/an4 --data_dir=DATA/librispeech251 --noise_dir=DATA/noise \
        --exclude_speakers=DATA/an4_eval_speakers.txt --workdir=runs/an4e_resnet18

The same command again resumes from the last checkpoint, with the same losses to the last bit on a CPU; one whose other
settings would change the outcome is refused. The run's folder holds `model.safetensors` (the float network in the
packed format), `head.safetensors` (the classifier, for fine-tuning), `checkpoints/`, `metrics.jsonl`, `tensorboard/`,
`run.json` and `settings.json` (what shaped the run).
"""

import dataclasses
import pathlib

import jax
from jax.experimental import multihost_utils

from experiments.configuration import launch, require, setting, write_run_record
from experiments.models import MODEL_FILE, load_float_model, write_head
from experiments.optimization import OptimizationConfig
from experiments.run_settings import claim_folder, shaping_settings
from experiments.running import run_or_resume
from experiments.scoring import calibrated_threshold
from experiments.speech import SpeechConfig, make_loader, training_corpus
from qsv.deploy import Embedder, save
from qsv.frontend import KaldiFbank
from qsv.models import Network, count_parameters, model_names
from qsv.quant import Rule, resolve
from qsv.training import (
    Classification,
    Periods,
    Task,
    TrainState,
    data_mesh,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Flags of a float training."""

    workdir: str = setting("", "Folder of the run; an interrupted run there is resumed.", incidental=True)
    model: str = setting("resnet34", "Network.", choices=model_names())
    width: int = setting(
        0, "Channels of a ResNet's first stage or ECAPA's blocks, units of an LSTM; 0 for the usual.", minimum=0
    )
    embedding_size: int = setting(0, "Dimensions of the embedding; 0 for the network's usual.", minimum=0)
    frontend: str = setting(
        "usual",
        "usual: the front end that published networks of this kind have; povey, hamming: Kaldi's filter banks with "
        "this window.",
        choices=["usual", "povey", "hamming"],
    )
    pretrained: str = setting(
        "",
        "Float model to start from, such as for large-margin fine-tuning: a run's folder (its classifier is used too "
        "where the speakers are the same), a file or another toolkit's checkpoint. Its architecture replaces --model, "
        "--width and the others.",
    )
    epochs: float = setting(150.0, "Passes over the training speech.", minimum=0.0)
    split_classes: bool = setting(
        False, "Split the classifier over the devices, each with its classes: for a hundred thousand speakers."
    )
    seed: int = setting(0, "Seed of weights, crops and augmentation.", minimum=0)
    log_steps: int = setting(10, "Steps between two lines of metrics.", minimum=1, incidental=True)
    save_steps: int = setting(500, "Steps between two checkpoints; 0 saves the last only.", minimum=0, incidental=True)
    speech: SpeechConfig = SpeechConfig()
    optimization: OptimizationConfig = OptimizationConfig()


def run(config: TrainConfig) -> pathlib.Path:
    """Train, or resume; returns the float model's file."""
    require(workdir=config.workdir)
    workdir = pathlib.Path(config.workdir)
    optimization = config.optimization
    network = Network.of_size(config.model, width=config.width, embedding_size=config.embedding_size)
    if config.frontend != "usual":
        network = dataclasses.replace(network, frontend=KaldiFbank(window=config.frontend))  # type: ignore[arg-type]
    corpus = training_corpus(config.speech)
    model_key, head_key = jax.random.split(jax.random.key(config.seed))
    head = None
    if config.pretrained:
        model = load_float_model(config.pretrained)
        network, variables = model.network, model.variables
        head = model.head(corpus.speakers, sub_centers=optimization.sub_centers)
    else:
        variables = network.init(model_key)
    loader = make_loader(config.speech, corpus, seed=config.seed, sample_rate_hz=network.frontend.sample_rate_hz)
    num_steps = max(1, round(config.epochs * loader.steps_per_epoch))
    loss, split = optimization.make_loss(len(corpus.speakers)), config.split_classes
    learning_rate = optimization.make_learning_rate(num_steps)
    plan = resolve([Rule(".*", None)], variables["params"])
    task = Task(
        network=network,
        objective=Classification(loss, optimization.make_margin(num_steps), "data" if split else None),
        plan=plan,
        learning_rate=learning_rate,
        transformation=optimization.make_optimizer().transformation(learning_rate),
        spec_augment=optimization.make_spec_augment(),
        dtype=optimization.dtype,
        parts=optimization.gradient_accumulation,
        recompute=optimization.recompute_blocks,
        split_head=split,
    )
    claim_folder(workdir, shaping_settings(config))
    write_run_record(
        workdir,
        "train",
        config,
        network=network.name,
        speakers=len(corpus.speakers),
        utterances=len(corpus),
        steps=num_steps,
        parameters=count_parameters(variables["params"]),
    )
    print(
        f"{network.name}: {count_parameters(variables['params']):,} parameters, {len(corpus.speakers)} speakers, "
        f"{len(corpus)} utterances, {num_steps} steps of {config.speech.batch_size}"
    )

    mesh = data_mesh()
    head = loss.init(head_key, network.embedding_size) if head is None else jax.numpy.asarray(head)
    state = TrainState.create(
        params=variables["params"],
        head=loss.padded(head) if split else head,
        batch_stats=variables["batch_stats"],
        transformation=task.transformation,
        seed=config.seed,
    )
    state = run_or_resume(
        state,
        loader,
        make_train_step(task, mesh),
        mesh,
        workdir=workdir,
        num_steps=num_steps,
        periods=Periods(log=config.log_steps, save=config.save_steps),
        split_head=split,
    )
    path = workdir / MODEL_FILE
    kernel = multihost_utils.process_allgather(state.head, tiled=True) if split else jax.device_get(state.head)
    if jax.process_index() == 0:
        write_head(workdir, kernel[:, : len(corpus.speakers) * optimization.sub_centers], corpus.speakers)
    variables = jax.device_get(state.variables)
    threshold = calibrated_threshold(Embedder(network, variables), corpus)
    save(path, network, plan, variables["params"], {}, variables["batch_stats"], threshold=threshold)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    launch(TrainConfig, run)
