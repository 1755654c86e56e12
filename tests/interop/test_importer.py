"""From checkpoint to network, whoever wrote it, and errors that name the file."""

import jax
import numpy as np
import pytest
import safetensors.numpy

from qsv.interop import FAMILIES, StateDictError, UnsafePickleError, import_checkpoint
from qsv.interop.wespeaker import resnet_key
from qsv.models import Network
from qsv.quant import leaf_paths

NETWORK = Network("resnet10", {"width": 2, "embedding_size": 3})


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    arrays = {}
    for path, leaf in leaf_paths(NETWORK.init(jax.random.key(0))):
        order = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(reversed(range(leaf.ndim)))
        arrays[resnet_key(path)] = rng.uniform(0.5, 1, size=[leaf.shape[axis] for axis in order]).astype(np.float32)
    return arrays


@pytest.mark.parametrize("kind", ["file", "folder", "settings", "wrapped", "safetensors"])
def test_a_checkpoint_becomes_a_network(torch_format, tmp_path, state, kind):
    path = tmp_path / "avg_model.pt"
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        safetensors.numpy.save_file(state, path)
    else:
        torch_format.save_zip(path, {"model": state} if kind == "wrapped" else state)
    if kind == "settings":
        (tmp_path / "config.yaml").write_text("dataset_args: {resample_rate: 8000}\n")
    imported = import_checkpoint(tmp_path if kind == "folder" else path)
    assert (imported.path, imported.family) == (path, "WeSpeaker ResNet")
    assert (imported.network.name, imported.network.arguments) == (NETWORK.name, NETWORK.arguments)
    assert imported.network.frontend.window == "hamming"
    assert imported.network.frontend.sample_rate_hz == (8000 if kind == "settings" else 16000)
    np.testing.assert_array_equal(imported.variables["params"]["embedding"]["kernel"], state["seg_1.weight"].T)
    embedding = imported.network.embed(imported.variables, np.zeros((1, 4000), np.float32))
    assert embedding.shape == (1, 3) and np.all(np.isfinite(embedding))


def test_unknown_networks_list_the_families_and_the_first_tensors(torch_format, tmp_path):
    path = torch_format.save_zip(tmp_path / "a.pt", {f"encoder.{i}": np.ones(1, np.float32) for i in range(20)})
    with pytest.raises(ValueError) as caught:
        import_checkpoint(path)
    message = str(caught.value)
    assert all(family.name in message for family in FAMILIES)
    assert message.startswith(f"{path} is of none of these families: ")
    assert message.endswith("its 20 tensors begin with " + ", ".join(f"encoder.{i}" for i in range(8)))


def test_variants_name_the_file_and_the_family(torch_format, tmp_path, state):
    path = torch_format.save_zip(tmp_path / "a.pt", {**state, "seg_2.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(ValueError, match=f"^{path}, which looks like a WeSpeaker ResNet: .*two_emb_layer"):
        import_checkpoint(path)


@pytest.mark.parametrize("value", ["[1]", "abc", "null", "{}", "-3"])
def test_settings_of_another_type_are_refused(torch_format, tmp_path, state, value):
    path = torch_format.save_zip(tmp_path / "a.pt", state)
    (tmp_path / "config.yaml").write_text(f"dataset_args: {{resample_rate: {value}}}\n")
    with pytest.raises(ValueError, match="a.pt, which looks like a WeSpeaker ResNet: "):
        import_checkpoint(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(torch_format, tmp_path, state, value):
    state["bn1.bias"] = np.array([1, value], np.float32)
    path = torch_format.save_zip(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match=r"a.pt, which looks like .*: bn1.bias holds NaN or infinity"):
        import_checkpoint(path)


def test_integers_where_floats_belong_are_refused(torch_format, tmp_path, state):
    state["bn1.bias"] = np.array([1, 2], np.int64)
    with pytest.raises(ValueError, match="bn1.bias must be floating point, got int64"):
        import_checkpoint(torch_format.save_zip(tmp_path / "a.pt", state))


def test_half_precision_is_widened(torch_format, tmp_path, state):
    narrow = {key: array.astype(torch_format.bfloat16) for key, array in state.items()}
    imported = import_checkpoint(torch_format.save_zip(tmp_path / "a.pt", narrow))
    kernel = imported.variables["params"]["embedding"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, narrow["seg_1.weight"].astype(np.float32).T)


def test_tensors_that_do_not_fit_are_listed(torch_format, tmp_path, state):
    del state["layer2.0.bn1.bias"]
    with pytest.raises(StateDictError, match="missing layer2.0.bn1.bias"):
        import_checkpoint(torch_format.save_zip(tmp_path / "a.pt", state))


def test_commands_are_not_run(torch_format, tmp_path, state):
    touched, path = tmp_path / "touched", tmp_path / "a.pt"
    attack = torch_format.call("posix.system", f"touch '{touched}'")
    path.write_bytes(torch_format.zip_bytes(torch_format.pickled({"model": {}, "optimizer": attack}), {}))
    with pytest.raises(UnsafePickleError, match=f"{path}: .*posix.system"):
        import_checkpoint(path)
    assert not touched.exists()


def test_families_have_names_of_their_own():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
