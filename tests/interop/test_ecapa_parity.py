"""ECAPA-TDNN of two toolkits in PyTorch and, read into ours, in JAX: the same embeddings of the same speech."""

import jax
import numpy as np
import pytest
import soundfile

from qsv.interop.ecapa import FAMILIES
from qsv.interop.state_dict import variables_from_state_dict

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

CHANNELS, SCALE, POOLED, SQUEEZED, ATTENDING, EMBEDDING = 32, 4, 40, 8, 8, 24


class WeSpeakerBlock(nn.Module):
    """Convolution, ReLU, batch normalisation."""

    def __init__(self, inputs, outputs, kernel=1):
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(torch.relu(self.conv(x)))


class WeSpeakerRes2(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        width = CHANNELS // SCALE
        self.convs = nn.ModuleList(
            [nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation) for _ in range(SCALE - 1)]
        )
        self.bns = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(SCALE - 1)])

    def forward(self, x):
        chunks = x.chunk(SCALE, dim=1)
        results = []
        for chunk, conv, bn in zip(chunks, self.convs, self.bns, strict=False):
            results.append(bn(torch.relu(conv(chunk + results[-1] if results else chunk))))
        return torch.cat([*results, chunks[-1]], dim=1)


class WeSpeakerSqueeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(CHANNELS, SQUEEZED), nn.Linear(SQUEEZED, CHANNELS)

    def forward(self, x):
        return x * torch.sigmoid(self.linear2(torch.relu(self.linear1(x.mean(dim=2)))))[..., None]


