"""A network whose weights and activations are 8-bit integers, so that 8-bit hardware can compute it.

    python -m experiments.integer_network --pretrained=campplus_cn_en_common.pt --weight_bits=4 --steps=300 \
        --data_dir=DATA/librispeech251 --noise_dir=DATA/noise --test_dir=DATA/an4 --workdir=runs/campplus_w4a8

Channels are brought to like size where the network is free to scale them, weights are calibrated (k-means levels on
the int8 grid), the ranges of all layers' inputs are measured on the speech, and then scales, ranges and what else is
trained learn to give the float network's embeddings, without labels. The folder gets `model.safetensors`, whose ranges
`qsv.deploy.load` applies, `report.md`, and what a training leaves. The same command again resumes; one whose other
settings would change the outcome is refused. `--steps=0` leaves the training out. With `--test_dir` the network is
measured, and on some utterances computed in integers, which must agree with the file; `--exported` measures its ONNX
file too, which devices run.

Source: MobileQuant's recipe, Tan et al. 2024 (arXiv 2408.13933), carried over to speaker networks: transforms that
change no function, weight clipping and activation ranges learnt end to end on the last output.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.calibration_file import calibrated_layers
from experiments.configuration import launch, machine, require, setting, write_json, write_run_record
from experiments.evaluate import load_file_embedder
from experiments.export import onnx_writer
from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization, finetune, unquantized
from experiments.models import MODEL_FILE, load_float_model
from experiments.quantize import SCHEMES, QuantizeConfig, description_lines, write_model
from experiments.run_settings import claim_folder, shaping_settings
from experiments.scoring import measure, score
from experiments.table_cells import interval_cell
from experiments.testing import TestConfig, TestSet, load_test_set
from qsv.data import read_audio
from qsv.deploy import Embedder, IntegerNetwork, PackedModel, load_packed
from qsv.deploy.integer import int8_levels
from qsv.models import at_points
from qsv.quant import ActivationQuantizer, Plan, leaf_paths
from qsv.training import Calibrated, calibrate_activations, equalize, scale_freedom
from qsv.training.waveform import float_waveform

# Enough to find where channels are free; it takes a run for every layer.
_TRIAL_SECONDS = 0.5
_RANGE_METHODS = ("mse", "percentile", "min_max")


@dataclasses.dataclass(frozen=True)
class IntegerNetworkConfig:
    """Flags of an integer network."""

    workdir: str = setting("", "Folder of the run.", incidental=True)
    pretrained: str = setting("", "Float network to quantize, as in experiments.quantize.")
    scheme: str = setting("kmeans", "Levels of the weights; k-means' are put on the int8 grid.", choices=SCHEMES)
    weight_bits: int = setting(8, "Bits a weight.", minimum=1)
    activation_bits: int = setting(8, "Bits of the inputs of layers.", minimum=2)
    symmetric: bool = setting(False, "Signed codes around zero; else unsigned ones with a zero point.")
    range_method: str = setting(
        "mse", "How ranges are measured: of least squared error, a percentile, or all.", choices=_RANGE_METHODS
    )
    percentile: float = setting(99.99, "percentile: share of the values within a range, in percent.", minimum=0.0)
    equalize: bool = setting(True, "Bring channels to like size before anything is quantized.")
    compared_utterances: int = setting(
        3, "Test utterances that are computed in integers too.", minimum=0, incidental=True
    )
    exported: bool = setting(
        False, "Score the trials by the exported ONNX file too, on onnxruntime; needs qsv[export].", incidental=True
    )
    output: str = setting("", "JSON file for the results; --workdir/results.json when absent.", incidental=True)
    finetune: FinetuneConfig = FinetuneConfig(integer_levels=True, mse_weight=1.0)
    test: TestConfig = setting(TestConfig(), "Trials.", incidental=True)

    def __post_init__(self) -> None:
        if self.exported and not self.test.test_dir:
            raise ValueError("--exported needs trials to score; give --test_dir")


def run(config: IntegerNetworkConfig) -> pathlib.Path:
    """Quantize weights and activations; returns the packed file."""
    require(workdir=config.workdir, pretrained=config.pretrained, data_dir=config.finetune.speech.data_dir)
    if not config.finetune.calibration_crops:
        raise ValueError("ranges of activations need speech to be measured on; give --calibration_crops")
    workdir, settings = pathlib.Path(config.workdir), config.finetune
    weights = QuantizeConfig(scheme=config.scheme, bits=config.weight_bits, finetune=settings)
    weights.quantizer()  # Out-of-range bits are refused before anything is measured.
    activations = ActivationQuantizer(config.activation_bits, config.symmetric)
    test_set = load_test_set(config.test) if config.test.test_dir else None
    if config.exported:
        onnx_writer()  # What it needs and lacks is said before anything is measured.
    model = load_float_model(config.pretrained)
    if model.path.resolve() == (workdir / MODEL_FILE).resolve():
        raise ValueError(f"--workdir={workdir} would overwrite --pretrained; choose another folder")
    plan = weights.plan(model.params)
    _check_levels(plan, model.params)
    claim_folder(workdir, shaping_settings(config))
    write_run_record(workdir, "integer_network", config)
    network = unquantized(settings, model)
    before = _equalized(network) if config.equalize else network
    start = calibrated_layers(settings, before, plan, workdir)
    start = dataclasses.replace(
        start,
        activations=calibrate_activations(
            model.network,
            start.variables,
            _float_waveforms(network),
            activations,
            method=config.range_method,  # type: ignore[arg-type]
            percentile=config.percentile,
        ),
    )
    description = f"{config.weight_bits}-bit weights, {config.activation_bits}-bit activations"
    trained = finetune(settings, start, workdir=workdir, description=description)
    written = write_model(trained, workdir / MODEL_FILE, compact=True)
    lines = [
        f"# {pathlib.Path(config.pretrained).name}, weights of {config.weight_bits} bits, activations of "
        f"{config.activation_bits}",
        "",
        *description_lines(model, settings),
        f"- channels equalized: {'yes' if config.equalize else 'no'}; ranges by {config.range_method}",
        *written.lines(),
        "",
    ]
    if test_set is not None:
        figures = _evaluated(config, network, written.path, test_set)
        write_json(pathlib.Path(config.output or workdir / "results.json"), figures)
        lines += [_sentence(figures), ""]
        print(_sentence(figures))
    (workdir / "report.md").write_text("\n".join(lines) + "\n" + written.size.to_markdown(), encoding="utf-8")
    print(f"wrote {written.path} and report.md beside it")
    return written.path


def _check_levels(plan: Plan, params: Any) -> None:
    """Raise ValueError where integers can't have the levels, which one kernel tells: their grid is the same in all."""
    path, quantizer = next(iter(plan.quantized.items()))
    weights = dict(leaf_paths(params))[path]
    int8_levels(quantizer.quantize(weights, quantizer.init(weights)))


