"""Imports end to end: the file that is made, what is printed, and what is refused."""

import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments import import_checkpoint, verify
from experiments.models import MODEL_FILE
from qsv.deploy import load_packed
from qsv.interop.wespeaker import resnet_key
from qsv.models import Network
from qsv.quant import leaf_paths

NETWORK = Network("resnet10", {"width": 2, "embedding_size": 8})


@pytest.fixture
def checkpoint(tmp_path):
    """A WeSpeaker ResNet in a folder of its own, as safetensors."""
    rng = np.random.default_rng(0)
    state = {"projection.weight": np.ones((5, 8), np.float32)}
    for path, leaf in leaf_paths(NETWORK.init(jax.random.key(0))):
        order = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(reversed(range(leaf.ndim)))
        shape = [leaf.shape[axis] for axis in order]
        state[resnet_key(path)] = rng.uniform(-0.4, 0.6, size=shape).astype(np.float32)
        if path.endswith(("var", "scale")):
            state[resnet_key(path)] = np.abs(state[resnet_key(path)]) + 0.5
    folder = tmp_path / "wespeaker"
    folder.mkdir()
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    return folder / "model.safetensors"


def run(*arguments):
    return import_checkpoint.run(import_checkpoint.ImportConfig(arguments=tuple(map(str, arguments))))


@pytest.mark.parametrize(
    ("output", "expected"), [("runs/made", f"runs/made/{MODEL_FILE}"), ("made/a.safetensors", "made/a.safetensors")]
)
def test_a_checkpoint_becomes_a_float_model(checkpoint, tmp_path, capsys, output, expected):
    path = run(checkpoint, tmp_path / output)
    assert path == tmp_path / expected
    model = load_packed(path)
    assert (model.network.name, model.network.arguments) == (NETWORK.name, NETWORK.arguments)
    state = safetensors.numpy.load_file(checkpoint)
    np.testing.assert_array_equal(model.packed_params["embedding"]["kernel"], state["seg_1.weight"].T)
    assert model.provenance == {"imported_from": "model.safetensors", "family": "WeSpeaker ResNet"}
    assert (model.threshold, model.plan_description) == (None, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "WeSpeaker ResNet: resnet10 {'width': 2, 'embedding_size': 8}"
    assert re.fullmatch(r"[\d,]+ parameters", lines[1])
    assert "num_mels=80, window='hamming'" in lines[2]
    assert lines[3:] == [f"wrote {path}"]


def test_the_model_compares_recordings(checkpoint, tmp_path, speech):
    run(checkpoint.parent, tmp_path / "made")
    recordings = [str(speech.test / "test0" / f"{number}.wav") for number in (0, 0)]
    config = verify.VerifyConfig(model=str(tmp_path / "made"), threshold=0.5, arguments=tuple(recordings))
    assert verify.run(config) == pytest.approx(1, abs=1e-5)


def test_a_second_import_replaces_the_first(checkpoint, tmp_path):
    first = run(checkpoint, tmp_path / "made")
    content = first.read_bytes()
    first.write_bytes(b"old")
    assert run(checkpoint, tmp_path / "made").read_bytes() == content


def test_the_checkpoint_is_not_overwritten(checkpoint, monkeypatch):
    content = checkpoint.read_bytes()
    monkeypatch.chdir(checkpoint.parent)
    for source in (checkpoint, checkpoint.parent):
        for output in (checkpoint, checkpoint.parent, "model.safetensors", "."):
            with pytest.raises(ValueError, match="is the checkpoint itself; give another folder"):
                run(source, output)
    assert checkpoint.read_bytes() == content


def test_a_checkpoint_of_another_name_is_not_overwritten(checkpoint):
    renamed = checkpoint.rename(checkpoint.with_name("model.pt"))
    content = renamed.read_bytes()
    with pytest.raises(ValueError, match="model.pt is the checkpoint itself; give another folder"):
        run(renamed, renamed)
    assert renamed.read_bytes() == content
    assert list(renamed.parent.iterdir()) == [renamed]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_arguments_are_needed(count):
    with pytest.raises(ValueError, match=f"give a checkpoint and the folder for its model, got {count}"):
        run(*["a.pt"] * count)


def test_errors_are_one_line_and_exit_status_1(run_experiment, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"<html>")
    status, output, errors = run_experiment("import_checkpoint", path, tmp_path / "made")
    assert (status, output) == (1, "")
    assert re.fullmatch(rf"error: {path}: has an unknown format, [^\n]*\n", errors)
    assert not (tmp_path / "made").exists()
