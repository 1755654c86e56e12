"""Checkpoints of WeSpeaker's ResNets and Gemini DF-ResNets."""

import re
from collections.abc import Mapping
from typing import Any

from qsv.frontend import KaldiFbank
from qsv.interop.family import Family
from qsv.interop.state_dict import KeyOf, StateDict, torch_leaf
from qsv.models import Network
from qsv.models.df_resnet import DEPTHS, GEMINI_DEPTHS
from qsv.models.resnet import STAGE_BLOCKS

_NUM_STAGES = 4
# Three of the four stages halve the frequencies, all four of a Gemini network.
_FREQUENCY_STRIDE, _GEMINI_FREQUENCY_STRIDE = 8, 16
_OUR_MODULE = re.compile(r"stage(?P<stage>\d)_block(?P<block>\d+)/(?P<module>.*)")
_MODULES = {"stem/conv": "conv1", "stem/norm": "bn1", "embedding": "seg_1"}
_BLOCK_MODULES = {
    "shortcut/conv": "shortcut.0",
    "shortcut/norm": "shortcut.1",
    **{f"conv{i}/conv": f"conv{i}" for i in (1, 2, 3)},
    **{f"conv{i}/norm": f"bn{i}" for i in (1, 2, 3)},
}


def wespeaker_frontend(config: Mapping[str, Any], num_mels: int) -> KaldiFbank:
    """The front end that WeSpeaker's `config.yaml` describes; its defaults where it says nothing.

    Args:
        config: the settings, {} without.
        num_mels: bands that the network takes.

    Raises:
        ValueError: the settings want other features than mean normalised filter banks of so many bands.
    """
    dataset = _section(config, "dataset_args")
    kind = dataset.get("frontend", "fbank")
    if kind != "fbank":
        raise ValueError(f"the front end must be 'fbank', the settings say dataset_args.frontend={kind!r}")
    fbank, normalization = _section(dataset, "fbank_args"), _section(dataset, "cmvn_args")
    if normalization.get("norm_var", False):
        raise ValueError("features must be mean normalised only, the settings say dataset_args.cmvn_args.norm_var=True")
    if fbank.get("num_mel_bins", num_mels) != num_mels:
        raise ValueError(f"the network takes {num_mels} bands, the settings say {fbank['num_mel_bins']}")
    return KaldiFbank(
        sample_rate_hz=int(dataset.get("resample_rate", 16000)),
        num_mels=num_mels,
        window="hamming",
        frame_length_ms=float(fbank.get("frame_length", 25)),
        frame_shift_ms=float(fbank.get("frame_shift", 10)),
        mean_normalize=bool(dataset.get("cmvn", True) and normalization.get("norm_mean", True)),
    )


