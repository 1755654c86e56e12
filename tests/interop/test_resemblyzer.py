"""Resemblyzer's GE2E encoder read into ours: the same embeddings of the same speech."""

import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import soundfile

from qsv.frontend import MelSpectrogram
from qsv.interop import import_checkpoint
from qsv.interop.resemblyzer import FAMILY
from qsv.interop.state_dict import variables_from_state_dict
from qsv.models import Network

# Samples: under one window; around the second window's coverage of 120 frames (31520) and the third's (43840),
# to a sample and across a frame; with and without frames that see the end from beyond it.
LENGTHS = [400, 8000, 25440, 25599, 25600, 31519, 31520, 31521, 31681, 43839, 43840, 50000, 77777]


@pytest.fixture
def state():
    """A state dict with Resemblyzer's keys, 8 units, 2 layers and embedding size 6."""
    rng = np.random.default_rng(0)
    shapes = {f"lstm.{kind}_hh_l{layer}": (32, 8)[:size] for layer in (0, 1) for kind, size in _KINDS}
    shapes |= {f"lstm.{kind}_ih_l{layer}": (32, (40, 8)[layer])[:size] for layer in (0, 1) for kind, size in _KINDS}
    shapes |= {"linear.weight": (6, 8), "linear.bias": (6,), "similarity_weight": (1,), "similarity_bias": (1,)}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


_KINDS = (("weight", 2), ("bias", 1))


def read(state):
    network = FAMILY.network_of(state, {})
    return network, variables_from_state_dict(network, state, FAMILY.key_of(network), ignored=FAMILY.ignored)


def test_every_tensor_finds_its_leaf(state):
    network, variables = read(state)
    expected = {"hidden_size": 8, "num_layers": 2, "embedding_size": 6}
    assert network == Network("ge2e", expected, MelSpectrogram(num_mels=40))
    assert variables["batch_stats"] == {}
    params = variables["params"]
    for layer in (0, 1):
        ours = params[f"lstm{layer + 1}"]
        np.testing.assert_array_equal(ours["input"]["kernel"], state[f"lstm.weight_ih_l{layer}"].T)
        np.testing.assert_array_equal(ours["hidden"]["kernel"], state[f"lstm.weight_hh_l{layer}"].T)
        both = state[f"lstm.bias_ih_l{layer}"] + state[f"lstm.bias_hh_l{layer}"]
        np.testing.assert_array_equal(ours["hidden"]["bias"], both)
    np.testing.assert_array_equal(params["embedding"]["kernel"], state["linear.weight"].T)
    np.testing.assert_array_equal(params["embedding"]["bias"], state["linear.bias"])


def test_other_networks_are_not_recognised_and_variants_refused(state):
    assert FAMILY.network_of({"conv1.weight": np.zeros((8, 1, 3, 3))}, {}) is None
    assert FAMILY.network_of({key: state[key] for key in state if "lstm" in key}, {}) is None
    with pytest.raises(ValueError, match="plain one-way LSTMs.*weight_ih_l0_reverse"):
        FAMILY.network_of({**state, "lstm.weight_ih_l0_reverse": state["lstm.weight_ih_l0"]}, {})
    with pytest.raises(ValueError, match="plain one-way LSTMs.*weight_hr_l0"):
        FAMILY.network_of({**state, "lstm.weight_hr_l0": np.zeros((4, 8))}, {})


@pytest.fixture(scope="module")
def encoder():
    """Resemblyzer's encoder; its voice activity detector, which embedding doesn't use, needn't be importable."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("librosa")
    morphology = types.ModuleType("scipy.ndimage.morphology")
    morphology.binary_dilation = scipy.ndimage.binary_dilation
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "webrtcvad", types.ModuleType("webrtcvad"))
        patch.setitem(sys.modules, "scipy.ndimage.morphology", morphology)
        encoder_class = pytest.importorskip("resemblyzer").VoiceEncoder
        yield encoder_class("cpu", verbose=False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def imported(encoder):
    """(network, variables) of the checkpoint that Resemblyzer ships."""
    folder = pathlib.Path(sys.modules[type(encoder).__module__].__file__).parent
    checkpoint = import_checkpoint(folder / "pretrained.pt")
    assert checkpoint.family == FAMILY.name
    return checkpoint.network, checkpoint.variables


def theirs(encoder, waveform):
    from resemblyzer import audio

    return encoder.embed_utterance(audio.normalize_volume(waveform, -30, increase_only=True))


def assert_same(ours, reference):
    assert float(np.dot(ours, reference)) >= 0.99999
    np.testing.assert_allclose(ours, reference, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def speech(speech_dir):
    """78,000 samples of three speakers, one quieter and one louder than the target volume."""
    files = [sorted((speech_dir / "an4" / name).rglob("*.flac"))[0] for name in ("fash", "mcel", "marh")]
    pieces = [soundfile.read(path, dtype="float32")[0][:26000] for path in files]
    pieces = [0.9 * pieces[0] / np.abs(pieces[0]).max(), pieces[1], 0.05 * pieces[2]]
    return np.resize(np.concatenate(pieces), 78000)


def test_padded_batches_equal_resemblyzer_at_every_length(encoder, imported, speech):
    network, variables = imported
    starts = np.random.default_rng(0).integers(0, [len(speech) - length + 1 for length in LENGTHS])
    waveforms = [speech[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]
    batch = np.stack([np.pad(waveform, (0, 80000 - len(waveform))) for waveform in waveforms])
    embeddings = np.asarray(network.embed(variables, jnp.asarray(batch), jnp.asarray(LENGTHS)))
    for waveform, ours in zip(waveforms, embeddings, strict=True):
        assert_same(ours, theirs(encoder, waveform))


@pytest.mark.parametrize(("length", "gain"), [(20000, 1.0), (31520, 0.01), (60000, 1.0)])
def test_single_utterances_equal_resemblyzer(encoder, imported, speech, length, gain):
    network, variables = imported
    waveform = gain * speech[:length]
    assert_same(np.asarray(network.embed(variables, jnp.asarray(waveform)[None]))[0], theirs(encoder, waveform))
