"""Mean and standard deviation of every channel over an utterance's frames."""

import jax
import jax.numpy as jnp

# PyTorch's statistics of a single frame are NaN; 3D-Speaker's pooling has this constant for them.
_SINGLE_FRAME_DEVIATION = 1e-2


def mean_and_deviation(x: jax.Array, mask: jax.Array | None = None, *, variance_offset: float = 0.0) -> jax.Array:
    """Statistics pooling over frames.

        y = [mean_t x, sqrt(var_t x + variance_offset)], var unbiased

    Args:
        x: [batch, frames, channels] float.
        mask: [batch, frames] bool, true where a frame is valid; None when all are.
        variance_offset: added to the variance under its square root.

    Returns:
        [batch, 2 * channels], the means, then the deviations, in float32 or wider. A single valid frame has
        deviation 0.01 without an offset, its square root with one. Without an offset, a channel that never changes
        has deviation and gradient 0.

    Source: 3D-Speaker's StatsPool (no offset) and WeSpeaker's TSTP (1e-7).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    valid = jnp.ones((1, x.shape[1], 1), bool) if mask is None else mask[..., None]
    count = jnp.maximum(jnp.sum(valid, axis=1), 1)
    mean = jnp.sum(jnp.where(valid, wide, 0), axis=1) / count
    squares = jnp.square(jnp.where(valid, wide - mean[:, None], 0))
    variance = jnp.sum(squares, axis=1) / jnp.maximum(count - 1, 1) + variance_offset
    if not variance_offset:
        variance = jnp.where(count > 1, variance, _SINGLE_FRAME_DEVIATION**2)
    # Two guards, because the square root's infinite slope at zero would make the gradient of one alone NaN.
    constant = variance <= 0
    deviation = jnp.where(constant, 0, jnp.sqrt(jnp.where(constant, 1, variance)))
    return jnp.concatenate([mean, deviation], axis=-1)
