"""The r-vector ResNet family for speaker verification."""

from collections.abc import Callable, Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models.batch_norm import EPSILON, MOMENTUM
from qsv.models.convolution import conv_general_dilated
from qsv.models.pooling import temporal_statistics_pooling

# depth -> (residual blocks in each of the four stages, whether they are bottlenecks)
STAGE_BLOCKS: dict[int, tuple[tuple[int, int, int, int], bool]] = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
    221: ((6, 16, 48, 3), True),
    293: ((10, 20, 64, 3), True),
}
_STAGE_STRIDES = (1, 2, 2, 2)
_BOTTLENECK_EXPANSION = 4

Activation = Callable[[jax.Array], jax.Array]


class ResNet(nn.Module):
    """ResNet that maps log-Mel features to a speaker embedding.

    3x3 stem, four stages of `width` * {1, 2, 4, 8} channels with strides 1, 2, 2, 2, temporal statistics pooling
    and one linear layer. Depths below 50 have basic blocks, the others bottlenecks with expansion 4.

    Attributes:
        depth: 10, 18, 34, 50, 101, 152, 221 or 293 (10 is ours, for small tasks).
        width: channels of the first stage (the papers' m; 32 is WeSpeaker's).
        embedding_size: dimensions of the embedding.
        dtype: type of the computation (bfloat16 for mixed precision); parameters stay float32.
        activation: nonlinearity after every batch normalisation.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
          along it. None where the whole batch is here.

    Source: Zeinali et al. 2019 (arXiv 1910.12592) as built in WeSpeaker's resnet.py. Frame masks are our addition.
    """

    depth: int = 34
    width: int = 32
    embedding_size: int = 256
    dtype: Any = jnp.float32
    activation: Activation = nn.relu
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Embed a batch.

        Args:
            features: [batch, frames, mels] float, mean normalised.
            mask: [batch, frames] bool, true where a frame is valid; padding then never changes an embedding.
            train: normalise by the batch's statistics and update the running ones.

        Returns:
            [batch, embedding_size] float32.

        Raises:
            ValueError: the depth is unknown or a size isn't positive.
        """
        check_sizes(self.depth, STAGE_BLOCKS, self.width, self.embedding_size)
        blocks, bottleneck = STAGE_BLOCKS[self.depth]
        # Height is frequency and width is time, as in the checkpoints of this family.
        x = features.swapaxes(1, 2)[..., None].astype(self.dtype)
        x = ConvNorm(self.width, dtype=self.dtype, batch_axis=self.batch_axis, name="stem")(x, mask, train=train)
        x = self.activation(x)
        for stage, (count, stride) in enumerate(zip(blocks, _STAGE_STRIDES, strict=True)):
            for index in range(count):
                block = Block(
                    channels=self.width * 2**stage,
                    stride=stride if index == 0 else 1,
                    bottleneck=bottleneck,
                    dtype=self.dtype,
                    activation=self.activation,
                    batch_axis=self.batch_axis,
                    name=f"stage{stage + 1}_block{index + 1}",
                )
                x, mask = block(x, mask, train=train)
        pooled = temporal_statistics_pooling(x, mask)
        return nn.Dense(self.embedding_size, name="embedding")(pooled)


def check_sizes(depth: int, depths: Collection[int], width: int, embedding_size: int) -> None:
    """Raise ValueError where a network of this family can't have these sizes."""
    if depth not in depths:
        raise ValueError(f"depth must be one of {sorted(depths)}, got {depth}")
    if width < 1 or embedding_size < 1:
        raise ValueError(f"width and embedding_size must be positive, got {width} and {embedding_size}")


class Block(nn.Module):
    """Residual block: two 3x3 convolutions, or a bottleneck 1x1, 3x3, 1x1; returns its output and frame mask.

    Attributes:
        channels: output channels, before a bottleneck's expansion.
        stride: stride in frequency and time of the first 3x3 convolution and of the shortcut.
        bottleneck: whether the block is a bottleneck.
        dtype: type of the computation.
        activation: nonlinearity.
        batch_axis: as in `ResNet`.
    """

    channels: int
    stride: int
    bottleneck: bool
    dtype: Any
    activation: Activation
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """[batch, frequency, frames, in] and [batch, frames] -> the same with `stride` times fewer frames."""
        out = self.channels * (_BOTTLENECK_EXPANSION if self.bottleneck else 1)
        kernels = (1, 3, 1) if self.bottleneck else (3, 3)
        strided = kernels.index(3)
        y = x
        for index, kernel in enumerate(kernels):
            last = index == len(kernels) - 1
            stride = self.stride if index == strided else 1
            channels = out if last else self.channels
            conv = ConvNorm(channels, kernel, stride, self.dtype, self.batch_axis, name=f"conv{index + 1}")
            y = conv(y, mask if index <= strided else strided_mask(mask, self.stride), train=train)
            if not last:
                y = self.activation(y)
        if self.stride != 1 or x.shape[-1] != out:
            shortcut = ConvNorm(out, 1, self.stride, self.dtype, self.batch_axis, name="shortcut")
            x = shortcut(x, mask, train=train)
        return self.activation(x + y), strided_mask(mask, self.stride)


class ConvNorm(nn.Module):
    """Convolution and batch normalisation.

    Padded frames are zeroed before a kernel that looks across frames, so that it sees what it would see past the
    end of an unpadded utterance.
    """

    channels: int
    kernel: int = 3
    stride: int | tuple[int, int] = 1
    dtype: Any = jnp.float32
    batch_axis: str | None = None
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frequency, frames, in] -> [batch, frequency / stride, frames / stride, channels]."""
        strides = (self.stride, self.stride) if isinstance(self.stride, int) else self.stride
        if mask is not None and self.kernel > 1:
            x = jnp.where(mask[:, None, :, None], x, 0)
        # Explicit padding: JAX's SAME shifts a strided convolution by a sample against other frameworks.
        x = nn.Conv(
            self.channels,
            (self.kernel, self.kernel),
            strides,
            padding=[(self.kernel // 2, self.kernel // 2)] * 2,
            feature_group_count=self.groups,
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name="conv",
        )(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=MOMENTUM,
            epsilon=EPSILON,
            dtype=self.dtype,
            axis_name=self.batch_axis,
            name="norm",
        )(x)


def strided_mask(mask: jax.Array | None, stride: int) -> jax.Array | None:
    """The mask after a convolution of this stride: output frame t is centred on input frame t * stride."""
    return mask if mask is None or stride == 1 else mask[:, ::stride]
