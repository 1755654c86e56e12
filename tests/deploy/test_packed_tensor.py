import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qsv.deploy.packed_tensor import checked_float, pack_on_host, restore, store, unpack_on_host
from qsv.quant import AdditivePowerOfTwo, KMeans, PowerOfTwo, QTensor, Uniform, pack_bits

SPECS = [
    *[KMeans(bits=bits) for bits in range(1, 9)],
    Uniform(bits=8),
    PowerOfTwo(bits=3),
    AdditivePowerOfTwo(bits=5),
    KMeans(bits=3, channel_axes=(-1,)),
    Uniform(bits=5, channel_axes=(0, -1)),
    KMeans(bits=2, normalization="restore"),
    Uniform(bits=4, channel_axes=(-1,), normalization="restore"),
]


def same_bits(left, right) -> bool:
    left, right = np.asarray(left), np.asarray(right)
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def assert_round_trip(weight: QTensor) -> None:
    tensors = store("w", weight)
    fields = {"bits": weight.bits, "shape": list(weight.shape), "dtype": weight.dtype}
    restored = restore("w", fields, tensors)
    assert (restored.bits, restored.shape, restored.dtype) == (weight.bits, weight.shape, weight.dtype)
    for part in ("codes", "codebook", "scale"):
        assert same_bits(getattr(restored, part), getattr(weight, part)), part
    assert same_bits(restored.dequantize(), weight.dequantize())
    stored_bytes = sum(array.nbytes for array in tensors.values())
    assert stored_bytes == -(-weight.code_bits // 8) + weight.table_bits // 8


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip_is_bit_exact(spec):
    weights = jax.random.normal(jax.random.key(spec.bits), (3, 5, 7))
    assert_round_trip(spec.quantize(weights, spec.init(weights)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_trip_of_narrow_weights(dtype):
    weights = jax.random.normal(jax.random.key(0), (33,)).astype(dtype)
    for spec in (KMeans(bits=3), Uniform(bits=8, normalization="restore")):
        weight = spec.quantize(weights, spec.init(weights))
        assert weight.dtype == dtype
        assert_round_trip(weight)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)])
def test_round_trip_of_odd_shapes(shape):
    weight = QTensor(jnp.ones(shape, jnp.uint8), jnp.array([-1.0, 1.0]), jnp.float32(2), 1, shape, "float32")
    assert_round_trip(weight)


@pytest.mark.parametrize("bits", range(1, 9))
def test_host_packing_equals_the_quantizers(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (13, 3), np.uint8)
    packed = pack_on_host(codes, bits=bits)
    np.testing.assert_array_equal(packed, pack_bits(codes, bits=bits))
    np.testing.assert_array_equal(unpack_on_host(packed, bits=bits, shape=codes.shape), codes)


def tensor(**changes) -> QTensor:
    fields = {
        "codes": np.zeros((4, 6), np.uint8),
        "codebook": np.linspace(-1, 1, 4, dtype=np.float32),
        "scale": np.float32(1),
        "bits": 2,
        "shape": (4, 6),
        "dtype": "float32",
    }
    return QTensor(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": np.full((4, 6), 4, np.uint8)}, r"codes of w must be uint8 \(4, 6\) below 4.*up to 4"),
        ({"codes": np.zeros((6, 4), np.uint8)}, r"codes of w must be uint8 \(4, 6\)"),
        ({"codebook": np.zeros(8, np.float32)}, "must have 4 levels"),
        ({"codebook": np.zeros((4, 6, 4), np.float32), "shape": (4, 6)}, None),
        ({"codebook": np.zeros((2, 6, 4), np.float32)}, r"axes \(2, 6\)"),
        ({"codebook": np.array([-1, 0, 1, np.nan], np.float32)}, "codebook holds NaN"),
        ({"codebook": np.zeros(4, np.float16)}, "codebook of w is float16"),
        ({"scale": np.ones(6, np.float32)}, r"scale of w has axes \(6,\)"),
        ({"scale": np.float64(1)}, "scale is float64"),
        ({"dtype": "int8"}, "type int8"),
    ],
)
def test_store_refuses_what_breaks_an_invariant(changes, message):
    if message is None:
        store("w", tensor(**changes))
        return
    with pytest.raises(ValueError, match=message):
        store("w", tensor(**changes))


@pytest.mark.parametrize(
    ("fields", "arrays", "message"),
    [
        ({"bits": 0}, {}, "0 bits"),
        ({"bits": True}, {}, "True bits"),
        ({"bits": 3}, {}, r"needs \[9\] bytes"),
        ({"shape": [4, 7]}, {}, r"needs \[7\] bytes"),
        ({"dtype": "object"}, {}, "type object"),
        ({}, {"w:codes": np.zeros(6, np.float32)}, "bytes of 2-bit codes, got float32"),
        ({}, {"w:codebook": np.zeros(3, np.float32)}, "4 levels"),
        ({}, {"w:scale": np.zeros((4, 2), np.float32)}, r"axes \(4, 2\)"),
        ({}, {"w:scale": None}, "lacks its scale"),
    ],
)
def test_restore_refuses_what_does_not_fit(fields, arrays, message):
    tensors = {name: array for name, array in {**store("w", tensor()), **arrays}.items() if array is not None}
    with pytest.raises(ValueError, match=message):
        restore("w", {"bits": 2, "shape": [4, 6], "dtype": "float32", **fields}, tensors)


def test_checked_float_keeps_type_and_makes_c_order():
    leaf = np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3))
    array = checked_float("w", leaf)
    assert array.flags.c_contiguous
    assert same_bits(array, leaf)
    with pytest.raises(ValueError, match="w is int32"):
        checked_float("w", np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        checked_float("w", jnp.array([1.0, jnp.inf]))
