"""CAM++: a densely connected time-delay network with context-aware masking, for speaker verification."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models.batch_norm import BatchNorm, channel_moments
from qsv.models.campplus_layers import DENSE_INIT, FREQUENCY_STRIDE, DenseLayer, Head, Segments, masked
from qsv.models.statistics import mean_and_deviation

# (layers, dilation) of the three dense blocks.
DENSE_BLOCKS = ((12, 1), (24, 2), (16, 2))


class CAMPPlus(nn.Module):
    """CAM++ that maps log-Mel features to a speaker embedding.

    A two-dimensional convolutional head divides the frequencies by eight, a time-delay layer halves the frame rate,
    and three blocks of densely connected layers follow, each layer adding `growth_rate` channels to all it was given.
    A layer's new channels are scaled by a mask made of the utterance's and the segment's mean. Statistics pooling,
    one linear layer and a batch normalisation without scale and bias end it.

    Attributes:
        embedding_size: dimensions of the embedding (512 and 192 are published).
        growth_rate: channels that a dense layer adds.
        bn_size: channels of a dense layer's bottleneck over `growth_rate`.
        init_channels: channels of the time-delay layer.
        variance_offset: added to the pooled variance under its square root: 0 in 3D-Speaker, 1e-7 in WeSpeaker.
        dtype: type of the computation (bfloat16 for mixed precision); parameters stay float32.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
            along it. None where the whole batch is here.

    Source: Wang et al. 2023 (arXiv 2303.00332) as built in 3D-Speaker's campplus/DTDNN.py and WeSpeaker's
    campplus.py. Frame masks are our addition. A channel's training statistics are computed once, not in every layer
    that it is passed to, and a context mask once for its segment: the same numbers.
    """

    embedding_size: int = 512
    growth_rate: int = 32
    bn_size: int = 4
    init_channels: int = 128
    variance_offset: float = 0.0
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
            ValueError: a size isn't positive, or `mels` isn't a multiple of 8.
        """
        for size in ("embedding_size", "growth_rate", "bn_size", "init_channels"):
            if getattr(self, size) < 1:
                raise ValueError(f"{size} must be positive, got {getattr(self, size)}")
        if features.shape[2] % FREQUENCY_STRIDE:
            raise ValueError(f"CAM++ needs a multiple of {FREQUENCY_STRIDE} Mel bands, got {features.shape[2]}")
        head = Head(self.dtype, self.batch_axis, name="head")
        x = masked(head(features.astype(self.dtype), mask, train=train), mask)
        mask = mask if mask is None else mask[:, ::2]
        x = nn.Conv(
            self.init_channels,
            (5,),
            2,
            # Explicit padding: JAX's SAME shifts a strided convolution by a sample against other frameworks.
            padding=[(2, 2)],
            use_bias=False,
            dtype=self.dtype,
            kernel_init=DENSE_INIT,
            name="tdnn",
        )(x)
        x = nn.relu(self._norm("tdnn_norm")(x, train=train))
        axis = None if self.is_initializing() else self.batch_axis
        segments = Segments.of(x.shape[1], mask, self.dtype)
        for block, (layers, dilation) in enumerate(DENSE_BLOCKS, start=1):
            moments = channel_moments(x, axis) if train else None
            for index in range(1, layers + 1):
                layer = DenseLayer(
                    self.growth_rate,
                    self.bn_size * self.growth_rate,
                    dilation,
                    self.dtype,
                    self.batch_axis,
                    name=f"block{block}_layer{index}",
                )
                new = layer(x, mask, segments, train=train, moments=moments)
                x = jnp.concatenate([x, new], axis=-1)
                if moments is not None:
                    moments = jnp.concatenate([moments, channel_moments(new, axis)], axis=-1)
            x = nn.relu(self._norm(f"transit{block}_norm")(x, train=train, moments=moments))
            transit = nn.Dense(
                x.shape[-1] // 2, use_bias=False, dtype=self.dtype, kernel_init=DENSE_INIT, name=f"transit{block}"
            )
            x = transit(x)
        x = nn.relu(self._norm("norm")(x, train=train))
        pooled = mean_and_deviation(x, mask, variance_offset=self.variance_offset)
        embedding = nn.Dense(self.embedding_size, use_bias=False, kernel_init=DENSE_INIT, name="embedding")(pooled)
        axis = self.batch_axis
        norm = BatchNorm(embedding.dtype, use_scale=False, use_bias=False, batch_axis=axis, name="embedding_norm")
        return norm(embedding, train=train)

    def _norm(self, name: str) -> BatchNorm:
        return BatchNorm(self.dtype, batch_axis=self.batch_axis, name=name)
