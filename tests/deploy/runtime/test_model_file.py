"""Sealed ONNX files: what was changed is refused, whichever byte it was."""

import pathlib

import numpy as np
import onnx
import pytest

from qsv.deploy.runtime import ModelFileError, OnnxEmbedder
from qsv.deploy.runtime.model_file import METADATA_KEY, read_sealed, sealed


def test_a_sealed_file_is_an_onnx_file(exported):
    found = read_sealed(exported.onnx)
    model = onnx.load_from_string(found.data)
    onnx.checker.check_model(model, full_check=True)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert entries["qsv_seal"].startswith(found.digest) and found.digest == OnnxEmbedder(exported.onnx).digest
    assert entries[METADATA_KEY] == found.description


@pytest.mark.parametrize("seed", range(4))
def test_every_flipped_byte_is_refused(exported, tmp_path, seed):
    rng = np.random.default_rng(seed)
    data, path = bytearray(exported.onnx.read_bytes()), tmp_path / "model.onnx"
    # The end, where the seal is, is as likely as all else.
    places = [*rng.integers(0, len(data), 1250), *(len(data) - rng.integers(1, 120, 1250))]
    for place, change in zip(places, rng.integers(1, 256, len(places)), strict=True):
        data[place] ^= int(change)
        path.write_bytes(data)
        with pytest.raises(ModelFileError, match="damaged"):
            read_sealed(path)
        data[place] ^= int(change)
    path.write_bytes(data)
    assert read_sealed(path).data == data


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: d + b"\0", lambda d: d[1:]])
def test_missing_and_added_bytes_are_refused(exported, tmp_path, change):
    path = tmp_path / "model.onnx"
    path.write_bytes(change(exported.onnx.read_bytes()))
    with pytest.raises(ModelFileError, match="damaged"):
        OnnxEmbedder(path)


def test_what_is_no_model_is_refused(exported, tmp_path):
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ModelFileError, match=r"empty\.onnx: is truncated"):
        OnnxEmbedder(tmp_path / "empty.onnx")
    with pytest.raises(ModelFileError, match="no ONNX file that qsv wrote"):
        OnnxEmbedder(exported.packed)
    with pytest.raises(ModelFileError, match="is a folder"):
        OnnxEmbedder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model file"):
        OnnxEmbedder(tmp_path / "none.onnx")
    with pytest.raises(ModelFileError, match="--input=waveform"):
        OnnxEmbedder(exported.features)


def with_metadata(exported, path: pathlib.Path, change) -> pathlib.Path:
    """The model with other metadata, sealed anew."""
    model = onnx.load(exported.onnx)
    entries = {entry.key: entry.value for entry in model.metadata_props}
    del model.metadata_props[:]
    text = change(entries[METADATA_KEY])
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    path.write_bytes(sealed(model.SerializeToString(), text))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"format_version": 2', '"format_version": 3'), "a newer qsv wrote it"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "export it anew"),
        (lambda text: text.replace('"sample_rate_hz"', '"rate"'), "lacks sample_rate_hz"),
        (lambda text: text.replace('"threshold": 0.995', '"threshold": "high"'), "lacks threshold"),
        (
            lambda text: text.replace('"embedding_size": 16, "threshold"', '"embedding_size": 1, "threshold"'),
            "one score",
        ),
        (lambda text: text[:-1], "no description"),
        (lambda text: "[]", "not those of qsv-onnx"),
    ],
)
def test_metadata_are_checked(exported, tmp_path, change, message):
    with pytest.raises(ModelFileError, match=message):
        OnnxEmbedder(with_metadata(exported, tmp_path / "model.onnx", change))


def test_a_graph_that_cannot_run_is_refused(exported, tmp_path):
    text = read_sealed(exported.onnx).description
    (tmp_path / "model.onnx").write_bytes(sealed(b"no graph" + text.encode(), text))
    with pytest.raises(ModelFileError, match="onnxruntime can't run it"):
        OnnxEmbedder(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="must be the value"):
        sealed(b"no graph", text)
