"""The parts of ECAPA-TDNN, in the two dialects in which it is published."""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models.batch_norm import EPSILON, MOMENTUM

DialectName = Literal["wespeaker", "speechbrain"]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What two toolkits do differently when they build the same paper's network.

    Attributes:
        reflects: pad a convolution over time by reflection, not by zeros.
        passed_chunk: the chunk of a Res2 block that goes through unchanged, 0 for the first, -1 for the last.
        normalizes_aggregation: batch normalisation after the aggregation of the blocks.
        normalizes_attention: ReLU and batch normalisation before the attention's tanh.
        unbiased_context: the context's variance has divisor n - 1 and `floor` added; else divisor n, and it is no
            less than `floor`.
        floor: least variance of the pooling.
    """

    reflects: bool
    passed_chunk: Literal[0, -1]
    normalizes_aggregation: bool
    normalizes_attention: bool
    unbiased_context: bool
    floor: float


DIALECTS: dict[DialectName, Dialect] = {
    "wespeaker": Dialect(
        reflects=False,
        passed_chunk=-1,
        normalizes_aggregation=False,
        normalizes_attention=False,
        unbiased_context=True,
        floor=1e-7,
    ),
    "speechbrain": Dialect(
        reflects=True,
        passed_chunk=0,
        normalizes_aggregation=True,
        normalizes_attention=True,
        unbiased_context=False,
        floor=1e-12,
    ),
}


def pad_frames(x: jax.Array, mask: jax.Array | None, edge: int, *, reflect: bool) -> jax.Array:
    """What a convolution over time sees: every utterance continued on both sides of its own valid frames.

    Args:
        x: [batch, frames, channels].
        mask: [batch, frames] bool, true in a row's first frames, which are valid; None when all are.
        edge: frames to add on each side.
        reflect: continue by reflection about the first and the last valid frame, back and forth where an utterance
            has no more than `edge` frames (`numpy.pad`'s rule, where PyTorch raises); else by zeros.

    Returns:
        [batch, edge + frames + edge, channels].
    """
    if not reflect:
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        return jnp.pad(x, ((0, 0), (edge, edge), (0, 0)))
    if mask is None:
        return jnp.pad(x, ((0, 0), (edge, edge), (0, 0)), mode="reflect")
    last = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True) - 1, 0)
    phase = jnp.arange(-edge, x.shape[1] + edge) % jnp.maximum(2 * last, 1)
    index = jnp.minimum(phase, 2 * last - phase)
    return jnp.take_along_axis(x, index[..., None], axis=1)


def masked_mean(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[batch, frames, channels] -> [batch, 1, channels]: the mean over valid frames, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if mask is None:
        return jnp.mean(wide, axis=1, keepdims=True)
    valid = mask[..., None]
    count = jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return jnp.sum(jnp.where(valid, wide, 0), axis=1, keepdims=True) / count


def batch_norm(dtype: Any, batch_axis: str | None, name: str, *, train: bool) -> nn.BatchNorm:
    """Batch normalisation with PyTorch's default settings."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        dtype=dtype,
        axis_name=batch_axis,
        name=name,
    )


