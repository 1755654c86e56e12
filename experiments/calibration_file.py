"""The calibration that a training starts from, kept beside its checkpoints: made once, however often it is resumed."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization, quantize_layers
from qsv.deploy import describe_plan
from qsv.deploy.atomic_write import write_atomically
from qsv.quant import Plan, init, leaf_paths, with_leaves

CALIBRATION_FILE = "calibration.safetensors"
# Of the speech, what changes how fast it is read, not what is heard.
_WITHOUT_EFFECT = ("loader_threads", "cache_mbytes", "max_bad_files")


def calibrated_layers(config: FinetuneConfig, before: Quantization, plan: Plan, folder: pathlib.Path) -> Quantization:
    """`quantize_layers`, from the file in a run's folder where that has been made with the same settings.

    Without fine-tuning nothing is resumed, hence nothing kept.

    Raises:
        ValueError: the folder's checkpoints are of other settings.
    """
    path = folder / CALIBRATION_FILE
    settings = _settings(config, before, plan)
    if path.exists() and config.steps:
        found = _read(path, before, plan, settings)
        if found is not None:
            return found
        if (folder / "checkpoints").exists():
            raise ValueError(
                f"{folder} holds checkpoints of a run with other bits, layers or calibration settings; choose another "
                "--workdir, or delete it"
            )
    after = quantize_layers(config, before, plan)
    if config.steps:
        arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaf_paths(after.calibrated)}
        write_atomically(path, safetensors.numpy.save(arrays, {"settings": json.dumps(settings)}))
    return after


def _read(path: pathlib.Path, before: Quantization, plan: Plan, settings: dict[str, Any]) -> Quantization | None:
    """The network as it was calibrated; None where the settings were others."""
    qstate = jax.eval_shape(lambda params: init(plan, params), before.calibrated.params)
    like = before.calibrated._replace(qstate=qstate)
    with safetensors.safe_open(path, "np") as file:
        if json.loads(file.metadata()["settings"]) != settings:
            return None
        calibrated = with_leaves(like, {name: file.get_tensor(name) for name, _ in leaf_paths(like)})
    return dataclasses.replace(before, plan=plan, calibrated=calibrated)


def _settings(config: FinetuneConfig, before: Quantization, plan: Plan) -> dict[str, Any]:
    """All that the calibration and the form of the checkpoints depend on, as JSON gives it back."""
    speech = {name: value for name, value in dataclasses.asdict(config.speech).items() if name not in _WITHOUT_EFFECT}
    settings = {
        "plan": describe_plan(plan),
        "plan before": describe_plan(before.plan),
        "model": str(before.model.path),
        "calibration": dataclasses.asdict(config.calibration),
        "crops": config.calibration_crops,
        "seed": config.seed,
        "speech": speech,
        # Their weights are in units of their scales.
        "layers with fixed codes": [path for path, one in plan.quantized.items() if config.keeps_codes(one.bits)],
    }
    return json.loads(json.dumps(settings))
