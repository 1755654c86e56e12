"""Export a packed file to ONNX or StableHLO.

    python -m experiments.export --model=runs/campplus_cn_en_common_kmeans_4 --output=campplus.onnx

The graph takes waveforms, or with `--input=features` what the front end makes of them, of any number and length, and
gives embeddings. Its weights are as small as in the packed file; onnxruntime unpacks them when it loads it. A file of
StableHLO is for JAX's compiler, on CPU, GPU and TPU: `qsv.deploy.load_stablehlo(path).call(waveforms)`.
"""

import dataclasses
import pathlib
from collections.abc import Callable

from experiments.configuration import launch, require, setting
from experiments.models import model_file
from qsv.deploy import export_stablehlo, load_packed

INPUTS = ("waveform", "features")
FORMATS = ("onnx", "stablehlo")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Flags of an export."""

    model: str = setting("", "Model to export: a run's folder or a packed file.")
    output: str = setting("", "File to write; the packed file's name with the format as suffix when absent.")
    format: str = setting("onnx", "onnx, or stablehlo for JAX's compiler.", choices=FORMATS)
    input: str = setting(
        "waveform",
        "waveform: [batch, samples] float32 in [-1, 1] at the network's rate; features: [batch, frames, features].",
        choices=INPUTS,
    )


def run(config: ExportConfig) -> pathlib.Path:
    """Write the ONNX file; returns its path."""
    require(model=config.model)
    if config.input not in INPUTS:
        raise ValueError(f"--input must be one of {', '.join(INPUTS)}, got {config.input!r}")
    if config.format not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, got {config.format!r}")
    source = model_file(config.model)
    path = pathlib.Path(config.output or source.with_suffix(f".{config.format}"))
    if path.exists() and path.samefile(source):
        raise ValueError(f"--output={path} would overwrite --model; give another file")
    write = export_stablehlo if config.format == "stablehlo" else onnx_writer()
    size = write(path, load_packed(source), waveform=config.input == "waveform")
    print(f"wrote {path}: {size:,} bytes, the packed file has {source.stat().st_size:,}")
    return path


def onnx_writer() -> Callable[..., int]:
    """`qsv.deploy.onnx.export_onnx`; raises ImportError without the extra `export`."""
    from qsv.deploy.onnx import export_onnx

    return export_onnx


if __name__ == "__main__":
    launch(ExportConfig, run)
