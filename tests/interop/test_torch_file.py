"""PyTorch's formats and safetensors: what is read, and that nothing broken or hostile is."""

import argparse
import collections
import functools
import importlib.util
import io
import json
import os
import pathlib
import struct
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qsv.interop import UnsafePickleError, read_torch_file

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


@pytest.fixture
def read(tmp_path):
    """Reads a file of these bytes."""

    def read_bytes(data):
        path = tmp_path / "model.pt"
        path.write_bytes(data)
        return read_torch_file(path)

    return read_bytes


@pytest.fixture
def refused(read):
    """Asserts that these bytes are refused with this message, and the file's name."""

    def check(data, message, error=ValueError):
        with pytest.raises(error, match=f"^[^\n]*model.pt: .*{message}"):
            read(data)

    return check


@pytest.fixture(params=["zip", "legacy"])
def write(request, torch_format):
    """(pickle, storages) -> the bytes of a file, in either format."""
    return torch_format.zip_bytes if request.param == "zip" else torch_format.legacy_bytes


@pytest.fixture
def four(torch_format):
    """A file with a tensor in storage 0 of four float32: (what makes the tensor) -> (pickle, storages)."""

    def make(tensor):
        return torch_format.pickled({"weight": tensor}), {"0": np.arange(4, dtype="<f4").tobytes()}

    return make


# What is read.


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


# What is refused: hostile pickles.


class Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.made_by = function, arguments

    def __reduce__(self):
        return self.made_by


@pytest.mark.parametrize("place", ["root", "value", "key of an OrderedDict", "optimizer"])
def test_commands_are_not_run(torch_format, write, refused, tmp_path, place):
    touched = tmp_path / "touched"
    attack = torch_format.call("posix.system" if os.name == "posix" else "nt.system", f"touch '{touched}'")
    value = {
        "root": attack,
        "value": {"weight": attack},
        "key of an OrderedDict": torch_format.call("collections.OrderedDict", [(attack, 1)]),
        "optimizer": {"state_dict": {}, "optimizer": [attack]},
    }[place]
    refused(write(torch_format.pickled(value), {}), r"asks for (posix|nt)\.system", UnsafePickleError)
    assert not touched.exists()


def test_commands_in_files_of_pytorch_are_not_run(tmp_path):
    torch = pytest.importorskip("torch")
    touched, path = tmp_path / "touched", tmp_path / "model.pt"
    torch.save({"weight": torch.ones(2), "attack": Runs(os.system, f"touch '{touched}'")}, path)
    torch.load(path, weights_only=False)
    assert touched.exists(), "the file must be a dangerous one"
    touched.unlink()
    with pytest.raises(UnsafePickleError, match=f"{path}: .*asks for (posix|nt).system"):
        read_torch_file(path)
    assert not touched.exists()


@pytest.mark.parametrize("part", range(5))
def test_every_pickle_of_the_legacy_format_is_watched(torch_format, refused, part):
    attack = torch_format.pickled(torch_format.call("builtins.eval", "1"))
    parts = [torch_format.pickled(value) for value in (0x1950A86A20F9469CFC6C, 1001, {}, {}, [])]
    # The first has to be the magic number to be taken for this format at all.
    parts[part] = parts[part] + attack if part == 0 else attack
    refused(b"".join(parts), "asks for builtins.eval", UnsafePickleError)


@pytest.mark.parametrize("function", [eval, exec, getattr, __import__, functools.partial, io.open, sys.exit])
def test_dangerous_functions_are_named(torch_format, write, refused, function):
    name = f"{function.__module__}.{function.__qualname__}"
    refused(write(torch_format.pickled(torch_format.call(name, "1")), {}), f"asks for {name}", UnsafePickleError)


def test_whole_models_are_refused_with_advice(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "model.pt")
    with pytest.raises(UnsafePickleError, match=r"torch.nn.modules.linear.Linear.*save\(model.state_dict\(\), ...\)"):
        read_torch_file(tmp_path / "model.pt")


