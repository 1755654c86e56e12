"""Turn another toolkit's checkpoint into a float model of ours.

    python -m experiments.import_checkpoint voxceleb_resnet34/avg_model.pt runs/resnet34

reads checkpoints of WeSpeaker, SpeechBrain, 3D-Speaker and Resemblyzer, without PyTorch and without running what is in
them. The first argument is the file or the folder that it lies in, with the toolkit's settings beside it; the second is
the folder to make `model.safetensors` in, or a file that ends so. Every other experiment takes it as `--model` or
`--pretrained`.
"""

import dataclasses
import pathlib

from experiments.configuration import launch
from experiments.models import MODEL_FILE
from qsv.deploy import save
from qsv.interop import import_checkpoint
from qsv.models import count_parameters
from qsv.quant import Rule, resolve


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """The arguments are the checkpoint and what to make of it."""

    arguments: tuple[str, ...] = ()


def run(config: ImportConfig) -> pathlib.Path:
    """Import a checkpoint; returns the float model's file."""
    if len(config.arguments) != 2:
        raise ValueError(
            f"give a checkpoint and the folder for its model, got {len(config.arguments)}: {list(config.arguments)}"
        )
    source, output = map(pathlib.Path, config.arguments)
    imported = import_checkpoint(source)
    path = output if output.suffix == pathlib.Path(MODEL_FILE).suffix else output / MODEL_FILE
    for made in (output, path):
        if made.exists() and made.samefile(imported.path):
            raise ValueError(f"{made} is the checkpoint itself; give another folder")
    network, variables = imported.network, imported.variables
    save(
        path,
        network,
        resolve([Rule(".*", None)], variables["params"]),
        variables["params"],
        {},
        variables["batch_stats"],
        provenance={"imported_from": imported.path.name, "family": imported.family},
    )
    print(f"{imported.family}: {network.name} {dict(network.arguments)}")
    print(f"{count_parameters(variables['params']):,} parameters")
    print(network.frontend)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    launch(ImportConfig, run)
