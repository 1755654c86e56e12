"""From a state dict of another framework to the variables of one of our networks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qsv.models import Network
from qsv.quant import leaf_paths, with_leaves

StateDict = Mapping[str, np.ndarray]
# Path of one of our leaves, such as `params/stem/conv/kernel`, -> the key of their tensor; several are added up.
KeyOf = Callable[[str], str | tuple[str, ...]]

_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_COUNTERS = ".num_batches_tracked"
# Of an error's message: a checkpoint of another network differs in every tensor.
_SHOWN = 12
_SHOWN_CHARACTERS = 120


class StateDictError(ValueError):
    """A state dict that isn't of the network it was read for; the message shows the first of each difference.

    Attributes:
        missing: keys the network needs and the state dict lacks.
        unexpected: keys of the state dict that the network has no place for.
        misshapen: (key, shape needed, shape found).
    """

    def __init__(
        self,
        network: Network,
        missing: Sequence[str],
        unexpected: Sequence[str],
        misshapen: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]],
    ) -> None:
        self.missing, self.unexpected, self.misshapen = tuple(missing), tuple(unexpected), tuple(misshapen)
        shapes = [f"{key} must have shape {needed}, got {found}" for key, needed, found in self.misshapen]
        lines = [f"the checkpoint isn't a {network.name} with {dict(network.arguments)}:"]
        lines += _first([f"missing {key}" for key in self.missing])
        lines += _first([f"unexpected {key[:_SHOWN_CHARACTERS]}" for key in self.unexpected])
        lines += _first(shapes)
        super().__init__("\n".join(lines))


def _first(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"  {line}" for line in lines[:_SHOWN] + more]


def torch_leaf(path: str) -> str:
    """PyTorch's name of a leaf: `params/.../kernel` -> `weight`, `batch_stats/.../mean` -> `running_mean`.

    >>> torch_leaf("batch_stats/stem/norm/mean")
    'running_mean'
    """
    return _LEAF_NAMES[path.rpartition("/")[2]]


def variables_from_state_dict(
    network: Network, state: StateDict, key_of: KeyOf, *, ignored: Callable[[str], bool] = lambda key: False
) -> dict[str, Any]:
    """The variables of a network out of a PyTorch state dict.

    Kernels are transposed: OIHW -> HWIO, OIK -> KIO, OI -> IO (also from a convolution of length 1). Everything
    becomes float32.

    Args:
        network: the network that the state dict should be of.
        state: PyTorch's names to arrays of any float type.
        key_of: path of one of our leaves -> the name of theirs. Of several names, the arrays are added.
        ignored: whether a key that no leaf asks for may be left out, such as a training's classifier. Counters of
            batches always may.

    Returns:
        `{"params": ..., "batch_stats": ...}`, float32 NumPy arrays.

    Raises:
        StateDictError: keys are missing, left over or of another shape.
        ValueError: a tensor isn't floating point, or holds NaN or infinity.
    """
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    wanted = {path: (leaf.shape, _as_tuple(key_of(path))) for path, leaf in leaf_paths(shapes)}
    needed = [key for _, keys in wanted.values() for key in keys]
    missing = [key for key in needed if key not in state]
    known = set(needed)
    unexpected = [key for key in state if key not in known and not key.endswith(_COUNTERS) and not ignored(key)]
    misshapen, leaves = [], {}
    for path, (shape, keys) in wanted.items():
        total = np.zeros(shape, np.float32)
        for key in keys:
            if key in state:
                array = _our_layout(_checked(key, state[key]), len(shape))
                if array.shape == shape:
                    total = total + array
                else:
                    misshapen.append((key, shape, array.shape))
        leaves[path] = total
    if missing or unexpected or misshapen:
        raise StateDictError(network, missing, unexpected, misshapen)
    variables: dict[str, Any] = with_leaves(shapes, leaves)
    return variables


def _as_tuple(keys: str | tuple[str, ...]) -> tuple[str, ...]:
    return (keys,) if isinstance(keys, str) else keys


def _checked(key: str, array: np.ndarray) -> np.ndarray:
    """The tensor in float32."""
    # bfloat16 comes from ml_dtypes, which NumPy doesn't count among the floats.
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        raise ValueError(f"{key} must be floating point, got {array.dtype}")
    wide = np.asarray(array, np.float32)
    if not np.all(np.isfinite(wide)):
        raise ValueError(f"{key} holds NaN or infinity")
    return wide


def _our_layout(array: np.ndarray, ndim: int) -> np.ndarray:
    """Output channels last; a convolution of length 1 becomes a matrix where ours is one."""
    if array.ndim < 2:
        return array
    while array.ndim > ndim and array.shape[-1] == 1:
        array = array[..., 0]
    return np.transpose(array, (*range(2, array.ndim), 1, 0))
