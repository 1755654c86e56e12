"""Hostile pickles in PyTorch's formats: nothing in them runs, and no tensor leaves its storage."""

import functools
import io
import os
import sys

import pytest

from qsv.interop import UnsafePickleError, read_torch_file


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
