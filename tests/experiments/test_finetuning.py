"""Settings of a fine-tuning, and what they refuse."""

import pytest

from experiments.finetuning import FinetuneConfig
from experiments.quantize import QuantizeConfig
from qsv.quant import KMeans


def test_channel_scales_share_the_codebook():
    config = QuantizeConfig(bits=3, finetune=FinetuneConfig(per_channel=True))
    assert config.quantizer() == KMeans(3, channel_axes=(-1,), share_codebook=True)


def test_normalised_weights_need_nearest_rounding():
    with pytest.raises(ValueError, match="--normalization=restore needs --rounding=nearest"):
        FinetuneConfig(normalization="restore")
    FinetuneConfig(normalization="restore", rounding="nearest")
