"""The calibration that a training starts from, kept beside its checkpoints: made once, however often it is resumed."""

import dataclasses
import pathlib

import jax
import numpy as np
import safetensors.numpy

from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import Quantization, quantize_layers
from experiments.models import open_tensors
from qsv.deploy.atomic_write import write_atomically
from qsv.quant import Plan, init, leaf_paths, with_leaves

CALIBRATION_FILE = "calibration.safetensors"


def calibrated_layers(config: FinetuneConfig, before: Quantization, plan: Plan, folder: pathlib.Path) -> Quantization:
    """`quantize_layers`, from the file in a run's folder where that has been made.

    Without fine-tuning nothing is resumed, hence nothing kept.

    Args:
        config: settings.
        before: the network as it is.
        plan: what to go on to.
        folder: of the run, which `experiments.run_settings.claim_folder` keeps to one plan and one set of settings.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / CALIBRATION_FILE
    if path.exists() and config.steps:
        return _read(path, before, plan)
    after = quantize_layers(config, before, plan)
    if config.steps:
        arrays = {name: np.asarray(leaf, order="C") for name, leaf in leaf_paths(after.calibrated)}
        write_atomically(path, safetensors.numpy.save(arrays))
    return after


def _read(path: pathlib.Path, before: Quantization, plan: Plan) -> Quantization:
    """The network as it was calibrated."""
    qstate = jax.eval_shape(lambda params: init(plan, params), before.calibrated.params)
    like = before.calibrated._replace(qstate=qstate)
    with open_tensors(path) as file:
        calibrated = with_leaves(like, {name: file.get_tensor(name) for name, _ in leaf_paths(like)})
    return dataclasses.replace(before, plan=plan, calibrated=calibrated)
