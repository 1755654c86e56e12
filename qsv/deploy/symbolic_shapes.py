"""Shapes of inputs whose batch and length are free, as JAX traces them."""

import bisect
from typing import Any

import jax
import numpy as np
from jax import export

from qsv.frontend import FrontEnd

# Frames that the deepest pooling needs.
MIN_FRAMES = 16
# How often networks halve the frames, at most.
_HALVINGS = 4

Shape = tuple[Any, ...]


def features_shape(num_features: int) -> Shape:
    """[b, t, num_features] of a network's input."""
    return _symbolic(f"b, t, {num_features}", [f"t >= {MIN_FRAMES}", *_halvings("t")])


def waveform_shape(frontend: FrontEnd, *, network_follows: bool) -> Shape:
    """[b, s] of a front end's input.

    Args:
        frontend: that takes it.
        network_follows: whether a network is traced with it, whose comparisons of sizes need to know more.
    """
    shortest = f"s >= {frontend.min_samples}"
    shape = _symbolic("b, s", [shortest])
    if not network_follows:
        return shape
    frames = str(_features(frontend, shape).shape[1])
    return _symbolic("b, s", [shortest, f"{frames} >= {MIN_FRAMES}", *_halvings(frames)])


def min_samples(frontend: FrontEnd) -> int:
    """The shortest waveform that has frames enough for every network."""
    high = frontend.min_samples
    while _frames(frontend, high) < MIN_FRAMES:
        high *= 2
    return bisect.bisect_left(
        range(high), MIN_FRAMES, lo=frontend.min_samples, key=lambda samples: _frames(frontend, samples)
    )


def _frames(frontend: FrontEnd, samples: int) -> int:
    return int(_features(frontend, (1, samples)).shape[1])


def _features(frontend: FrontEnd, shape: Shape) -> Any:
    return jax.eval_shape(lambda waveform: frontend(waveform)[0], jax.ShapeDtypeStruct(shape, np.float32))


def _halvings(size: str) -> list[str]:
    """That two ways of writing half a size, that of a slice and that of a convolution, are equal."""
    sizes = [size]
    for _ in range(_HALVINGS):
        sizes.append(f"floordiv({sizes[-1]} + 1, 2)")
    return [f"floordiv({own} - 1, 2) == floordiv({own} + 1, 2) - 1" for own in sizes[:-1]]


def _symbolic(shape: str, constraints: list[str]) -> Shape:
    return tuple(export.symbolic_shape(shape, constraints=constraints))
