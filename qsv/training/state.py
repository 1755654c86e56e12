"""The training state: a pytree with all that an exact resume needs, but the data position."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qsv.quant import ActivationRange, QuantizerState, scales, with_scales


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "head", "batch_stats", "opt_state", "qstate", "key", "ranges"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A training run between two steps.

    The position in the data belongs to the loader on the host; checkpoints keep both together.

    Attributes:
        step: steps taken, int32 scalar.
        params: the network's float parameters.
        head: the loss's class directions, no part of the network.
        batch_stats: running statistics of the batch normalisations.
        opt_state: of the optimizer over `trainable()`.
        qstate: `{path: QuantizerState}`; empty while training in float.
        key: raw data of the random key that every step folds its number into.
        ranges: of the quantized inputs of layers, learnt with the rest; empty where activations are float.
    """

    step: jax.Array
    params: Any
    head: Any
    batch_stats: Any
    opt_state: Any
    qstate: dict[str, QuantizerState]
    key: jax.Array
    ranges: Mapping[str, ActivationRange] = dataclasses.field(default_factory=dict)

    @classmethod
    def create(
        cls,
        *,
        params: Any,
        head: Any,
        batch_stats: Any,
        transformation: optax.GradientTransformation,
        seed: int,
        qstate: dict[str, QuantizerState] | None = None,
        ranges: Mapping[str, ActivationRange] | None = None,
    ) -> "TrainState":
        """A state at step 0."""
        qstate = qstate or {}
        ranges = dict(ranges or {})
        trainable = {"params": params, "head": head, "scales": scales(qstate), "ranges": ranges}
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            head=head,
            batch_stats=batch_stats,
            opt_state=transformation.init(trainable),
            qstate=qstate,
            key=jax.random.key_data(jax.random.key(seed)),
            ranges=ranges,
        )

    def trainable(self) -> dict[str, Any]:
        """What the optimizer updates: `{"params", "head", "scales", "ranges"}`."""
        return {"params": self.params, "head": self.head, "scales": scales(self.qstate), "ranges": self.ranges}

    def with_trainable(self, trainable: dict[str, Any]) -> "TrainState":
        """The state with updated trainable parts."""
        return dataclasses.replace(
            self,
            params=trainable["params"],
            head=trainable["head"],
            qstate=with_scales(self.qstate, trainable["scales"]),
            ranges=trainable["ranges"],
        )

    @property
    def variables(self) -> dict[str, Any]:
        """`{"params", "batch_stats"}` of the float network."""
        return {"params": self.params, "batch_stats": self.batch_stats}
