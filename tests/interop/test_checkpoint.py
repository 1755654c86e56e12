"""Which file of a checkpoint is read, what is unwrapped, and settings as plain data."""

import numpy as np
import pytest
import safetensors.numpy

from qsv.interop import read_checkpoint
from qsv.interop.checkpoint import read_config

STATE = {"conv.weight": np.ones((2, 3), np.float32), "conv.bias": np.zeros(2, np.float32)}


@pytest.fixture
def save(torch_format):
    """Writes a checkpoint; the folders above it are made."""

    def write(path, value=STATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        return torch_format.save_zip(path, value)

    return write


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".anything"])
def test_a_bare_state_dict(tmp_path, save, suffix):
    state, config = read_checkpoint(save(tmp_path / f"model{suffix}"))
    assert list(state) == ["conv.weight", "conv.bias"] and config == {}
    np.testing.assert_array_equal(state["conv.weight"], STATE["conv.weight"])


def test_safetensors(tmp_path):
    safetensors.numpy.save_file(STATE, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path)[0]) == set(STATE)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": STATE},
        {"model": STATE, "epoch": 3, "optimizer": {"state": {}}},
        {"model_state": STATE, "optimizer_state": {"state": {"exp_avg": np.ones(2, np.float32)}}},
        {"model_state_dict": STATE},
        {"module": STATE},
        {"model": {"state_dict": STATE}},
        {f"module.{key}": value for key, value in STATE.items()},
        {f"module._orig_mod.{key}": value for key, value in STATE.items()},
        {"state_dict": {f"_orig_mod.module.{key}": value for key, value in STATE.items()}},
    ],
    ids=lambda content: ",".join(content),
)
def test_wrappers_and_prefixes_are_removed(tmp_path, save, content):
    assert list(read_checkpoint(save(tmp_path / "model.pt", content))[0]) == list(STATE)


def test_a_prefix_stays_where_not_all_names_have_it(tmp_path, save):
    state = {"module.weight": STATE["conv.weight"], "weight": STATE["conv.bias"]}
    assert list(read_checkpoint(save(tmp_path / "model.pt", state))[0]) == list(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no state dict, but a list"),
        (3, "holds no state dict, but a int"),
        ({}, "holds no state dict, but a dict"),
        ({"state_dict": {}}, "holds no state dict, but a dict"),
        ({"epoch": 3}, "aren't tensors: epoch"),
        ({"model": STATE, "state_dict": STATE}, "aren't tensors: model, state_dict"),
        ({**STATE, "epoch": 3}, "aren't tensors: epoch"),
        ({"encoder": STATE, "decoder": STATE}, "alone or under one of state_dict, .*: encoder, decoder"),
        ({"state_dict": {**STATE, "nested": STATE}}, "aren't tensors: nested"),
    ],
    ids=repr,
)
def test_what_is_no_state_dict_is_refused(tmp_path, save, content, message):
    path = save(tmp_path / "model.pt", content)
    with pytest.raises(ValueError, match=f"model.pt .*{message}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["avg_model.pt", "model_1.pt", "model_2.pt"], "avg_model.pt"),
        (["embedding_model.ckpt", "classifier.ckpt", "mean_var_norm_emb.ckpt"], "embedding_model.ckpt"),
        (["pytorch_model.bin", "README.md"], "pytorch_model.bin"),
        (["campplus.pth"], "campplus.pth"),
        (["models/avg_model.pt", "models/model_1.pt"], "models/avg_model.pt"),
        (["models/model_7.pt"], "models/model_7.pt"),
        (["model.pt", "models/avg_model.pt"], "model.pt"),
    ],
    ids=repr,
)
def test_the_file_of_a_folder(tmp_path, save, files, expected):
    for file in files:
        save(tmp_path / file, {file: STATE["conv.bias"]})
    assert list(read_checkpoint(tmp_path)[0]) == [expected]


def test_an_ambiguous_folder_lists_its_candidates(tmp_path, save):
    for name in ("model_1.pt", "model_2.pt"):
        save(tmp_path / name)
    with pytest.raises(ValueError, match="several checkpoints, name one: model_1.pt, model_2.pt"):
        read_checkpoint(tmp_path)
    assert len(read_checkpoint(tmp_path / "model_2.pt")[0]) == 2


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file or folder .*nowhere"):
        read_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint: neither avg_model.pt nor .* \*.pt, "):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "hyperparams.yaml"])
