"""Post-training quantization of a network: levels, rounding, biases and batch statistics, without a gradient."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from qsv.models import GE2E, Network
from qsv.models.batch_norm import BatchNorm, channel_moments
from qsv.models.ge2e import LSTMWeights, lstm_sequences
from qsv.quant import (
    Plan,
    QuantizerState,
    compensated_rounding,
    fake_quantize,
    init,
    leaf_paths,
    nearest_in_cells,
    refitted_weights,
    with_leaves,
)
from qsv.training.layer_moments import layer_moments
from qsv.training.recalibration import recalibrate_batch_stats, shifted_batch_stats, shifted_mean, shifted_variance
from qsv.training.waveform import float_waveform

# Chosen on held-out speakers of LibriSpeech, where a factor of two either way makes no difference.
_REFIT_DAMPING = 0.2
# Where the inputs of a layer are few, they say little about how they have changed.
_REFIT_DAMPING_PER_INPUT = 0.3

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
        sequential: take each layer's inputs from the network whose earlier layers are quantized, and first refit its
            weights so that from these inputs they give the float network's outputs (`refitted_weights`).
        bias_correction: change the bias of every layer that has one so that its output keeps its mean.
        recalibration: "shift" moves batch statistics by what quantization changes in them (`shifted_batch_stats`),
            "replace" takes those of the speech (`recalibrate_batch_stats`).

    Source: Hessian-weighted k-means, Choi et al. 2017 (arXiv 1612.01543), with the Hessian of each layer's own squared
    error in place of the loss's; GPTQ, Frantar et al. 2022 (arXiv 2210.17323), and its asymmetric form, GPTAQ, Li et
    al. 2025 (arXiv 2504.02692), here as a least-squares fit ahead of the rounding; bias correction, Nagel et al. 2019
    (arXiv 1906.04721), with means measured on speech.
    """

    weighted_codebooks: bool = True
    rounding: Rounding = "compensated"
    sequential: bool = True
    bias_correction: bool = True
    recalibration: Recalibration = "shift"

    @property
    def uses_inputs(self) -> bool:
        """Whether any part needs the inputs of the layers."""
        return self.weighted_codebooks or self.rounding == "compensated" or self.sequential or self.bias_correction


def calibrate(
    network: Network,
    variables: Any,
    plan: Plan,
    waveforms: Iterable[Any],
    calibration: Calibration = Calibration(),
) -> Calibrated:
    """Quantize a float network after training, by some of its own kind of speech.

    All of the speech goes through the float network and the quantized one side by side, once, layer by layer, so that
    the layers' inputs and outputs must fit into memory (for CAM++ 5 MB a second), unless none are needed.

    Args:
        network: the network.
        variables: its float `{"params", "batch_stats"}`.
        plan: from `qsv.resolve(policy, variables["params"])`.
        waveforms: batches [batch, samples], float in [-1, 1] or int16, full rows of equal length; no labels.
        calibration: its parts.

    Returns:
        Parameters, batch statistics and quantizer states. The parameters are as near to the (refitted) weights as
        they can be without leaving the levels chosen for them, which is where fine-tuning starts best.

    Raises:
        ValueError: no batches, or a quantizer that compensated rounding can't round.
    """
    batches = [jnp.asarray(waveform) for waveform in waveforms]
    if not batches:
        raise ValueError("a calibration needs at least one batch of speech")
    if not calibration.uses_inputs:
        params, qstate = variables["params"], init(plan, variables["params"])
        quantized = fake_quantize(plan, params, qstate)
        return Calibrated(
            params, recalibrate(network, variables, quantized, batches, calibration.recalibration), qstate
        )
    calibrator = _Calibrator(network, variables, plan, calibration)
    features = [_features(network, batch) for batch in batches]
    calibrator.walk(jnp.concatenate(features))
    return calibrator.result()


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


