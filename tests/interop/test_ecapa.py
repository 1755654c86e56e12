"""ECAPA-TDNN checkpoints of WeSpeaker, SpeechBrain and 3D-Speaker: names, sizes, front ends, refusals."""

import jax
import numpy as np
import pytest

from qsv.frontend import KaldiFbank, SpeechBrainFbank
from qsv.interop.ecapa import FAMILIES
from qsv.interop.state_dict import StateDictError, variables_from_state_dict
from qsv.models import Network
from qsv.quant import leaf_paths

BY_TOOLKIT = {family.name.partition(" ")[0]: family for family in FAMILIES}
SIZES = {
    "channels": 24,
    "embedding_size": 16,
    "aggregation_channels": 40,
    "scale": 4,
    "se_channels": 6,
    "attention_channels": 8,
    "global_context": True,
}
SPEECHBRAIN_CONFIG = {
    "n_mels": 80,
    "compute_features": {"!": "new:speechbrain.lobes.features.Fbank", "n_mels": "<n_mels>"},
    "mean_var_norm": {"norm_type": "sentence", "std_norm": False},
    "embedding_model": {"input_size": "<n_mels>", "dilations": [1, 2, 3, 4, 1]},
}
SPEAKERLAB_CONFIG = {"embedding_model": {"obj": "speakerlab.models.ecapa_tdnn.ECAPA_TDNN.ECAPA_TDNN", "args": {}}}


def state_of(toolkit, **changes):
    """{name: array} with random values, as the toolkit would write a narrow network."""
    wespeaker = toolkit == "WeSpeaker"
    network = Network("ecapa" if wespeaker else "ecapa_speechbrain", {**SIZES, **changes})
    key_of = BY_TOOLKIT[toolkit].key_of(network)
    rng = np.random.default_rng(0)
    state = {}
    for path, leaf in leaf_paths(jax.eval_shape(network.init, jax.random.key(0))):
        shape = leaf.shape
        if path.endswith("kernel"):
            # Matrices are convolutions of length 1, but for those that WeSpeaker applies once an utterance.
            is_linear = wespeaker and path.split("/")[-2] in ("squeeze", "excite", "embedding")
            shape = (shape[-1], shape[-2], *([] if is_linear else [shape[0] if len(shape) == 3 else 1]))
        state[key_of(path)] = rng.uniform(0.5, 1.5, size=shape).astype(np.float32)
    return state


def read(toolkit, state, config=None):
    """The network, and the variables, that the only family to recognise a state dict makes of it."""
    networks = {name: family.network_of(state, config or {}) for name, family in BY_TOOLKIT.items()}
    assert [name for name, network in networks.items() if network is not None] == [toolkit]
    family, network = BY_TOOLKIT[toolkit], networks[toolkit]
    return network, variables_from_state_dict(network, state, family.key_of(network), ignored=family.ignored)