@pytest.mark.parametrize(("weights", "folder"), [("a.pt", "."), ("models/a.pt", "."), ("models/a.pt", "models")])
def test_settings_are_found(tmp_path, save, monkeypatch, name, weights, folder):
    path = save(tmp_path / weights)
    (tmp_path / folder / name).write_text("model: ResNet34\n")
    assert read_checkpoint(path)[1] == {"model": "ResNet34"}
    assert read_checkpoint(tmp_path)[1] == {"model": "ResNet34"}
    monkeypatch.chdir(path.parent)
    assert read_checkpoint("a.pt")[1] == {"model": "ResNet34"}


def test_settings_above_another_folder_are_not_its_own(tmp_path, save):
    path = save(tmp_path / "weights" / "a.pt")
    (tmp_path / "config.yaml").write_text("model: ResNet34\n")
    assert read_checkpoint(path)[1] == {}


def test_two_files_of_settings_are_ambiguous(tmp_path, save):
    for name in ("config.yaml", "hyperparams.yaml"):
        (tmp_path / name).write_text("a: 1\n")
    with pytest.raises(ValueError, match="both config.yaml and hyperparams.yaml; leave only the one of a.pt"):
        read_checkpoint(save(tmp_path / "a.pt"))


@pytest.fixture
def config_of(tmp_path):
    def read(text):
        path = tmp_path / "hyperparams.yaml"
        path.write_text(text, encoding="utf-8")
        return read_config(path)

    return read


def test_tags_make_plain_data(config_of):
    text = """
        # Settings as SpeechBrain writes them.
        n_mels: 80
        pretrained_path: speechbrain/spkrec-ecapa-voxceleb
        compute_features: !new:speechbrain.lobes.features.Fbank
            n_mels: !ref <n_mels>
            deltas: false
        embedding_model: !new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
            channels: [1024, 1024, 1024, 1024, 3072]
        sizes: !apply:builtins.list [1, 2]
        encoder: !new:speechbrain.dataio.encoder.CategoricalEncoder
        class: !name:torch.nn.ReLU
            inplace: True
        paths:
            embedding_model: !ref <pretrained_path>/embedding_model.ckpt
        placeholder: !PLACEHOLDER
    """
    assert config_of(text) == {
        "n_mels": 80,
        "pretrained_path": "speechbrain/spkrec-ecapa-voxceleb",
        "compute_features": {"!": "new:speechbrain.lobes.features.Fbank", "n_mels": "<n_mels>", "deltas": False},
        "embedding_model": {
            "!": "new:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
            "channels": [1024, 1024, 1024, 1024, 3072],
        },
        "sizes": [1, 2],
        "encoder": {"!": "new:speechbrain.dataio.encoder.CategoricalEncoder"},
        "class": {"!": "name:torch.nn.ReLU", "inplace": True},
        "paths": {"embedding_model": "<pretrained_path>/embedding_model.ckpt"},
        "placeholder": {"!": "PLACEHOLDER"},
    }


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!apply:os.system", "!new:subprocess.Popen"])
def test_tags_run_nothing(config_of, tmp_path, tag):
    touched = tmp_path / "touched"
    command = f"touch {touched}"
    assert config_of(f"a: {tag}\n  - {command}\n") == {"a": [command]}
    assert config_of(f"a: {tag} {command}\n") == {"a": command}
    assert not touched.exists()


def test_aliases_and_merges(config_of):
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\nsame: *base\n"
    assert config_of(text) == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}, "same": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "can't be read as settings"),
        ("a: *nowhere", "undefined alias 'nowhere'"),
        ("a: !!unknown 3", "could not determine a constructor"),
        ("a\n", "must be a mapping, it is a str"),
        ("[1, 2]", "must be a mapping, it is a list"),
        ("a: &a [*a]", "more than 100,000 values"),
        ("a: &a {b: *a}", "more than 100,000 values"),
        ("a0: &a0 [1, 1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)), "more than 100,000"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40)), "than 100,"),
        ("a: " + "[" * 5000, "can't be read as settings"),
        ("a: 1" + " " * 2**18, "more than 262,144 bytes"),
        ("a: \ud800".encode("utf-16", "surrogatepass").decode("latin1"), "can't be read as settings"),
    ],
    ids=["cut", "alias", "type", "text", "list", "itself", "in itself", "bomb", "merges", "deep", "long", "encoding"],
)
def test_other_files_are_refused(config_of, text, message):
    with pytest.raises(ValueError, match=f"hyperparams.yaml .*{message}"):
        config_of(text)


def test_an_empty_file_has_no_settings(config_of):
    assert config_of("") == {}
