"""Settings of a fine-tuning, and what they refuse."""

import dataclasses

import numpy as np
import pytest

from experiments.finetune_config import FinetuneConfig
from experiments.finetuning import finetune, unquantized
from experiments.models import load_float_model
from experiments.quantize import QuantizeConfig
from qsv.quant import KMeans, leaf_paths, resolve, with_leaves


def test_channel_scales_share_the_codebook():
    config = QuantizeConfig(bits=3, finetune=FinetuneConfig(per_channel=True))
    assert config.quantizer() == KMeans(3, channel_axes=(-1,), share_codebook=True)


def test_normalised_weights_need_nearest_rounding():
    with pytest.raises(ValueError, match="--normalization=restore needs --rounding=nearest"):
        FinetuneConfig(normalization="restore")
    FinetuneConfig(normalization="restore", rounding="nearest")


def test_kernels_that_are_quantized_later_train_at_their_later_rate(float_run, make_speech_config, tmp_path):
    config = FinetuneConfig(steps=3, calibration_crops=0, level_rate=1e-6, speech=make_speech_config())
    network = unquantized(config, load_float_model(str(float_run)))
    plan = QuantizeConfig(bits=2, finetune=config).policy()
    final = resolve(plan, network.model.params)
    # The teacher agrees with itself: one kernel is moved, so that there is something to learn.
    kernels = {path: leaf for path, leaf in leaf_paths(network.model.params) if path in final.quantized}
    moved = with_leaves(network.model.params, {"stem/conv/kernel": kernels["stem/conv/kernel"] * 0.5})
    start = dataclasses.replace(network, calibrated=network.calibrated._replace(params=moved))

    def largest_step(name, upcoming):
        trained = finetune(config, start, workdir=tmp_path / name, description=name, upcoming=upcoming)
        after = dict(leaf_paths(trained.calibrated.params))
        return max(float(np.abs(after[path] - leaf).max()) for path, leaf in leaf_paths(moved) if path in kernels)

    assert largest_step("later", final) < 1e-2 * largest_step("never", None)
