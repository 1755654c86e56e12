"""What each bit width of each layer costs in accuracy: by the Hessian, by distortion, or by measured drift."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from optax.losses import cosine_similarity

from qsv.models import Network
from qsv.precision.allocation import Choice, Layer
from qsv.precision.gauss_newton import OutputLoss, cosine_root
from qsv.precision.hessian import Loss
from qsv.precision.traces import TraceEstimate
from qsv.quant import Quantizer, leaf_paths, with_leaves

_EPSILON = 1e-12


class Sensitivity(Protocol):
    """What quantizing one layer costs; only differences and sums of costs matter, not their unit."""

    def __call__(self, path: str, quantizer: Quantizer) -> float:
        """The cost, finite, 0 for none."""
        ...


class HessianSensitivity:
    """Omega_i(b) = tr(H_i) / n_i |Q_b(W_i) - W_i|^2.

    Source: HAWQ-V2, Dong et al. 2020 (arXiv 1911.03852), as Liu et al. 2024 use it. A negative trace counts as 0.
    """

    def __init__(self, params: Any, traces: Mapping[str, TraceEstimate]) -> None:
        """Traces of the layers that will be asked for, from `hessian_traces` or `gauss_newton_traces`."""
        self._leaves = dict(leaf_paths(params))
        self._traces = traces

    def __call__(self, path: str, quantizer: Quantizer) -> float:
        """The second-order estimate of the loss's increase, but for a factor of two."""
        if path not in self._traces:
            raise ValueError(f"no trace for {path!r}")
        return self._traces[path].mean_trace * squared_error(self._leaves[path], quantizer)


class DistortionSensitivity:
    """|Q_b(W_i) - W_i|^2 / |W_i|^2: no data, no gradient, every layer as important as the next."""

    def __init__(self, params: Any) -> None:
        """The float parameters."""
        self._leaves = dict(leaf_paths(params))

    def __call__(self, path: str, quantizer: Quantizer) -> float:
        """The relative squared error."""
        weights = self._leaves[path]
        energy = float(jnp.sum(jnp.square(weights.astype(jnp.float32))))
        return squared_error(weights, quantizer) / energy if energy > 0 else 0.0


class DriftSensitivity:
    """Mean of 1 - cosine between embeddings of the float network and of one with this layer alone quantized.

    It needs one pass over the speech for each layer and width, but no gradient, and sees all that a trace leaves out.
    """

    def __init__(self, network: Network, variables: Any, waveforms: Iterable[Any]) -> None:
        """Float variables, and batches [batch, samples] of float in [-1, 1]."""
        self._network = network
        self._variables = variables
        self._waveforms = [jnp.asarray(waveform) for waveform in waveforms]
        if not self._waveforms:
            raise ValueError("drift needs at least one batch of speech")
        self._embeddings = [network.embed(variables, waveform) for waveform in self._waveforms]

    def __call__(self, path: str, quantizer: Quantizer) -> float:
        """The drift of the embeddings."""
        params = self._variables["params"]
        weights = dict(leaf_paths(params))[path]
        quantized = quantizer.fake_quantize(weights, quantizer.init(weights))
        variables = {**self._variables, "params": with_leaves(params, {path: quantized})}
        cosines = [
            cosine_similarity(self._network.embed(variables, waveform), embeddings, epsilon=_EPSILON)
            for waveform, embeddings in zip(self._waveforms, self._embeddings, strict=True)
        ]
        return float(1 - jnp.mean(jnp.concatenate(cosines)))


def embedding_loss(network: Network, variables: Any) -> Loss:
    """The label-free loss for `hessian_traces`: 1 - cosine with the float network's embeddings.

    At the float parameters this loss and its gradient vanish, but not its Hessian. As the residual is zero there, that
    is the Gauss-Newton matrix J^T B J (B the Hessian of 1 - cosine in the embedding), hence positive semidefinite: the
    exact curvature of the drift that a small change of the weights causes. So neither a perturbed student nor labels
    are needed, and `gauss_newton_traces` of `embedding_drift` estimates the same traces much sooner.

    Args:
        network: the network.
        variables: its float `{"params", "batch_stats"}`; statistics stay as they are.

    Returns:
        (params, waveforms [batch, samples] float in [-1, 1]) -> mean loss.
    """

    def loss(params: Any, waveform: jax.Array) -> jax.Array:
        features, _ = network.frontend(waveform)
        targets: Any = network.module().apply(variables, features)
        embeddings: Any = network.module().apply({**variables, "params": params}, features)
        return 1 - jnp.mean(cosine_similarity(embeddings, jax.lax.stop_gradient(targets), epsilon=_EPSILON))

    return loss


def embedding_drift(network: Network, batch_stats: Any) -> OutputLoss:
    """The same loss for `gauss_newton_traces`; arguments as above, of which only the statistics are needed."""

    def embeddings(params: Any, waveform: jax.Array) -> jax.Array:
        features, _ = network.frontend(waveform)
        found: Any = network.module().apply({"params": params, "batch_stats": batch_stats}, features)
        return found

    return OutputLoss(embeddings, cosine_root)


def layer_choices(
    params: Any,
    paths: Sequence[str],
    quantizers: Sequence[Quantizer],
    sensitivity: Sensitivity,
    *,
    multiplications: Mapping[str, int] | None = None,
    activation_bits: int = 32,
) -> list[Layer]:
    """The layers and what each quantizer would make of them, for `allocate`.

    Args:
        params: float parameters.
        paths: of the layers' kernels.
        quantizers: one for each bit width.
        sensitivity: what they cost.
        multiplications: {path: multiplications for an utterance}, from `layer_multiplications`; bit operations are 0
            where it is absent.
        activation_bits: bits of what the weights are multiplied with.

    Returns:
        One layer for each path; bytes are those of codes and tables in the packed file.

    Raises:
        ValueError: an unknown path, or two quantizers of the same bits.
    """
    leaves = dict(leaf_paths(params))
    unknown = [path for path in paths if path not in leaves]
    if unknown:
        raise ValueError(f"{unknown} are no leaves of the parameters")
    layers = []
    for path in paths:
        choices = []
        for quantizer in quantizers:
            bops = (multiplications or {}).get(path, 0) * quantizer.bits * activation_bits
            cost, size = sensitivity(path, quantizer), storage_bytes(leaves[path], quantizer)
            choices.append(Choice(quantizer.bits, cost, size, float(bops)))
        layers.append(Layer(path, int(leaves[path].size), tuple(choices)))
    return layers


def squared_error(weights: jax.Array, quantizer: Quantizer) -> float:
    """|Q(W) - W|^2, the sum over the tensor."""
    return float(_squared_error(weights, quantizer))


def storage_bytes(weights: jax.Array, quantizer: Quantizer) -> int:
    """Bytes of codes and tables in the packed file; nothing is computed."""
    packed = jax.eval_shape(lambda leaf: quantizer.quantize(leaf, quantizer.init(leaf)), weights)
    return -(-packed.code_bits // 8) + packed.table_bits // 8


@functools.partial(jax.jit, static_argnums=1)
def _squared_error(weights: jax.Array, quantizer: Quantizer) -> jax.Array:
    wide = weights.astype(jnp.float32)
    return jnp.sum(jnp.square(quantizer.fake_quantize(wide, quantizer.init(wide)) - wide))
