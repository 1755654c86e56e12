"""SpecAugment: random time and frequency masks, drawn anew for every example."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Masks `num_time_masks` spans of frames and `num_mel_masks` spans of Mel bands of each example.

    A span's width is uniform on 0..max, its start uniform over the places where it fits. Masked values become
    zero, the mean of features that were mean normalised.

    Attributes:
        probability: share of the examples that are masked at all.
        num_time_masks: spans of frames for each example.
        max_time_frames: widest span of frames.
        num_mel_masks: spans of Mel bands for each example.
        max_mels: widest span of bands.

    Source: Park et al. 2019 (arXiv 1904.08779), without time warping; the defaults are WeSpeaker's.
    """

    probability: float = 0.6
    num_time_masks: int = 1
    max_time_frames: int = 10
    num_mel_masks: int = 1
    max_mels: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], got {self.probability}")
        if min(self.num_time_masks, self.max_time_frames, self.num_mel_masks, self.max_mels) < 0:
            raise ValueError(f"mask counts and widths can't be negative, got {self}")

    def __call__(self, key: jax.Array, features: jax.Array, *, first_example: jax.Array | int = 0) -> jax.Array:
        """Mask a batch.

        Args:
            key: a random key.
            features: [batch, frames, mels] float, mean normalised.
            first_example: place of the first row in the whole batch, where this is one device's part of it. An
                example's masks depend on the key and its place only, not on how the batch was split.

        Returns:
            [batch, frames, mels] in the same dtype.
        """
        places = first_example + jnp.arange(len(features))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)
        return jax.vmap(self._mask)(keys, features)

    def _mask(self, key: jax.Array, features: jax.Array) -> jax.Array:
        frames, mels = features.shape
        time_key, mel_key, apply_key = jax.random.split(key, 3)
        hidden = (
            _spans(time_key, self.num_time_masks, self.max_time_frames, frames)[:, None]
            | _spans(mel_key, self.num_mel_masks, self.max_mels, mels)[None, :]
        )
        return jnp.where(hidden & jax.random.bernoulli(apply_key, self.probability), 0, features)


def _spans(key: jax.Array, count: int, max_width: int, size: int) -> jax.Array:
    """[size] bool, true inside any of `count` random spans."""
    width_key, start_key = jax.random.split(key)
    width = jax.random.randint(width_key, (count, 1), 0, min(max_width, size) + 1)
    room = size - width + 1
    start = jnp.floor(jax.random.uniform(start_key, (count, 1)) * room).astype(jnp.int32)
    position = jnp.arange(size)
    return jnp.any((position >= start) & (position < start + width), axis=0)