class WeSpeakerResidual(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        parts = WeSpeakerBlock(CHANNELS, CHANNELS), WeSpeakerRes2(dilation), WeSpeakerBlock(CHANNELS, CHANNELS)
        self.se_res2block = nn.Sequential(*parts, WeSpeakerSqueeze())

    def forward(self, x):
        return x + self.se_res2block(x)


class WeSpeakerPooling(nn.Module):
    def __init__(self, global_context):
        super().__init__()
        self.global_context = global_context
        self.linear1 = nn.Conv1d(POOLED * (3 if global_context else 1), ATTENDING, 1)
        self.linear2 = nn.Conv1d(ATTENDING, POOLED, 1)

    def forward(self, x):
        seen = x
        if self.global_context:
            deviation = torch.sqrt(x.var(dim=2, keepdim=True) + 1e-7)
            seen = torch.cat([x, x.mean(dim=2, keepdim=True).expand_as(x), deviation.expand_as(x)], dim=1)
        weights = torch.softmax(self.linear2(torch.tanh(self.linear1(seen))), dim=2)
        mean = (weights * x).sum(dim=2)
        variance = (weights * x.square()).sum(dim=2) - mean.square()
        return torch.cat([mean, torch.sqrt(variance.clamp(min=1e-7))], dim=1)


class WeSpeakerECAPA(nn.Module):
    def __init__(self, global_context=True, emb_bn=False):
        super().__init__()
        self.layer1 = WeSpeakerBlock(80, CHANNELS, 5)
        self.layer2, self.layer3, self.layer4 = (WeSpeakerResidual(dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * CHANNELS, POOLED, 1)
        self.pool = WeSpeakerPooling(global_context)
        self.bn = nn.BatchNorm1d(2 * POOLED)
        self.linear = nn.Linear(2 * POOLED, EMBEDDING)
        self.bn2 = nn.BatchNorm1d(EMBEDDING) if emb_bn else nn.Identity()

    def forward(self, features):
        first = self.layer2(self.layer1(features.transpose(1, 2)))
        second = self.layer3(first)
        outputs = torch.cat([first, second, self.layer4(second)], dim=1)
        return self.bn2(self.linear(self.bn(self.pool(torch.relu(self.conv(outputs))))))


class SpeechBrainConv(nn.Module):
    def __init__(self, inputs, outputs, kernel=1, dilation=1):
        super().__init__()
        self.edge = dilation * (kernel // 2)
        self.conv = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)

    def forward(self, x):
        return self.conv(F.pad(x, (self.edge, self.edge), mode="reflect"))


class SpeechBrainNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.norm(x)


class SpeechBrainBlock(nn.Module):
    """Convolution, ReLU, batch normalisation."""

    def __init__(self, inputs, outputs, kernel=1, dilation=1):
        super().__init__()
        self.conv = SpeechBrainConv(inputs, outputs, kernel, dilation)
        self.norm = SpeechBrainNorm(outputs)

    def forward(self, x):
        return self.norm(torch.relu(self.conv(x)))


class SpeechBrainRes2(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        width = CHANNELS // SCALE
        self.blocks = nn.ModuleList([SpeechBrainBlock(width, width, 3, dilation) for _ in range(SCALE - 1)])

    def forward(self, x):
        first, *chunks = x.chunk(SCALE, dim=1)
        results = []
        for chunk, block in zip(chunks, self.blocks, strict=True):
            results.append(block(chunk + results[-1] if results else chunk))
        return torch.cat([first, *results], dim=1)


class SpeechBrainSqueeze(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = SpeechBrainConv(CHANNELS, SQUEEZED), SpeechBrainConv(SQUEEZED, CHANNELS)

    def forward(self, x):
        return x * torch.sigmoid(self.conv2(torch.relu(self.conv1(x.mean(dim=2, keepdim=True)))))


class SpeechBrainResidual(nn.Module):
    def __init__(self, dilation):
        super().__init__()
        self.tdnn1, self.tdnn2 = SpeechBrainBlock(CHANNELS, CHANNELS), SpeechBrainBlock(CHANNELS, CHANNELS)
        self.res2net_block = SpeechBrainRes2(dilation)
        self.se_block = SpeechBrainSqueeze()

    def forward(self, x):
        return x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))


class SpeechBrainPooling(nn.Module):
    def __init__(self, global_context):
        super().__init__()
        self.global_context = global_context
        self.tdnn = SpeechBrainBlock(POOLED * (3 if global_context else 1), ATTENDING)
        self.conv = SpeechBrainConv(ATTENDING, POOLED)

    def forward(self, x):
        def statistics(weights):
            mean = (weights * x).sum(dim=2, keepdim=True)
            return mean, torch.sqrt((weights * (x - mean).square()).sum(dim=2, keepdim=True).clamp(min=1e-12))

        even = torch.full((1, 1, x.shape[2]), 1 / x.shape[2])
        seen = torch.cat([x, *(s.expand_as(x) for s in statistics(even))], dim=1) if self.global_context else x
        return torch.cat(statistics(torch.softmax(self.conv(torch.tanh(self.tdnn(seen))), dim=2)), dim=1)


class SpeechBrainECAPA(nn.Module):
    def __init__(self, global_context=True):
        super().__init__()
        residuals = [SpeechBrainResidual(dilation) for dilation in (2, 3, 4)]
        self.blocks = nn.ModuleList([SpeechBrainBlock(80, CHANNELS, 5), *residuals])
        self.mfa = SpeechBrainBlock(3 * CHANNELS, POOLED)
        self.asp = SpeechBrainPooling(global_context)
        self.asp_bn = SpeechBrainNorm(2 * POOLED)
        self.fc = SpeechBrainConv(2 * POOLED, EMBEDDING)

    def forward(self, features):
        outputs = [features.transpose(1, 2)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return self.fc(self.asp_bn(self.asp(self.mfa(torch.cat(outputs[2:], dim=1)))))[..., 0]


def with_random_statistics(network):
    """The network in evaluation, its batch normalisations as if it had been trained."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1:
            low = 0.5 if name.endswith(("running_var", "weight")) else -0.5
            tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return network.eval()


NETWORKS = [
    (WeSpeakerECAPA, {}),
    (WeSpeakerECAPA, {"global_context": False, "emb_bn": True}),
    (SpeechBrainECAPA, {}),
    (SpeechBrainECAPA, {"global_context": False}),
]


@pytest.mark.parametrize(("toolkit", "options"), NETWORKS)
def test_embeddings_of_real_speech_equal_the_toolkits(speech_dir, toolkit, options):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    theirs = with_random_statistics(toolkit(**options))
    state = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    family, network = next(
        (family, network) for family in FAMILIES if (network := family.network_of(state, {})) is not None
    )
    variables = variables_from_state_dict(network, state, family.key_of(network), ignored=family.ignored)
    files = [*sorted((speech_dir / "an4" / "fash").iterdir())[:2], sorted((speech_dir / "emodb" / "03").iterdir())[0]]
    utterances = [soundfile.read(file, dtype="float32")[0] for file in files]
    lengths = np.array([len(utterance) for utterance in utterances])
    assert len(set(lengths)) == 3
    batch = np.stack([np.pad(utterance, (0, max(lengths) + 1234 - len(utterance))) for utterance in utterances])
    together = np.asarray(network.embed(variables, batch, lengths))
    for row, utterance in enumerate(utterances):
        features, _ = network.frontend(jax.numpy.asarray(utterance)[None])
        with torch.no_grad():
            expected = theirs(torch.from_numpy(np.asarray(features)))[0].numpy()
        alone = np.asarray(network.embed(variables, utterance[None]))[0]
        for ours in (alone, together[row]):
            norm = np.linalg.norm(expected)
            assert np.dot(ours, expected) / (np.linalg.norm(ours) * norm) >= 0.99999
            assert np.abs(ours - expected).max() <= 1e-4 * norm
    # The network tells the utterances apart, so that agreement means something.
    unit = together / np.linalg.norm(together, axis=1, keepdims=True)
    assert np.min(np.linalg.norm(unit[:, None] - unit, axis=2)[np.triu_indices(3, 1)]) > 0.01
