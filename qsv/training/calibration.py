"""Post-training quantization of a network: levels, rounding, biases and batch statistics, without a gradient."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from qsv.models import Network
from qsv.quant import Plan, QuantizerState, compensated_rounding, fake_quantize, init, leaf_paths
from qsv.training.input_moments import InputMoments, input_moments
from qsv.training.recalibration import recalibrate_batch_stats, shifted_batch_stats

Rounding = Literal["nearest", "compensated"]
Recalibration = Literal["shift", "replace", "none"]


class Calibrated(NamedTuple):
    """What a calibration makes of a float network.

    Attributes:
        params: parameters, still float; `fake_quantize(plan, params, qstate)` are the quantized ones.
        batch_stats: running statistics for the quantized network.
        qstate: codebooks and scales.
    """

    params: Any
    batch_stats: Any
    qstate: dict[str, QuantizerState]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Which of its parts a calibration has.

    Attributes:
        weighted_codebooks: fit levels with each weight's squared error weighted by the mean square of its input.
        rounding: "compensated" chooses the levels so that each layer's output changes least (`compensated_rounding`).
        bias_correction: add E[x] (W - W_q) to the bias of every layer that has one, so that its output keeps its mean.
        recalibration: "shift" moves batch statistics by what quantization changes in them (`shifted_batch_stats`),
            "replace" takes those of the speech (`recalibrate_batch_stats`).

    Source: Hessian-weighted k-means, Choi et al. 2017 (arXiv 1612.01543), with the Hessian of each layer's own squared
    error in place of the loss's; GPTQ, Frantar et al. 2022 (arXiv 2210.17323); bias correction, Nagel et al. 2019
    (arXiv 1906.04721), with means measured on speech.
    """

    weighted_codebooks: bool = True
    rounding: Rounding = "compensated"
    bias_correction: bool = True
    recalibration: Recalibration = "shift"

    @property
    def uses_moments(self) -> bool:
        """Whether the moments of the layers' inputs are needed."""
        return self.weighted_codebooks or self.bias_correction or self.rounding == "compensated"


def calibrate(
    network: Network,
    variables: Any,
    plan: Plan,
    waveforms: Iterable[Any],
    calibration: Calibration = Calibration(),
    *,
    moments: Mapping[str, InputMoments] | None = None,
) -> Calibrated:
    """Quantize a float network after training, by some of its own kind of speech.

    Args:
        network: the network.
        variables: its float `{"params", "batch_stats"}`.
        plan: from `qsv.resolve(policy, variables["params"])`.
        waveforms: batches [batch, samples], float in [-1, 1] or int16, full rows; no labels.
        calibration: its parts.
        moments: `input_moments(network, variables, waveforms)`, where they are known already.

    Returns:
        Parameters, batch statistics and quantizer states.

    Raises:
        ValueError: no batches, or a quantizer that compensated rounding can't round.
    """
    batches, params = list(waveforms), variables["params"]
    if moments is None:
        moments = input_moments(network, variables, batches) if calibration.uses_moments else {}
    qstate = init(plan, params, importance=_importance(params, moments) if calibration.weighted_codebooks else None)
    if calibration.rounding == "compensated":
        params = _compensated(params, plan, qstate, moments)
    if calibration.bias_correction:
        params = _bias_corrected(variables["params"], params, plan, qstate, moments)
    quantized = fake_quantize(plan, params, qstate)
    return Calibrated(params, recalibrate(network, variables, quantized, batches, calibration.recalibration), qstate)


def recalibrate(
    network: Network, variables: Any, params: Any, waveforms: Iterable[Any], recalibration: Recalibration
) -> Any:
    """Batch statistics for quantized parameters.

    Args:
        network: the network.
        variables: the float `{"params", "batch_stats"}`.
        params: the quantized parameters.
        waveforms: as for `calibrate`.
        recalibration: as in `Calibration`.

    Returns:
        New batch statistics; with "none" the given ones.
    """
    if recalibration == "none":
        return variables["batch_stats"]
    if recalibration == "replace":
        return recalibrate_batch_stats(network, params, variables["batch_stats"], waveforms)
    return shifted_batch_stats(network, variables["params"], params, variables["batch_stats"], waveforms)


def _importance(params: Any, moments: Mapping[str, InputMoments]) -> dict[str, jax.Array]:
    """Mean square of the input that each weight multiplies, [..., inputs, 1]."""
    return {
        path: jnp.diagonal(moments[path].second).reshape(*leaf.shape[:-1], 1)
        for path, leaf in leaf_paths(params)
        if path in moments
    }


def _compensated(params: Any, plan: Plan, qstate: Any, moments: Mapping[str, InputMoments]) -> Any:
    """Parameters whose planned kernels lie on levels that change the layers' outputs least."""
    rounded = [
        compensated_rounding(leaf, moments[path].second, plan.quantized[path], qstate[path])
        if path in plan.quantized and path in moments
        else leaf
        for path, leaf in leaf_paths(params)
    ]
    return jax.tree.unflatten(jax.tree.structure(params), rounded)


def _bias_corrected(before: Any, params: Any, plan: Plan, qstate: Any, moments: Mapping[str, InputMoments]) -> Any:
    """Parameters whose biases make up for E[x] (W - W_q)."""
    quantized = dict(leaf_paths(fake_quantize(plan, params, qstate)))
    corrections: dict[str, Any] = {}
    for path, kernel in leaf_paths(before):
        bias = moments[path].bias if path in plan.quantized and path in moments else None
        if bias is not None:
            error = (kernel - quantized[path]).reshape(-1, kernel.shape[-1])
            corrections[bias] = corrections.get(bias, 0) + moments[path].mean @ error
    corrected = [leaf + corrections.get(path, 0) for path, leaf in leaf_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), corrected)
