"""Exports end to end: a packed file in, an ONNX file out that embeds alike."""

import numpy as np
import onnxruntime
import pytest

from experiments import export
from experiments.models import MODEL_FILE
from qsv.deploy import load, load_stablehlo


def test_the_exported_file_embeds_as_the_packed_one(tmp_path, quantized_run, speech, capsys):
    path = export.run(export.ExportConfig(model=str(quantized_run), output=str(tmp_path / "model.onnx")))
    assert f"{path.stat().st_size:,} bytes" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    embedder = load(quantized_run / MODEL_FILE)
    waveform = np.random.default_rng(0).normal(scale=0.1, size=9_000).astype(np.float32)
    (found,) = session.run(None, {"waveform": waveform[None]})
    expected = embedder(waveform, embedder.network.frontend.sample_rate_hz)
    cosine = found[0] @ expected / np.linalg.norm(found[0]) / np.linalg.norm(expected)
    assert cosine > 0.99999


def test_by_default_the_file_lies_beside_the_packed_one(tmp_path, quantized_run):
    source = tmp_path / "small.safetensors"
    source.write_bytes((quantized_run / MODEL_FILE).read_bytes())
    path = export.run(export.ExportConfig(model=str(source), input="features"))
    assert path == tmp_path / "small.onnx"
    assert [one.name for one in onnxruntime.InferenceSession(path).get_inputs()] == ["features"]


def test_stablehlo(tmp_path, quantized_run):
    path = export.run(
        export.ExportConfig(model=str(quantized_run / MODEL_FILE), output=str(tmp_path / "model"), format="stablehlo")
    )
    waveform = np.random.default_rng(0).normal(scale=0.1, size=9_000).astype(np.float32)
    found = np.asarray(load_stablehlo(path).call(waveform[None]))[0]
    embedder = load(quantized_run / MODEL_FILE)
    expected = embedder(waveform, embedder.network.frontend.sample_rate_hz)
    assert found @ expected / np.linalg.norm(found) / np.linalg.norm(expected) > 0.99999


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--model"),
        ({"model": "MODEL", "output": "MODEL"}, "would overwrite --model"),
        ({"model": "MODEL", "format": "tape"}, "--format must be one of onnx, stablehlo, got 'tape'"),
        ({"model": "MODEL", "input": "spectrum"}, "--input must be one of waveform, features, got 'spectrum'"),
    ],
)
def test_wrong_settings_are_named(quantized_run, settings, message):
    own = {name: value.replace("MODEL", str(quantized_run / MODEL_FILE)) for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        export.run(export.ExportConfig(**own))


def test_a_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        export.run(export.ExportConfig(model=str(tmp_path / "missing")))
