"""Broken containers of PyTorch's formats and safetensors are refused, whatever is wrong in them."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from qsv.interop import read_torch_file

VALUES = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture
def whole(torch_format):
    """The bytes of a sound file: (format) -> bytes."""

    def make(kind):
        value, storages = {"a": VALUES, "b": VALUES[0]}, {}
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
    data[data.index(VALUES.tobytes()) + 5] ^= 1
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
