"""How fast exported networks are on a CPU: latency, memory, cold start and size, side by side.

    python -m experiments.benchmark_inference --model=resnet34 --bits=4 --data_dir=DATA/an4 \
        --output=results/benchmark_inference_resnet34.json

One network, as: float ONNX; our file of bit-packed weights; our integer graph, of the same bits and 8-bit activations;
and what onnxruntime's own static quantization makes of the float file. All run on onnxruntime, ours on OpenVINO too
where it is installed, in turns, in one process, so that a slower minute of the machine meets all of them; medians and
quartiles are over rounds. Memory and cold start are of a process of their own each, which loads the file and runs it
once; `qsv verify` is timed from the start of its process to its end. Weights are random unless `--pretrained` names a
network: neither speed nor size depends on them.
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import soundfile
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from experiments.configuration import launch, machine, require, setting, write_json
from experiments.models import load_float_model
from experiments.speech import SpeechConfig, make_loader, training_corpus
from experiments.tables import inference_table
from experiments.timing import ratio_figures, time_figures, time_in_turns
from qsv.deploy import PackedModel, size_report
from qsv.deploy.compact import fold_batch_norms
from qsv.deploy.onnx import export_onnx, to_onnx
from qsv.deploy.runtime.backends import make_runner
from qsv.models import Network, model_names
from qsv.quant import ActivationQuantizer, KMeans, Rule, dequantize, init, quantize, resolve
from qsv.training import calibrate_activations
from qsv.training.waveform import float_waveform

# onnxruntime's threads look for more work for some milliseconds.
_PAUSE_SECONDS = 0.05
FLOAT, PACKED, INTEGER, STATIC = "float", "packed", "integer", "onnxruntime static int8"
_ON_OPENVINO = " on OpenVINO"

# Loads a file, runs it once, and says how long that took and what memory it had.
_PROBE = """
import sys, time
started = time.perf_counter()
import pathlib, numpy
from qsv.deploy.runtime.backends import make_runner
path, inputs, backend, threads = sys.argv[1:]
make_runner(path, pathlib.Path(path).read_bytes(), backend=backend, threads=int(threads))(numpy.load(inputs))
seconds = time.perf_counter() - started
# Not getrusage, whose maximum is the parent's where that is larger.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak)
"""
_COMMAND = "import sys; from qsv.deploy.runtime.command import main; sys.exit(main())"


class Program(NamedTuple):
    """What is timed: an ONNX file, and what runs it."""

    path: pathlib.Path
    backend: str = "onnxruntime"


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
        programs = _write_files(model, speech, pathlib.Path(folder))
        for frames, threads in itertools.product(map(int, config.frames), map(int, config.threads)):
            features = _features(model.network, frames)
            times = _latencies(programs, features, threads, config.rounds)
            for kind, own in times.items():
                rows.append(
                    {
                        **time_figures(kind, own),
                        "frames": frames,
                        "threads": threads,
                        **ratio_figures(own, times[FLOAT]),
                        **_process(programs[kind], features, threads, config.starts),
                    }
                )
        sizes = {kind: program.path.stat().st_size for kind, program in programs.items()}
        operations = dict(_operations(programs[INTEGER].path, pathlib.Path(folder)))
        verify_seconds = _verify_seconds(model, speech, pathlib.Path(folder), config.starts)
    results = {
        "experiment": "benchmark_inference",
        "network": name,
        "bits": config.bits,
        "rounds": config.rounds,
        "file_bytes": sizes,
        "content_bytes": size_report(*fold_batch_norms(model.packed_params, model.batch_stats)).stored_bytes,
        "rows": rows,
        "verify_seconds": verify_seconds,
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


def _write_files(model: PackedModel, speech: Sequence[jax.Array], folder: pathlib.Path) -> dict[str, Program]:
    """{kind: program}, all from features to embeddings."""
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
    programs = {kind: Program(path) for kind, path in files.items()}
    if importlib.util.find_spec("openvino"):
        programs |= {kind + _ON_OPENVINO: Program(files[kind], "openvino") for kind in (FLOAT, PACKED, INTEGER)}
    return programs


class _Calibration(CalibrationDataReader):
    """Features of speech, for onnxruntime's own ranges."""

    def __init__(self, features: Iterator[np.ndarray]) -> None:
        self._features = features

    def get_next(self) -> dict[str, np.ndarray] | None:
        features = next(self._features, None)
        return None if features is None else {"features": features}


def _latencies(
    programs: Mapping[str, Program], features: np.ndarray, threads: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of every program in every round."""
    calls = {}
    for kind, (path, backend) in programs.items():
        runner = make_runner(path, path.read_bytes(), backend=backend, threads=threads)
        runner(features)
        calls[kind] = functools.partial(runner, features)
    return time_in_turns(calls, rounds, pause_seconds=_PAUSE_SECONDS)


def _process(program: Program, features: np.ndarray, threads: int, starts: int) -> dict[str, float]:
    """Medians over processes that load a file and run it once."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, features)
        file.flush()
        command = [sys.executable, "-c", _PROBE, str(program.path), file.name, program.backend, str(threads)]
        texts = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(starts)]
    seconds, kilobytes = zip(*(map(float, text.split()) for text in texts), strict=True)
    return {"start_seconds": statistics.median(seconds), "peak_mbytes": statistics.median(kilobytes) * 1024 / 1e6}


def _verify_seconds(
    model: PackedModel, speech: Sequence[jax.Array], folder: pathlib.Path, starts: int
) -> dict[str, float]:
    """Median seconds of `qsv verify` of two crops by our files from waveforms, the whole process."""
    recording, seconds = folder / "speech.wav", {}
    soundfile.write(recording, np.ravel(speech[0][:2]), model.network.frontend.sample_rate_hz)
    for kind, own in ((PACKED, dataclasses.replace(model, activations=None)), (INTEGER, model)):
        path = folder / f"{kind}_waveform.onnx"
        export_onnx(path, own)
        shared = [f"--model={path}", f"--store={folder / kind}.sqlite"]
        command = [sys.executable, "-c", _COMMAND]
        subprocess.run([*command, "enrol", "speaker", str(recording), *shared], check=True, capture_output=True)
        times = []
        for _ in range(starts):
            started = time.perf_counter()
            verify = [*command, "verify", "speaker", str(recording), "--threshold=0", *shared]
            subprocess.run(verify, check=True, capture_output=True)
            times.append(time.perf_counter() - started)
        seconds[kind] = statistics.median(times)
    return seconds


def _operations(path: pathlib.Path, folder: pathlib.Path) -> collections.Counter[str]:
    """What onnxruntime runs of a file: {operation: how many}."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return collections.Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


if __name__ == "__main__":
    launch(InferenceBenchmarkConfig, run)
