"""Loss, optimizer and schedules: the flags that training and fine-tuning share."""

import dataclasses

import optax

from experiments.configuration import setting
from qsv.frontend import SpecAugment
from qsv.training import MarginSoftmax, Optimizer, learning_rate_schedule, margin_schedule


@dataclasses.dataclass(frozen=True)
class OptimizationConfig:
    """Everything about the loss and its minimisation; defaults are those of WeSpeaker's recipe."""

    optimizer: str = setting("sgd", "sgd has Nesterov momentum.", choices=["sgd", "adamw"])
    learning_rate: float = setting(0.1, "Learning rate after warm-up.", minimum=0.0)
    final_learning_rate: float = setting(5e-5, "Learning rate at the last step.", minimum=0.0)
    schedule: str = setting("exponential", "Decay of the learning rate.", choices=["exponential", "cosine", "constant"])
    warmup_fraction: float = setting(0.04, "Share of the steps over which the rate rises.", minimum=0.0)
    momentum: float = setting(0.9, "Momentum of sgd.", minimum=0.0)
    weight_decay: float = setting(1e-4, "Weight decay of the kernels.", minimum=0.0)
    clip_norm: float = setting(0.0, "Clip gradients to this global norm; 0 doesn't.", minimum=0.0)
    margin: float = setting(0.2, "Final additive angular margin in radians.", minimum=0.0)
    margin_rise_start: float = setting(0.13, "Share of the steps before the margin rises.", minimum=0.0)
    margin_rise_end: float = setting(0.27, "Share of the steps from which the margin is final.", minimum=0.0)
    softmax_scale: float = setting(32.0, "Scale s of the margin softmax.", minimum=0.0)
    sub_centers: int = setting(1, "Class directions a speaker.", minimum=1)
    top_k: int = setting(0, "Nearest non-target speakers that are penalised; 0 for none.", minimum=0)
    top_k_margin: float = setting(0.06, "Angular penalty of those in radians.", minimum=0.0)
    spec_augment: bool = setting(True, "Mask a span of frames and of Mel bands in 60 % of the crops.")
    gradient_accumulation: int = setting(
        1,
        "Parts of a batch that go through the network one after the other, for less memory; each is normalised alone.",
        minimum=1,
    )
    recompute_blocks: bool = setting(
        False,
        "Compute activations inside of blocks anew in the backward pass, for less memory of a GPU or TPU.",
        incidental=True,
    )
    dtype: str = setting("float32", "Type of the computation.", choices=["float32", "bfloat16"])

    def make_learning_rate(self, num_steps: int) -> optax.Schedule:
        """The schedule over a run of `num_steps`."""
        return learning_rate_schedule(
            self.schedule,
            peak=self.learning_rate,
            final=self.final_learning_rate,
            num_steps=num_steps,
            warmup_steps=round(self.warmup_fraction * num_steps),
        )

    def make_margin(self, num_steps: int) -> optax.Schedule:
        """The margin over a run of `num_steps`."""
        return margin_schedule(
            final=self.margin,
            rise_start=round(self.margin_rise_start * num_steps),
            rise_end=round(self.margin_rise_end * num_steps),
        )

    def make_optimizer(self, *, scale_rate: float = 1.0, scale_start: int = 0) -> Optimizer:
        """The optimizer; `scale_rate` and `scale_start` are for quantizer scales."""
        return Optimizer(
            self.optimizer,  # type: ignore[arg-type]
            self.momentum,
            self.weight_decay,
            scale_rate,
            scale_start,
            self.clip_norm,
        )

    def make_loss(self, num_speakers: int) -> MarginSoftmax:
        """The margin softmax over so many speakers."""
        return MarginSoftmax(num_speakers, self.softmax_scale, self.sub_centers, self.top_k, self.top_k_margin)

    def make_spec_augment(self) -> SpecAugment | None:
        """The feature masks, if any."""
        return SpecAugment() if self.spec_augment else None
