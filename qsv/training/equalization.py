"""Networks that compute the same with channels of like size, so that one scale a tensor suits all of them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qsv.models import Network
from qsv.models.batch_norm import EPSILON, BatchNorm
from qsv.quant import leaf_paths, with_leaves

# Scales of channels are kept within this factor of 1: more would hide an empty channel in rounding errors.
_LARGEST_SCALE = 100.0
_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class ScaleFreedom:
    """Where channels can be scaled and scaled back without a change of what a network computes.

    Attributes:
        readers: {path of a batch normalisation: paths of all layers that read its output}, where nothing but
            rectifiers, means and the like, which hand a factor on, is between them.
        norms: {path of a layer: path of the batch normalisation that takes its output}.
    """

    readers: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a network made of a waveform: its embedding, and by path every layer's and normalisation's input."""

    embedding: np.ndarray
    inputs: Mapping[str, np.ndarray]


def scale_freedom(network: Network, variables: Any, waveform: jax.Array) -> ScaleFreedom:
    """Find the places by trying: half of the channels are doubled at one end and halved at the other.

    A factor of two is exact in floating point, so where the network is free the embedding stays the same to the last
    bit. That needs no knowledge of the architecture. It takes a run for each normalisation and each layer, so the
    waveform should be short.

    Args:
        network: the network.
        variables: its float `{"params", "batch_stats"}`.
        waveform: [batch, samples] float in [-1, 1], of speech or noise.
    """
    run = _runner(network, waveform)
    leaves = dict(leaf_paths(variables))
    before = run(variables)
    norms = [
        path for path in before.inputs if f"params/{path}/scale" in leaves and f"batch_stats/{path}/mean" in leaves
    ]
    layers = [path for path in before.inputs if f"params/{path}/kernel" in leaves]
    readers, following = {}, {}
    for norm in norms:
        scales = _half_doubled(leaves[f"params/{norm}/scale"].size)
        doubled = _with_scaled_norm(variables, norm, scales)
        changed = run(doubled)
        found = tuple(
            layer
            for layer in layers
            if _reads(leaves[f"params/{layer}/kernel"], scales)
            and np.array_equal(changed.inputs[layer], before.inputs[layer] * scales)
            and np.any(changed.inputs[layer] != before.inputs[layer])
        )
        if found and _same(run(_with_scaled_readers(doubled, found, 1 / scales)), before):
            readers[norm] = found
    for layer in layers:
        scales = _half_doubled(leaves[f"params/{layer}/kernel"].shape[-1])
        doubled = _with_scaled_outputs(variables, layer, scales)
        changed = run(doubled)
        for norm in norms:
            if leaves[f"params/{norm}/scale"].size != scales.size or np.array_equal(
                changed.inputs[norm], before.inputs[norm]
            ):
                continue
            if _same(run(_with_absorbed_scales(doubled, norm, scales)), before):
                following[layer] = norm
                break
    return ScaleFreedom(readers, following)


def equalize(network: Network, variables: Any, waveforms: Iterable[Any], freedom: ScaleFreedom) -> Any:
    """Channels brought to like size: those that layers put out, and those between a normalisation and its readers.

        outputs:  w[..., c] <- w[..., c] max|w| / max|w[..., c]|,   undone by the normalisation behind
        inputs:   s_c = sqrt(max|x_c| / max|w[..., c, :]|),   x_c <- x_c / s_c in the normalisation,
                  w[..., c, :] <- w[..., c, :] s_c in all readers, whose largest weight counts

    Args:
        network: the network.
        variables: its float `{"params", "batch_stats"}`.
        waveforms: batches [batch, samples] float in [-1, 1], whose activations are measured.
        freedom: from `scale_freedom`.

    Returns:
        Variables of a network that computes the same up to rounding.

    Raises:
        ValueError: there are no batches.

    Source: cross-layer equalization, Nagel et al. 2019 (arXiv 1906.04721), with measured ranges of the activations in
    place of those of the next kernel's inputs, and without folding: batch normalisations carry the factors.
    """
    largest = _largest_inputs(network, variables, waveforms, [path for own in freedom.readers.values() for path in own])
    for norm, readers in freedom.readers.items():
        leaves = dict(leaf_paths(variables))
        activation = np.max([largest[layer] for layer in readers], axis=0)
        weight = np.max([_largest_weights(leaves[f"params/{layer}/kernel"], activation.size) for layer in readers], 0)
        scales = _bounded(np.sqrt(activation / np.maximum(weight, _TINY)), (activation > 0) & (weight > 0))
        variables = _with_scaled_norm(variables, norm, 1 / scales)
        variables = _with_scaled_readers(variables, readers, scales)
    for layer, norm in freedom.norms.items():
        kernel = np.abs(dict(leaf_paths(variables))[f"params/{layer}/kernel"])
        own = kernel.max(axis=tuple(range(kernel.ndim - 1)))
        scales = _bounded(kernel.max() / np.maximum(own, _TINY), own > 0)
        variables = _with_scaled_outputs(variables, layer, scales)
        variables = _with_absorbed_scales(variables, norm, scales)
    return variables