def _resnet(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    # Other networks of this plan, such as ERes2Net, have no `conv2` in their blocks.
    if not {"conv1.weight", "layer1.0.conv1.weight", "layer1.0.conv2.weight"} <= state.keys():
        return None
    _check_pooling(state, config)
    blocks, bottleneck = _counts(state, "layer{stage}.{block}.conv1.weight"), "layer1.0.conv3.weight" in state
    depth = next((depth for depth, one in STAGE_BLOCKS.items() if one == (blocks, bottleneck)), None)
    if depth is None:
        known = ", ".join(f"{depth}: {list(counts)}" for depth, (counts, _) in STAGE_BLOCKS.items())
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise ValueError(f"no ResNet has stages of {list(blocks)} {kind}; known are {known}")
    width = _shape(state, "conv1.weight", 4)[0]
    arguments = {"width": width, "embedding_size": _shape(state, "seg_1.weight", 2)[0]}
    channels = width * 2 ** (_NUM_STAGES - 1) * (4 if bottleneck else 1)
    num_mels = _num_mels(state, channels, _FREQUENCY_STRIDE)
    return Network(f"resnet{depth}", arguments, wespeaker_frontend(config, num_mels))


def _gemini(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    if not {"downsample_layers.0.0.weight", "stages.0.0.conv1.weight"} <= state.keys():
        return None
    _check_pooling(state, config)
    blocks = _counts(state, "stages.{stage}.{block}.conv1.weight", first_stage=0)
    depth = next((depth for depth in GEMINI_DEPTHS if DEPTHS[depth][0] == blocks), None)
    if depth is None:
        known = ", ".join(f"{depth}: {list(DEPTHS[depth][0])}" for depth in GEMINI_DEPTHS)
        raise ValueError(f"no Gemini DF-ResNet has stages of {list(blocks)} blocks; known are {known}")
    width = _shape(state, "downsample_layers.0.0.weight", 4)[0]
    arguments = {"width": width, "embedding_size": _shape(state, "seg_1.weight", 2)[0]}
    num_mels = _num_mels(state, width * 2 ** (_NUM_STAGES - 1), _GEMINI_FREQUENCY_STRIDE)
    return Network(f"gemini_df_resnet{depth}", arguments, wespeaker_frontend(config, num_mels))


def _num_mels(state: StateDict, channels: int, frequency_stride: int) -> int:
    """Bands of the input, by the statistics of `channels` at every frequency that the last layer takes."""
    pooled, per_frequency = _shape(state, "seg_1.weight", 2)[1], 2 * channels
    num_mels = frequency_stride * (pooled // max(per_frequency, 1))
    if not num_mels or pooled * frequency_stride != num_mels * per_frequency:
        raise ValueError(f"seg_1 must take a multiple of {per_frequency} statistics, it takes {pooled}")
    return num_mels


def _check_pooling(state: StateDict, config: Mapping[str, Any]) -> None:
    """Raises ValueError where the end of the network isn't TSTP and one linear layer."""
    if "seg_2.weight" in state:
        raise ValueError("a ResNet with two_emb_layer=True (it has seg_2) isn't supported; train it with False")
    pooling = _section(config, "model_args").get("pooling_func", "TSTP")
    with_weights = any(key.startswith("pool.") for key in state)
    if pooling != "TSTP" or with_weights:
        found = f"pooling_func {pooling!r}" if pooling != "TSTP" else "a pooling with weights of its own (pool.*)"
        raise ValueError(f"a ResNet must have the pooling TSTP, this one has {found}")


def _counts(state: StateDict, key: str, *, first_stage: int = 1) -> tuple[int, ...]:
    """Blocks of every stage, by the keys that each must have."""
    counts = []
    for stage in range(first_stage, first_stage + _NUM_STAGES):
        count = 0
        while key.format(stage=stage, block=count) in state:
            count += 1
        counts.append(count)
    return tuple(counts)


def _resnet_key_of(network: Network) -> KeyOf:
    return resnet_key


def resnet_key(path: str) -> str:
    """The name of a tensor of ours in WeSpeaker.

    >>> resnet_key("batch_stats/stage2_block1/shortcut/norm/mean")
    'layer2.0.shortcut.1.running_mean'
    """
    module = path.partition("/")[2].rpartition("/")[0]
    match = _OUR_MODULE.fullmatch(module)
    if match is None:
        return f"{_MODULES[module]}.{torch_leaf(path)}"
    block = int(match["block"]) - 1
    return f"layer{match['stage']}.{block}.{_BLOCK_MODULES[match['module']]}.{torch_leaf(path)}"


def _gemini_key_of(network: Network) -> KeyOf:
    return gemini_key


def gemini_key(path: str) -> str:
    """The name of a tensor of ours in WeSpeaker's Gemini DF-ResNet.

    >>> gemini_key("params/stage2_block1/conv3/norm/scale"), gemini_key("params/down4/conv/kernel")
    ('stages.1.0.bn3.weight', 'downsample_layers.4.0.weight')
    """
    module = path.partition("/")[2].rpartition("/")[0]
    match = _OUR_MODULE.fullmatch(module)
    if match is not None:
        stage, block = int(match["stage"]) - 1, int(match["block"]) - 1
        return f"stages.{stage}.{block}.{_BLOCK_MODULES[match['module']]}.{torch_leaf(path)}"
    if module == "embedding":
        return f"seg_1.{torch_leaf(path)}"
    layer, _, part = module.partition("/")
    index = 0 if layer == "stem" else int(layer.removeprefix("down"))
    return f"downsample_layers.{index}.{('conv', 'norm').index(part)}.{torch_leaf(path)}"


def _ignored(key: str) -> bool:
    return key.startswith("projection.")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _shape(state: StateDict, key: str, ndim: int) -> tuple[int, ...]:
    if key not in state or state[key].ndim != ndim:
        found = state[key].shape if key in state else "none"
        raise ValueError(f"a WeSpeaker ResNet must have {key} with {ndim} axes, this checkpoint has {found}")
    return tuple(state[key].shape)


FAMILY = Family("WeSpeaker ResNet", _resnet, _resnet_key_of, _ignored)
GEMINI_FAMILY = Family("WeSpeaker Gemini DF-ResNet", _gemini, _gemini_key_of, _ignored)
