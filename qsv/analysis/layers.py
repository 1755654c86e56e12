"""What quantization changed layer by layer: in the weights, and in what the layers compute."""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from qsv.analysis.levels import nearest_levels, quantized_pairs
from qsv.models import GE2E, Network
from qsv.models.ge2e import lstm_sequences
from qsv.quant import Plan, QTensor, leaf_paths, quantize, with_leaves
from qsv.quant.transform import States

# Standardized weights further out belong to the last bins of a density.
_DENSITY_RANGE = 5.0
_DENSITY_BINS = 256
# Total variation of the standard normal density: up to 1 / sqrt(2 pi) and down again.
_NORMAL_VARIATION = 2 / math.sqrt(2 * math.pi)


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How far values moved from where they were.

    Attributes:
        relative_error: |q - x| / |x|, of Euclidean norms.
        cosine: of the angle between q and x.
        sqnr_db: signal-to-quantization-noise ratio, -20 log10 of the relative error; infinite without any error.
    """

    relative_error: float
    cosine: float
    sqnr_db: float

    @classmethod
    def of_sums(cls, reference: float, changed: float, squared_error: float) -> "Distortion":
        """From |x|^2, |q|^2 and |q - x|^2; of zeros nothing can be lost.

        The error is a sum of its own, since as |x|^2 + |q|^2 - 2 x . q a small one is lost in float32's rounding.
        """
        product = (reference + changed - squared_error) / 2
        if reference <= 0:
            relative = 0.0 if changed <= 0 else math.inf
        else:
            relative = math.sqrt(squared_error / reference)
        lengths = math.sqrt(reference * changed)
        cosine = min(product / lengths, 1.0) if lengths > 0 else float(reference == changed)
        return cls(relative, cosine, -20 * math.log10(relative) if relative > 0 else math.inf)


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """A float kernel, and what its quantizer's levels make of it.

    Attributes:
        path: of the kernel.
        size: weights.
        bits: of a code.
        distortion: of the float weights moved to the nearest level, see `nearest_levels`.
        kurtosis: excess kurtosis of the float weights, 0 for normal ones; more where few weights are far out.
        smoothness: see `smoothness`.
        code_entropy_bits: entropy of the network's own codes; the levels are used evenly where it is `bits`.
    """

    path: str
    size: int
    bits: int
    distortion: Distortion
    kurtosis: float
    smoothness: float
    code_entropy_bits: float


def weight_statistics(plan: Plan, params: Any, qstate: States) -> list[LayerWeights]:
    """How every planned kernel is distributed, and what its levels do to it.

    Args:
        plan: from `qsv.resolve`.
        params: the float parameters.
        qstate: from `qsv.init`, or of a training.

    Returns:
        One row for each quantized leaf, in the plan's order.
    """
    of_deviation = [
        path for path, own in plan.quantized.items() if getattr(own, "normalization", "none") == "standardize"
    ]
    return packed_weight_statistics(params, quantize(plan, params, qstate), standardized=of_deviation)


def packed_weight_statistics(params: Any, packed: Any, *, standardized: Collection[str] = ()) -> list[LayerWeights]:
    """`weight_statistics` of a packed network beside the float one that it came from.

    Args:
        params: as for `nearest_levels`, and so are the next two.
        packed: as there.
        standardized: as there.

    Raises:
        ValueError: as there.
    """
    rounded = dict(leaf_paths(nearest_levels(params, packed, standardized=standardized)))
    return [_weights_row(path, *pair, rounded[path]) for path, pair in quantized_pairs(params, packed).items()]


def _weights_row(path: str, weights: jax.Array, packed: QTensor, rounded: jax.Array) -> LayerWeights:
    values, levels = (np.asarray(own, np.float64).ravel() for own in (weights, rounded))
    sums = (float(np.vdot(own, own)) for own in (values, levels, levels - values))
    shares = np.bincount(np.asarray(packed.codes).ravel()) / max(values.size, 1)
    constant = values.size == 0 or np.ptp(values) == 0
    return LayerWeights(
        path=path,
        size=values.size,
        bits=packed.bits,
        distortion=Distortion.of_sums(*sums),
        kurtosis=0.0 if constant else float(stats.kurtosis(values)),
        smoothness=smoothness(values),
        code_entropy_bits=float(stats.entropy(shares, base=2)) if values.size else 0.0,
    )


def smoothness(weights: ArrayLike) -> float:
    """How smooth the distribution of weights is: 1 for normal ones, less for peaked or ragged ones.

        smoothness = TV(normal density) / TV(density of the standardized weights),   TV(f) = sum_i |f_i+1 - f_i|

    The density is a histogram on 256 bins over five deviations either side, smoothed by a Gaussian kernel of Scott's
    width. A flat distribution comes to 1.4, Laplace's to 0.6; a second peak adds to the variation, too.

    Args:
        weights: any shape.

    Returns:
        0 where all weights are equal, or there are none.

    Source: ours; Li et al. 2022 (arXiv 2210.17326) speak of smoothness by the look of histograms.
    """
    values = np.asarray(weights, np.float64).ravel()
    deviation = values.std() if values.size else 0.0
    if deviation == 0:
        return 0.0
    standardized = np.clip((values - values.mean()) / deviation, -_DENSITY_RANGE, _DENSITY_RANGE)
    density, edges = np.histogram(standardized, _DENSITY_BINS, (-_DENSITY_RANGE, _DENSITY_RANGE), density=True)
    width = values.size**-0.2
    kernel = stats.norm.pdf(np.arange(-4 * width, 4 * width + 1e-9, edges[1] - edges[0]), scale=width)
    smoothed = np.convolve(density, kernel / kernel.sum())
    return float(_NORMAL_VARIATION / np.abs(np.diff(smoothed, prepend=0, append=0)).sum())


@dataclasses.dataclass(frozen=True)
class LayerDrift:
    """How much a layer's output changed, by its own quantization and by all that went before.

    Attributes:
        path: of the layer.
        distortion: of its output, over all positions of all utterances.
    """

    path: str
    distortion: Distortion


def activation_drift(
    network: Network, variables: Any, quantized_variables: Any, waveforms: Iterable[Any]
) -> list[LayerDrift]:
    """Drift of the output of every convolution, dense layer and LSTM, in the order in which they are computed.

    Args:
        network: the network.
        variables: its float `{"params", "batch_stats"}`.
        quantized_variables: the same of the quantized network, its levels as floats.
        waveforms: batches [batch, samples], float in [-1, 1]; full rows, so that no padding is compared.

    Raises:
        ValueError: no batches.
    """
    names: list[str] = []
    totals: Any = None
    for waveform in waveforms:
        sums = np.asarray(_output_sums(network, variables, quantized_variables, jnp.asarray(waveform)), np.float64)
        totals = sums if totals is None else totals + sums
        names = names or _layer_names(network, variables, jnp.asarray(waveform))
    if totals is None:
        raise ValueError("drift needs at least one batch of speech")
    return [LayerDrift(name, Distortion.of_sums(*row)) for name, row in zip(names, totals, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _output_sums(network: Network, variables: Any, quantized_variables: Any, waveform: jax.Array) -> jax.Array:
    """[layers, 3]: |x|^2, |q|^2 and |q - x|^2 of every layer's outputs."""
    pairs = zip(
        _layer_outputs(network, variables, waveform),
        _layer_outputs(network, quantized_variables, waveform),
        strict=True,
    )
    sums = [[jnp.vdot(own, own) for own in (x, q, q - x)] for (_, x), (_, q) in pairs]
    return jnp.array(sums)


