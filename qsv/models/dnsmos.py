"""Convolutional networks that predict the quality of speech, after DNSMOS."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qsv.models.batch_norm import EPSILON, BatchNorm
from qsv.quant import binary_activation

Maps = Literal["relu", "binary"]


class DNSMOS(nn.Module):
    """3x3 convolutions, global maximum, dense layers: features to one score.

    Some convolutions are followed by 2x2 maximum pooling and dropout. With `maps="binary"` what a convolution hands
    on is one bit a value, 1 where it is positive; the dense layers keep their rectifiers. The nonlinearity comes after
    the maxima, with which it commutes: it has fewer values to see, and the gradient of binary maps, which are tied
    everywhere, goes to the value that decides.

    Attributes:
        channels: outputs of each convolution.
        pooled: which convolutions (counted from 1) are pooled.
        dense: units of the hidden dense layers.
        dropout: share of the channels that training drops after a pooling, each as a whole.
        maps: nonlinearity of the convolutions.
        beta: how narrow the surrogate derivative of binary maps is.
        normalized: batch normalisation ahead of every convolution's nonlinearity, with a bias and no scale, in place of
            the convolution's bias. `fold_norms` makes of it the network without.
        dtype: type of the computation; parameters stay float32.
        batch_axis: mapped axis (of `jax.shard_map`) that the batch is split over; dropout is then that of the whole
          batch on one device.

    Source: Reddy et al. 2021 (arXiv 2010.15258) and Microsoft's model_v8 for P.808 scores: five convolutions of 32,
    32, 32, 32 and 64 channels, the first, second and fourth pooled, 54,945 parameters. Nilsson et al. 2024 (arXiv
    2407.04578): the defaults, 45,697 parameters, with binary activation maps. Frame masks and normalisation are our
    additions. Both drop 30 % of the values. We drop whole channels (Tompson et al. 2015, arXiv 1411.4280), and none
    unless told to: a global maximum over what is left, scaled up, is larger in training than without, so that scores
    come out too low, of single values by far, of channels still by some.
    """

    channels: tuple[int, ...] = (32, 32, 32, 64)
    pooled: tuple[int, ...] = (1, 2, 3)
    dense: tuple[int, ...] = (64, 64)
    dropout: float = 0.0
    maps: Maps = "relu"
    beta: float = 5.0
    normalized: bool = False
    dtype: Any = jnp.float32
    batch_axis: str | None = None

    @property
    def embedding_size(self) -> int:
        """Outputs: one score."""
        return 1

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None, *, train: bool = False) -> jax.Array:
        """Score a batch.

        Args:
            features: [batch, frames, bands] float, at least 2 ** len(pooled) of both.
            mask: [batch, frames] bool, true where a frame is valid; padding then never changes a score.
            train: drop channels out, which needs the random stream "dropout", and normalise by the batch.

        Returns:
            [batch, 1] float32.

        Raises:
            ValueError: `maps` is unknown, or there are too few frames or bands to pool.
        """
        shrinkage = 2 ** len(self.pooled)
        if any(size < shrinkage for size in features.shape[1:]):
            raise ValueError(f"features must have {shrinkage} frames and bands at least, got {features.shape}")
        activate = self._activation()
        x = features[..., None].astype(self.dtype)
        for number, channels in enumerate(self.channels, start=1):
            # As past the end of an unpadded utterance.
            x = x if mask is None else jnp.where(mask[:, :, None, None], x, 0)
            bias = not self.normalized
            x = nn.Conv(channels, (3, 3), padding=1, use_bias=bias, dtype=self.dtype, name=f"conv{number}")(x)
            if number in self.pooled:
                x = halved(x)
                # Frames are pooled in pairs, so that an odd last one is lost.
                mask = mask if mask is None else mask[:, 1::2]
            if number == len(self.channels):
                x = x if mask is None else jnp.where(mask[:, :, None, None], x, -jnp.inf)
                x = jnp.max(x, axis=(1, 2)).astype(jnp.float32)
            if self.normalized:
                norm = BatchNorm(x.dtype, use_scale=False, batch_axis=self.batch_axis, name=f"norm{number}")
                x = norm(x, train=train)
            x = activate(x)
            if number in self.pooled and train and self.dropout:
                x = self._drop(x)
        for number, units in enumerate(self.dense, start=1):
            x = nn.relu(nn.Dense(units, name=f"dense{number}")(x))
        return nn.Dense(1, name="score")(x)

    def _activation(self) -> Callable[[jax.Array], jax.Array]:
        if self.maps == "binary":
            return lambda x: binary_activation(x, self.beta)
        if self.maps != "relu":
            raise ValueError(f"maps must be 'relu' or 'binary', got {self.maps!r}")
        return nn.relu

    def _drop(self, x: jax.Array) -> jax.Array:
        """Dropout of channels, [batch, ..., channels], drawn for each example of the whole batch on all devices."""
        key = self.make_rng("dropout")
        first = 0 if self.batch_axis is None else jax.lax.axis_index(self.batch_axis) * len(x)
        keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(first + jnp.arange(len(x)))
        shape = (1,) * (x.ndim - 2) + x.shape[-1:]
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, shape))(keys)
        return jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)


def fold_norms(params: Mapping[str, Any], batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with which `DNSMOS` computes without normalisation what it does with, up to rounding.

        a = 1 / sqrt(var + 1e-5),   kernel' = a kernel,   bias' = bias - mean a

    A normalisation's factor is positive, so that maxima of convolutions before it stay where they are.

    Args:
        params: of a network with `normalized=True`, float.
        batch_stats: its running statistics.
    """
    folded = {name: dict(layer) for name, layer in params.items() if not name.startswith("norm")}
    for name, statistics in batch_stats.items():
        slope = 1 / np.sqrt(np.asarray(statistics["var"], np.float64) + EPSILON)
        conv = folded[name.replace("norm", "conv")]
        bias = np.asarray(params[name]["bias"]) - np.asarray(statistics["mean"]) * slope
        conv |= {"kernel": (np.asarray(conv["kernel"]) * slope).astype(np.float32), "bias": bias.astype(np.float32)}
    return folded


@jax.custom_jvp
def halved(x: jax.Array) -> jax.Array:
    """2x2 maximum pooling, [batch, height, width, channels] -> the same of half the height and width, rounded down.

    Of equal values the first, row by row, gets the gradient, as in `nn.max_pool`, whose own gradient is a serial loop
    on a CPU: a training step takes three times as long with it.
    """
    return nn.max_pool(x, (2, 2), (2, 2))


@halved.defjvp
def _halved_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (value, *values), (tangent, *others) = map(_corners, (*primals, *tangents))
    for own, other in zip(values, others, strict=True):
        tangent = jnp.where(own > value, other, tangent)
        value = jnp.maximum(own, value)
    return value, tangent


def _corners(x: jax.Array) -> list[jax.Array]:
    """The four values of every window, row by row."""
    height, width = (size // 2 * 2 for size in x.shape[1:3])
    return [x[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]