# Of the published checkpoints: a name, its shape, and where the tensor goes.
PUBLISHED = {
    "WeSpeaker": [
        ("layer1.conv.weight", (512, 80, 5), "params/stem/conv/kernel"),
        ("layer1.bn.running_var", (512,), "batch_stats/stem/norm/var"),
        ("layer2.se_res2block.0.conv.weight", (512, 512, 1), "params/block1/pointwise1/conv/kernel"),
        ("layer3.se_res2block.1.convs.6.weight", (64, 64, 3), "params/block2/branch7/conv/kernel"),
        ("layer4.se_res2block.1.bns.0.running_mean", (64,), "batch_stats/block3/branch1/norm/mean"),
        ("layer2.se_res2block.2.bn.weight", (512,), "params/block1/pointwise2/norm/scale"),
        ("layer2.se_res2block.3.linear1.weight", (128, 512), "params/block1/squeeze/kernel"),
        ("layer2.se_res2block.3.linear2.bias", (512,), "params/block1/excite/bias"),
        ("conv.weight", (1536, 1536, 1), "params/aggregation/conv/kernel"),
        ("pool.linear1.weight", (128, 4608, 1), "params/pooling/attention/kernel"),
        ("pool.linear2.weight", (1536, 128, 1), "params/pooling/logits/kernel"),
        ("bn.running_mean", (3072,), "batch_stats/pooled_norm/mean"),
        ("linear.weight", (192, 3072), "params/embedding/kernel"),
    ],
    "SpeechBrain": [
        ("blocks.0.conv.conv.weight", (1024, 80, 5), "params/stem/conv/kernel"),
        ("blocks.0.norm.norm.running_var", (1024,), "batch_stats/stem/norm/var"),
        ("blocks.1.tdnn1.conv.conv.weight", (1024, 1024, 1), "params/block1/pointwise1/conv/kernel"),
        ("blocks.2.res2net_block.blocks.6.conv.conv.weight", (128, 128, 3), "params/block2/branch7/conv/kernel"),
        ("blocks.3.res2net_block.blocks.0.norm.norm.running_mean", (128,), "batch_stats/block3/branch1/norm/mean"),
        ("blocks.1.tdnn2.norm.norm.weight", (1024,), "params/block1/pointwise2/norm/scale"),
        ("blocks.1.se_block.conv1.conv.weight", (128, 1024, 1), "params/block1/squeeze/kernel"),
        ("blocks.1.se_block.conv2.conv.bias", (1024,), "params/block1/excite/bias"),
        ("mfa.conv.conv.weight", (3072, 3072, 1), "params/aggregation/conv/kernel"),
        ("mfa.norm.norm.bias", (3072,), "params/aggregation/norm/bias"),
        ("asp.tdnn.conv.conv.weight", (128, 9216, 1), "params/pooling/attention/conv/kernel"),
        ("asp.tdnn.norm.norm.weight", (128,), "params/pooling/attention/norm/scale"),
        ("asp.conv.conv.weight", (3072, 128, 1), "params/pooling/logits/kernel"),
        ("asp_bn.norm.running_mean", (6144,), "batch_stats/pooled_norm/mean"),
        ("fc.conv.weight", (192, 6144, 1), "params/embedding/kernel"),
    ],
}


@pytest.mark.parametrize(
    ("toolkit", "network"),
    [
        ("WeSpeaker", Network("ecapa")),
        ("SpeechBrain", Network("ecapa_speechbrain", {"channels": 1024, "aggregation_channels": 3072})),
    ],
    ids=["WeSpeaker", "SpeechBrain"],
)
def test_published_tensors_have_a_place(toolkit, network):
    leaves = dict(leaf_paths(jax.eval_shape(network.init, jax.random.key(0))))
    key_of = BY_TOOLKIT[toolkit].key_of(network)
    for key, shape, path in PUBLISHED[toolkit]:
        assert key_of(path) == key
        assert tuple(size for size in shape if size > 1)[::-1] == leaves[path].shape
    assert len({key_of(path) for path in leaves}) == len(leaves)


@pytest.mark.parametrize("toolkit", ["WeSpeaker", "SpeechBrain"])
@pytest.mark.parametrize("global_context", [True, False])
def test_sizes_are_read_from_the_tensors(toolkit, global_context):
    state = state_of(toolkit, global_context=global_context)
    network, variables = read(toolkit, state)
    expected = {**SIZES, "global_context": global_context}
    if toolkit == "WeSpeaker":
        assert network == Network("ecapa", {**expected, "normalize_embedding": False}, KaldiFbank(window="hamming"))
        np.testing.assert_array_equal(variables["params"]["embedding"]["kernel"], state["linear.weight"].T)
    else:
        assert network == Network("ecapa_speechbrain", expected, SpeechBrainFbank())
        kernel = variables["params"]["block2"]["branch3"]["conv"]["kernel"]
        theirs = state["blocks.2.res2net_block.blocks.2.conv.conv.weight"]
        np.testing.assert_array_equal(kernel, theirs.transpose(2, 1, 0))


def test_the_embeddings_normalisation_and_the_classifier_of_wespeaker():
    state = state_of("WeSpeaker", normalize_embedding=True)
    network, variables = read("WeSpeaker", {**state, "projection.weight": np.ones((7, 16), np.float32)})
    assert network.arguments["normalize_embedding"]
    np.testing.assert_array_equal(variables["batch_stats"]["embedding_norm"]["var"], state["bn2.running_var"])


