"""Batch normalisation that keeps less for the backward pass, with statistics that layers can share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# Of every batch normalisation here, `flax.linen`'s too: folding and recalibration rely on them.
MOMENTUM = 0.9
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` with PyTorch's settings, as one multiplication and one addition per channel.

        y = x a + b, a = scale / sqrt(var + 1e-5), b = bias - mean a

    Linen's form keeps x - mean besides x for the gradient of the scale; this one keeps x alone.

    Attributes:
        dtype: type of the result; statistics and parameters are float32 or wider.
        use_scale: whether it has a scale of its own, else 1.
        use_bias: whether it has a bias, else 0.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over: training statistics are averaged
            along it. None where the whole batch is here.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167). Momentum 0.9 (PyTorch's 0.1); the running variance is of the
    batch's biased one, as in Linen.
    """

    dtype: Any = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    batch_axis: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, moments: jax.Array | None = None) -> jax.Array:
        """Normalise every channel.

        Args:
            x: [..., channels] float.
            train: normalise by the batch's statistics and update the running ones.
            moments: `channel_moments(x, batch_axis)`, where they are known already; only used when training.

        Returns:
            [..., channels] in `dtype`.
        """
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        if train:
            axis = None if self.is_initializing() else self.batch_axis
            mean, var = channel_moments(x, axis) if moments is None else moments
            if not self.is_initializing():
                running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
                running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * var
        else:
            mean, var = running_mean.value, running_var.value
        slope = lax.rsqrt(var + EPSILON)
        if self.use_scale:
            slope = slope * self.param("scale", nn.initializers.ones, channels)
        offset = -mean * slope
        if self.use_bias:
            offset = offset + self.param("bias", nn.initializers.zeros, channels)
        return (x * slope + offset).astype(self.dtype)


def channel_moments(x: jax.Array, batch_axis: str | None = None) -> jax.Array:
    """Mean and biased variance of every channel over all other axes, as `BatchNorm` takes them.

    Args:
        x: [..., channels] float.
        batch_axis: as in `BatchNorm`.

    Returns:
        [2, channels], the means and the variances, float32 or wider. Those of concatenated channels are the
        concatenated moments.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    moments = jnp.stack([jnp.mean(wide, axes), jnp.mean(jnp.square(wide), axes)])
    if batch_axis is not None:
        moments = lax.pmean(moments, batch_axis)
    # Rounding can leave the difference a little below zero.
    return moments.at[1].set(jnp.maximum(moments[1] - jnp.square(moments[0]), 0))
