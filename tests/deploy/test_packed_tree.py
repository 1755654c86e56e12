import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qsv
from qsv.deploy import load_packed, load_tree, save_tree
from qsv.quant import leaf_paths


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        hidden = nn.relu(nn.Dense(32)(x))
        return nn.Dense(3)(hidden)


@pytest.fixture
def packed():
    params = Perceptron().init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    plan = qsv.resolve([qsv.Rule(".*/kernel", qsv.KMeans(bits=3)), qsv.Rule(".*", None)], params)
    return qsv.quantize(plan, params, qsv.init(plan, params))


def bytes_of(tree):
    arrays = [np.asarray(array) for _, leaf in leaf_paths(tree) for array in jax.tree.leaves(leaf)]
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def test_a_tree_of_any_model_comes_back_bit_for_bit(packed, tmp_path):
    packed["Dense_1"]["bias"] = jnp.arange(3, dtype=jnp.bfloat16)
    size = save_tree(tmp_path / "new" / "tree.safetensors", packed, provenance={"classes": 3})
    tree, provenance = load_tree(tmp_path / "new" / "tree.safetensors")
    assert size == (tmp_path / "new" / "tree.safetensors").stat().st_size
    assert provenance == {"classes": 3}
    found = [(path, isinstance(leaf, qsv.QTensor)) for path, leaf in leaf_paths(tree)]
    assert found == [(path, path.endswith("kernel")) for path, _ in leaf_paths(packed)]
    assert bytes_of(tree) == bytes_of(packed)
    x = jax.random.normal(jax.random.key(1), (4, 8))
    outputs = [Perceptron().apply({"params": qsv.dequantize(own)}, x) for own in (packed, tree)]
    np.testing.assert_array_equal(*outputs)


def test_codes_take_their_bits(tmp_path):
    weights = jax.random.normal(jax.random.key(0), (256, 512))
    plan = qsv.resolve([qsv.Rule(".*", qsv.KMeans(bits=2))], {"w": weights})
    size = save_tree(tmp_path / "w", qsv.quantize(plan, {"w": weights}, qsv.init(plan, {"w": weights})))
    assert 0 <= size - weights.size * 2 / 8 < 700


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ([np.zeros(2, np.float32)], "arrays or QTensors, got list at .*more"),
        (np.zeros(2, np.int32), "more is int32, expected float32"),
        (np.full(2, np.inf, np.float32), "more holds NaN or infinity"),
        ({"a/b": np.zeros(2, np.float32)}, "without '/' and ':', got 'a/b'"),
    ],
)
def test_what_cannot_be_stored_is_refused(packed, tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        save_tree(tmp_path / "tree", {**packed, "more": leaf})
    assert not list(tmp_path.iterdir())


def test_damage_is_refused_with_the_name(packed, tmp_path):
    path = tmp_path / "tree.safetensors"
    save_tree(path, packed)
    whole = path.read_bytes()
    for place in np.random.default_rng(0).choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"tree\.safetensors: "):
            load_tree(path)


def test_a_model_file_is_told_from_a_tree(packed, tmp_path):
    save_tree(tmp_path / "tree", packed)
    with pytest.raises(ValueError, match="got 'qsv-tree'; qsv.deploy.load_tree reads it"):
        load_packed(tmp_path / "tree")


def test_a_constant_fills_no_memory(tmp_path):
    size = save_tree(tmp_path / "tree", {"zeros": np.broadcast_to(np.float32(0), (2**20,))})
    tree, _ = load_tree(tmp_path / "tree")
    assert size < 1000 and tree["zeros"].shape == (2**20,) and tree["zeros"].strides == (0,)
