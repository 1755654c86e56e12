"""A reference of a network in integers: what a device with 8-bit arithmetic computes, to the last bit."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from jax import lax

from qsv.models import OUTPUT, Network, activation_points
from qsv.quant import QTensor, QuantizedActivations, dequantize, leaf_paths

# Steps on either side of zero that a codebook in [-1, 1] may have: those of int8, of uniform levels of fewer bits, of
# powers of two.
_GRIDS = (127, 63, 31, 15, 7, 3, 1, 64, 32, 16, 8, 4, 2)
_GRID_TOLERANCE = 1e-3
_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC")}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weights", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class IntegerLayer:
    """A kernel in int8.

    Attributes:
        weights: int8 of the kernel's shape.
        scale: float32, a scalar or [outputs]: the kernel is `scale * weights`.
    """

    weights: jax.Array
    scale: jax.Array


def integer_layer(packed: QTensor) -> IntegerLayer:
    """A quantized kernel in int8, without loss.

    Args:
        packed: of `Uniform`, `PowerOfTwo` up to 4 bits, or `KMeans(integer_levels=True)`; one scale for the tensor or
            one for each output.

    Raises:
        ValueError: its levels aren't on an int8 grid, or its scales are of other axes than the outputs'.
    """
    levels, scale = int8_levels(packed)
    whole = dataclasses.replace(packed, codebook=jnp.asarray(levels, jnp.float32), scale=jnp.ones((), jnp.float32))
    return IntegerLayer(whole.dequantize().astype(jnp.int8), jnp.asarray(scale))


def int8_levels(packed: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """The codebook in int8, and what it is to be multiplied by, float32: a scalar, or [outputs]; errors as above."""
    codebook, scale, outputs = np.asarray(packed.codebook), np.asarray(packed.scale, np.float32), packed.shape[-1]
    if scale.size not in (1, outputs) or (scale.ndim and scale.shape[-1] not in (1, outputs)):
        raise ValueError(f"scales must be of the tensor or of its {outputs} outputs, got shape {scale.shape}")
    for steps in _GRIDS:
        levels = np.round(codebook * steps)
        if np.all(np.abs(codebook * steps - levels) <= _GRID_TOLERANCE):
            own = scale.reshape(-1) if scale.size > 1 else scale.reshape(())
            return levels.astype(np.int8), np.asarray(own / np.float32(steps))
    raise ValueError("levels must be on an int8 grid; quantize with KMeans(..., integer_levels=True) or Uniform")


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network whose convolutions and dense layers multiply and add integers.

        x = round(x / s_x) + z_x in uint8 (or int8),   a = sum (x - z_x) w in int32,   y = s_x s_w a + b in float32

    A layer's output gets codes of its own, after the normalisation behind it, where a sum or a product reads it. What
    is between the layers (normalisations, rectifiers, sums, pooling) is computed in float32 from codes and gives codes
    again; it is a few operations a value where the layers have hundreds. A fake-quantized network
    (`qsv.models.quantized_activations` around weights from `qsv.fake_quantize`) computes the same up to the rounding
    of its float sums: a layer's codes differ by one step at most, given the same inputs.

    Attributes:
        network: the network.
        layers: {path of a convolution or dense layer: its kernel}; the others are computed in float.
        variables: `{"params", "batch_stats"}` of floats, for all else.
        activations: codes of the layers' inputs and outputs, from `qsv.training.calibrate_activations`.

    Raises:
        ValueError: a layer has no range.
    """

    network: Network
    layers: Mapping[str, IntegerLayer]
    variables: Mapping[str, Any]
    activations: QuantizedActivations

    def __post_init__(self) -> None:
        points = activation_points(self.network).inputs
        missing = [path for path in points if path in self.layers and points[path] not in self.activations.ranges]
        if missing:
            raise ValueError(f"{len(missing)} layers have no range of their input, such as {missing[0]}")

    @classmethod
    def of(
        cls,
        network: Network,
        packed_params: Any,
        batch_stats: Any,
        activations: QuantizedActivations,
    ) -> "IntegerNetwork":
        """The integer network of packed parameters; kernels that are float stay so.

        Args:
            network: the network.
            packed_params: from `qsv.quantize`.
            batch_stats: running statistics.
            activations: codes of the layers' inputs and outputs, with a range for every input of a layer whose kernel
                is quantized.

        Raises:
            ValueError: a kernel's levels aren't on an int8 grid, or a layer has no range.
        """
        layers = {}
        for path, leaf in leaf_paths(packed_params):
            if isinstance(leaf, QTensor) and path.endswith("/kernel"):
                try:
                    layers[path.removesuffix("/kernel")] = integer_layer(leaf)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        floats = {"params": dequantize(packed_params), "batch_stats": batch_stats}
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), floats)
        return cls(network, layers, variables, activations)

    def embed(self, waveform: jax.Array) -> jax.Array:
        """Embeddings [batch, embedding_size] float32 of full rows [batch, samples] float in [-1, 1]."""
        return _run(self.network, self.layers, self.variables, self.activations, waveform)[0]

    def codes(self, waveform: jax.Array) -> dict[str, jax.Array]:
        """{point: codes}, uint8 or int8."""
        return _run(self.network, self.layers, self.variables, self.activations, waveform)[1]


