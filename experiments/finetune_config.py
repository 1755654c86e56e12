"""Flags of how a network is quantized, whatever the quantizers."""

import dataclasses

from experiments.configuration import setting
from experiments.optimization import OptimizationConfig
from experiments.speech import SpeechConfig
from qsv.training import Calibration, Recalibration, Rounding


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How a network is quantized, whatever the scheme and the bits."""

    per_channel: bool = setting(False, "A scale for each output channel; the levels are the tensor's.")
    integer_levels: bool = setting(
        False, "kmeans: levels on the int8 grid, so that the network can be computed in integers."
    )
    normalization: str = setting(
        "none",
        "Standardize weights before quantizing: standardize never undoes it, restore does.",
        choices=["none", "standardize", "restore"],
    )
    float_layers: tuple[str, ...] = setting((), "Regular expression over paths of kernels to leave float.")
    loss: str = setting(
        "distill",
        "distill: agree with the float network, needs no labels; margin: classify the training speakers (KMQAT).",
        choices=["distill", "margin"],
    )
    cosine_weight: float = setting(1.0, "distill: weight of 1 - cosine between the embeddings.", minimum=0.0)
    mse_weight: float = setting(0.0, "distill: weight of the embeddings' relative squared error.", minimum=0.0)
    feature_weight: float = setting(0.0, "distill: weight of the inner features' relative squared error.", minimum=0.0)
    features: str = setting("", "distill: regular expression over paths of the modules whose outputs are compared.")
    frozen_statistics: bool = setting(True, "Keep the statistics of batch normalisations while fine-tuning.")
    steps: int = setting(1000, "Fine-tuning steps; 0 for post-training quantization.", minimum=0)
    refresh_steps: int = setting(
        0,
        "Steps between two refreshes of the codebooks, as in KMQAT; 0 for never: the calibrated ones stay.",
        minimum=0,
    )
    refresh_rate: float = setting(1.0, "Weight of the new codebook in a refresh.", minimum=0.0)
    level_rate: float = setting(
        2.5e-3,
        "Learning rate of weights that are quantized, now or in a later stage, in distances to their next level, so "
        "that as many change their code whatever the bits and the network; 0 for --learning_rate.",
        minimum=0.0,
    )
    keep_codes_from_bits: int = setting(
        4,
        "distill: layers of so many bits or more keep the codes that --rounding=compensated chose, and train scales, "
        "biases and normalisations alone. 0: every layer's codes follow its weights.",
        minimum=0,
    )
    scale_rate: float = setting(1.0, "Learning rate of the scales relative to the weights'.", minimum=0.0)
    range_rate: float = setting(
        1e-3, "Learning rate of the ranges of quantized activations in widths of a range.", minimum=0.0
    )
    scale_start_fraction: float = setting(0.05, "Share of the steps before scales are learnt.", minimum=0.0)
    calibration_crops: int = setting(
        512,
        "Crops of augmented speech for --weighted_codebooks, --rounding, --sequential, --bias_correction and "
        "--recalibration; 0 does none of them. All are in memory at once: for CAM++ 6 GB.",
        minimum=0,
    )
    weighted_codebooks: bool = setting(True, "Weigh weights by the mean square of their inputs in fitting levels.")
    rounding: Rounding = setting(
        "compensated",
        "compensated: before any training, choose levels so that each layer's output changes least (GPTQ).",
        choices=["nearest", "compensated"],
    )
    sequential: bool = setting(
        True, "Calibrate each layer with inputs from the layers quantized before it, and undo what these changed."
    )
    bias_correction: bool = setting(True, "Correct biases by what quantization changes in the mean of their layer.")
    recalibration: Recalibration = setting(
        "shift",
        "Statistics of batch normalisations, before fine-tuning and, unless they are frozen in it, after it. shift: "
        "move them by what quantization changes in the calibration batches; replace: take those batches' own.",
        choices=["shift", "replace", "none"],
    )
    seed: int = setting(0, "Seed of crops and augmentation.", minimum=0)
    log_steps: int = setting(10, "Steps between two lines of metrics.", minimum=1, incidental=True)
    save_steps: int = setting(500, "Steps between two checkpoints; 0 saves the last only.", minimum=0, incidental=True)
    # Other voices than the speech has, at no cost: what is calibrated on them alone is worse on all others.
    speech: SpeechConfig = SpeechConfig(batch_size=16, speed_perturbation=True)
    optimization: OptimizationConfig = OptimizationConfig(
        optimizer="adamw",
        learning_rate=2e-4,
        final_learning_rate=1e-6,
        schedule="cosine",
        warmup_fraction=0.0,
        weight_decay=0.0,
        margin_rise_start=0.0,
        margin_rise_end=0.0,
        spec_augment=False,
    )

    def __post_init__(self) -> None:
        if self.calibration_crops and self.rounding == "compensated" and self.normalization != "none":
            raise ValueError(
                f"--normalization={self.normalization} needs --rounding=nearest: standardized weights can't be "
                "rounded one input after the other"
            )

    @property
    def calibration(self) -> Calibration:
        """What is done before any training."""
        return Calibration(
            weighted_codebooks=self.weighted_codebooks,
            rounding=self.rounding,
            sequential=self.sequential,
            bias_correction=self.bias_correction,
            recalibration=self.recalibration,
        )

    def keeps_codes(self, bits: int) -> bool:
        """Whether fine-tuning leaves the codes of a layer of so many bits alone.

        Codes that were chosen together make up for each other's errors. With many bits a step that changes some of
        them by themselves costs more than it gains; with few, where the errors are large, it gains.
        """
        chosen_together = self.rounding == "compensated" and self.calibration_crops
        least = self.keep_codes_from_bits
        return bool(self.loss == "distill" and chosen_together and least and bits >= least)

    @property
    def needs_speech(self) -> bool:
        """Whether anything is trained or recalibrated."""
        return bool(self.steps or self.calibration_crops)
