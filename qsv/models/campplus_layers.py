"""The parts of CAM++: its two-dimensional head and its dense layers with context-aware masks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from qsv.models.batch_norm import BatchNorm

HEAD_CHANNELS = 32
# Three of the head's convolutions halve the frequencies.
FREQUENCY_STRIDE = 8
SEGMENT_FRAMES = 100

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# PyTorch's default for a convolution, and He et al.'s, which CAM++ sets for all that is one-dimensional.
_HEAD_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
DENSE_INIT = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Segments(NamedTuple):
    """The frames of every segment of 100.

    Attributes:
        members: [batch, segments, frames], 1 where a valid frame lies in a segment, else 0; batch is 1 where no
            frame is padding.
        counts: [batch, segments, 1] float32, valid frames of the segment, at least 1.
        total: [batch, 1, 1] float32, valid frames of the utterance, at least 1.
    """

    members: jax.Array
    counts: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, frames: int, mask: jax.Array | None, dtype: Any) -> "Segments":
        """Segments of so many frames, of which `mask` [batch, frames] says which are valid (None: all)."""
        number = -(-frames // SEGMENT_FRAMES)
        members = (jnp.arange(frames) // SEGMENT_FRAMES == jnp.arange(number)[:, None])[None]
        if mask is not None:
            members = members & mask[:, None]
        counts = jnp.sum(members, axis=2, keepdims=True).astype(jnp.float32)
        total = jnp.sum(counts, axis=1, keepdims=True)
        return cls(members.astype(dtype), jnp.maximum(counts, 1), jnp.maximum(total, 1))

    def context(self, x: jax.Array) -> jax.Array:
        """[batch, frames, channels] -> [batch, segments, channels]: the utterance's mean plus the segment's."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        sums = jnp.matmul(self.members, x, preferred_element_type=wide)
        return jnp.sum(sums, axis=1, keepdims=True) / self.total + sums / self.counts


class Head(nn.Module):
    """Two-dimensional residual convolutions that divide the frequencies by eight and keep the frames.

    Attributes:
        dtype: type of the computation.
        batch_axis: as in `CAMPPlus`.
    """

    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frames, mels] -> [batch, frames, channels * mels / 8], channel-major then frequency."""

        def conv(name: str, stride: int) -> FrequencyConvNorm:
            return FrequencyConvNorm(3, stride, self.dtype, self.batch_axis, name=name)

        x = nn.relu(conv("stem", 1)(x.swapaxes(1, 2)[..., None], mask, train=train))
        for index, stride in enumerate((2, 1, 2, 1), start=1):
            x = HeadBlock(stride, self.dtype, self.batch_axis, name=f"block{index}")(x, mask, train=train)
        x = nn.relu(conv("downsample", 2)(x, mask, train=train))
        return x.transpose(0, 2, 3, 1).reshape(x.shape[0], x.shape[2], -1)


class HeadBlock(nn.Module):
    """Residual block of two 3x3 convolutions.

    Attributes:
        stride: stride in frequency of the first convolution.
        dtype: type of the computation.
        batch_axis: as in `CAMPPlus`.
    """

    stride: int
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frequency, frames, channels] -> [batch, frequency / stride, frames, channels]."""

        def conv(name: str, kernel: int, stride: int) -> FrequencyConvNorm:
            return FrequencyConvNorm(kernel, stride, self.dtype, self.batch_axis, name=name)

        y = nn.relu(conv("conv1", 3, self.stride)(x, mask, train=train))
        y = conv("conv2", 3, 1)(y, mask, train=train)
        if self.stride != 1:
            x = conv("shortcut", 1, self.stride)(x, mask, train=train)
        return nn.relu(x + y)


