"""State dicts as variables: layouts, dtypes, sums, and what doesn't fit."""

import jax
import ml_dtypes
import numpy as np
import pytest

from qsv.interop import StateDictError, variables_from_state_dict
from qsv.interop.state_dict import torch_leaf
from qsv.interop.wespeaker import resnet_key
from qsv.models import Network
from qsv.quant import leaf_paths

NETWORK = Network("resnet10", {"width": 2, "embedding_size": 3})


@pytest.fixture
def state():
    """Random weights of the network, in PyTorch's layout and under its names."""
    rng = np.random.default_rng(0)
    arrays = {}
    for path, leaf in leaf_paths(NETWORK.init(jax.random.key(0))):
        # HWIO -> OIHW, IO -> OI.
        order = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(reversed(range(leaf.ndim)))
        arrays[resnet_key(path)] = rng.normal(size=np.transpose(leaf, order).shape).astype(np.float32)
    return arrays


def read(state, **options):
    return variables_from_state_dict(NETWORK, state, resnet_key, **options)


def test_kernels_are_transposed(state):
    variables = read(state)
    params, stats = variables["params"], variables["batch_stats"]
    np.testing.assert_array_equal(params["stem"]["conv"]["kernel"][2, 1, 0], state["conv1.weight"][:, 0, 2, 1])
    np.testing.assert_array_equal(params["embedding"]["kernel"], state["seg_1.weight"].T)
    np.testing.assert_array_equal(params["embedding"]["bias"], state["seg_1.bias"])
    np.testing.assert_array_equal(params["stem"]["norm"]["scale"], state["bn1.weight"])
    np.testing.assert_array_equal(stats["stem"]["norm"]["mean"], state["bn1.running_mean"])
    np.testing.assert_array_equal(stats["stem"]["norm"]["var"], state["bn1.running_var"])


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_float_becomes_float32(state, dtype):
    variables = read({key: array.astype(dtype) for key, array in state.items()})
    leaves = dict(leaf_paths(variables))
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(leaves["params/embedding/bias"], state["seg_1.bias"].astype(dtype).astype(np.float32))


def test_convolutions_of_length_one_become_matrices(state):
    found = read({**state, "seg_1.weight": state["seg_1.weight"][:, :, None]})
    np.testing.assert_array_equal(found["params"]["embedding"]["kernel"], state["seg_1.weight"].T)


def test_several_tensors_are_added(state):
    halves = {key: value for key, value in state.items() if key != "seg_1.bias"}
    halves |= {"seg_1.bias_a": state["seg_1.bias"] * 2, "seg_1.bias_b": -state["seg_1.bias"]}

    def key_of(path):
        key = resnet_key(path)
        return ("seg_1.bias_a", "seg_1.bias_b") if key == "seg_1.bias" else key

    found = variables_from_state_dict(NETWORK, halves, key_of)
    np.testing.assert_array_equal(found["params"]["embedding"]["bias"], state["seg_1.bias"])


def test_all_differences_are_told(state):
    state["seg_1.bias"] = np.zeros(4, np.float32)
    state["bn1.extra"] = state.pop("bn1.bias")
    with pytest.raises(StateDictError) as caught:
        read(state)
    error = caught.value
    assert (error.missing, error.unexpected) == (("bn1.bias",), ("bn1.extra",))
    assert error.misshapen == (("seg_1.bias", (3,), (4,)),)
    assert str(error).splitlines() == [
        "the checkpoint isn't a resnet10 with {'width': 2, 'embedding_size': 3}:",
        "  missing bn1.bias",
        "  unexpected bn1.extra",
        "  seg_1.bias must have shape (3,), got (4,)",
    ]


def test_long_lists_of_differences_are_cut_in_the_message(state):
    with pytest.raises(StateDictError, match=rf"\.\.\. and {len(state) - 12} more") as caught:
        read({})
    assert set(caught.value.missing) == set(state)
    assert len(str(caught.value).splitlines()) == 1 + 12 + 1


@pytest.mark.parametrize("shape", [(2, 2, 3, 3), (2, 1, 3), (2, 1, 3, 3, 1, 2), (2, 9), (18,), ()])
def test_tensors_of_another_shape_are_refused(state, shape):
    with pytest.raises(StateDictError, match=r"conv1.weight must have shape \(3, 3, 1, 2\)"):
        read({**state, "conv1.weight": np.zeros(shape, np.float32)})


def test_counters_and_ignored_tensors_may_be_there(state):
    more = {"bn1.num_batches_tracked": np.array(7), "projection.weight": np.zeros((3, 5), np.float32)}
    read({**state, **more}, ignored=lambda key: key.startswith("projection."))
    with pytest.raises(StateDictError, match="unexpected projection.weight"):
        read({**state, **more})


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.uint8, np.bool_, np.complex64])
def test_other_types_are_refused(state, dtype):
    with pytest.raises(ValueError, match=f"^seg_1.bias must be floating point, got {np.dtype(dtype)}$"):
        read({**state, "seg_1.bias": np.zeros(3, dtype)})


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_refused(state, value):
    broken = state["bn1.running_var"].astype(np.float64)
    broken[1] = value
    with pytest.raises(ValueError, match="^bn1.running_var holds NaN or infinity$"):
        read({**state, "bn1.running_var": broken})


def test_names_of_leaves():
    leaves = ["kernel", "scale", "bias", "mean", "var"]
    expected = ["weight", "weight", "bias", "running_mean", "running_var"]
    assert [torch_leaf(f"params/a/{leaf}") for leaf in leaves] == expected
