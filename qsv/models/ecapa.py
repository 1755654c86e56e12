"""ECAPA-TDNN for speaker verification, as WeSpeaker and as SpeechBrain build it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models.ecapa_layers import (
    DIALECTS,
    TDNN,
    AttentiveStatisticsPooling,
    DialectName,
    SERes2Block,
    batch_norm,
)

# Dilations of the Res2 convolutions, one for each block.
DILATIONS = (2, 3, 4)
_STEM_KERNEL = 5


class ECAPA(nn.Module):
    """ECAPA-TDNN: maps log-Mel features to a speaker embedding.

    A convolution over five frames, three residual blocks with Res2 convolutions and squeeze-excitation, an
    aggregation of the three blocks' outputs, attentive statistics pooling and one linear layer.

    Attributes:
        dialect: "wespeaker" or "speechbrain", which differ in padding, Res2 order and normalisations (see `Dialect`).
        channels: channels of the blocks, a multiple of `scale` (the papers' C).
        embedding_size: dimensions of the embedding.
        aggregation_channels: channels that are pooled.
        scale: chunks of a Res2 block.
        se_channels: width of the squeeze.
        attention_channels: width of the pooling's attention.
        global_context: whether the attention sees the utterance's mean and deviation besides the frame.
        normalize_embedding: batch normalisation of the embedding (WeSpeaker's `emb_bn`).
        dtype: type of the computation (bfloat16 for mixed precision); parameters stay float32.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
          along it. None where the whole batch is here.

    Source: Desplanques et al. 2020 (arXiv 2005.07143) as built in WeSpeaker's ecapa_tdnn.py (c512 and c1024 with
    global context have 6.19M and 14.66M parameters) and SpeechBrain's ECAPA_TDNN.py (spkrec-ecapa-voxceleb: channels
    1024, aggregation_channels 3072, 20.77M). Where we differ: a padded row's embedding is that of the utterance
    alone in both dialects, whereas SpeechBrain reflects at the end of the batch and rounds relative lengths; and an
    utterance too short to be reflected has a defined result (`pad_frames`).
    """

    dialect: DialectName = "wespeaker"
    channels: int = 512
    embedding_size: int = 192
    aggregation_channels: int = 1536
    scale: int = 8
    se_channels: int = 128
    attention_channels: int = 128
    global_context: bool = True
    normalize_embedding: bool = False
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Embed a batch.

        Args:
            features: [batch, frames, mels] float, mean normalised.
            mask: [batch, frames] bool, true in the first frames of a row, which are valid; padding then never
                changes an embedding.
            train: normalise by the batch's statistics and update the running ones.

        Returns:
            [batch, embedding_size] float32.

        Raises:
            ValueError: the dialect is unknown, a size isn't positive, or scale doesn't divide channels.
        """
        self._check()
        dialect = DIALECTS[self.dialect]
        shared: dict[str, Any] = {"dialect": dialect, "dtype": self.dtype, "batch_axis": self.batch_axis}
        x = features.astype(self.dtype)
        x = TDNN(self.channels, kernel=_STEM_KERNEL, name="stem", **shared)(x, mask, train=train)
        outputs = []
        for index, dilation in enumerate(DILATIONS):
            block = SERes2Block(
                dilation=dilation, scale=self.scale, se_channels=self.se_channels, name=f"block{index + 1}", **shared
            )
            x = block(x, mask, train=train)
            outputs.append(x)
        aggregate = TDNN(
            self.aggregation_channels, normalized=dialect.normalizes_aggregation, name="aggregation", **shared
        )
        x = aggregate(jnp.concatenate(outputs, axis=-1), mask, train=train)
        pool = AttentiveStatisticsPooling(
            attention_channels=self.attention_channels, global_context=self.global_context, name="pooling", **shared
        )
        # From here on the computation is as wide as the statistics.
        pooled = batch_norm(None, self.batch_axis, "pooled_norm", train=train)(pool(x, mask, train=train))
        embedding = nn.Dense(self.embedding_size, name="embedding")(pooled)
        if self.normalize_embedding:
            embedding = batch_norm(None, self.batch_axis, "embedding_norm", train=train)(embedding)
        return embedding

    def _check(self) -> None:
        if self.dialect not in DIALECTS:
            raise ValueError(f"dialect must be one of {sorted(DIALECTS)}, got {self.dialect!r}")
        for name in ("channels", "embedding_size", "aggregation_channels", "se_channels", "attention_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.scale < 2 or self.channels % self.scale:
            raise ValueError(
                f"scale must be at least 2 and divide channels, got scale={self.scale}, channels={self.channels}"
            )