TRICKS = {
    "tensor of a dict": (lambda t: t.tensor({}, (1,), (1,)), "makes a tensor of dict"),
    "tensor of a string": (lambda t: t.tensor("0", (1,), (1,)), "makes a tensor of str"),
    "too few arguments": (lambda t: t.call("torch._utils._rebuild_tensor_v2"), "arguments that don't fit"),
    "called storage type": (lambda t: t.call("torch.FloatStorage", 10**12), "only a name"),
    "called dtype": (lambda t: t.call("torch.float32", 1), "only a name"),
    "called tensor class": (lambda t: t.call("torch.Tensor", 10**12), "only a name"),
    "parameter of a list": (lambda t: t.call("torch._utils._rebuild_parameter", [1], True, {}), "of list instead"),
    "tensor by a foreign function": (
        lambda t: t.call("torch._tensor._rebuild_from_type_v2", t.named("torch.Size"), t.named("torch.Tensor"), (), {}),
        "makes a tensor by torch.Size",
    ),
    "conjugated": (
        lambda t: t.call(
            "torch._utils._rebuild_tensor_v2", t.storage("0", 4), 0, (4,), (1,), False, {}, {"conj": True}
        ),
        "metadata",
    ),
    "unknown dtype": (
        lambda t: t.call("torch._utils._rebuild_tensor_v3", t.storage("0", 4), 0, (4,), (1,), False, {}, "float32x"),
        "tensors of str can't be read",
    ),
    "bare storage": (lambda t: t.storage("0", 4), "is a bare storage"),
    "ordered dict of a number": (lambda t: t.call("collections.OrderedDict", 3), "makes an OrderedDict of int"),
    "ordered dict of singles": (lambda t: t.call("collections.OrderedDict", [["a"]]), "something else than pairs"),
    "ordered dict with a tuple": (lambda t: t.call("collections.OrderedDict", [[((),), 1]]), "else than pairs"),
    "namespace with arguments": (lambda t: t.call("argparse.Namespace", [[((),), 1]]), "arguments that don't fit"),
    "counter of a list": (lambda t: t.call("collections.Counter", ["a"]), "makes a Counter of list"),
    "size of a number": (lambda t: t.call("torch.Size", 3), "makes a torch.Size of int"),
    "device of a list": (lambda t: t.call("torch.device", []), "makes a torch.device of list"),
    "version of a dict": (lambda t: t.call("torch.torch_version.TorchVersion", {}), "makes a version of dict"),
    "encoding": (lambda t: t.call("_codecs.encode", "a", "zip"), "encodes something else than bytes"),
    "numpy objects": (lambda t: t.call("numpy.dtype", "O8", False, True), "isn't a number"),
    "numpy records": (lambda t: t.call("numpy.dtype", [("a", "f8")]), "isn't a number"),
    "bare numpy type": (lambda t: t.call("numpy.dtype", "f8"), "is a bare numpytype"),
    "numpy scalar of text": (
        lambda t: t.call("numpy.core.multiarray.scalar", t.call("numpy.dtype", "f8"), "12345678"),
        "something else than a type and bytes",
    ),
    "numpy scalar too short": (
        lambda t: t.call(
            "numpy._core.multiarray.scalar", t.call("numpy.dtype", "f8"), t.call("_codecs.encode", "1234", "latin1")
        ),
        "NumPy f8 of 4 bytes",
    ),
    "attributes of a list": (lambda t: t.Code(t.encode([1]) + t.encode({"append": 1}) + b"b"), "attributes of list"),
    "attributes of a tensor": (
        lambda t: t.Code(t.tensor(t.storage("0", 4), (4,), (1,)) + t.encode({"shape": (9,)}) + b"b"),
        "attributes of Tensor",
    ),
    "attributes of a storage": (lambda t: t.Code(t.storage("0", 4) + t.encode({"numel": 9}) + b"b"), "of Storage"),
    "attributes of a global": (lambda t: t.Code(t.named("torch.Size") + t.encode({"name": 9}) + b"b"), "of torch.Size"),
    "slots": (lambda t: t.Code(t.encode({}) + t.encode(({}, {"__class__": 1})) + b"b"), "attributes of dict"),
    "numpy type's state": (
        lambda t: t.Code(t.call("numpy.dtype", "f8") + t.encode((3, "O", None)) + b"b"),
        "sets attributes of _NumpyType",
    ),
    "module by persistent id": (lambda t: t.Code(t.encode(("module", "Net", "net.py", "code")) + b"Q"), "isn't a tens"),
    "number as persistent id": (lambda t: t.Code(t.encode(7) + b"Q"), "isn't a tensor's storage"),
    "nested persistent id": (
        lambda t: t.Code(t.encode(("storage", t.storage("0", 4), "0", "cpu", 4)) + b"Q"),
        "storages of type Storage",
    ),
    "storage of another type": (
        lambda t: t.Code(t.encode(("storage", t.named("torch.Size"), "0", "cpu", 4)) + b"Q"),
        "storages of type torch.Size",
    ),
    "storage's key a number": (lambda t: t.tensor(t.storage(0, 4), (4,), (1,)), "another key than a string"),
    "storage's size a text": (lambda t: t.tensor(t.storage("0", "4"), (4,), (1,)), "a size that can't be"),
    "storage's size negative": (lambda t: t.tensor(t.storage("0", -4), (4,), (1,)), "a size that can't be"),
    "storage's size endless": (lambda t: t.tensor(t.storage("0", 2**70), (4,), (1,)), "a size that can't be"),
    "view of a storage": (
        lambda t: t.tensor(t.storage("0", 4, "FloatStorage", ("1", 0, 2)), (2,), (1,)),
        "before PyTorch 0.4",
    ),
    "a storage of two types": (
        lambda t: [t.tensor(t.storage("0", 4), (4,), (1,)), t.tensor(t.storage("0", 4, "IntStorage"), (4,), (1,))],
        "several sizes or types",
    ),
    "in itself": (lambda t: t.Code(b"]q\x00h\x00a"), "nested in itself"),
    "deep lists": (lambda t: t.Code(b"]" * 10_000 + b"a" * 9_999), "more than 64 levels"),
    "deep tuples": (lambda t: t.Code(b")" + b"\x85" * 100_000), "more than 64 levels"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_allowed_globals_cannot_be_misused(torch_format, write, four, refused, trick):
    make, message = TRICKS[trick]
    data, storages = four(make(torch_format))
    refused(write(data, storages if b"storage" in data else {}), message)


OUT_OF_BOUNDS = {
    "too long": ((5,), (1,), 0, "doesn't fit its storage of 4 elements"),
    "behind the end": ((1,), (1,), 4, "doesn't fit"),
    "offset": ((2,), (1,), 3, "doesn't fit"),
    "stride": ((2, 2), (3, 1), 0, "doesn't fit"),
    "scalar behind the end": ((), (), 4, "doesn't fit"),
    "repeated": ((10**6, 10**6), (0, 0), 0, "doesn't fit"),
    "negative offset": ((1,), (1,), -1, "integers from 0 on"),
    "negative stride": ((2,), (-1,), 1, "integers from 0 on"),
    "negative size": ((-1,), (1,), 0, "integers from 0 on"),
    "endless size": ((2**64,), (0,), 0, "integers from 0 on"),
    "endless stride": ((2,), (2**62,), 0, "doesn't fit"),
    "empty but endless": ((0, 2**62, 2**62), (1, 1, 1), 0, ""),
    "logical": ((True,), (1,), 0, "integers from 0 on"),
    "text": (("4",), (1,), 0, "integers from 0 on"),
    "list": ([4], (1,), 0, "must be tuples"),
    "axes": ((4,), (1, 1), 0, "1 axes, but 2 strides"),
    "many axes": ((1,) * 33, (1,) * 33, 0, "at most 32"),
}


@pytest.mark.parametrize("case", OUT_OF_BOUNDS)
def test_tensors_stay_within_their_storage(torch_format, write, four, refused, case):
    shape, strides, offset, message = OUT_OF_BOUNDS[case]
    tensor = torch_format.tensor(torch_format.storage("0", 4), shape, strides, offset)
    refused(write(*four(tensor)), message)


def test_many_views_of_one_storage_do_not_fill_the_memory(torch_format, write, refused, read):
    def views(count):
        stored = torch_format.storage("0", 100)
        tensors = [torch_format.tensor(stored, (51,), (1,), offset) for offset in range(count)]
        return write(torch_format.pickled(tensors), {"0": bytes(400)})

    assert len(read(views(7))) == 7
    refused(views(8), "the tensors in storage 0 claim 1,632 bytes, it has 400")


@pytest.mark.parametrize("numel", [0, 3, 5, 2**40])
def test_storages_of_another_length_are_refused(torch_format, write, four, refused, numel):
    refused(write(*four(torch_format.tensor(torch_format.storage("0", numel), (0,), (1,)))), "storage 0 should")


def test_storages_of_another_type_are_refused(torch_format, four, refused):
    tensor = torch_format.tensor(torch_format.storage("0", 4, "DoubleStorage"), (4,), (1,))
    refused(torch_format.zip_bytes(*four(tensor)), "storage 0 should have 32 bytes, it has 16")


# What is refused: broken containers.


@pytest.fixture
def whole(torch_format):
    """The bytes of a sound file: (format) -> bytes."""

    def make(kind):
        value, storages = {"a": array_of("float32"), "b": array_of("float32", (5,))}, {}
        if kind == "safetensors":
            return safetensors.numpy.save(value)
        data_pickle = torch_format.pickled(torch_format.with_tensors(value, storages))
        return getattr(torch_format, f"{kind}_bytes")(data_pickle, storages)

    return make


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files_are_refused(whole, read, refused, kind):
    data = whole(kind)
    assert set(read(data)) == {"a", "b"}
    for length in [*range(0, 40), *range(40, len(data), 7), len(data) - 1]:
        refused(data[:length], "")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_bytes_give_one_type_of_error(whole, read, kind):
    data, rng = whole(kind), np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data)
        for position in rng.integers(len(data), size=rng.integers(1, 4)):
            damaged[position] = rng.integers(256)
        try:
            read(bytes(damaged))
        except ValueError as error:
            assert "model.pt: " in str(error)


def test_wrong_checksums_are_refused(whole, refused):
    data = bytearray(whole("zip"))
    data[data.index(array_of("float32").tobytes()) + 5] ^= 1
    refused(bytes(data), "Bad CRC-32 for file 'archive/data/0'")


def test_compressed_members_are_refused(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(10**7))
    assert len(buffer.getvalue()) < 20_000
    refused(buffer.getvalue(), "a compressed or encrypted member")


def test_members_that_overlap_are_refused(refused):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/data/0", bytes(10_000))
        first = archive.filelist[-1]
        for key in range(1, 10):
            again = zipfile.ZipInfo(f"archive/data/{key}")
            for name in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(again, name, getattr(first, name))
            archive.filelist.append(again)
    refused(buffer.getvalue(), "its members claim 100,004")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leave_out": ["archive/data.pkl"]}, "no single folder with data.pkl"),
        ({"leave_out": ["archive/data/0"]}, "lacks archive/data/0"),
        ({"data/0": bytes(15)}, "should have 16 bytes, it has 15"),
        ({"data/0": bytes(17)}, "should have 16 bytes, it has 17"),
        ({"byteorder": b"middle"}, "byte order b'middle'"),
        ({"extra": [("other/data.pkl", b"")]}, "two members 'other/data.pkl'"),
        ({"extra": [("other/file", b"")]}, "no single folder"),
        ({"extra": [("file", b"")]}, "a member 'file'"),
        ({"extra": [("/etc/passwd", b"")]}, "a member '/etc/passwd'"),
        ({"extra": [("archive/../../x", b"")]}, "a member 'archive/../../x'"),
        ({"extra": [("archive/x\\..\\y", b"")]}, "a member"),
        ({"extra": [("archive/constants.pkl", b"")]}, "TorchScript archive.*torch.save its state_dict"),
        ({"extra": [("archive/code/model.py", b"")]}, "TorchScript archive"),
    ],
    ids=repr,
)
def test_zip_files_that_pytorch_would_not_write(torch_format, four, refused, changes, message):
    data, storages = four(torch_format.tensor(torch_format.storage("0", 4), (4,), (1,)))
    refused(torch_format.zip_bytes(data, storages, **changes), message)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_the_same_name_are_refused(torch_format, four, refused):
    data, storages = four(torch_format.tensor(torch_format.storage("0", 4), (4,), (1,)))
    twice = torch_format.zip_bytes(data, storages, extra=[("archive/data/0", bytes(16))])
    refused(twice, "two members 'archive/data/0'")