class FrequencyConvNorm(nn.Module):
    """Convolution with a stride in frequency alone, and batch normalisation.

    Attributes:
        kernel: height and width, 1 or 3.
        stride: 1 or 2.
        dtype: type of the computation.
        batch_axis: as in `CAMPPlus`.
    """

    kernel: int
    stride: int
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, *, train: bool) -> jax.Array:
        """[batch, frequency, frames, in] -> [batch, frequency / stride, frames, channels]."""
        if self.kernel == 1:
            dense = nn.Dense(HEAD_CHANNELS, use_bias=False, dtype=self.dtype, kernel_init=_HEAD_INIT, name="conv")
            x = dense(x[:, :: self.stride])
        else:
            if mask is not None:
                x = jnp.where(mask[:, None, :, None], x, 0)
            x = nn.Conv(
                HEAD_CHANNELS,
                (self.kernel, self.kernel),
                (self.stride, 1),
                padding=[(1, 1)] * 2,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=_HEAD_INIT,
                conv_general_dilated=_halving_conv if self.stride == 2 else None,
                name="conv",
            )(x)
        return BatchNorm(self.dtype, batch_axis=self.batch_axis, name="norm")(x, train=train)


class DenseLayer(nn.Module):
    """The new channels of one dense layer: a bottleneck, a dilated convolution and its context-aware mask.

        y = conv(h) * sigmoid(W2 relu(W1 context(h) + b1) + b2), h = relu(norm(W relu(norm(x))))

    Attributes:
        channels: new channels.
        bottleneck: channels of h.
        dilation: frames between the convolution's three taps.
        dtype: type of the computation.
        batch_axis: as in `CAMPPlus`.
    """

    channels: int
    bottleneck: int
    dilation: int
    dtype: Any
    batch_axis: str | None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        segments: Segments,
        *,
        train: bool,
        moments: jax.Array | None = None,
    ) -> jax.Array:
        """[batch, frames, in] -> [batch, frames, channels]; `moments` as in `BatchNorm`, of x."""

        def dense(name: str, channels: int, use_bias: bool = True) -> nn.Dense:
            return nn.Dense(channels, use_bias=use_bias, dtype=self.dtype, kernel_init=DENSE_INIT, name=name)

        def norm(name: str) -> BatchNorm:
            return BatchNorm(self.dtype, batch_axis=self.batch_axis, name=name)

        h = nn.relu(norm("norm1")(x, train=train, moments=moments))
        h = nn.relu(norm("norm2")(dense("bottleneck", self.bottleneck, use_bias=False)(h), train=train))
        h = masked(h, mask)
        y = nn.Conv(
            self.channels,
            (3,),
            padding=[(self.dilation, self.dilation)],
            kernel_dilation=self.dilation,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=DENSE_INIT,
            name="local",
        )(h)
        # The context is constant within a segment, and so is the mask made of it.
        context = nn.relu(dense("context1", self.bottleneck // 2)(segments.context(h)))
        gate = nn.sigmoid(dense("context2", self.channels)(context))
        return y * jnp.repeat(gate, SEGMENT_FRAMES, axis=1)[:, : y.shape[1]]


def masked(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """[batch, frames, channels] with zeros in padded frames, which a convolution sees past an utterance's end."""
    return x if mask is None else jnp.where(mask[..., None], x, 0)


@jax.custom_jvp
def halve_frequencies(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution with stride 2 in frequency, whose gradients are fast on CPU.

    Args:
        x: [batch, frequency, frames, channels].
        kernel: [3, 3, channels, features].

    Returns:
        [batch, ceil(frequency / 2), frames, features]; zeros are around x.
    """
    return lax.conv_general_dilated(x, kernel, (2, 1), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT)


@halve_frequencies.defjvp
def _halve_frequencies_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    # XLA's transpose of a strided convolution is six times slower on CPU than those of two without a stride.
    return halve_frequencies(x, kernel), _by_parity(x_dot, kernel) + halve_frequencies(x, kernel_dot)


def _by_parity(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`halve_frequencies` as the convolution of even rows with the middle row of the kernel, of odd ones with two."""
    even, odd = x[:, ::2], x[:, 1::2]
    middle = lax.conv_general_dilated(even, kernel[1:2], (1, 1), ((0, 0), (1, 1)), dimension_numbers=_LAYOUT)
    missing = even.shape[1] - odd.shape[1]
    outer = lax.conv_general_dilated(odd, kernel[::2], (1, 1), ((1, missing), (1, 1)), dimension_numbers=_LAYOUT)
    return middle + outer


def _halving_conv(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """What `nn.Conv` calls for a 3x3 kernel with stride (2, 1)."""
    return halve_frequencies(x, kernel)