class _Calibrator:
    """Quantizes layer after layer in the order in which the network computes them."""

    def __init__(self, network: Network, variables: Any, plan: Plan, calibration: Calibration) -> None:
        self._network = network
        self._float = variables
        self._quantizers = plan.quantized
        self._calibration = calibration
        # Leaves by path: the float network's, what is returned of them, and what the quantized network computes with.
        self._params = dict(leaf_paths(variables["params"]))
        self._latent = dict(self._params)
        self._quantized = dict(self._params)
        self._batch_stats = dict(leaf_paths(variables["batch_stats"]))
        self._new_stats = dict(self._batch_stats)
        self._qstate: dict[str, QuantizerState] = {}
        self._inside = False

    def result(self) -> Calibrated:
        """What has been made of the network; planned leaves that no layer used are quantized by themselves."""
        for path, quantizer in self._quantizers.items():
            if path not in self._qstate:
                self._qstate[path] = quantizer.init(self._params[path])
        return Calibrated(
            with_leaves(self._float["params"], self._latent),
            with_leaves(self._float["batch_stats"], self._new_stats),
            {path: self._qstate[path] for path in self._quantizers},
        )

    def walk(self, features: jax.Array) -> None:
        """Quantize all layers, each with what the layers before it make of the features."""
        with nn.intercept_methods(self._intercept):
            self._network.module().apply(self._float, jnp.concatenate([features, features]))

    def _intercept(self, call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        """Computes a layer for the float network, in the first half of the batch, and the quantized, in the second."""
        layer: Any = context.module
        kinds = nn.Conv | nn.Dense | nn.BatchNorm | BatchNorm
        if isinstance(layer, GE2E) and context.method_name == "stacked_lstm":
            return self._stacked_lstm(*args)
        if self._inside or context.method_name != "__call__" or not isinstance(layer, kinds):
            return call(*args, **kwargs)
        path = "/".join(layer.path)
        targets, inputs = jnp.split(args[0], 2)
        unbound = layer.clone(parent=None, name=None)
        with self._computing():
            expected: Any = unbound.apply(_variables(path, self._params, self._batch_stats), targets, **kwargs)
            if isinstance(layer, nn.Conv | nn.Dense):
                bias = f"{path}/bias" if layer.use_bias else None
                self._quantize(f"{path}/kernel", bias, unbound, inputs, targets)
            else:
                self._recalibrate(path, inputs, targets)
            found: Any = unbound.apply(_variables(path, self._quantized, self._new_stats), inputs, **kwargs)
        return jnp.concatenate([expected, found])

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Layers that are computed here aren't intercepted once more."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _stacked_lstm(self, sequence: jax.Array, layers: list[LSTMWeights]) -> jax.Array:
        """Last hidden states, for a [frames, batch, inputs] whose batch has the float network's half and the other."""
        targets, inputs = jnp.split(sequence, 2, axis=1)
        expected = _lstm_sequences(targets, layers)
        for index, (below, own) in enumerate(zip([targets, *expected], expected, strict=False)):
            found = [inputs, *_lstm_sequences(inputs, self._lstm_weights(len(layers)))]
            pairs = {"input": (found[index], below), "hidden": (_a_frame_later(found[index + 1]), _a_frame_later(own))}
            for part, (x, target) in pairs.items():
                self._quantize(f"lstm{index + 1}/{part}/kernel", f"lstm{index + 1}/hidden/bias", None, x, target)
        last = _lstm_sequences(inputs, self._lstm_weights(len(layers)))[-1]
        return jnp.concatenate([expected[-1][-1], last[-1]])

    def _lstm_weights(self, count: int) -> list[LSTMWeights]:
        """What the quantized network computes with."""
        parts = ("input/kernel", "hidden/kernel", "hidden/bias")
        names = [[f"lstm{index}/{part}" for part in parts] for index in range(1, count + 1)]
        return [(self._quantized[kernel], self._quantized[own], self._quantized[bias]) for kernel, own, bias in names]

    def _quantize(self, path: str, bias: str | None, layer: Any, inputs: jax.Array, targets: jax.Array) -> None:
        """Choose the levels of a planned kernel and correct its bias; a layer of None only multiplies."""
        if path not in self._quantizers or path in self._qstate:
            return
        quantizer, weights, calibration = self._quantizers[path], self._params[path], self._calibration
        moments = layer_moments(layer, inputs if calibration.sequential else targets, targets)
        if moments is None:
            self._qstate[path] = state = quantizer.init(weights)
            self._quantized[path] = quantizer.fake_quantize(weights, state)
            return
        damping = _REFIT_DAMPING + _REFIT_DAMPING_PER_INPUT * len(moments.mean) / moments.rows
        wanted = weights
        if calibration.sequential:
            wanted = refitted_weights(weights, moments.second, moments.cross, damping)
        importance = jnp.diagonal(moments.second).reshape(*weights.shape[:-1], 1)
        state = quantizer.init(wanted, importance=importance if calibration.weighted_codebooks else None)
        if calibration.rounding == "compensated":
            rounded = compensated_rounding(wanted, moments.second, quantizer, state)
            wanted = nearest_in_cells(wanted, rounded, state)
        self._qstate[path], self._latent[path] = state, wanted
        self._quantized[path] = quantized = quantizer.fake_quantize(wanted, state)
        if bias is not None and calibration.bias_correction:
            before, after = (kernel.reshape(-1, kernel.shape[-1]) for kernel in (weights, quantized))
            correction = moments.target_mean @ before - moments.mean @ after
            self._latent[bias] = self._quantized[bias] = self._quantized[bias] + correction

    def _recalibrate(self, path: str, inputs: jax.Array, targets: jax.Array) -> None:
        """Fit a layer's running statistics to the inputs."""
        mean, var = f"{path}/mean", f"{path}/var"
        if self._calibration.recalibration == "none":
            return
        new_mean, new_var = _channel_moments(inputs)
        if self._calibration.recalibration == "replace":
            self._new_stats |= {mean: new_mean, var: new_var}
        else:
            old_mean, old_var = _channel_moments(targets)
            self._new_stats[mean] = shifted_mean(self._batch_stats[mean], old_mean, new_mean)
            self._new_stats[var] = shifted_variance(self._batch_stats[var], old_var, new_var)


def _variables(path: str, params: dict[str, Any], batch_stats: dict[str, Any]) -> dict[str, Any]:
    """The variables of one layer of those of all, by path."""

    def own(leaves: dict[str, Any]) -> dict[str, Any]:
        return {leaf.removeprefix(f"{path}/"): leaves[leaf] for leaf in leaves if leaf.startswith(f"{path}/")}

    return {"params": own(params), "batch_stats": own(batch_stats)}


_channel_moments = jax.jit(channel_moments)
_lstm_sequences = jax.jit(lstm_sequences)


@functools.partial(jax.jit, static_argnums=0)
def _features(network: Network, waveform: jax.Array) -> jax.Array:
    return network.frontend(float_waveform(waveform))[0]


def _a_frame_later(hidden: jax.Array) -> jax.Array:
    """[frames, batch, hidden] as a recurrent kernel sees it: zeros first."""
    return jnp.concatenate([jnp.zeros_like(hidden[:1]), hidden[:-1]])
