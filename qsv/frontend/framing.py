"""Overlapping frames of a signal."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def framed(signal: jax.Array, frames: Any, *, length: int, shift: int) -> jax.Array:
    """Cut the second axis into frames.

    Args:
        signal: [batch, samples, ...]; samples at least `(frames - 1) * shift + length`.
        frames: how many; an int, or a symbolic size of `jax.export`.
        length: samples in a frame.
        shift: samples between the starts of two frames.

    Returns:
        [batch, frames, length, ...].
    """
    positions = jnp.arange(frames)[:, None] * shift + np.arange(length)
    return signal.at[:, positions].get(mode="promise_in_bounds")
