"""Pooling of frame-level features into one vector an utterance."""

import jax

from qsv.models.statistics import mean_and_deviation

_VARIANCE_OFFSET = 1e-7


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
    batch, frequency, frames, channels = features.shape
    flat = features.transpose(0, 2, 3, 1).reshape(batch, frames, channels * frequency)
    return mean_and_deviation(flat, mask, variance_offset=_VARIANCE_OFFSET)
