"""ResNet-36 and ResNet-200: wide ResNets with squeeze and excitation and attentive pooling."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models.batch_norm import BatchNorm
from qsv.models.convolution import conv_general_dilated
from qsv.models.ecapa_layers import DIALECTS, AttentiveStatisticsPooling, masked_mean
from qsv.models.resnet import ConvNorm, check_sizes, strided_mask

BlockKind = Literal["basic", "preactivated"]

# depth -> (residual blocks in each of the four stages, their kind)
ATTENTIVE_STAGE_BLOCKS: dict[int, tuple[tuple[int, int, int, int], BlockKind]] = {
    36: ((3, 4, 6, 3), "basic"),
    200: ((3, 24, 36, 3), "preactivated"),
}
_WIDTH_FACTORS = (1, 1, 2, 2)
_STAGE_STRIDES = (1, 2, 2, 2)
# An attention with ReLU and batch normalisation: without the latter ResNet-36 would have 14.92 million parameters.
_POOLING = DIALECTS["speechbrain"]
# Stages with squeeze and excitation, the first ones.
_NUM_GATED_STAGES = 2


class AttentiveResNet(nn.Module):
    """ResNet that maps log-Mel features to a speaker embedding, pooled by attention.

    3x3 stem; four stages of `width` * {1, 1, 2, 2} channels with strides 1, 2, 2, 2, the first two with squeeze and
    excitation; attentive statistics pooling of every channel and frequency; batch normalisation and one linear layer.
    Depth 36 has blocks of two 3x3 convolutions and ReLU, depth 200 pre-activated ones of 3x3, 3x3, 1x1 and SiLU.

    Attributes:
        depth: 36 or 200.
        width: channels of the first stage (128 is the paper's).
        embedding_size: dimensions of the embedding.
        attention_channels: bottleneck of the pooling's attention.
        dtype: type of the computation (bfloat16 for mixed precision); parameters stay float32.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
            along it. None where the whole batch is here.

    Source: Leguillier et al. 2026 (arXiv 2606.08078), inferred, since no code is public: with 81 features these
    definitions have the published 14.93 and 59.94 million parameters. Frame masks are our addition.
    """

    depth: int = 36
    width: int = 128
    embedding_size: int = 256
    attention_channels: int = 128
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Embed a batch; arguments, result and errors as of `ResNet`."""
        check_sizes(self.depth, ATTENTIVE_STAGE_BLOCKS, self.width, self.embedding_size)
        blocks, kind = ATTENTIVE_STAGE_BLOCKS[self.depth]
        common: dict[str, Any] = {"dtype": self.dtype, "batch_axis": self.batch_axis}
        # Height is frequency and width is time.
        x = features.swapaxes(1, 2)[..., None].astype(self.dtype)
        x = nn.relu(ConvNorm(self.width, **common, name="stem")(x, mask, train=train))
        make = BasicBlock if kind == "basic" else PreactivatedBlock
        for stage, (count, factor, stride) in enumerate(zip(blocks, _WIDTH_FACTORS, _STAGE_STRIDES, strict=True)):
            for index in range(count):
                block = make(
                    channels=self.width * factor,
                    stride=stride if index == 0 else 1,
                    gated=stage < _NUM_GATED_STAGES,
                    **common,
                    name=f"stage{stage + 1}_block{index + 1}",
                )
                x, mask = block(x, mask, train=train)
        if kind == "preactivated":
            x = nn.silu(BatchNorm(**common, name="norm")(x, train=train))
        # [batch, frequency, frames, channels] -> [batch, frames, frequency * channels].
        frames = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
        pool = AttentiveStatisticsPooling(
            _POOLING, self.attention_channels, global_context=False, **common, name="pooling"
        )
        pooled = BatchNorm(jnp.float32, batch_axis=self.batch_axis, name="pooled_norm")(
            pool(frames, mask, train=train), train=train
        )
        return nn.Dense(self.embedding_size, name="embedding")(pooled)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions and ReLU; returns its output and frame mask.

    Attributes:
        channels: output channels.
        stride: stride in frequency and time of the first convolution and of the shortcut.
        gated: whether there is a squeeze and excitation.
        dtype: type of the computation.
        batch_axis: as in `AttentiveResNet`.
    """

    channels: int
    stride: int
    gated: bool
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """[batch, frequency, frames, in] and [batch, frames] -> the same with `stride` times fewer frames."""
        common: dict[str, Any] = {"dtype": self.dtype, "batch_axis": self.batch_axis}
        after = strided_mask(mask, self.stride)
        y = nn.relu(ConvNorm(self.channels, 3, self.stride, **common, name="conv1")(x, mask, train=train))
        y = ConvNorm(self.channels, 3, **common, name="conv2")(y, after, train=train)
        if self.gated:
            y = SqueezeExcitation(dtype=self.dtype, name="gate")(y, after)
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = ConvNorm(self.channels, 1, self.stride, **common, name="shortcut")(x, mask, train=train)
        return nn.relu(x + y), after


class PreactivatedBlock(nn.Module):
    """Residual block of 3x3, 3x3 and 1x1 convolutions, each after batch normalisation and SiLU.

    Its attributes are those of `BasicBlock`. A shortcut's convolution sees what the first one sees.

    Source: He et al. 2016 (arXiv 1603.05027).
    """

    channels: int
    stride: int
    gated: bool
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """[batch, frequency, frames, in] and [batch, frames] -> the same with `stride` times fewer frames."""
        after = strided_mask(mask, self.stride)

        def activated(y: jax.Array, name: str) -> jax.Array:
            norm = BatchNorm(self.dtype, batch_axis=self.batch_axis, name=name)
            return nn.silu(norm(y, train=train))

        def convolved(y: jax.Array, own_mask: jax.Array | None, kernel: int, stride: int, name: str) -> jax.Array:
            if own_mask is not None and kernel > 1:
                y = jnp.where(own_mask[:, None, :, None], y, 0)
            return nn.Conv(
                self.channels,
                (kernel, kernel),
                (stride, stride),
                padding=[(kernel // 2, kernel // 2)] * 2,
                use_bias=False,
                dtype=self.dtype,
                conv_general_dilated=conv_general_dilated,
                name=name,
            )(y)

        first = activated(x, "norm1")
        y = convolved(first, mask, 3, self.stride, "conv1")
        y = convolved(activated(y, "norm2"), after, 3, 1, "conv2")
        y = convolved(activated(y, "norm3"), after, 1, 1, "conv3")
        if self.gated:
            y = SqueezeExcitation(dtype=self.dtype, name="gate")(y, after)
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = convolved(first, mask, 1, self.stride, "shortcut")
        return x + y, after


class SqueezeExcitation(nn.Module):
    """Channels times gates that a small network makes of their means over frequencies and valid frames.

    Attributes:
        reduction: channels over the width of the squeeze.
        dtype: type of the computation.

    Source: Hu et al. 2018 (arXiv 1709.01507).
    """

    reduction: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """[batch, frequency, frames, channels] and [batch, frames] -> the same shape."""
        channels = x.shape[-1]
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = masked_mean(jnp.mean(wide, axis=1), mask)[:, 0]
        squeezed = nn.relu(nn.Dense(channels // self.reduction, dtype=self.dtype, name="squeeze")(mean))
        gate = nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name="excite")(squeezed))
        return x * gate[:, None, None, :]
