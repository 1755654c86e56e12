"""What each bit width of each layer of a network costs; measured once, kept in a file, used for any target size."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from tqdm import tqdm

from experiments.configuration import setting, write_json
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization
from experiments.models import model_digest
from experiments.run_settings import require_same, shaping_settings
from experiments.running import free_programs
from experiments.speech import make_loader
from qsv.models import Network
from qsv.precision import (
    Choice,
    DistortionSensitivity,
    DriftSensitivity,
    HessianSensitivity,
    Layer,
    Loss,
    OutputLoss,
    Sensitivity,
    StoppingRule,
    TraceEstimate,
    embedding_drift,
    gauss_newton_traces,
    hessian_traces,
    largest_relative_error,
    layer_choices,
    layer_multiplications,
    softmax_root,
)
from qsv.quant import Quantizer
from qsv.training import MarginSoftmax, data_mesh, put_batch
from qsv.training.waveform import float_waveform

# Of the loss, beside the speech.
_MARGIN_SETTINGS = ("softmax_scale", "sub_centers", "top_k", "top_k_margin", "margin")

_Made = TypeVar("_Made", Loss, OutputLoss)


@dataclasses.dataclass(frozen=True)
class SensitivityConfig:
    """How sensitivities are measured."""

    sensitivity: str = setting(
        "gauss_newton",
        "gauss_newton: mean trace of the loss's Gauss-Newton matrix times squared error; hessian: of its Hessian "
        "(HAWQ-V2), which without labels is the same, and with labels takes a hundred times longer to be as exact; "
        "distortion: relative squared error, without speech; drift: change of the embeddings with that layer alone "
        "quantized.",
        choices=["gauss_newton", "hessian", "distortion", "drift"],
    )
    sensitivity_file: str = setting(
        "",
        "JSON file of the sensitivities, by default in --workdir: read where it exists, else measured and written. "
        "Runs for other target sizes can share it.",
        incidental=True,
    )
    sensitivity_crops: int = setting(32, "Crops of speech for gauss_newton, hessian and drift.", minimum=1)
    trace_error: float = setting(0.1, "Wanted standard error of every trace, relative to it.", minimum=1e-6)
    max_probes: int = setting(300, "Probes of the traces after which to stop anyway.", minimum=8)
    utterance_seconds: float = setting(3.0, "Length of the utterance whose bit operations are counted.", minimum=0.1)

    def file(self, workdir: str | pathlib.Path) -> pathlib.Path:
        """Where they are kept."""
        return pathlib.Path(self.sensitivity_file or pathlib.Path(workdir) / "sensitivity.json")

    def kept_in(self, workdir: str | pathlib.Path) -> "SensitivityConfig":
        """The same for runs in other folders that share what is kept in this one."""
        return dataclasses.replace(self, sensitivity_file=str(self.file(workdir)))


@dataclasses.dataclass(frozen=True)
class Measured:
    """Sensitivities of a network's layers.

    Attributes:
        layers: with a choice for each quantizer.
        traces: {path: estimate}; empty unless the sensitivity is by traces.
    """

    layers: tuple[Layer, ...]
    traces: dict[str, TraceEstimate]


def sensitivities(
    config: SensitivityConfig,
    finetune: FinetuneConfig,
    network: Quantization,
    paths: Sequence[str],
    quantizers: Sequence[Quantizer],
    *,
    file: pathlib.Path,
) -> Measured:
    """Read the sensitivities, or measure and write them.

    Args:
        config: how.
        finetune: the loss and the speech.
        network: from `unquantized`.
        paths: of the kernels.
        quantizers: one for each bit width.
        file: where they are kept.

    Raises:
        ValueError: the file is of other layers, quantizers or settings.
    """
    settings = _settings(config, finetune, network) | {
        "quantizers": [repr(quantizer) for quantizer in quantizers],
        "layers": list(paths),
    }
    if file.exists():
        return _read(file, settings)
    measured = _measure(config, finetune, network, paths, quantizers)
    write_json(
        file,
        {
            "settings": settings,
            "layers": [dataclasses.asdict(layer) for layer in measured.layers],
            "traces": {path: dataclasses.asdict(trace) for path, trace in measured.traces.items()},
        },
    )
    return measured


def _settings(config: SensitivityConfig, finetune: FinetuneConfig, network: Quantization) -> dict[str, Any]:
    """What they depend on but for the seed, whose part is small: runs of several seeds share them."""
    settings = shaping_settings(config) | {"pretrained": model_digest(str(network.model.path))}
    if config.sensitivity == "distortion":
        return settings
    settings |= shaping_settings(finetune.speech) | {"loss": finetune.loss}
    if finetune.loss == "margin":
        settings |= {name: getattr(finetune.optimization, name) for name in _MARGIN_SETTINGS}
    return settings


def _read(file: pathlib.Path, settings: dict[str, Any]) -> Measured:
    content = json.loads(file.read_text(encoding="utf-8"))
    require_same(content["settings"], settings, file)
    layers = tuple(
        Layer(fields["path"], fields["weights"], tuple(Choice(**choice) for choice in fields["choices"]))
        for fields in content["layers"]
    )
    return Measured(layers, {path: TraceEstimate(**fields) for path, fields in content["traces"].items()})


def _measure(
    config: SensitivityConfig,
    finetune: FinetuneConfig,
    network: Quantization,
    paths: Sequence[str],
    quantizers: Sequence[Quantizer],
) -> Measured:
    model = network.model
    multiplications = layer_multiplications(model.network, model.variables, seconds=config.utterance_seconds)
    # In the order in which the network computes them, which is how a person reads the table.
    paths = sorted(paths, key=[*multiplications, *paths].index)
    traces: dict[str, TraceEstimate] = {}
    measure: Sensitivity
    if config.sensitivity == "distortion":
        measure = DistortionSensitivity(model.params)
    elif config.sensitivity == "drift":
        waveforms = [float_waveform(jnp.asarray(batch["waveform"])) for batch in _batches(config, finetune, network)]
        measure = DriftSensitivity(model.network, model.variables, waveforms)
    else:
        traces = _traces(config, finetune, network, paths)
        measure = HessianSensitivity(model.params, traces)
    layers: list[Layer] = []
    for path in paths:
        # Hundreds of layers have hundreds of shapes, each with programs for every quantizer.
        free_programs()
        layers += layer_choices(model.params, [path], quantizers, measure, multiplications=multiplications)
    return Measured(tuple(layers), traces)


def _traces(
    config: SensitivityConfig, finetune: FinetuneConfig, network: Quantization, paths: Sequence[str]
) -> dict[str, TraceEstimate]:
    """Traces of the curvature of the loss that the fine-tuning will have, at the float network."""
    mesh = data_mesh()
    with tqdm(total=config.max_probes, desc="traces", unit="probe") as bar:

        def report(probes: int, estimates: Any) -> None:
            bar.update(probes - bar.n)
            bar.set_postfix(largest_error=f"{largest_relative_error(estimates):.0%}", refresh=False)

        arguments = (network.model.params, [put_batch(batch, mesh) for batch in _batches(config, finetune, network)])
        options: dict[str, Any] = {
            "key": jax.random.key(finetune.seed),
            "rule": StoppingRule(config.trace_error, max_probes=config.max_probes),
            "mesh": mesh,
            "report": report,
        }
        if finetune.loss == "distill":
            # The residual vanishes at the float network: the Hessian is the Gauss-Newton matrix.
            drift = _embedding(network.model.network, network.model.batch_stats)
            return gauss_newton_traces(drift, *arguments, paths, **options)
        if config.sensitivity == "gauss_newton":
            return gauss_newton_traces(_labelled(finetune, network, margin_logits), *arguments, paths, **options)
        return hessian_traces(_labelled(finetune, network, margin_loss), *arguments, paths, **options)


def _batches(config: SensitivityConfig, finetune: FinetuneConfig, network: Quantization) -> list[dict[str, Any]]:
    """Microbatches of the training's speech, as large as its batches."""
    if network.corpus is None:
        raise ValueError(f"--sensitivity={config.sensitivity} needs speech; give --data_dir")
    speech = dataclasses.replace(finetune.speech, batch_size=min(finetune.speech.batch_size, config.sensitivity_crops))
    sample_rate_hz = network.model.network.frontend.sample_rate_hz
    # Traces are averaged over all processes; the drift is measured by each of them, to the same result.
    whole = config.sensitivity == "drift"
    loader = make_loader(speech, network.corpus, seed=finetune.seed + 2, sample_rate_hz=sample_rate_hz, whole=whole)
    batches = list(itertools.islice(loader, -(-config.sensitivity_crops // speech.batch_size)))
    loader.close()
    return batches


def _labelled(finetune: FinetuneConfig, network: Quantization, make: Callable[..., _Made]) -> _Made:
    assert network.corpus is not None
    model, settings = network.model, finetune.optimization
    classify = settings.make_loss(len(network.corpus.speakers))
    return make(model.network, model.batch_stats, network.head, classify, settings.margin)


def margin_loss(network: Network, batch_stats: Any, head: jax.Array, classify: MarginSoftmax, margin: float) -> Loss:
    """The training's loss as `hessian_traces` takes it; batch statistics stay as they are.

    Args:
        network: the network.
        batch_stats: its running statistics.
        head: class directions.
        classify: the margin softmax.
        margin: in radians.

    Returns:
        (params, {"waveform": [batch, samples], "label": [batch]}) -> mean loss.
    """
    embed = _embedding(network, batch_stats).outputs
    angle = jnp.asarray(margin, jnp.float32)
    return lambda params, batch: classify(embed(params, batch), head, batch["label"], angle)[0]


def margin_logits(
    network: Network, batch_stats: Any, head: jax.Array, classify: MarginSoftmax, margin: float
) -> OutputLoss:
    """The same loss as `gauss_newton_traces` takes it, by its logits; arguments as in `margin_loss`."""
    embed = _embedding(network, batch_stats).outputs
    angle = jnp.asarray(margin, jnp.float32)
    return OutputLoss(
        lambda params, batch: classify.logits(embed(params, batch), head, batch["label"], angle), softmax_root
    )


def _embedding(network: Network, batch_stats: Any) -> OutputLoss:
    """The drift of the embeddings of a training's batch."""
    loss = embedding_drift(network, batch_stats)
    return dataclasses.replace(
        loss, outputs=lambda params, batch: loss.outputs(params, float_waveform(batch["waveform"]))
    )
