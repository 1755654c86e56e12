"""The console command, and that nothing of JAX is behind it."""

import importlib.metadata
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qsv.deploy.onnx.graph import IR_VERSION, OPSET
from qsv.deploy.runtime.command import main
from qsv.deploy.runtime.model_file import METADATA_KEY, read_sealed, sealed


@pytest.fixture
def run(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("QSV_MODEL", str(exported.onnx))
    monkeypatch.setenv("QSV_STORE", str(tmp_path / "prints.sqlite"))

    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_enrol_verify_identify_list_forget(run, recordings):
    status, out, _ = run("enrol", "Ann", recordings["a0"], recordings["a1"])
    assert status == 0 and out.startswith("Ann: 2 recordings added, 2 in the voice print; the least like the others")
    run("enrol", "Bob", recordings["b0"])
    status, out, _ = run("verify", "Ann", recordings["a2"])
    assert status == 0 and out.startswith("accepted: score ") and "threshold 0.9950" in out
    assert run("verify", "Ann", recordings["b1"])[0] == 3
    assert run("verify", "Ann", recordings["b1"], "--threshold=-1")[0] == 0
    status, out, _ = run("identify", recordings["b1"])
    assert status == 0 and out.splitlines()[0].endswith("  Bob") and out.splitlines()[1].endswith("Ann  (rejected)")
    assert run("list")[1].startswith("Ann: 2 recordings, since 20") and "Bob: 1 recording, " in run("list")[1]
    assert run("forget", "Ann")[:2] == (0, "Ann is forgotten\n")
    status, _, err = run("verify", "Ann", recordings["a2"])
    assert status == 1 and err.startswith("qsv: no speaker 'Ann' is enrolled in")


def test_json(run, recordings):
    def fields(*arguments):
        status, out, _ = run(*arguments, "--json")
        return status, json.loads(out)

    assert fields("enrol", "Ann", recordings["a0"])[1] == {
        "name": "Ann",
        "added": 1,
        "utterances": 1,
        "least_score": None,
        "warnings": [],
    }
    status, decision = fields("verify", "Ann", recordings["b0"])
    assert status == 3 and decision["accepted"] is False and decision["score"] < decision["threshold"]
    status, found = fields("identify", recordings["b0"])
    assert status == 3 and found["name"] is None and found["candidates"][0]["name"] == "Ann"
    assert fields("list")[1]["speakers"][0]["utterances"] == 1
    status, error = fields("verify", "Ann", "none.wav")
    assert status == 1 and "none.wav" in error["error"]


def test_a_failure_of_the_backend_is_an_error_like_others(run, exported, recordings, tmp_path):
    """A graph that only takes waveforms of seven samples."""
    text = read_sealed(exported.onnx).description
    shapes = {"waveform": ["batch", "samples"], "embedding": [1, 7]}
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    sizes = numpy_helper.from_array(np.array([1, 7]), "sizes")
    nodes = [helper.make_node("Reshape", ["waveform", "sizes"], ["embedding"])]
    graph = helper.make_graph(nodes, "graph", [given], [made], [sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {METADATA_KEY: text})
    (tmp_path / "model.onnx").write_bytes(sealed(model.SerializeToString(), text))
    status, out, _ = run("enrol", "Ann", recordings["a0"], "--model", tmp_path / "model.onnx", "--json")
    assert status == 1
    assert "model.onnx: onnxruntime can't run it with inputs (1, 16000): " in json.loads(out)["error"]


def test_info(run, exported):
    status, out, _ = run("info", exported.onnx)
    assert status == 0
    assert "resnet10(width=4, embedding_size=16)" in out and "KMeans(bits=4): " in out and "threshold  0.9950" in out
    fields = json.loads(run("info", exported.onnx, "--json")[1])
    assert fields["bytes"] == exported.onnx.stat().st_size and fields["sample_rate_hz"] == 16000
    status, _, err = run("info", exported.packed)
    assert status == 1 and "experiments.export" in err


def test_wrong_usage_ends_with_status_2(run, monkeypatch):
    for arguments in ((), ("enrol", "Ann"), ("verify", "Ann"), ("shout",)):
        with pytest.raises(SystemExit) as caught:
            run(*arguments)
        assert caught.value.code == 2


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"jax", "jaxlib", "flax", "optax", "orbax", "scipy", "absl", "grain", "onnx", "torch"}:
            raise ImportError(f"{name} is not for the runtime")

sys.meta_path.insert(0, Blocker())
from qsv.deploy.runtime.command import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_runtime_needs_neither_jax_nor_flax(exported, recordings, tmp_path):
    environment = {**os.environ, "QSV_MODEL": str(exported.onnx), "QSV_STORE": str(tmp_path / "prints")}
    for arguments in (("enrol", "Ann", recordings["a0"]), ("verify", "Ann", recordings["a1"]), ("info", exported.onnx)):
        command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_extra_for_the_runtime_pulls_no_jax():
    needed = {"jax", "flax", "scipy", "onnx", "tensorflow-datasets", "absl-py"}
    texts = importlib.metadata.requires("qsv") or []
    pulled = [text for text in texts if "extra ==" not in text or 'extra == "runtime"' in text]
    names = {text.split(";")[0].split(">")[0].split("=")[0].strip() for text in pulled}
    assert names == {"lazy_loader", "numpy", "soundfile", "soxr", "onnxruntime", "platformdirs"}
    assert not names & needed
