"""Margin softmax losses for speaker classification."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

# What a split classifier's classes are a multiple of.
SPLIT_CLASSES = 128
# Below every cosine.
_NO_CLASS = -2.0


@dataclasses.dataclass(frozen=True)
class MarginSoftmax:
    """Additive angular margin softmax, with sub-centers and an inter-top-k penalty as options.

        L = -log softmax_j(s * z_j)[y],   z_y = cos(theta_y + m),   z_j = cos(theta_j) otherwise

    With `sub_centers` > 1 a class has several directions and the nearest one counts. With `top_k` > 0 the k
    non-target classes nearest to an example get cos(theta - top_k_margin): they must be further away.

    Attributes:
        num_speakers: classes.
        scale: s.
        sub_centers: directions a class.
        top_k: penalised non-target classes; 0 for none.
        top_k_margin: their margin in radians.

    Source: Deng et al. 2019 (arXiv 1801.07698); sub-centers Deng et al. 2020; inter-top-k Zhao et al. 2021
    (arXiv 2110.05042). As in WeSpeaker, beyond theta = pi - m the target's cosine falls linearly instead.
    """

    num_speakers: int
    scale: float = 32.0
    sub_centers: int = 1
    top_k: int = 0
    top_k_margin: float = 0.06

    def __post_init__(self) -> None:
        if self.num_speakers < 2:
            raise ValueError(f"classification needs at least two speakers, got {self.num_speakers}")
        if self.scale <= 0 or self.sub_centers < 1:
            raise ValueError(f"scale and sub_centers must be positive, got {self.scale} and {self.sub_centers}")
        if not 0 <= self.top_k < self.num_speakers:
            raise ValueError(f"top_k must be in [0, {self.num_speakers}), got {self.top_k}")

    def init(self, key: jax.Array, embedding_size: int) -> jax.Array:
        """Class directions: [embedding_size, num_speakers * sub_centers] float32, Glorot uniform."""
        shape = (embedding_size, self.num_speakers * self.sub_centers)
        return jax.nn.initializers.glorot_uniform()(key, shape, jnp.float32)

    def padded(self, kernel: jax.Array) -> jax.Array:
        """Class directions to be split over devices: with zeros up to a multiple of 128, which don't count.

        So any number of devices that divides 128 can share them, and go on with those of another number.
        """
        return jnp.pad(kernel, ((0, 0), (0, (-self.num_speakers % SPLIT_CLASSES) * self.sub_centers)))

    def __call__(
        self,
        embeddings: jax.Array,
        kernel: jax.Array,
        labels: jax.Array,
        margin: jax.Array | float,
        *,
        class_axis: str | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Loss and accuracy of a batch.

        Args:
            embeddings: [batch, embedding_size] float.
            kernel: [embedding_size, num_speakers * sub_centers] class directions, not normalised.
            labels: [batch] int.
            margin: m in radians; may be traced, so that a schedule never recompiles.
            class_axis: within `jax.shard_map`, the axis over which batch and classes are both split: this device has
                the examples and the classes, [embedding_size, classes / devices * sub_centers], of its own, and the
                result is that of all.

        Returns:
            (mean loss, share of examples whose nearest class is theirs without a margin), scalars.

        Source of the split: Deng et al. 2019 (arXiv 1801.07698), section 3, "parallel acceleration".
        """
        if class_axis is not None:
            return self._split(embeddings, kernel, labels, margin, class_axis)
        cosine, target = self._cosines(embeddings, kernel), self._is_target(labels)
        logits = self._logits(cosine, target, margin)
        loss = -jnp.mean(jnp.sum(jnp.where(target, jax.nn.log_softmax(logits), 0), axis=1))
        return loss, jnp.mean((jnp.argmax(cosine, axis=1) == labels).astype(loss.dtype))

    def logits(
        self, embeddings: jax.Array, kernel: jax.Array, labels: jax.Array, margin: jax.Array | float
    ) -> jax.Array:
        """[batch, num_speakers]: s z, of which the loss is the cross-entropy; arguments as above."""
        return self._logits(self._cosines(embeddings, kernel), self._is_target(labels), margin)

    def _split(
        self, embeddings: jax.Array, kernel: jax.Array, labels: jax.Array, margin: jax.Array | float, axis: str
    ) -> tuple[jax.Array, jax.Array]:
        """Every device compares all examples with its classes; sums over devices make the softmax."""
        embeddings, labels = (lax.all_gather(own, axis, tiled=True) for own in (embeddings, labels))
        classes = kernel.shape[1] // self.sub_centers
        number = lax.axis_index(axis) * classes + jnp.arange(classes)
        cosine = jnp.where(number < self.num_speakers, self._cosines(embeddings, kernel), _NO_CLASS)
        target = labels[:, None] == number
        logits = jnp.where(number < self.num_speakers, self._logits(cosine, target, margin, axis), -jnp.inf)
        peak = lax.pmax(lax.stop_gradient(logits).max(axis=1), axis)
        total = lax.psum(jnp.exp(logits - peak[:, None]).sum(axis=1), axis)
        wanted = lax.psum(jnp.where(target, logits, 0).sum(axis=1), axis)
        nearest = lax.pmax(lax.stop_gradient(cosine).max(axis=1), axis)
        is_nearest = lax.psum(jnp.where(target, cosine, 0).sum(axis=1), axis) >= nearest
        return jnp.mean(peak + jnp.log(total) - wanted), jnp.mean(is_nearest.astype(logits.dtype))

    def _cosines(self, embeddings: jax.Array, kernel: jax.Array) -> jax.Array:
        cosine = _unit(embeddings, axis=1) @ _unit(kernel, axis=0)
        nearest = cosine.reshape(len(embeddings), -1, self.sub_centers).max(axis=-1)
        # Rounding may leave [-1, 1], where the sine of the margin would be NaN.
        return jnp.clip(nearest, -1, 1)

    def _is_target(self, labels: jax.Array) -> jax.Array:
        return jax.nn.one_hot(labels, self.num_speakers, dtype=bool)

    def _logits(
        self, cosine: jax.Array, target: jax.Array, margin: jax.Array | float, axis: str | None = None
    ) -> jax.Array:
        sine = jnp.sqrt(jnp.maximum(1 - jnp.square(cosine), 1e-12))
        moved = cosine * jnp.cos(margin) - sine * jnp.sin(margin)
        past_pi = cosine <= jnp.cos(jnp.pi - margin)
        moved = jnp.where(past_pi, cosine - 1 - jnp.cos(jnp.pi - margin), moved)
        others = cosine
        if self.top_k:
            penalised = cosine * math.cos(self.top_k_margin) + sine * math.sin(self.top_k_margin)
            ranked = jnp.where(target, -jnp.inf, cosine)
            highest = lax.top_k(ranked, min(self.top_k, ranked.shape[1]))[0]
            if axis is not None:
                highest = lax.top_k(lax.all_gather(highest, axis, axis=1, tiled=True), self.top_k)[0]
            threshold = highest[:, -1:]
            others = jnp.where(ranked >= threshold, penalised, cosine)
        return self.scale * jnp.where(target, moved, others)


def _unit(vectors: jax.Array, axis: int) -> jax.Array:
    squared = jnp.sum(jnp.square(vectors), axis=axis, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squared, 1e-12))
