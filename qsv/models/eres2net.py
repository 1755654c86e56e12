"""ERes2NetV2: a Res2Net with attentional fusion of features, for speaker verification."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qsv.models.batch_norm import BatchNorm
from qsv.models.convolution import conv_general_dilated
from qsv.models.statistics import mean_and_deviation

# Residual blocks of the four stages; those of the last two fuse their branches by attention.
STAGE_BLOCKS = (3, 4, 6, 3)
FIRST_FUSED_STAGE = 3
# Three stages halve frequencies and frames.
FREQUENCY_STRIDE = 8

_FUSION_REDUCTION = 4
_BASE_WIDTH_OVER = 64
_CEILING = 20.0
_VARIANCE_OFFSET = 1e-8


class ERes2NetV2(nn.Module):
    """ERes2NetV2 that maps log-Mel features to a speaker embedding.

    3x3 stem, four stages of `width` * {1, 2, 4, 8} * `expansion` channels with strides 1, 2, 2, 2; the third stage's
    output, downsampled, is fused with the fourth's by attention. Temporal statistics pooling and one linear layer.

    Attributes:
        embedding_size: dimensions of the embedding.
        width: channels of the stem (the paper's m).
        base_width: channels of a branch, per 64 channels of a stage before expansion.
        scale: branches of a block.
        expansion: channels of a block's output over those of its stage. The published pairs of base width, scale and
            expansion are 26, 2, 2 and 24, 4, 4.
        dtype: type of the computation (bfloat16 for mixed precision); parameters stay float32.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
            along it. None where the whole batch is here.

    Source: Chen et al. 2024 (arXiv 2406.02167) as built in 3D-Speaker's ERes2NetV2.py, with one embedding layer.
    Frame masks are our addition.
    """

    embedding_size: int = 192
    width: int = 64
    base_width: int = 26
    scale: int = 2
    expansion: int = 2
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Embed a batch.

        Args:
            features: [batch, frames, mels] float, mean normalised; mels is a multiple of 8.
            mask: [batch, frames] bool, true where a frame is valid; padding then never changes an embedding.
            train: normalise by the batch's statistics and update the running ones.

        Returns:
            [batch, embedding_size] float32.

        Raises:
            ValueError: a size is too small, or `mels` isn't a multiple of 8.
        """
        self._check(features.shape[2])
        # Height is frequency and width is time, as in the checkpoints of this family.
        x = features.swapaxes(1, 2)[..., None].astype(self.dtype)
        x = nn.relu(self._conv(self.width, 3, "stem")(x, mask, train=train))
        stages = []
        for stage, count in enumerate(STAGE_BLOCKS, start=1):
            planes = self.width * 2 ** (stage - 1)
            for index in range(1, count + 1):
                block = Block(
                    branch=self._branch(planes),
                    scale=self.scale,
                    channels=planes * self.expansion,
                    stride=2 if stage > 1 and index == 1 else 1,
                    fused=stage >= FIRST_FUSED_STAGE,
                    dtype=self.dtype,
                    batch_axis=self.batch_axis,
                    name=f"stage{stage}_block{index}",
                )
                x, mask = block(x, mask, train=train)
            stages.append((x, mask))
        (third, third_mask), (fourth, _) = stages[-2:]
        third = nn.Conv(
            fourth.shape[-1],
            (3, 3),
            (2, 2),
            # Explicit padding: JAX's SAME shifts a strided convolution by a sample against other frameworks.
            padding=[(1, 1)] * 2,
            use_bias=False,
            dtype=self.dtype,
            conv_general_dilated=conv_general_dilated,
            name="stage3_downsample",
        )(_masked(third, third_mask))
        x = AttentionalFusion(self.dtype, self.batch_axis, name="stage_fusion")(fourth, third, train=train)
        # [batch, frequency, frames, channels] -> channel-major then frequency.
        x = x.transpose(0, 2, 3, 1).reshape(x.shape[0], x.shape[2], -1)
        pooled = mean_and_deviation(x, mask, variance_offset=_VARIANCE_OFFSET)
        return nn.Dense(self.embedding_size, name="embedding")(pooled)

    def _conv(self, channels: int, kernel: int, name: str) -> "ConvNorm":
        return ConvNorm(channels, kernel, dtype=self.dtype, batch_axis=self.batch_axis, name=name)

    def _branch(self, planes: int) -> int:
        return planes * self.base_width // _BASE_WIDTH_OVER

    def _check(self, mels: int) -> None:
        for size in ("embedding_size", "scale", "expansion"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size} must be positive, got {getattr(self, size)}")
        narrowest = min(self._branch(self.width), self._branch(4 * self.width) // _FUSION_REDUCTION)
        if narrowest < 1:
            raise ValueError(
                f"width {self.width} and base_width {self.base_width} leave no channels for a branch or its fusion"
            )
        if mels % FREQUENCY_STRIDE:
            raise ValueError(f"ERes2NetV2 needs a multiple of {FREQUENCY_STRIDE} Mel bands, got {mels}")


class Block(nn.Module):
    """Residual block: 1x1, a chain of 3x3 branches, 1x1; returns its output and frame mask.

    The channels are split into `scale` branches. Each is convolved after the result of the one before it is merged
    into it, by addition or by attention.

    Attributes:
        branch: channels of a branch.
        scale: branches.
        channels: output channels.
        stride: stride in frequency and time of the first 1x1 convolution and of the shortcut.
        fused: whether branches are merged by attention.
        dtype: type of the computation.
        batch_axis: as in `ERes2NetV2`.
    """

    branch: int
    scale: int
    channels: int
    stride: int
    fused: bool
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """[batch, frequency, frames, in] and [batch, frames] -> the same with `stride` times fewer frames."""
        shared: dict[str, Any] = {"dtype": self.dtype, "batch_axis": self.batch_axis}
        y = ConvNorm(self.branch * self.scale, 1, self.stride, **shared, name="conv1")(x, mask, train=train)
        if mask is not None:
            mask = mask[:, :: self.stride]
        results: list[jax.Array] = []
        for index, part in enumerate(jnp.split(_clipped_relu(y), self.scale, axis=-1)):
            if results and self.fused:
                part = AttentionalFusion(**shared, name=f"fusion{index}")(results[-1], part, train=train)
            elif results:
                part = results[-1] + part
            convolve = ConvNorm(self.branch, 3, **shared, name=f"branch{index + 1}")
            results.append(_clipped_relu(convolve(part, mask, train=train)))
        y = ConvNorm(self.channels, 1, **shared, name="conv3")(jnp.concatenate(results, axis=-1), mask, train=train)
        if self.stride != 1 or x.shape[-1] != self.channels:
            x = ConvNorm(self.channels, 1, self.stride, **shared, name="shortcut")(x, mask, train=train)
        return _clipped_relu(x + y), mask


class AttentionalFusion(nn.Module):
    """A sum of two inputs, weighted by an attention over both at every position (the paper's AFF).

        a = tanh(norm(W2 silu(norm(W1 [x, y])))),   z = (1 + a) x + (1 - a) y

    Attributes:
        dtype: type of the computation.
        batch_axis: as in `ERes2NetV2`.
    """

    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array, *, train: bool) -> jax.Array:
        """Two of [..., channels] -> [..., channels]."""

        def dense(name: str, channels: int, value: jax.Array) -> jax.Array:
            value = nn.Dense(channels, dtype=self.dtype, name=name)(value)
            return BatchNorm(self.dtype, batch_axis=self.batch_axis, name=f"{name}_norm")(value, train=train)

        channels = x.shape[-1]
        squeezed = nn.silu(dense("squeeze", channels // _FUSION_REDUCTION, jnp.concatenate([x, y], axis=-1)))
        attention = jnp.tanh(dense("excite", channels, squeezed))
        return (1 + attention) * x + (1 - attention) * y


class ConvNorm(nn.Module):
    """Convolution and batch normalisation.

    Attributes:
        channels: output channels.
        kernel: height and width: 1, or 3 without stride.
        stride: stride in frequency and time.
        dtype: type of the computation.
        batch_axis: as in `ERes2NetV2`.
    """

    channels: int
    kernel: int
    stride: int = 1
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frequency, frames, in] -> [batch, frequency / stride, frames / stride, channels]."""
        if self.kernel == 1:
            dense = nn.Dense(self.channels, use_bias=False, dtype=self.dtype, name="conv")
            # Indexing by a stride would be a look-up where sizes are symbolic.
            for axis in (1, 2):
                x = lax.slice_in_dim(x, 0, None, self.stride, axis)
            x = dense(x)
        else:
            x = nn.Conv(
                self.channels,
                (self.kernel, self.kernel),
                padding=[(1, 1)] * 2,
                use_bias=False,
                dtype=self.dtype,
                conv_general_dilated=conv_general_dilated,
                name="conv",
            )(_masked(x, mask))
        return BatchNorm(self.dtype, batch_axis=self.batch_axis, name="norm")(x, train=train)


def _clipped_relu(x: jax.Array) -> jax.Array:
    return jnp.minimum(nn.relu(x), _CEILING)


def _masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[batch, frequency, frames, channels] with zeros in padded frames, as past an utterance's end."""
    return x if mask is None else jnp.where(mask[:, None, :, None], x, 0)