def _layer_names(network: Network, variables: Any, waveform: jax.Array) -> list[str]:
    names: list[str] = []

    def trace() -> None:
        names.extend(name for name, _ in _layer_outputs(network, variables, waveform))

    jax.eval_shape(trace)
    return names


def _layer_outputs(network: Network, variables: Any, waveform: jax.Array) -> list[tuple[str, jax.Array]]:
    """(path, output in float32) in the order of computation."""
    outputs: list[tuple[str, jax.Array]] = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        result, layer = call(*args, **kwargs), context.module
        if isinstance(layer, nn.Conv | nn.Dense) and context.method_name == "__call__":
            outputs.append(("/".join(layer.path), result.astype(jnp.float32)))
        elif isinstance(layer, GE2E) and context.method_name == "stacked_lstm":
            sequences = enumerate(lstm_sequences(*args), start=1)
            outputs.extend((f"lstm{index}", own.astype(jnp.float32)) for index, own in sequences)
        return result

    features, _ = network.frontend(waveform)
    with nn.intercept_methods(intercept):
        network.module().apply(variables, features)
    return outputs


def with_layers_of(params: Any, others: Any, paths: Iterable[str]) -> Any:
    """The parameters with some leaves from another tree: one layer quantized in a float network, or the reverse.

    Args:
        params: parameters, as floats.
        others: a tree of the same form.
        paths: of the leaves that come from `others`.

    Raises:
        ValueError: there is no such leaf.
    """
    leaves, wanted = dict(leaf_paths(others)), tuple(paths)
    unknown = [path for path in wanted if path not in leaves]
    if unknown:
        raise ValueError(f"{unknown} are no leaves of the parameters")
    return with_leaves(params, {path: leaves[path] for path in wanted})


def grouped_paths(paths: Sequence[str], depth: int) -> dict[str, tuple[str, ...]]:
    """Paths that begin with the same `depth` components, by that beginning; each by itself where `depth` is 0.

    >>> grouped_paths(["stem/kernel", "block1/conv1/kernel", "block1/conv2/kernel"], 1)
    {'stem': ('stem/kernel',), 'block1': ('block1/conv1/kernel', 'block1/conv2/kernel')}
    """
    if depth < 0:
        raise ValueError(f"depth can't be negative, got {depth}")
    groups: dict[str, tuple[str, ...]] = {}
    for path in paths:
        name = "/".join(path.split("/")[:depth]) if depth else path
        groups[name] = (*groups.get(name, ()), path)
    return groups
