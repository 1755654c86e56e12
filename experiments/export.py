"""Export a packed file to ONNX.

    python -m experiments.export --model=runs/campplus_kmeans_4/model.safetensors --output=campplus.onnx

The graph takes waveforms, or with `--input=features` what the front end makes of them, of any number and length, and
gives embeddings. Its weights are as small as in the packed file; onnxruntime unpacks them when it loads it.
"""

import dataclasses
import pathlib

from experiments.configuration import launch, require, setting
from qsv.deploy import load_packed
from qsv.deploy.onnx import export_onnx

INPUTS = ("waveform", "features")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Flags of an export."""

    model: str = setting("", "Packed file to export.")
    output: str = setting("", "File to write; the packed file's name with the suffix .onnx when absent.")
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
    source = pathlib.Path(config.model)
    path = pathlib.Path(config.output or source.with_suffix(".onnx"))
    if path.exists() and path.samefile(source):
        raise ValueError(f"--output={path} would overwrite --model; give another file")
    size = export_onnx(path, load_packed(source), waveform=config.input == "waveform")
    print(f"wrote {path}: {size:,} bytes, the packed file has {source.stat().st_size:,}")
    return path


if __name__ == "__main__":
    launch(ExportConfig, run)
