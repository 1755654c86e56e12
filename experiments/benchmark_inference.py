"""How fast exported networks are on a CPU: latency, memory, cold start and size, side by side.

    python -m experiments.benchmark_inference --model=resnet34 --bits=4 --data_dir=DATA/an4 \
        --output=results/benchmark_inference_resnet34.json

One network, as: float ONNX; our file of bit-packed weights; our integer graph, of the same bits and 8-bit activations;
and what onnxruntime's own static quantization makes of the float file. All run on onnxruntime in turns, in one process,
so that a slower minute of the machine meets all of them; medians and quartiles are over rounds. Memory and cold start
are of a process of their own each, which loads the file and runs it once. Weights are random unless `--pretrained`
names a network: neither speed nor size depends on them.
"""

import collections
import dataclasses
import functools
import itertools
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.models import load_float_model
from experiments.speech import SpeechConfig, make_loader, training_corpus
from experiments.tables import inference_table
from experiments.timing import ratio_figures, time_figures, time_in_turns
from qsv.deploy import PackedModel
from qsv.deploy.onnx import to_onnx
from qsv.models import Network, model_names
from qsv.quant import ActivationQuantizer, KMeans, Rule, dequantize, init, quantize, resolve
from qsv.training import calibrate_activations
from qsv.training.waveform import float_waveform

# onnxruntime's threads look for more work for some milliseconds.
_PAUSE_SECONDS = 0.05
FLOAT, PACKED, INTEGER, STATIC = "float", "packed", "integer", "onnxruntime static int8"

# Loads a file, runs it once, and says how long that took and what memory it had.
_PROBE = """
import sys, time
started = time.perf_counter()
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = int(sys.argv[3]), 3
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"features": numpy.load(sys.argv[2])})
seconds = time.perf_counter() - started
# Not getrusage, whose maximum is the parent's where that is larger.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak)
"""


@dataclasses.dataclass(frozen=True)
class InferenceBenchmarkConfig:
    """Flags of the benchmark."""

    model: str = setting("resnet34", "Network.", choices=model_names())
    width: int = setting(0, "Channels of the first stage; 0 for the usual.", minimum=0)
    pretrained: str = setting("", "Float network in place of --model, as in experiments.quantize.")
    bits: int = setting(4, "Bits a weight of our files.", minimum=1)
    frames: tuple[str, ...] = setting(("200", "600"), "Lengths of the input, in frames of 10 ms.")
    threads: tuple[str, ...] = setting(("1", "2"), "Threads of onnxruntime.")
    rounds: int = setting(15, "Rounds; each runs every file once.", minimum=2)
    starts: int = setting(5, "Processes for memory and cold start.", minimum=1)
    output: str = setting("", "JSON file for the results; printed in any case.")
    speech: SpeechConfig = SpeechConfig(batch_size=4)

    def __post_init__(self) -> None:
        for flag, values in (("frames", self.frames), ("threads", self.threads)):
            if not values or not all(value.isdecimal() and int(value) for value in values):
                raise ValueError(f"--{flag} must be positive whole numbers, got {list(values)}")