def _float_waveforms(network: Quantization) -> list[Any]:
    return [float_waveform(jnp.asarray(waveform)) for waveform in network.waveforms]


def _equalized(network: Quantization) -> Quantization:
    """The same function with channels of like size; it stays its own teacher."""
    model, waveforms = network.model, _float_waveforms(network)
    samples = max(round(_TRIAL_SECONDS * model.network.frontend.sample_rate_hz), model.network.frontend.min_samples)
    freedom = scale_freedom(model.network, model.variables, waveforms[0][:1, :samples])
    print(
        f"equalizing the outputs of {len(freedom.norms)} layers, and the inputs of "
        f"{sum(map(len, freedom.readers.values()))}"
    )
    moved = equalize(model.network, model.variables, waveforms, freedom)
    model = dataclasses.replace(model, params=moved["params"], batch_stats=moved["batch_stats"])
    return dataclasses.replace(network, model=model, calibrated=Calibrated(model.params, model.batch_stats, {}))


def _evaluated(
    config: IntegerNetworkConfig, network: Quantization, path: pathlib.Path, test_set: TestSet
) -> dict[str, Any]:
    packed = load_packed(path)
    reference = score(Embedder(network.model.network, network.model.variables), test_set)
    scores = score(Embedder.of(packed), test_set)
    figures = {
        "experiment": "integer_network",
        "network": pathlib.Path(config.pretrained).name,
        "scheme": config.scheme,
        "weight_bits": config.weight_bits,
        "scales": "channel" if config.finetune.per_channel else "tensor",
        "activation_bits": config.activation_bits,
        "equalized": config.equalize,
        "steps": config.finetune.steps,
        "test": pathlib.Path(config.test.test_dir).name,
        "file_bytes": path.stat().st_size,
        "float": measure(reference, test_set),
        **measure(scores, test_set, reference),
        "integers": _in_integers(config, packed, test_set),
        "machine": machine(),
    }
    if config.exported:
        figures["exported"] = _exported(path.with_suffix(".onnx"), packed, test_set, scores)
    return figures