@pytest.mark.parametrize("key", ["../data.pkl", "1", "0/", "/0", "0\0"])
def test_storages_are_looked_up_by_their_exact_names(torch_format, four, refused, key):
    refused(torch_format.zip_bytes(*four(torch_format.tensor(torch_format.storage(key, 4), (4,), (1,)))), "lacks arch")


@pytest.mark.parametrize("count", [0, 3, 2**62, -1])
def test_the_sizes_in_legacy_files_must_agree(torch_format, four, refused, count):
    data = torch_format.legacy_bytes(*four(torch_format.tensor(torch_format.storage("0", 4), (4,), (1,))))
    refused(data[:-24] + struct.pack("<q", count) + data[-16:], "should begin with its size, 4 elements")


def test_other_versions_of_the_legacy_format_are_refused(torch_format, refused):
    refused(torch_format.legacy_bytes(torch_format.pickled({}), {}, version=1002), "another version")


@pytest.mark.parametrize("keys", [[], ["0", "0"], ["1"], ["0", "1"], "0", [0], {"0": 1}])
def test_the_list_of_storages_in_legacy_files_must_agree(torch_format, four, refused, keys):
    data, storages = four(torch_format.tensor(torch_format.storage("0", 4), (4,), (1,)))
    whole = torch_format.legacy_bytes(data, storages)
    right = torch_format.pickled(["0"])
    assert right in whole
    refused(whole.replace(right, torch_format.pickled(keys)), "list of storages isn't that of its tensors")


def test_safetensors_with_other_types_are_refused(refused):
    text = json.dumps({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    refused(struct.pack("<Q", len(text)) + text + bytes(8), "F8_E8M0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "unknown format.* 0 bytes begin with b''"),
        (b"<!DOCTYPE html><html>", "unknown format.*begin with b'<!DOCTYPE html><'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer.*git lfs pull"),
        (b"\x80\x02}.", "unknown format"),
        (b"PK\x03\x04", "not a zip file"),
    ],
)
def test_other_files_are_refused(refused, data, message):
    refused(data, message)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        read_torch_file(tmp_path / "nowhere.pt")