def run(config: InferenceBenchmarkConfig) -> dict[str, Any]:
    """Make the files, and time them; returns what is written."""
    require(data_dir=config.speech.data_dir)
    name, model, speech = _integer_model(config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = _write_files(model, speech, pathlib.Path(folder))
        for frames, threads in itertools.product(map(int, config.frames), map(int, config.threads)):
            features = _features(model.network, frames)
            times = _latencies(files, features, threads, config.rounds)
            for kind, own in times.items():
                rows.append(
                    {
                        **time_figures(kind, own),
                        "frames": frames,
                        "threads": threads,
                        **ratio_figures(own, times[FLOAT]),
                        **_process(files[kind], features, threads, config.starts),
                    }
                )
        sizes = {kind: path.stat().st_size for kind, path in files.items()}
        operations = dict(_operations(files[INTEGER], pathlib.Path(folder)))
    results = {
        "experiment": "benchmark_inference",
        "network": name,
        "bits": config.bits,
        "rounds": config.rounds,
        "file_bytes": sizes,
        "rows": rows,
        "integer_operations": operations,
        "onnxruntime": onnxruntime.__version__,
        "machine": machine(),
    }
    if config.output:
        write_json(pathlib.Path(config.output), results)
    print(inference_table(results))
    return results


def _integer_model(config: InferenceBenchmarkConfig) -> tuple[str, PackedModel, list[jax.Array]]:
    """What the network is called, itself with k-means levels on the int8 grid and 8-bit activations, and speech."""
    if config.pretrained:
        model = load_float_model(config.pretrained)
        network, variables, name = model.network, model.variables, pathlib.Path(config.pretrained).stem
    else:
        network, name = Network.of_size(config.model, width=config.width), config.model
        variables = network.init(jax.random.key(0))
    plan = resolve([Rule(".*/kernel", KMeans(config.bits, integer_levels=True)), Rule(".*", None)], variables["params"])
    packed = quantize(plan, variables["params"], init(plan, variables["params"]))
    fake = {"params": dequantize(packed), "batch_stats": variables["batch_stats"]}
    speech = _speech(config, network)
    activations = calibrate_activations(network, fake, speech, ActivationQuantizer(8), method="min_max")
    return name, PackedModel(network, packed, variables["batch_stats"], None, {}, {}, "", activations), speech


def _speech(config: InferenceBenchmarkConfig, network: Network) -> list[jax.Array]:
    """Two batches of crops, for ranges."""
    corpus = training_corpus(config.speech, labelled=False)
    loader = make_loader(config.speech, corpus, seed=0, sample_rate_hz=network.frontend.sample_rate_hz)
    batches = [float_waveform(jnp.asarray(batch["waveform"])) for batch in itertools.islice(loader, 2)]
    loader.close()
    return batches


def _features(network: Network, frames: int) -> np.ndarray:
    shape = (1, frames, network.frontend.num_features)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _write_files(model: PackedModel, speech: Sequence[jax.Array], folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{kind: ONNX file}, all from features to embeddings."""
    weights_only = dataclasses.replace(model, activations=None)
    floats = dataclasses.replace(weights_only, packed_params=dequantize(model.packed_params))
    files = {}
    for kind, own in ((FLOAT, floats), (PACKED, weights_only), (INTEGER, model)):
        files[kind] = folder / f"{kind}.onnx"
        files[kind].write_bytes(to_onnx(own, waveform=False).SerializeToString())
    files[STATIC] = folder / "static.onnx"
    prepared = folder / "prepared.onnx"
    # Symbolic shape inference doesn't know how the frames come about; the quantization needs none.
    quant_pre_process(str(files[FLOAT]), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(files[STATIC]),
        _Calibration(np.asarray(model.network.frontend(waveforms)[0]) for waveforms in speech),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return files


class _Calibration(CalibrationDataReader):
    """Features of speech, for onnxruntime's own ranges."""

    def __init__(self, features: Iterator[np.ndarray]) -> None:
        self._features = features

    def get_next(self) -> dict[str, np.ndarray] | None:
        features = next(self._features, None)
        return None if features is None else {"features": features}


def _session(path: pathlib.Path, threads: int, optimized: pathlib.Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _latencies(
    files: Mapping[str, pathlib.Path], features: np.ndarray, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every file in every round."""
    sessions = {kind: _session(path, threads) for kind, path in files.items()}

    def call(session: onnxruntime.InferenceSession) -> None:
        session.run(None, {"features": features})

    for session in sessions.values():
        call(session)
    calls = {kind: functools.partial(call, session) for kind, session in sessions.items()}
    return time_in_turns(calls, rounds, pause_seconds=_PAUSE_SECONDS)


def _process(path: pathlib.Path, features: np.ndarray, threads: int, starts: int) -> dict[str, float]:
    """Medians over processes that load a file and run it once."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, features)
        file.flush()
        command = [sys.executable, "-c", _PROBE, str(path), file.name, str(threads)]
        texts = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(starts)]
    seconds, kilobytes = zip(*(map(float, text.split()) for text in texts), strict=True)
    return {"start_seconds": statistics.median(seconds), "peak_mbytes": statistics.median(kilobytes) * 1024 / 1e6}


def _operations(path: pathlib.Path, folder: pathlib.Path) -> collections.Counter[str]:
    """What onnxruntime runs of a file: {operation: how many}."""
    _session(path, 1, folder / "optimized.onnx")
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


if __name__ == "__main__":
    launch(InferenceBenchmarkConfig, run)