def _exported(path: pathlib.Path, packed: PackedModel, test_set: TestSet, reference: np.ndarray) -> dict[str, Any]:
    """Write the ONNX file; its figures on onnxruntime, and how they differ from those of the packed file's scores."""
    size = onnx_writer()(path, packed)
    embedder, _ = load_file_embedder(str(path), "onnxruntime")
    return {"file_bytes": size, **measure(score(embedder, test_set), test_set, reference)}


def _in_integers(config: IntegerNetworkConfig, packed: PackedModel, test_set: TestSet) -> dict[str, Any]:
    """How the network in integers differs from the file's on some utterances: cosines of embeddings, steps of codes."""
    integer = IntegerNetwork.of(packed.network, packed.packed_params, packed.batch_stats, packed.activations)
    embedder, cosines, steps = Embedder.of(packed), [], []
    for utterance in test_set.utterances[: config.compared_utterances]:
        waveform = jnp.asarray(read_audio(utterance.path, sample_rate_hz=packed.network.frontend.sample_rate_hz))[None]
        pair = [np.asarray(run(waveform))[0] for run in (embedder.embed_batch, integer.embed)]
        cosines.append(float(pair[0] @ pair[1] / np.prod(np.linalg.norm(pair, axis=1))))
        steps.append(_largest_step(integer, embedder.variables, waveform))
    return {
        "utterances": len(cosines),
        "least_cosine": min(cosines, default=None),
        "largest_step": max(steps, default=None),
    }


def _largest_step(integer: IntegerNetwork, variables: Any, waveform: jax.Array) -> int:
    """How far codes of any layer are from those in float, where that is given the integers' inputs."""
    quantizer, ranges = integer.activations.quantizer, integer.activations.ranges
    codes, steps = integer.codes(waveform), []

    def compare(point: str, values: jax.Array) -> jax.Array:
        own = quantizer.quantize(values, ranges[point])
        steps.append(int(np.abs(np.subtract(codes[point], own, dtype=np.int32)).max()))
        return quantizer.dequantize(codes[point], ranges[point])

    features, _ = integer.network.frontend(waveform)
    with at_points(ranges, compare):
        integer.network.module().apply(variables, features)
    return max(steps)


def _sentence(figures: dict[str, Any]) -> str:
    difference = interval_cell(figures, "eer_percent_difference", 2, sign="+")
    text = f"EER {figures['eer_percent']:.2f} % on {figures['test']}, {difference} against float."
    integers = figures["integers"]
    if integers["utterances"]:
        text += (
            f" Computed in integers, {integers['utterances']} utterances have a cosine of "
            f"{integers['least_cosine']:.6f} or more with it, and the codes of a layer are {integers['largest_step']} "
            "steps apart at most."
        )
    if "exported" in figures:
        difference = interval_cell(figures["exported"], "eer_percent_difference", 2, sign="+")
        text += (
            f" The ONNX file of {figures['exported']['file_bytes']:,} bytes has an EER of "
            f"{figures['exported']['eer_percent']:.2f} % on onnxruntime, {difference} against the packed file."
        )
    return text


if __name__ == "__main__":
    launch(IntegerNetworkConfig, run)
