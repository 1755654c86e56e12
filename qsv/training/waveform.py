"""Batches of samples as networks take them."""

import jax
import jax.numpy as jnp

_INT16_SCALE = 32768.0


def float_waveform(waveform: jax.Array) -> jax.Array:
    """16-bit samples as float32 in [-1, 1]; float ones stay as they are.

    Args:
        waveform: [batch, samples], int16 or float in [-1, 1].
    """
    # Integer samples take a quarter of the transfer; float ones are kept, in float64 tests too.
    if jnp.issubdtype(waveform.dtype, jnp.integer):
        return waveform.astype(jnp.float32) / _INT16_SCALE
    return waveform
