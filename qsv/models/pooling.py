"""Pooling of frame-level features into one vector an utterance."""

import jax
import jax.numpy as jnp


def temporal_statistics_pooling(features: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """TSTP: mean and standard deviation over time of every channel and frequency.

        y = [mean_t x, sqrt(var_t x + 1e-7)], var unbiased

    Args:
        features: [batch, frequency, frames, channels] float.
        mask: [batch, frames] bool, true where a frame is valid; None when all are.

    Returns:
        [batch, 2 * channels * frequency]: the means, then the deviations, each channel-major then frequency, in
        float32 or wider. An utterance with a single valid frame has deviation sqrt(1e-7).

    Source: WeSpeaker's TSTP, whose order of the flattened axes is kept so that its weights can be read.
    """
    wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    if mask is None:
        valid = jnp.ones((1, 1, features.shape[2], 1), bool)
    else:
        valid = mask[:, None, :, None]
    count = jnp.maximum(jnp.sum(valid, axis=2), 1)
    mean = jnp.sum(jnp.where(valid, wide, 0), axis=2) / count
    deviation = jnp.where(valid, wide - mean[:, :, None], 0)
    variance = jnp.sum(jnp.square(deviation), axis=2) / jnp.maximum(count - 1, 1)
    statistics = [mean, jnp.sqrt(variance + 1e-7)]
    # [batch, frequency, channels] -> channel-major then frequency.
    return jnp.concatenate([s.swapaxes(1, 2).reshape(s.shape[0], -1) for s in statistics], axis=-1)