def _bounded(scales: np.ndarray, is_known: np.ndarray) -> np.ndarray:
    """[channels] float32 within the largest factor of 1; 1 where nothing is known."""
    return np.where(is_known, np.clip(scales, 1 / _LARGEST_SCALE, _LARGEST_SCALE), 1).astype(np.float32)


def _half_doubled(channels: int) -> np.ndarray:
    """[channels] float32: 2 for every second one, also where there is one only."""
    return np.where(np.arange(channels) % 2 == 0, 2, 1).astype(np.float32)


def _reads(kernel: jax.Array, scales: np.ndarray) -> bool:
    """Whether the channels are a kernel's inputs: all of them in every output, or one each (depthwise)."""
    return kernel.shape[-2] == scales.size or _is_depthwise(kernel, scales)


def _is_depthwise(kernel: jax.Array, scales: np.ndarray) -> bool:
    return kernel.shape[-2] == 1 and kernel.shape[-1] == scales.size and scales.size > 1


def _largest_weights(kernel: jax.Array, channels: int) -> np.ndarray:
    """[channels] largest magnitude of the weights that an input channel meets."""
    magnitudes = np.abs(np.asarray(kernel))
    axis = -1 if _is_depthwise(kernel, np.ones(channels)) else -2
    return np.max(magnitudes, axis=tuple(a for a in range(magnitudes.ndim) if a != axis % magnitudes.ndim))


def _with_scaled_norm(variables: Any, norm: str, scales: np.ndarray) -> Any:
    """The outputs of a normalisation times factors."""
    leaves = dict(leaf_paths(variables))
    names = [f"params/{norm}/{name}" for name in ("scale", "bias")]
    return with_leaves(variables, {name: leaves[name] * scales for name in names})


def _with_scaled_readers(variables: Any, layers: Iterable[str], scales: np.ndarray) -> Any:
    """The weights that meet input channels times factors."""
    leaves = dict(leaf_paths(variables))
    changed = {}
    for layer in layers:
        kernel = leaves[f"params/{layer}/kernel"]
        factors = scales if _is_depthwise(kernel, scales) else scales[:, None]
        changed[f"params/{layer}/kernel"] = kernel * factors
    return with_leaves(variables, changed)


def _with_scaled_outputs(variables: Any, layer: str, scales: np.ndarray) -> Any:
    """The outputs of a layer times factors."""
    leaves = dict(leaf_paths(variables))
    names = [name for name in (f"params/{layer}/kernel", f"params/{layer}/bias") if name in leaves]
    return with_leaves(variables, {name: leaves[name] * scales for name in names})


def _with_absorbed_scales(variables: Any, norm: str, scales: np.ndarray) -> Any:
    """A normalisation that gives what it gave, of inputs that are multiplied by factors."""
    leaves = dict(leaf_paths(variables))
    mean, var, scale = (f"batch_stats/{norm}/mean", f"batch_stats/{norm}/var", f"params/{norm}/scale")
    moved = leaves[var] * np.square(scales)
    # The epsilon isn't scaled with the variance, so the rest of the factor goes to the scale.
    slope = leaves[scale] * jnp.sqrt((moved + EPSILON) / (leaves[var] + EPSILON)) / scales
    return with_leaves(variables, {mean: leaves[mean] * scales, var: moved, scale: slope})


def _same(run: _Run, before: _Run) -> bool:
    return np.allclose(run.embedding, before.embedding, rtol=1e-4, atol=1e-5 * np.abs(before.embedding).max())


def _runner(network: Network, waveform: jax.Array) -> Any:
    features, _ = network.frontend(jnp.asarray(waveform))

    @jax.jit
    def run(variables: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return _with_inputs(network, variables, features, lambda values: values)

    def run_on_host(variables: Any) -> _Run:
        embedding, inputs = jax.device_get(run(variables))
        return _Run(embedding, inputs)

    return run_on_host


def _with_inputs(network: Network, variables: Any, features: jax.Array, of_input: Any) -> tuple[jax.Array, Any]:
    """The embeddings, and {path: what a function makes of the input} of every layer and normalisation."""
    inputs: dict[str, jax.Array] = {}

    def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(
            context.module, nn.Conv | nn.Dense | nn.BatchNorm | BatchNorm
        ):
            inputs["/".join(context.module.path)] = of_input(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        embedding: Any = network.module().apply(variables, features)
    return embedding, inputs


def _largest_inputs(
    network: Network, variables: Any, waveforms: Iterable[Any], layers: list[str]
) -> dict[str, np.ndarray]:
    """{layer: [channels] largest magnitude of its input's channels over all speech}."""

    @jax.jit
    def measure(variables: Any, waveform: jax.Array) -> dict[str, jax.Array]:
        features, _ = network.frontend(waveform)

        def largest(values: jax.Array) -> jax.Array:
            return jnp.max(jnp.abs(values), axis=tuple(range(values.ndim - 1)))

        _, inputs = _with_inputs(network, variables, features, largest)
        return {layer: inputs[layer] for layer in layers}

    found: dict[str, np.ndarray] = {}
    for waveform in waveforms:
        for layer, own in jax.device_get(measure(variables, jnp.asarray(waveform))).items():
            found[layer] = np.maximum(found[layer], own) if layer in found else own
    if layers and not found:
        raise ValueError("equalization needs at least one batch of speech")
    return found