def test_wespeakers_settings_decide_the_front_end():
    config = {"dataset_args": {"resample_rate": 8000, "fbank_args": {"num_mel_bins": 80, "frame_length": 32}}}
    network, _ = read("WeSpeaker", state_of("WeSpeaker"), config)
    assert network.frontend == KaldiFbank(sample_rate_hz=8000, window="hamming", frame_length_ms=32.0)


def test_speechbrains_settings_decide_the_front_end():
    state = state_of("SpeechBrain")
    network, _ = read("SpeechBrain", state, SPEECHBRAIN_CONFIG)
    assert network.frontend == SpeechBrainFbank()
    fbank = {"sample_rate": "<rate>", "n_fft": 512, "win_length": 32, "f_max": 3800.0}
    network, _ = read("SpeechBrain", state, {**SPEECHBRAIN_CONFIG, "rate": 8000, "compute_features": fbank})
    expected = SpeechBrainFbank(sample_rate_hz=8000, fft_size=512, frame_length_ms=32, high_hz=3800.0)
    assert network.frontend == expected


def test_3d_speakers_settings_tell_it_from_speechbrain():
    network, _ = read("3D-Speaker", state_of("SpeechBrain"), SPEAKERLAB_CONFIG)
    assert network == Network("ecapa_speechbrain", SIZES, KaldiFbank())


def test_other_networks_are_not_recognised():
    resnet = {"conv1.weight": np.zeros((8, 1, 3, 3)), "layer2.0.conv1.weight": np.zeros((16, 8, 3, 3))}
    assert [family.network_of(resnet, {}) for family in FAMILIES] == [None] * len(FAMILIES)


@pytest.mark.parametrize(
    ("toolkit", "config", "message"),
    [
        ("WeSpeaker", {"dataset_args": {"frontend": "s3prl"}}, "s3prl"),
        ("SpeechBrain", {"mel_scale": "slaney"}, "no compute_features"),
        (
            "SpeechBrain",
            {**SPEECHBRAIN_CONFIG, "compute_features": {"!": "new:speechbrain.lobes.features.MFCC"}},
            "features.Fbank.*MFCC",
        ),
        ("SpeechBrain", {**SPEECHBRAIN_CONFIG, "compute_features": {"deltas": True}}, "deltas=True"),
        ("SpeechBrain", {**SPEECHBRAIN_CONFIG, "compute_features": {"n_fft": "big"}}, "numbers.*big"),
        ("SpeechBrain", {**SPEECHBRAIN_CONFIG, "mean_var_norm": {"std_norm": False}}, "norm_type.*global"),
        ("SpeechBrain", {**SPEECHBRAIN_CONFIG, "embedding_model": {"dilations": [1, 1, 1, 1, 1]}}, "dilations"),
    ],
)
def test_settings_that_we_lack_are_refused(toolkit, config, message):
    with pytest.raises(ValueError, match=message):
        BY_TOOLKIT[toolkit].network_of(state_of(toolkit), config)


def test_wespeakers_other_poolings_are_refused():
    state = {key: value for key, value in state_of("WeSpeaker").items() if not key.startswith("pool.")}
    with pytest.raises(ValueError, match="attentive pooling"):
        BY_TOOLKIT["WeSpeaker"].network_of(state, {})


@pytest.mark.parametrize(("toolkit", "key"), [("WeSpeaker", "conv.weight"), ("SpeechBrain", "fc.conv.weight")])
def test_missing_and_misshapen_tensors_are_named(toolkit, key):
    state = state_of(toolkit)
    with pytest.raises(ValueError, match=f"{key} with 3 axes.*None"):
        BY_TOOLKIT[toolkit].network_of({name: value for name, value in state.items() if name != key}, {})
    with pytest.raises(ValueError, match=f"{key} with 3 axes.*\\(5,\\)"):
        BY_TOOLKIT[toolkit].network_of({**state, key: np.ones(5, np.float32)}, {})
    with pytest.raises(StateDictError, match="stranger"):
        read(toolkit, {**state, "stranger.weight": np.ones((2, 2), np.float32)})
