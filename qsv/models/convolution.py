"""A convolution whose gradients are fast on CPU, for `flax.linen.Conv(conv_general_dilated=...)`."""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero, zero_from_primal

LAYOUT = ("NHWC", "HWIO", "NHWC")

# XLA's CPU weight gradient keeps up below this width, where the patches only cost memory traffic.
MIN_CHANNELS = 32

IMAGES_PER_STEP = 2

Pair = tuple[int, int]
Edges = tuple[Pair, Pair]
Convolve = Callable[[jax.Array, jax.Array, Pair, Edges], jax.Array]

_PORTABLE = contextvars.ContextVar("portable", default=False)


@contextlib.contextmanager
def portable_convolutions() -> Generator[None]:
    """Within it every convolution is traced as one operation, as exporters and other devices want it."""
    token = _PORTABLE.set(True)
    try:
        yield
    finally:
        _PORTABLE.reset(token)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """Convolve as `jax.lax.conv_general_dilated` does, with faster gradients on CPU.

    The weight gradient of a wide layer is summed over pairs of images, whose patches stay in cache:
    `dw = sum_pairs patches(x)^T dy`. Forward and input gradient are XLA's. A depthwise layer, whose channels are
    each convolved by themselves, becomes a sum of shifted products, forwards and backwards, which is some ten
    times faster than XLA's convolution in groups. All derivatives are ordinary JAX operations behind
    `jax.custom_jvp`, so forward mode, `jvp` of `grad` and `vmap` work. Within `portable_convolutions` all is
    XLA's.

    The rules serve 2-D NHWC/HWIO convolutions in float32 and float64, without dilation, a set precision or string
    padding, which are depthwise, or have no groups and are 1x1 or at least `MIN_CHANNELS` wide; all else is XLA's.
    The backend is `jax.default_backend()` when traced: all rules are right on every device, so a computation traced
    for another one is at worst slower, whereas `jax.lax.platform_dependent` would put a branch into every layer and
    keep what either rule saves for the backward pass. Split a batch over devices with `jax.shard_map`, not by
    auto-sharding, which has to gather the batch to walk over it; there, pass `jax.lax.conv_general_dilated`.

    Args:
        lhs: activations, `[batch, height, width, channels]`.
        rhs: kernel, `[height, width, channels, features]`, of the same dtype.
        window_strides: stride in height and width.
        padding: `'SAME'`, `'VALID'` or (low, high) for height and width.
        lhs_dilation: as in `jax.lax.conv_general_dilated`, like all that follow.
        rhs_dilation: spacing of the kernel's taps.
        dimension_numbers: layouts of lhs, rhs and output.
        feature_group_count: groups of channels.
        batch_group_count: groups of images.
        precision: of the products.
        preferred_element_type: dtype to accumulate in.

    Returns:
        `[batch, height_out, width_out, features]`, equal to XLA's.
    """
    plain = (
        jax.default_backend() == "cpu"
        and not _PORTABLE.get()
        and lhs.ndim == rhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.float64)
        and lhs.size > 0
        and (isinstance(padding, str) or all(edge >= 0 for pair in padding for edge in pair))
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and batch_group_count == 1
        and precision is None
        and preferred_element_type is None
        and _is_channels_last(lhs, rhs, dimension_numbers)
    )
    if plain and not isinstance(padding, str):
        (top, bottom), (left, right) = padding
        (down, across) = window_strides
        arguments = (lhs, rhs, (down, across), ((top, bottom), (left, right)))
        if feature_group_count == 1 and (rhs.shape[:2] == (1, 1) or min(rhs.shape[2:]) >= MIN_CHANNELS):
            return _convolve(*arguments)
        if feature_group_count == lhs.shape[-1] == rhs.shape[-1] > 1:
            return _convolve_channels(*arguments)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def _is_channels_last(lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any) -> bool:
    wanted = lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
    return bool(lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers) == wanted)


