"""DF-ResNet: deep and narrow networks of inverted bottlenecks, in the original strides and in Gemini's."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models.pooling import temporal_statistics_pooling
from qsv.models.resnet import Activation, ConvNorm, check_sizes, strided_mask

_BLOCKS = {56: (3, 3, 9, 3), 110: (3, 3, 27, 3), 179: (3, 8, 45, 3), 233: (3, 8, 63, 3)}
# Gemini's depths count the four downsampling layers too.
_NUM_DOWNSAMPLING = 4
_ORIGINAL_STRIDES = ((1, 1), (2, 2), (2, 2), (2, 2))
_GEMINI_STRIDES = ((2, 1), (2, 2), (2, 1), (2, 1))

# depth -> (blocks in each stage, strides in frequency and time before each stage)
DEPTHS = {
    **{depth: (blocks, _ORIGINAL_STRIDES) for depth, blocks in _BLOCKS.items()},
    **{depth + _NUM_DOWNSAMPLING: (blocks, _GEMINI_STRIDES) for depth, blocks in _BLOCKS.items()},
}
GEMINI_DEPTHS = tuple(depth + _NUM_DOWNSAMPLING for depth in _BLOCKS)
_WIDTH_FACTORS = (1, 2, 4, 8)
_EXPANSION = 4


class DFResNet(nn.Module):
    """Depth-first ResNet that maps log-Mel features to a speaker embedding.

    3x3 stem; four times a strided 3x3 convolution without nonlinearity and a stage of inverted bottlenecks of
    `width` * {1, 2, 4, 8} channels; temporal statistics pooling and one linear layer.

    Attributes:
        depth: 56, 110, 179 or 233, or Gemini's 60, 114, 183 or 237: the same blocks, but frequency is halved four times
            and time once, where the original halves both three times.
        width: channels of the stem and the first stage (32 is the papers').
        embedding_size: dimensions of the embedding.
        dtype: type of the computation (bfloat16 for mixed precision); parameters stay float32.
        activation: nonlinearity.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
            along it. None where the whole batch is here.

    Source: Liu et al. 2022 (DF-ResNet, Interspeech); Golden Gemini, Liu et al. 2023 (arXiv 2312.03620), as built in
    WeSpeaker's gemini_dfresnet.py (4.05, 6.53, 9.20 and 11.68 million parameters). The original's code isn't public:
    its downsampling is inferred to be Gemini's but for the strides. Frame masks are our addition.
    """

    depth: int = 60
    width: int = 32
    embedding_size: int = 256
    dtype: Any = jnp.float32
    activation: Activation = nn.relu
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Embed a batch; arguments, result and errors as of `ResNet`."""
        check_sizes(self.depth, DEPTHS, self.width, self.embedding_size)
        common: dict[str, Any] = {"dtype": self.dtype, "batch_axis": self.batch_axis}
        # Height is frequency and width is time, as in the checkpoints of this family.
        x = features.swapaxes(1, 2)[..., None].astype(self.dtype)
        x = self.activation(ConvNorm(self.width, **common, name="stem")(x, mask, train=train))
        blocks, strides = DEPTHS[self.depth]
        for stage, (count, factor, stride) in enumerate(zip(blocks, _WIDTH_FACTORS, strides, strict=True), start=1):
            channels = factor * self.width
            x = ConvNorm(channels, 3, stride, **common, name=f"down{stage}")(x, mask, train=train)
            mask = strided_mask(mask, stride[1])
            for index in range(1, count + 1):
                name = f"stage{stage}_block{index}"
                x = InvertedBottleneck(channels, self.activation, **common, name=name)(x, mask, train=train)
        pooled = temporal_statistics_pooling(x, mask)
        return nn.Dense(self.embedding_size, name="embedding")(pooled)


class InvertedBottleneck(nn.Module):
    """Residual block: 1x1 to four times the channels, 3x3 of each channel by itself, 1x1 back.

    Attributes:
        channels: of input and output.
        activation: nonlinearity after the first two convolutions and after the addition.
        dtype: type of the computation.
        batch_axis: as in `DFResNet`.
    """

    channels: int
    activation: Activation
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frequency, frames, channels] -> the same."""
        wide = _EXPANSION * self.channels
        common: dict[str, Any] = {"dtype": self.dtype, "batch_axis": self.batch_axis}
        y = self.activation(ConvNorm(wide, 1, **common, name="conv1")(x, mask, train=train))
        y = self.activation(ConvNorm(wide, 3, groups=wide, **common, name="conv2")(y, mask, train=train))
        y = ConvNorm(self.channels, 1, **common, name="conv3")(y, mask, train=train)
        return self.activation(x + y)
