"""WeSpeaker's ResNets: the same embeddings as theirs, architectures from shapes, and variants that are refused."""

import jax
import numpy as np
import pytest
import soundfile

from qsv.frontend import KaldiFbank
from qsv.interop import import_checkpoint, variables_from_state_dict
from qsv.interop.wespeaker import FAMILY, GEMINI_FAMILY, gemini_key, resnet_key, wespeaker_frontend
from qsv.models import Network
from qsv.models.df_resnet import DEPTHS, GEMINI_DEPTHS
from qsv.models.resnet import STAGE_BLOCKS
from qsv.quant import leaf_paths

NUM_MELS = 80
SECONDS = (1.3, 0.71, 1.0)


def build(torch, depth, *, width, embedding_size):
    """The network in PyTorch, from its description: stem, four stages, TSTP, one linear layer."""
    nn = torch.nn
    counts, bottleneck = STAGE_BLOCKS[depth]

    class Block(nn.Module):
        def __init__(self, inputs, channels, stride):
            super().__init__()
            outputs = channels * (4 if bottleneck else 1)
            # (kernel, outputs, stride) of each convolution.
            shapes = [(3, channels, stride), (3, outputs, 1)]
            if bottleneck:
                shapes = [(1, channels, 1), (3, channels, stride), (1, outputs, 1)]
            self.count = len(shapes)
            fan_in = inputs
            for index, (kernel, out, step) in enumerate(shapes, 1):
                setattr(self, f"conv{index}", nn.Conv2d(fan_in, out, kernel, step, kernel // 2, bias=False))
                setattr(self, f"bn{index}", nn.BatchNorm2d(out))
                fan_in = out
            self.shortcut = nn.Sequential()
            if stride != 1 or inputs != outputs:
                self.shortcut = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            y = x
            for index in range(1, self.count + 1):
                y = getattr(self, f"bn{index}")(getattr(self, f"conv{index}")(y))
                if index < self.count:
                    y = torch.relu(y)
            return torch.relu(y + self.shortcut(x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            inputs = width
            for stage, count in enumerate(counts):
                blocks = []
                for index in range(count):
                    blocks.append(Block(inputs, width * 2**stage, 2 if stage and not index else 1))
                    inputs = width * 2**stage * (4 if bottleneck else 1)
                setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.seg_1 = nn.Linear(2 * inputs * NUM_MELS // 8, embedding_size)
            # The training's classifier, which checkpoints hold too.
            self.projection = nn.Linear(embedding_size, 5, bias=False)

        def forward(self, features):
            """[batch, frames, mels] -> [batch, embedding_size]."""
            x = torch.relu(self.bn1(self.conv1(features.transpose(1, 2).unsqueeze(1))))
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            deviation = torch.sqrt(torch.var(x, dim=-1) + 1e-7)
            return self.seg_1(torch.cat([x.mean(dim=-1).flatten(1), deviation.flatten(1)], dim=1))

    return randomized(torch, ResNet)


def build_gemini(torch, depth, *, width, embedding_size):
    """The Gemini DF-ResNet in PyTorch: four downsampling layers, inverted bottlenecks, TSTP, one linear layer."""
    nn = torch.nn
    counts, strides = DEPTHS[depth]

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            wide = 4 * channels
            self.conv1, self.bn1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
            self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
            self.bn2 = nn.BatchNorm2d(wide)
            self.conv3, self.bn3 = nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)

        def forward(self, x):
            y = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(y)))
            return torch.relu(self.bn3(self.conv3(y)) + x)

    class Gemini(nn.Module):
        def __init__(self):
            super().__init__()
            widths = [width * factor for factor in (1, 1, 2, 4, 8)]
            stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
            self.downsample_layers = nn.ModuleList([stem])
            for fan_in, out, stride in zip(widths, widths[1:], strides, strict=False):
                conv = nn.Conv2d(fan_in, out, 3, stride, padding=1, bias=False)
                self.downsample_layers.append(nn.Sequential(conv, nn.BatchNorm2d(out)))
            self.stages = nn.ModuleList(
                [
                    nn.Sequential(*[Block(out) for _ in range(count)])
                    for out, count in zip(widths[1:], counts, strict=True)
                ]
            )
            self.seg_1 = nn.Linear(2 * widths[-1] * NUM_MELS // 16, embedding_size)
            self.projection = nn.Linear(embedding_size, 5, bias=False)

        def forward(self, features):
            """[batch, frames, mels] -> [batch, embedding_size]."""
            x = self.downsample_layers[0](features.transpose(1, 2).unsqueeze(1))
            for downsample, stage in zip(self.downsample_layers[1:], self.stages, strict=True):
                x = stage(downsample(x))
            deviation = torch.sqrt(torch.var(x, dim=-1) + 1e-7)
            return self.seg_1(torch.cat([x.mean(dim=-1).flatten(1), deviation.flatten(1)], dim=1))

    return randomized(torch, Gemini)


def randomized(torch, make):
    """A model with normalisations that do something, in evaluation mode."""
    nn = torch.nn
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize(("name", "depth"), [("resnet", 18), ("resnet", 50), ("gemini_df_resnet", 60)])
def test_embeddings_are_theirs(speech_dir, tmp_path, name, depth):
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    model = (build if name == "resnet" else build_gemini)(torch, depth, width=4, embedding_size=16)
    torch.save(model.state_dict(), tmp_path / "avg_model.pt")
    imported = import_checkpoint(tmp_path)
    frontend = KaldiFbank(window="hamming", num_mels=NUM_MELS)
    assert imported.network == Network(f"{name}{depth}", {"width": 4, "embedding_size": 16}, frontend)

    files = sorted((speech_dir / "an4").rglob("*.flac")) or sorted((speech_dir / "an4").rglob("*.wav"))
    lengths = [round(seconds * 16000) for seconds in SECONDS]
    waveforms = [
        soundfile.read(file, dtype="float32")[0][:length] for file, length in zip(files, lengths, strict=False)
    ]
    lengths = [len(waveform) for waveform in waveforms]
    batch = np.zeros((len(lengths), max(lengths)), np.float32)
    for row, waveform in zip(batch, waveforms, strict=True):
        row[: len(waveform)] = waveform

    with torch.no_grad():
        features = [np.array(frontend(waveform[None])[0]) for waveform in waveforms]
        theirs = np.concatenate([model(torch.from_numpy(one)).numpy() for one in features])
    whole = imported.network.embed(imported.variables, waveforms[0][None])
    padded = imported.network.embed(imported.variables, batch, np.array(lengths))
    for ours, expected in ((whole, theirs[:1]), (padded, theirs)):
        norms = np.linalg.norm(expected, axis=1)
        cosines = np.sum(ours * expected, axis=1) / (np.linalg.norm(ours, axis=1) * norms)
        assert np.min(cosines) >= 0.99999
        assert np.max(np.abs(ours - expected).max(axis=1) / norms) <= 1e-4
    # Weights that gave every utterance the same embedding would prove little.
    assert np.linalg.norm(theirs[0] - theirs[1]) > 0.01 * np.linalg.norm(theirs[0])


def shapes_of(network, key_of=resnet_key):
    """A state dict of the network in their layout, of zeros that take no memory."""
    state = {}
    for path, leaf in leaf_paths(jax.eval_shape(network.init, jax.random.key(0))):
        order = (3, 2, 0, 1) if leaf.ndim == 4 else tuple(reversed(range(leaf.ndim)))
        state[key_of(path)] = np.broadcast_to(np.float32(0), [leaf.shape[axis] for axis in order])
    return state


@pytest.fixture
def state():
    return shapes_of(Network("resnet18", {"width": 2, "embedding_size": 3}))


@pytest.mark.parametrize("depth", STAGE_BLOCKS)
@pytest.mark.parametrize(("width", "embedding_size", "num_mels"), [(32, 256, 80), (3, 5, 40)])
def test_every_depth_is_recognised_by_its_shapes(depth, width, embedding_size, num_mels):
    frontend = KaldiFbank(window="hamming", num_mels=num_mels)
    network = Network(f"resnet{depth}", {"width": width, "embedding_size": embedding_size}, frontend)
    assert FAMILY.network_of(shapes_of(network), {}) == network


@pytest.mark.parametrize("depth", GEMINI_DEPTHS)
@pytest.mark.parametrize(("width", "embedding_size", "num_mels"), [(32, 256, 80), (3, 5, 32)])
def test_every_gemini_depth_is_recognised_by_its_shapes(depth, width, embedding_size, num_mels):
    frontend = KaldiFbank(window="hamming", num_mels=num_mels)
    network = Network(f"gemini_df_resnet{depth}", {"width": width, "embedding_size": embedding_size}, frontend)
    state = shapes_of(network, gemini_key)
    assert GEMINI_FAMILY.network_of(state, {}) == network
    assert FAMILY.network_of(state, {}) is None


def test_other_gemini_stages_are_refused():
    state = shapes_of(Network("gemini_df_resnet60", {"width": 2}), gemini_key)
    state["stages.3.3.conv1.weight"] = state["stages.3.2.conv1.weight"]
    with pytest.raises(ValueError, match=r"no Gemini DF-ResNet has stages of \[3, 3, 9, 4\] blocks; known are 60"):
        GEMINI_FAMILY.network_of(state, {})


def test_names_are_theirs():
    network = Network("resnet50", {"width": 2})
    names = {resnet_key(path) for path, _ in leaf_paths(jax.eval_shape(network.init, jax.random.key(0)))}
    assert {"conv1.weight", "bn1.running_var", "layer3.5.bn3.bias", "layer1.0.shortcut.0.weight", "seg_1.bias"} <= names
    assert "layer1.1.shortcut.0.weight" not in names


def test_classifiers_are_left_out_and_other_tensors_not(state):
    network = FAMILY.network_of(state, {})
    more = {**state, "projection.weight": np.zeros((5, 3), np.float32)}
    variables_from_state_dict(network, more, FAMILY.key_of(network), ignored=FAMILY.ignored)
    with pytest.raises(ValueError, match="unexpected layer1.0.se.fc.weight"):
        more["layer1.0.se.fc.weight"] = np.zeros((2, 2), np.float32)
        variables_from_state_dict(network, more, FAMILY.key_of(network), ignored=FAMILY.ignored)


@pytest.mark.parametrize("missing", ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"])
def test_other_networks_are_not_recognised(state, missing):
    del state[missing]
    assert FAMILY.network_of(state, {}) is None
    assert FAMILY.network_of({}, {}) is None


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"seg_2.weight": (3, 3)}, {}, "two_emb_layer=True .*seg_2.*isn't supported"),
        ({"pool.linear1.weight": (3, 3)}, {}, "must have the pooling TSTP, .* a pooling with weights"),
        ({}, {"model_args": {"pooling_func": "TAP"}}, "must have the pooling TSTP, .* pooling_func 'TAP'"),
        ({"layer2.2.conv1.weight": (4, 4, 3, 3)}, {}, r"no ResNet has stages of \[2, 3, 2, 2\] basic blocks; known"),
        ({"layer1.0.conv3.weight": (4, 4, 3, 3)}, {}, r"no ResNet has stages of \[2, 2, 2, 2\] bottlenecks"),
        ({"seg_1.weight": (3, 321)}, {}, "must take a multiple of 32 statistics, it takes 321"),
        ({"seg_1.weight": (3, 0)}, {}, "must take a multiple of 32 statistics, it takes 0"),
        ({"seg_1.weight": (3, 320, 1)}, {}, "must have seg_1.weight with 2 axes"),
        ({"seg_1.weight": None}, {}, "must have seg_1.weight with 2 axes, this checkpoint has none"),
        ({"conv1.weight": (3,)}, {}, "must have conv1.weight with 4 axes"),
        ({"conv1.weight": (0, 1, 3, 3)}, {}, "statistics"),
        ({}, {"dataset_args": {"frontend": "s3prl"}}, "front end must be 'fbank', .*'s3prl'"),
        ({}, {"dataset_args": {"cmvn_args": {"norm_var": True}}}, "mean normalised only"),
        ({}, {"dataset_args": {"fbank_args": {"num_mel_bins": 40}}}, "takes 80 bands, the settings say 40"),
    ],
)
def test_variants_that_we_do_not_have_are_refused(state, changes, config, message):
    state |= {key: np.zeros(shape, np.float32) for key, shape in changes.items() if shape is not None}
    state = {key: value for key, value in state.items() if changes.get(key, ()) is not None}
    with pytest.raises(ValueError, match=message):
        FAMILY.network_of(state, config)


def test_the_front_end_is_that_of_the_settings():
    settings = {
        "dataset_args": {
            "resample_rate": 8000,
            "cmvn": True,
            "cmvn_args": {"norm_mean": False, "norm_var": False},
            "fbank_args": {"num_mel_bins": 64, "frame_length": 20, "frame_shift": 8, "dither": 1.0},
        }
    }
    expected = KaldiFbank(8000, 64, "hamming", 20.0, 8.0, mean_normalize=False)
    assert wespeaker_frontend(settings, 64) == expected
    assert wespeaker_frontend({"dataset_args": {"cmvn": False}}, 80).mean_normalize is False
    assert wespeaker_frontend({"dataset_args": None}, 80) == KaldiFbank(window="hamming")
