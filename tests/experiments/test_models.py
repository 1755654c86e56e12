"""Models found by what users name."""

import numpy as np
import pytest

from experiments.models import load_embedder, load_float_model, model_file, read_head, write_head
from qsv.deploy import load_packed


def test_a_run_folder_and_its_file_name_the_same_model(float_run):
    path = float_run / "model.safetensors"
    assert model_file(str(float_run)) == model_file(str(path)) == path


def test_a_folder_without_a_finished_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.safetensors doesn't exist: .*isn't finished, or it is no run"):
        model_file(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no model file or run folder .*nowhere"):
        model_file(str(tmp_path / "nowhere"))


def test_a_flipped_byte_is_refused(tmp_path, float_run):
    damaged = bytearray((float_run / "model.safetensors").read_bytes())
    damaged[-5] ^= 1
    path = tmp_path / "model.safetensors"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="model.safetensors: is damaged"):
        load_float_model(str(tmp_path))


def test_a_float_model_is_read_as_it_was_trained(float_run):
    model = load_float_model(str(float_run))
    assert model.network == load_packed(float_run / "model.safetensors").network


def test_another_toolkits_checkpoint_is_imported(tmp_path, wespeaker_checkpoint, capsys):
    model = load_float_model(str(wespeaker_checkpoint))
    assert "WeSpeaker ResNet" in capsys.readouterr().out
    assert model.network.name == "resnet18"
    assert model.threshold is None and model.head(("ann", "bob"), sub_centers=1) is None
    embedder, size = load_embedder(str(wespeaker_checkpoint))
    assert size == wespeaker_checkpoint.stat().st_size
    assert embedder(np.random.default_rng(0).normal(0, 0.1, 8000), 16000).shape == (model.network.embedding_size,)


def test_what_is_no_checkpoint_says_so(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"nothing like a checkpoint")
    with pytest.raises(ValueError, match="model.pt"):
        load_float_model(str(path))


def test_a_head_is_for_its_speakers_and_sub_centers_only(tmp_path):
    (tmp_path / "model.safetensors").touch()
    kernel = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_head(tmp_path, kernel, ("ann", "bob", "cy d"))
    np.testing.assert_array_equal(read_head(str(tmp_path), ("ann", "bob", "cy d"), sub_centers=2), kernel)
    assert read_head(str(tmp_path), ("ann", "bob", "eve"), sub_centers=2) is None
    assert read_head(str(tmp_path), ("ann", "bob", "cy d"), sub_centers=1) is None


def test_a_part_of_a_padded_head_is_written_as_it_is(tmp_path):
    (tmp_path / "model.safetensors").touch()
    padded = np.arange(32, dtype=np.float32).reshape(4, 8)
    write_head(tmp_path, padded[:, :6], ("ann", "bob", "cy d"))
    np.testing.assert_array_equal(read_head(str(tmp_path), ("ann", "bob", "cy d"), sub_centers=2), padded[:, :6])


def test_a_damaged_head_is_named(tmp_path):
    (tmp_path / "model.safetensors").touch()
    write_head(tmp_path, np.ones((4, 2), np.float32), ("ann", "bob"))
    path = tmp_path / "head.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="head.safetensors is damaged, delete it"):
        read_head(str(tmp_path), ("ann", "bob"), sub_centers=1)


def test_a_model_file_without_a_head_has_none(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert read_head(str(tmp_path), ("ann",), sub_centers=1) is None