class TDNN(nn.Module):
    """Convolution over time, ReLU, batch normalisation.

    Attributes:
        channels: output channels.
        dialect: decides what lies beyond an utterance's ends.
        kernel: frames of the kernel, odd; a kernel of one frame is a matrix.
        dilation: frames between the kernel's taps.
        normalized: whether there is a batch normalisation.
        dtype: type of the computation.
        batch_axis: as in `ECAPA`.
    """

    channels: int
    dialect: Dialect
    kernel: int = 1
    dilation: int = 1
    normalized: bool = True
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frames, in] and [batch, frames] -> [batch, frames, channels]."""
        if self.kernel == 1:
            x = nn.Dense(self.channels, dtype=self.dtype, name="conv")(x)
        else:
            edge = self.dilation * (self.kernel // 2)
            x = pad_frames(x, mask, edge, reflect=self.dialect.reflects)
            x = nn.Conv(
                self.channels,
                (self.kernel,),
                kernel_dilation=(self.dilation,),
                padding="VALID",
                dtype=self.dtype,
                name="conv",
            )(x)
        x = nn.relu(x)
        return batch_norm(self.dtype, self.batch_axis, "norm", train=train)(x) if self.normalized else x


class SERes2Block(nn.Module):
    """Residual block: 1x1, Res2 convolutions, 1x1, squeeze and excitation; as many channels out as in.

    The Res2 part cuts the channels into `scale` chunks. One goes through; of the others, each is added to the
    result of the one before it and convolved.

    Attributes:
        dialect: which chunk goes through, and the padding.
        dilation: of the Res2 convolutions, whose kernel is 3.
        scale: chunks of the channels.
        se_channels: width of the squeeze.
        dtype: type of the computation.
        batch_axis: as in `ECAPA`.
    """

    dialect: Dialect
    dilation: int
    scale: int
    se_channels: int
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frames, channels] and [batch, frames] -> [batch, frames, channels]."""
        channels = x.shape[-1]
        shared: dict[str, Any] = {"dialect": self.dialect, "dtype": self.dtype, "batch_axis": self.batch_axis}
        y = TDNN(channels, name="pointwise1", **shared)(x, mask, train=train)
        chunks = jnp.split(y, self.scale, axis=-1)
        passed = chunks.pop(self.dialect.passed_chunk)
        results: list[jax.Array] = []
        for index, chunk in enumerate(chunks):
            convolve = TDNN(
                channels // self.scale, kernel=3, dilation=self.dilation, name=f"branch{index + 1}", **shared
            )
            results.append(convolve(chunk + results[-1] if results else chunk, mask, train=train))
        y = jnp.concatenate([passed, *results] if self.dialect.passed_chunk == 0 else [*results, passed], axis=-1)
        y = TDNN(channels, name="pointwise2", **shared)(y, mask, train=train)
        squeezed = nn.relu(nn.Dense(self.se_channels, dtype=self.dtype, name="squeeze")(masked_mean(y, mask)))
        gate = nn.sigmoid(nn.Dense(channels, dtype=self.dtype, name="excite")(squeezed))
        return x + y * gate


class AttentiveStatisticsPooling(nn.Module):
    """Mean and standard deviation over time of every channel, each weighted by its own attention.

        a = softmax_t(V tanh(W [x, mean x, std x])),   y = [sum_t a x, sqrt(sum_t a (x - sum_t a x)^2)]

    Attributes:
        dialect: see its fields.
        attention_channels: rows of W.
        global_context: whether the attention sees the utterance's mean and deviation besides the frame.
        dtype: type of the attention's computation; the statistics are float32 or wider.
        batch_axis: as in `ECAPA`.

    Source: Okabe et al. 2018 (arXiv 1803.10963), channel- and context-dependent as in Desplanques et al. 2020.
    """

    dialect: Dialect
    attention_channels: int
    global_context: bool
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frames, channels] and [batch, frames] -> [batch, 2 * channels], the means, then the deviations."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        seen = self._with_context(wide, mask) if self.global_context else wide
        if self.dialect.normalizes_attention:
            hidden = TDNN(
                self.attention_channels, self.dialect, dtype=self.dtype, batch_axis=self.batch_axis, name="attention"
            )(seen, mask, train=train)
        else:
            hidden = nn.Dense(self.attention_channels, dtype=self.dtype, name="attention")(seen)
        logits = nn.Dense(x.shape[-1], dtype=self.dtype, name="logits")(jnp.tanh(hidden)).astype(wide.dtype)
        if mask is not None:
            valid = mask[..., None]
            # Not minus infinity, which would make a row without any valid frame NaN.
            logits = jnp.where(valid, logits, jnp.finfo(logits.dtype).min)
            wide = jnp.where(valid, wide, 0)
        weights = nn.softmax(logits, axis=1)
        mean = jnp.sum(weights * wide, axis=1, keepdims=True)
        variance = jnp.sum(weights * jnp.square(wide - mean), axis=1)
        return jnp.concatenate([mean[:, 0], jnp.sqrt(jnp.maximum(variance, self.dialect.floor))], axis=-1)

    def _with_context(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """Every frame beside the utterance's mean and deviation: [batch, frames, 3 * channels]."""
        mean = masked_mean(x, mask)
        variance = masked_mean(jnp.square(x - mean), mask)
        if self.dialect.unbiased_context:
            count = x.shape[1] if mask is None else jnp.sum(mask, axis=1)[:, None, None]
            deviation = jnp.sqrt(variance * count / jnp.maximum(count - 1, 1) + self.dialect.floor)
        else:
            deviation = jnp.sqrt(jnp.maximum(variance, self.dialect.floor))
        return jnp.concatenate([x, *(jnp.broadcast_to(s, x.shape) for s in (mean, deviation))], axis=-1)
