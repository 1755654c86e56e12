"""Quantized activations of any network: what every layer is given, on the levels of its range."""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from qsv.models import Network
from qsv.quant import ActivationQuantizer, ActivationRange, calibrate_range
from qsv.quant.activations import RangeMethod

# Enough for a percentile of 99.99; the smallest and the largest value are always kept.
_VALUES_PER_LAYER = 2**18

OnInput = Callable[[str, jax.Array], jax.Array]


@contextlib.contextmanager
def quantized_inputs(quantizer: ActivationQuantizer, ranges: Mapping[str, ActivationRange]) -> Iterator[None]:
    """Inside, the inputs of the layers named are put on their levels whenever a Linen module is applied.

    Works under `jax.jit` and `jax.grad`, with the ranges as arguments of what is transformed: they can be learnt.

    Args:
        quantizer: of all of them.
        ranges: {path of a convolution or dense layer: range of its input}, from `calibrate_activations`.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from qsv.quant import ActivationQuantizer, ActivationRange
    >>> dense = nn.Dense(1, use_bias=False, kernel_init=nn.initializers.ones, name="dense")
    >>> net = nn.Sequential([dense])
    >>> variables = net.init(jax.random.key(0), jnp.ones((1, 1)))
    >>> ranges = {"layers_0": ActivationRange(jnp.float32(0), jnp.float32(3))}
    >>> with quantized_inputs(ActivationQuantizer(2), ranges):
    ...     float(net.apply(variables, jnp.full((1, 1), 1.4))[0, 0])
    1.0
    """

    def quantize(path: str, values: jax.Array) -> jax.Array:
        return quantizer.fake_quantize(values, ranges[path]) if path in ranges else values

    with nn.intercept_methods(_on_inputs(quantize)):
        yield


def calibrate_activations(
    network: Network,
    variables: Any,
    waveforms: Iterable[Any],
    quantizer: ActivationQuantizer,
    *,
    method: RangeMethod = "mse",
    percentile: float = 99.99,
    pattern: str = ".*",
) -> dict[str, ActivationRange]:
    """A range for the input of every convolution and dense layer.

    Args:
        network: the network.
        variables: its `{"params", "batch_stats"}`, with quantized weights where these will be.
        waveforms: batches [batch, samples], float in [-1, 1]; full rows of any speech.
        quantizer: whose codes will cover the ranges.
        method: as in `calibrate_range`.
        percentile: as there.
        pattern: regular expression over whole paths of the layers; others stay float.

    Returns:
        {path: range}, one scalar range a layer, in the order of computation.

    Raises:
        ValueError: no batches, a pattern that fits no layer, or values that aren't finite.
    """
    expression = re.compile(pattern)
    seen: dict[str, list[np.ndarray]] = {}
    count = 0
    for waveform in waveforms:
        count += 1
        for path, values in _sampled_inputs(network, variables, jnp.asarray(waveform)).items():
            seen.setdefault(path, []).append(np.asarray(values))
    if not count:
        raise ValueError("ranges need at least one batch of speech")
    order = _layer_order(network, variables, jnp.asarray(waveform))
    chosen = [path for path in order if expression.fullmatch(path)]
    if not chosen:
        raise ValueError(f"{pattern!r} fits no layer; there are {order[:5]} ...")
    return {path: calibrate_range(seen[path], quantizer, method=method, percentile=percentile) for path in chosen}


@functools.partial(jax.jit, static_argnums=0)
def _sampled_inputs(network: Network, variables: Any, waveform: jax.Array) -> dict[str, jax.Array]:
    """Values of every layer's input: some, evenly, with the smallest and the largest."""
    kept: dict[str, jax.Array] = {}

    def keep(path: str, values: jax.Array) -> jax.Array:
        flat = values.astype(jnp.float32).ravel()
        # An odd stride doesn't pick the same channel always.
        some = flat[:: (-(-flat.size // _VALUES_PER_LAYER)) | 1]
        kept[path] = jnp.concatenate([some, jnp.stack([flat.min(), flat.max()])])
        return values

    _apply(network, variables, waveform, keep)
    return kept


def _layer_order(network: Network, variables: Any, waveform: jax.Array) -> list[str]:
    paths: list[str] = []

    def note(path: str, values: jax.Array) -> jax.Array:
        paths.append(path)
        return values

    jax.eval_shape(lambda: _apply(network, variables, waveform, note))
    return list(dict.fromkeys(paths))


def _apply(network: Network, variables: Any, waveform: jax.Array, on_input: OnInput) -> Any:
    features, _ = network.frontend(waveform)
    with nn.intercept_methods(_on_inputs(on_input)):
        return network.module().apply(variables, features)


def _on_inputs(on_input: OnInput) -> Callable[..., Any]:
    """An interceptor that hands the input of every convolution and dense layer through a function."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Conv | nn.Dense):
            return call(*args, **kwargs)
        return call(on_input("/".join(layer.path), args[0]), *args[1:], **kwargs)

    return intercept
