"""PyTorch's formats and safetensors: what is read."""

import argparse
import collections
import importlib.util
import json
import pathlib
import struct

import ml_dtypes
import numpy as np
import pytest

from qsv.interop import read_torch_file

DTYPES = [
    *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
]


def array_of(dtype, shape=(3, 4)):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    values = np.random.default_rng(0).normal(scale=20, size=shape)
    return np.asarray(values > 0 if dtype == "bool" else values + (1j if "complex" in dtype else 0)).astype(kind)


def same(found, expected):
    """Whether two trees are equal, down to the dtypes of their arrays."""
    if isinstance(expected, np.ndarray):
        return type(found) is np.ndarray and found.dtype == expected.dtype and np.array_equal(found, expected)
    if isinstance(expected, dict):
        return type(found) is dict and list(found) == list(expected) and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return type(found) is type(expected) and found == expected


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_in_both_byte_orders(torch_format, tmp_path, dtype, byteorder):
    expected = {"a": array_of(dtype), "nested": {"b": array_of(dtype, ()), "empty": array_of(dtype, (0, 3))}}
    path = torch_format.save_zip(tmp_path / "model.pt", expected, byteorder=byteorder)
    found = read_torch_file(path)
    assert same(found, expected)
    assert found["a"].flags.c_contiguous and found["a"].flags.writeable


def test_the_legacy_format(torch_format, read):
    expected = {"a": array_of("float32"), "step": 3, "nested": {"b": array_of("float32", (5,))}}
    storages = {}
    data_pickle = torch_format.pickled(torch_format.with_tensors(expected, storages))
    assert same(read(torch_format.legacy_bytes(data_pickle, storages)), expected)


def test_without_a_byte_order_it_is_little(torch_format, write, four, read):
    data, storages = four(torch_format.tensor(torch_format.storage("0", 4), (4,), (1,)))
    np.testing.assert_array_equal(read(write(data, storages))["weight"], [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((2, 2), (1, 2), 0, [[0, 2], [1, 3]]),
        ((2,), (2,), 1, [1, 3]),
        ((), (), 3, 3),
        ((2, 2), (1, 1), 0, [[0, 1], [1, 2]]),
        ((3,), (0,), 2, [2, 2, 2]),
        ((1, 1), (2**40, 2**40), 0, [[0]]),
        ((0, 7), (7, 1), 9, np.empty((0, 7))),
    ],
)
def test_views_within_the_storage(torch_format, write, four, read, shape, strides, offset, expected):
    tensor = torch_format.tensor(torch_format.storage("0", 4), shape, strides, offset)
    found = read(write(*four(tensor)))["weight"]
    np.testing.assert_array_equal(found, np.asarray(expected, np.float32))
    assert found.dtype == np.float32 and found.flags.c_contiguous


def test_tied_tensors_stay_one(torch_format, write, read):
    stored = torch_format.storage("0", 4)
    tied = torch_format.tensor(stored, (4,), (1,))
    data = torch_format.pickled({"a": tied, "b": tied, "part": torch_format.tensor(stored, (2,), (1,), 2)})
    found = read(write(data, {"0": np.arange(4, dtype="<f4").tobytes()}))
    assert found["a"] is found["b"]
    np.testing.assert_array_equal(found["part"], [2, 3])


def test_lists_in_lists_many_times_are_read_at_once(torch_format, write, read):
    # Sixty levels, each of which holds the one below twice: 2**60 lists to whoever walks them without care.
    data = b"\x80\x02]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b"h\x00."
    found = read(write(data, {}))
    assert found[0] is found[1]


def everything(torch):
    attributed = torch.ones(3)
    attributed.note = "attributes are left out"
    weights = torch.arange(12.0)
    return {
        "state_dict": torch.nn.Sequential(torch.nn.Conv1d(2, 3, 5), torch.nn.BatchNorm1d(3)).state_dict(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "attributed": attributed,
        "views": [weights.reshape(3, 4).t()[1:, ::2], weights[5], torch.zeros(0, 3)],
        "types": [
            torch.tensor([0, 1, 3]).to(getattr(torch, name))
            for name in (*DTYPES, "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
        ],
        "args": argparse.Namespace(depth=34, nested=argparse.Namespace(b=[1])),
        "numpy": [np.float64(0.5), np.float32(0.25), np.int64(-3), np.bool_(True)],
        "version": torch.__version__,
        "device": [torch.device("cpu"), torch.device("cuda", 1)],
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "milestones": collections.Counter([30, 60, 30]),
        "bytes": b"a\xff",
    }


def as_numpy(torch, value):
    """What our reader should give for what PyTorch loads."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
            kind = getattr(ml_dtypes, str(value.dtype).removeprefix("torch."))
            return value.view(torch.uint8).numpy().view(kind)
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: as_numpy(torch, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [as_numpy(torch, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, torch.device | torch.dtype | str):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, *({"pickle_protocol": protocol} for protocol in (3, 4, 5))],
    ids=repr,
)
def test_what_pytorch_writes(tmp_path, options):
    torch = pytest.importorskip("torch")
    value = everything(torch)
    torch.save(value, tmp_path / "model.pt", **options)
    assert same(read_torch_file(tmp_path / "model.pt"), as_numpy(torch, value))


@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints_of_pytorch(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    value = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(value, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert same(read_torch_file(tmp_path / "model.pt"), as_numpy(torch, value))


def test_a_published_checkpoint_in_the_legacy_format():
    spec = importlib.util.find_spec("resemblyzer")
    if spec is None:
        pytest.skip("Resemblyzer isn't installed")
    path = pathlib.Path(spec.origin).parent / "pretrained.pt"
    found = read_torch_file(path)
    assert {"step", "model_state", "optimizer_state"} == set(found)
    assert found["model_state"]["lstm.weight_ih_l0"].shape == (1024, 40)
    assert np.isfinite(found["model_state"]["linear.weight"]).all()
    torch = pytest.importorskip("torch")
    assert same(found, as_numpy(torch, torch.load(path, map_location="cpu", weights_only=False)))


def test_safetensors(tmp_path, read):
    expected = {dtype: array_of(dtype) for dtype in DTYPES if dtype != "complex128"}
    expected |= {"scalar": array_of("float32", ()), "empty": array_of("float32", (0, 3))}
    expected["float8"] = array_of("float32").astype(ml_dtypes.float8_e4m3fn)
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64"}
    names |= {"bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "uint8": "U8"}
    names |= {f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    # Widest first, as safetensors aligns its tensors.
    for name, array in sorted(expected.items(), key=lambda item: -item[1].dtype.itemsize):
        span = [len(content), len(content) + array.nbytes]
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        content += array.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    found = read(struct.pack("<Q", len(text)) + text + content)
    assert same({name: found[name] for name in expected}, expected)