@functools.partial(jax.jit, static_argnums=0)
def _run(
    network: Network,
    layers: Mapping[str, IntegerLayer],
    variables: Mapping[str, Any],
    activations: QuantizedActivations,
    waveform: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    codes: dict[str, jax.Array] = {}
    quantizer, ranges = activations.quantizer, activations.ranges
    # An array is known by being the same object: a block's input is that of its first layer.
    given: list[tuple[jax.Array, str]] = []

    def on_levels(point: str, values: jax.Array) -> jax.Array:
        wide = values.astype(jnp.float32)
        codes[point] = quantizer.quantize(wide, ranges[point])
        return quantizer.dequantize(codes[point], ranges[point])

    def multiplied(module: nn.Conv | nn.Dense, layer: IntegerLayer, point: str) -> jax.Array:
        scale, zero_point = quantizer.grid(ranges[point])
        # Zero is a code, so zeros around an input are zeros after this.
        inputs = codes[point].astype(jnp.int32) - zero_point.astype(jnp.int32)
        sums = _multiply(module, inputs, layer.weights.astype(jnp.int32))
        outputs = sums.astype(jnp.float32) * (scale * layer.scale)
        bias = module.variables["params"].get("bias")
        return outputs if bias is None else outputs + bias

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if path in ranges:
            args = (on_levels(path, args[0]), *args[1:])
            given.append((args[0], path))
        if isinstance(module, nn.Conv | nn.Dense) and path in layers:
            out = multiplied(module, layers[path], next(point for value, point in given if value is args[0]))
        else:
            out = call(*args, **kwargs)
        return on_levels(path + OUTPUT, out) if path + OUTPUT in ranges else out

    features, _ = network.frontend(waveform)
    with nn.intercept_methods(intercept):
        embeddings: Any = network.module().apply(variables, features)
    return embeddings, codes


def _multiply(layer: nn.Conv | nn.Dense, inputs: jax.Array, weights: jax.Array) -> jax.Array:
    """The layer's sums of products in int32; 255 * 127 * 65,000 products fit."""
    if isinstance(layer, nn.Dense):
        return jnp.matmul(inputs, weights)
    axes = weights.ndim - 2
    padding = canonicalize_padding(layer.padding, axes)
    return lax.conv_general_dilated(
        inputs,
        weights,
        _of_each_axis(layer.strides, axes),
        padding,
        rhs_dilation=_of_each_axis(layer.kernel_dilation, axes),
        dimension_numbers=_LAYOUTS[axes],
        feature_group_count=layer.feature_group_count,
        preferred_element_type=jnp.int32,
    )


def _of_each_axis(value: Any, axes: int) -> tuple[int, ...]:
    """A stride or dilation as Linen takes it: None, one number, or one for each axis."""
    if value is None:
        return (1,) * axes
    return (value,) * axes if isinstance(value, int) else tuple(value)