def _bilinear(convolve: Convolve, convolve_by_kernel: Convolve) -> Convolve:
    """A convolution with its derivative: one function for a tangent of the images, another for one of the kernel."""
    convolution = jax.custom_jvp(convolve, nondiff_argnums=(2, 3))

    def derivative(strides: Pair, padding: Edges, primals: Any, tangents: Any) -> tuple[Any, Any]:
        images, kernel = primals
        images_dot, kernel_dot = tangents
        out = convolution(images, kernel, strides, padding)
        # The first layer's input has no tangent: its zeros must not be convolved.
        terms = []
        if not isinstance(images_dot, SymbolicZero):
            terms.append(convolution(images_dot, kernel, strides, padding))
        if not isinstance(kernel_dot, SymbolicZero):
            terms.append(convolve_by_kernel(images, kernel_dot, strides, padding))
        return out, sum(terms[1:], terms[0]) if terms else zero_from_primal(out, symbolic_zeros=True)

    convolution.defjvp(derivative, symbolic_zeros=True)
    return convolution


def _whole(images: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges) -> jax.Array:
    return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=LAYOUT)


def _convolve_patches(images: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges) -> jax.Array:
    """`patches(images) @ kernel`, a few images at a time: its transpose in kernel is the weight gradient."""
    kernel = _varying_like(kernel, images)
    if kernel.shape[:2] == (1, 1):
        return _patches(images, (1, 1), strides, padding) @ kernel[0, 0]

    # Rematerialized, because the patches of all images would otherwise be kept for the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def multiply(some: jax.Array, matrix: jax.Array) -> jax.Array:
        return _patches(some, (kernel.shape[0], kernel.shape[1]), strides, padding) @ matrix

    matrix = kernel.reshape(-1, kernel.shape[-1])
    batch = images.shape[0]
    together = IMAGES_PER_STEP if batch % IMAGES_PER_STEP == 0 else 1
    steps = images.reshape(batch // together, together, *images.shape[1:])
    out = lax.map(lambda some: multiply(some, matrix), steps)
    return out.reshape(batch, *out.shape[2:])


def _patches(images: jax.Array, size: Pair, strides: Pair, padding: Edges) -> jax.Array:
    """The window under every output, `[batch, height_out, width_out, taps * channels]`, taps row by row."""
    return jnp.concatenate(_windows(images, size, strides, padding), axis=-1)


def _windows(images: jax.Array, size: Pair, strides: Pair, padding: Edges) -> list[jax.Array]:
    """What each tap of a kernel meets, `[batch, height_out, width_out, channels]`, taps row by row."""
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    batch, height, width, channels = padded.shape
    rows = (height - size[0]) // strides[0] * strides[0] + 1
    columns = (width - size[1]) // strides[1] * strides[1] + 1
    return [
        lax.slice(padded, (0, i, j, 0), (batch, i + rows, j + columns, channels), (1, *strides, 1))
        for i in range(size[0])
        for j in range(size[1])
    ]


def _shifted_products(images: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges) -> jax.Array:
    taps = kernel.reshape(-1, kernel.shape[-1])
    windows = _windows(images, (kernel.shape[0], kernel.shape[1]), strides, padding)
    return functools.reduce(jnp.add, [window * tap for window, tap in zip(windows, taps, strict=True)])


def _products_by_image(images: jax.Array, kernel: jax.Array, strides: Pair, padding: Edges) -> jax.Array:
    """The same, image by image: its transpose in kernel is the weight gradient, whose products stay in cache."""
    kernel = _varying_like(kernel, images)
    size, taps = (kernel.shape[0], kernel.shape[1]), kernel.reshape(-1, 1, kernel.shape[-1])

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def multiply(image: jax.Array, taps: jax.Array) -> jax.Array:
        windows = _windows(image[None], size, strides, padding)
        # The product with ones transposes to one too, which is twice as fast as XLA's sum over rows and columns.
        ones = jnp.ones((math.prod(windows[0].shape[:-1]), 1), taps.dtype)
        products = [window * (ones @ tap).reshape(window.shape) for window, tap in zip(windows, taps, strict=True)]
        return functools.reduce(jnp.add, products)[0]

    return lax.map(lambda image: multiply(image, taps), images)


def _varying_like(kernel: jax.Array, images: jax.Array) -> jax.Array:
    """A kernel for a loop over images: inside shard_map its gradient is summed over devices after it, not in it."""
    varying = jax.typeof(images).manual_axis_type.varying - jax.typeof(kernel).manual_axis_type.varying
    return lax.pcast(kernel, tuple(varying), to="varying") if varying else kernel


_convolve = _bilinear(_whole, _convolve_patches)
_convolve_channels = _bilinear(_shifted_products, _products_by_image)
