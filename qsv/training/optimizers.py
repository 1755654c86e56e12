"""Optimizers over a training state's trainable parts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

from qsv.quant import leaf_paths, with_leaves


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What updates weights, quantizer scales and ranges of activations.

    Kernels decay; biases, normalisation parameters, scales and ranges don't. The latter two share the schedule, times
    `scale_rate`, from step `scale_start` on.

    Attributes:
        name: "sgd" (Nesterov momentum; decay is added to the gradient, as in PyTorch) or "adamw" (decoupled decay).
        momentum: of SGD.
        weight_decay: coefficient.
        scale_rate: learning rate of scales and ranges relative to the weights'.
        scale_start: first step that moves them.
        clip_norm: global gradient norm to clip to; 0 for none.

    Source: KMQAT's recipe (SGD, decay on weights only, scales frozen at first), Liu et al. 2024.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    scale_rate: float = 1.0
    scale_start: int = 0
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be 'sgd' or 'adamw', got {self.name!r}")
        for field in ("momentum", "weight_decay", "scale_rate", "scale_start", "clip_norm"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} can't be negative, got {getattr(self, field)}")

    def transformation(
        self,
        learning_rate: optax.Schedule,
        *,
        factors: Mapping[str, float] | None = None,
        range_factors: Mapping[str, float] | None = None,
    ) -> optax.GradientTransformation:
        """The optax transformation of a tree `{"params", "head", "scales", "ranges"}`.

        Args:
            learning_rate: step -> learning rate.
            factors: {path in the parameters: what its updates are multiplied with, decay included}.
            range_factors: {path of a layer: what the updates of its range are multiplied with}.
        """

        def scale_learning_rate(step: jax.Array) -> jax.Array:
            return learning_rate(step) * self.scale_rate * (step >= self.scale_start)

        groups = {
            "decayed": self._rule(learning_rate, self.weight_decay),
            "free": self._rule(learning_rate, 0.0),
            "scales": self._rule(scale_learning_rate, 0.0),
        }
        clip = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm else []
        update = optax.partition(groups, parameter_groups)
        scaled = [_scaled(factors or {}, range_factors or {})] if factors or range_factors else []
        return optax.chain(*clip, update, *scaled)

    def _rule(self, learning_rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
        if self.name == "adamw":
            return optax.adamw(learning_rate, weight_decay=weight_decay)
        decay = optax.add_decayed_weights(weight_decay) if weight_decay else optax.identity()
        return optax.chain(decay, optax.sgd(learning_rate, self.momentum or None, nesterov=self.momentum > 0))


def _scaled(factors: Mapping[str, float], range_factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Multiplies the updates of some parameters and ranges."""

    def scale(updates: dict[str, Any], params: Any) -> dict[str, Any]:
        own = updates["params"]
        scaled = {path: leaf * factors[path] for path, leaf in leaf_paths(own) if path in factors}
        ranges = {path: optax.tree.scale(range_factors.get(path, 1.0), one) for path, one in updates["ranges"].items()}
        return {**updates, "params": with_leaves(own, scaled), "ranges": ranges}

    return optax.stateless(scale)


def parameter_groups(trainable: dict[str, Any]) -> dict[str, Any]:
    """ "decayed", "free" or "scales" for every leaf of `{"params", "head", "scales", "ranges"}`."""

    def group(leaf: Any) -> str:
        return "decayed" if leaf.ndim > 1 else "free"

    return {
        "params": jax.tree.map(group, trainable["params"]),
        "head": jax.tree.map(group, trainable["head"]),
        "scales": jax.tree.map(lambda _: "scales", trainable["scales"]),
        "ranges": jax.tree.map(lambda _: "scales", trainable["ranges"]),
    }
