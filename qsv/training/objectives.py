"""What a training step minimises: classification of speakers, error of a score, or agreement with a teacher."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from qsv.training.losses import MarginSoftmax

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a network made of a batch.

    Attributes:
        embeddings: [batch, embedding_size].
        features: outputs of inner modules by path, [batch, ...] each; empty where none were asked for.
    """

    embeddings: jax.Array
    features: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """A frozen, hashable description of a loss."""

    @property
    def uses_teacher(self) -> bool:
        """Whether the float network's outputs for the same features are needed."""
        ...

    @property
    def features(self) -> str:
        """Regular expression over the paths of inner modules whose outputs are needed; "" for none."""
        ...

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: jax.Array,
        head: Any,
        step: jax.Array,
        batch_axis: str | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The loss, a mean over the batch, and what else to report, means over the batch too.

        Where the batch is split over the devices of the mapped axis `batch_axis`, these are means over a device's part,
        whose means over the axis are those of the batch.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Classification:
    """Margin softmax over the training speakers.

    Attributes:
        loss: the margin softmax; the head is its class directions.
        margin: step -> margin in radians.
        class_axis: the mesh's axis over which the head's classes are split, None where every device has all.
    """

    loss: MarginSoftmax
    margin: optax.Schedule
    class_axis: str | None = None

    @property
    def uses_teacher(self) -> bool:
        """It has labels instead."""
        return False

    @property
    def features(self) -> str:
        """None."""
        return ""

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: jax.Array,
        head: Any,
        step: jax.Array,
        batch_axis: str | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Reports train/accuracy_percent and train/margin_radians."""
        margin = jnp.asarray(self.margin(step), jnp.float32)
        loss, accuracy = self.loss(student.embeddings, head, labels, margin, class_axis=self.class_axis)
        return loss, {"train/accuracy_percent": 100 * accuracy, "train/margin_radians": margin}


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Agreement with the float network, the teacher: no labels, no classifier.

        L = a mean(1 - cos(e, t)) + b mean|e - t|^2 / mean|t|^2 + c mean_l mean|f_l - g_l|^2 / mean|g_l|^2

    with embeddings e, t and inner features f_l, g_l of student and teacher on the same augmented features.

    Attributes:
        cosine_weight: a.
        mse_weight: b.
        feature_weight: c.
        features: regular expression over the paths of inner modules (`stage[1-4]_block.*`) whose outputs are compared.

    Source: Hinton et al. 2015 (arXiv 1503.02531) and Romero et al. 2015 (arXiv 1412.6550), with embeddings in place
    of logits since a speaker network is used without its classifier.
    """

    cosine_weight: float = 1.0
    mse_weight: float = 0.0
    feature_weight: float = 0.0
    features: str = ""

    def __post_init__(self) -> None:
        weights = (self.cosine_weight, self.mse_weight, self.feature_weight)
        if min(weights) < 0 or not any(weights):
            raise ValueError(f"the weights of a distillation can't be negative or all zero, got {weights}")
        if (self.feature_weight > 0) != bool(self.features):
            raise ValueError(
                "matching inner features needs both a weight and a pattern of module paths, got "
                f"feature_weight={self.feature_weight} and features={self.features!r}"
            )

    @property
    def uses_teacher(self) -> bool:
        """Always."""
        return True

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: jax.Array,
        head: Any,
        step: jax.Array,
        batch_axis: str | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Reports train/cosine, the mean cosine between student and teacher."""
        assert teacher is not None
        cosine = jnp.mean(optax.losses.cosine_similarity(student.embeddings, teacher.embeddings, epsilon=1e-12))
        loss = self.cosine_weight * (1 - cosine)
        if self.mse_weight:
            loss += self.mse_weight * _relative_squared_error(student.embeddings, teacher.embeddings, batch_axis)
        if self.feature_weight:
            errors = [
                _relative_squared_error(student.features[path], teacher.features[path], batch_axis)
                for path in teacher.features
            ]
            loss += self.feature_weight * jnp.mean(jnp.stack(errors))
        return loss, {"train/cosine": cosine}


@dataclasses.dataclass(frozen=True)
class Regression:
    """Squared error of one output against the label, a number: of speech quality, say."""

    @property
    def uses_teacher(self) -> bool:
        """It has labels instead."""
        return False

    @property
    def features(self) -> str:
        """None."""
        return ""

    def __call__(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: jax.Array,
        head: Any,
        step: jax.Array,
        batch_axis: str | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """The mean squared error; reports train/absolute_error."""
        difference = student.embeddings[:, 0] - labels
        return jnp.mean(jnp.square(difference)), {"train/absolute_error": jnp.mean(jnp.abs(difference))}


def _relative_squared_error(student: jax.Array, teacher: jax.Array, batch_axis: str | None) -> jax.Array:
    """The squared error of a device's part of the batch over the teacher's mean square in the whole."""
    wide = teacher.astype(jnp.promote_types(teacher.dtype, jnp.float32))
    energy = jnp.mean(jnp.square(wide))
    if batch_axis is not None:
        energy = jax.lax.pmean(energy, batch_axis)
    return jnp.mean(jnp.square(student - wide)) / jnp.maximum(energy, jnp.finfo(wide.dtype).tiny)
