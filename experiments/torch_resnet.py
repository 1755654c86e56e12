"""The float training step in PyTorch, for `experiments.benchmark_training --torch` only."""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from qsv.frontend import KaldiFbank
from qsv.models.resnet import STAGE_BLOCKS


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.first = _conv_norm(inputs, channels, 3, stride)
        self.second = _conv_norm(channels, channels, 3, 1)
        plain = stride == 1 and inputs == channels
        self.shortcut = nn.Identity() if plain else _conv_norm(inputs, channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


def _conv_norm(inputs: int, channels: int, kernel: int, stride: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels))


class _ResNet(nn.Module):
    def __init__(self, depth: int, width: int):
        super().__init__()
        counts, bottleneck = STAGE_BLOCKS[depth]
        if bottleneck:
            raise ValueError(f"the PyTorch comparison has basic blocks only, not depth {depth}")
        layers: list[nn.Module] = [_conv_norm(1, width, 3, 1), nn.ReLU()]
        inputs = width
        for stage, count in enumerate(counts):
            for index in range(count):
                layers.append(_Block(inputs, width * 2**stage, 2 if stage and not index else 1))
                inputs = width * 2**stage
        self.layers = nn.Sequential(*layers)
        self.embedding = nn.Linear(2 * inputs * 10, 256)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = self.layers(features).flatten(1, 2)
        statistics = [x.mean(-1), torch.sqrt(x.var(-1) + 1e-7)]
        return self.embedding(torch.cat(statistics, dim=1))


def make_torch_step(
    model: str, width: int, batch: dict[str, np.ndarray], num_speakers: int, *, channels_last: bool
) -> Callable[[], None]:
    """A warm float32 step with all cores: forward, softmax loss, backward, SGD; features are computed beforehand.

    It leaves out the front end and the margin, which favours PyTorch a little.
    """
    waveform = batch["waveform"].astype(np.float32) / 32768
    features, _ = KaldiFbank()(waveform)
    inputs = torch.from_numpy(np.array(features).swapaxes(1, 2)[:, None].copy())
    labels = torch.from_numpy(batch["label"].astype(np.int64))
    network = _ResNet(int(model.removeprefix("resnet")), width)
    if channels_last:
        inputs = inputs.to(memory_format=torch.channels_last)
        network = network.to(memory_format=torch.channels_last)
    head = nn.Linear(256, num_speakers, bias=False)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(head(network(inputs)), labels).backward()
        optimizer.step()

    once()
    once()
    return once
