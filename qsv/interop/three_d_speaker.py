"""Checkpoints of CAM++ from 3D-Speaker and WeSpeaker, and of 3D-Speaker's ERes2NetV2."""

from collections.abc import Mapping
from typing import Any

from qsv.frontend import KaldiFbank
from qsv.interop.family import Family
from qsv.interop.state_dict import KeyOf, StateDict, torch_leaf
from qsv.interop.wespeaker import wespeaker_frontend
from qsv.models import Network, campplus_layers, eres2net
from qsv.models.campplus import DENSE_BLOCKS

# Added to the pooled variance by WeSpeaker; 3D-Speaker adds nothing.
_WESPEAKER_VARIANCE_OFFSET = 1e-7
_CLASSIFIER = "projection."
# What `base_width` is relative to in ERes2NetV2.
_WIDTH_UNIT = 64


def _3d_speaker_campplus(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    if not _is_campplus(state):
        return None
    arguments, num_mels = _campplus_arguments(state)
    return Network("campplus", arguments, _3d_speaker_frontend(config, num_mels))


def _wespeaker_campplus(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    # Only the settings, or the classifier that WeSpeaker keeps beside the network, tell the two toolkits apart.
    is_wespeaker = config.get("model") == "CAMPPlus" or any(key.startswith(_CLASSIFIER) for key in state)
    if not (is_wespeaker and _is_campplus(state)):
        return None
    settings = config.get("model_args")
    pooling = settings.get("pooling_func", "TSTP") if isinstance(settings, Mapping) else "TSTP"
    if pooling != "TSTP":
        raise ValueError(f"a CAM++ must have the pooling TSTP, the settings say {pooling!r}")
    arguments, num_mels = _campplus_arguments(state)
    arguments["variance_offset"] = _WESPEAKER_VARIANCE_OFFSET
    return Network("campplus", arguments, wespeaker_frontend(config, num_mels))


def _is_campplus(state: StateDict) -> bool:
    return {"head.conv1.weight", "xvector.tdnn.linear.weight"} <= state.keys()


def _campplus_arguments(state: StateDict) -> tuple[dict[str, Any], int]:
    """The arguments that the shapes tell, and the Mel bands."""
    if any(key.startswith("xvector.stats.") for key in state):
        raise ValueError("a CAM++ must have statistics pooling, this one's has weights of its own (xvector.stats.*)")
    init_channels, from_head, _ = _shape(state, "xvector.tdnn.linear.weight", 3)
    growth_rate, bottleneck, _ = _shape(state, "xvector.block1.tdnnd1.cam_layer.linear_local.weight", 3)
    arguments = {
        "embedding_size": _shape(state, "xvector.dense.linear.weight", 3)[0],
        "growth_rate": growth_rate,
        "bn_size": _quotient(bottleneck, growth_rate, "channels of a bottleneck"),
        "init_channels": init_channels,
    }
    frequencies = _quotient(from_head, campplus_layers.HEAD_CHANNELS, "inputs of xvector.tdnn")
    return arguments, campplus_layers.FREQUENCY_STRIDE * frequencies


def _campplus_key_of(network: Network) -> KeyOf:
    names = {
        "head/stem": ("head.conv1", "head.bn1"),
        "head/downsample": ("head.conv2", "head.bn2"),
    }
    for block in range(4):
        ours, theirs = f"head/block{block + 1}", f"head.layer{block // 2 + 1}.{block % 2}"
        names[f"{ours}/conv1"] = (f"{theirs}.conv1", f"{theirs}.bn1")
        names[f"{ours}/conv2"] = (f"{theirs}.conv2", f"{theirs}.bn2")
        names[f"{ours}/shortcut"] = (f"{theirs}.shortcut.0", f"{theirs}.shortcut.1")
    modules = _conv_norm_names(names)
    for module in ("tdnn", *(f"transit{block + 1}" for block in range(len(DENSE_BLOCKS)))):
        modules[module] = f"xvector.{module}.linear"
        modules[f"{module}_norm"] = f"xvector.{module}.nonlinear.batchnorm"
    for block, (layers, _) in enumerate(DENSE_BLOCKS, start=1):
        for layer in range(1, layers + 1):
            ours, theirs = f"block{block}_layer{layer}", f"xvector.block{block}.tdnnd{layer}"
            modules[f"{ours}/norm1"] = f"{theirs}.nonlinear1.batchnorm"
            modules[f"{ours}/bottleneck"] = f"{theirs}.linear1"
            modules[f"{ours}/norm2"] = f"{theirs}.nonlinear2.batchnorm"
            modules[f"{ours}/local"] = f"{theirs}.cam_layer.linear_local"
            modules[f"{ours}/context1"] = f"{theirs}.cam_layer.linear1"
            modules[f"{ours}/context2"] = f"{theirs}.cam_layer.linear2"
    modules["norm"] = "xvector.out_nonlinear.batchnorm"
    modules["embedding"] = "xvector.dense.linear"
    modules["embedding_norm"] = "xvector.dense.nonlinear.batchnorm"
    return _key_in(modules)


def _eres2netv2(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    if not {"layer3_ds.weight", "fuse34.local_att.0.weight"} <= state.keys():
        return None
    if "seg_2.weight" in state:
        raise ValueError("an ERes2NetV2 with two_emb_layer=True (it has seg_2) isn't supported; train it with False")
    width = _shape(state, "conv1.weight", 4)[0]
    last_stage = width * 2 ** (len(eres2net.STAGE_BLOCKS) - 1)
    branch = _shape(state, f"layer{len(eres2net.STAGE_BLOCKS)}.0.convs.0.weight", 4)[0]
    expansion = _quotient(_shape(state, "layer1.0.conv3.weight", 4)[0], width, "outputs of layer1")
    embedding_size, pooled = _shape(state, "seg_1.weight", 2)
    scale = 0
    while f"layer1.0.convs.{scale}.weight" in state:
        scale += 1
    arguments = {
        "embedding_size": embedding_size,
        "width": width,
        # Branches are rounded down, so this is the least width that gives the last and finest one.
        "base_width": -(-branch * _WIDTH_UNIT // last_stage),
        "scale": scale,
        "expansion": expansion,
    }
    # Means and deviations of every channel at every frequency.
    frequencies = _quotient(pooled, 2 * last_stage * expansion, "statistics that seg_1 takes")
    return Network("eres2netv2", arguments, _3d_speaker_frontend(config, eres2net.FREQUENCY_STRIDE * frequencies))


def _eres2netv2_key_of(network: Network) -> KeyOf:
    names = {"stem": ("conv1", "bn1")}
    fusions = {"stage_fusion": "fuse34"}
    scale = network.module().scale
    for stage, blocks in enumerate(eres2net.STAGE_BLOCKS, start=1):
        for block in range(blocks):
            ours, theirs = f"stage{stage}_block{block + 1}", f"layer{stage}.{block}"
            names[f"{ours}/conv1"] = (f"{theirs}.conv1", f"{theirs}.bn1")
            names[f"{ours}/conv3"] = (f"{theirs}.conv3", f"{theirs}.bn3")
            names[f"{ours}/shortcut"] = (f"{theirs}.shortcut.0", f"{theirs}.shortcut.1")
            for branch in range(scale):
                names[f"{ours}/branch{branch + 1}"] = (f"{theirs}.convs.{branch}", f"{theirs}.bns.{branch}")
                fusions[f"{ours}/fusion{branch + 1}"] = f"{theirs}.fuse_models.{branch}"
    modules = _conv_norm_names(names)
    for ours, theirs in fusions.items():
        for layer, place in {"squeeze": 0, "squeeze_norm": 1, "excite": 3, "excite_norm": 4}.items():
            modules[f"{ours}/{layer}"] = f"{theirs}.local_att.{place}"
    modules["stage3_downsample"] = "layer3_ds"
    modules["embedding"] = "seg_1"
    return _key_in(modules)


def _3d_speaker_frontend(config: Mapping[str, Any], num_mels: int) -> KaldiFbank:
    # Its samples are in [-1, 1] when Kaldi's floor cuts off quiet bands.
    return KaldiFbank(sample_rate_hz=int(config.get("sample_rate", 16000)), num_mels=num_mels, full_scale=1.0)


def _conv_norm_names(names: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """From modules of a convolution and a normalisation to the names of both."""
    both: dict[str, str] = {}
    for ours, (conv, norm) in names.items():
        both |= {f"{ours}/conv": conv, f"{ours}/norm": norm}
    return both


def _key_in(modules: Mapping[str, str]) -> KeyOf:
    """From our modules' names to theirs -> from the paths of our leaves to their tensors' names."""

    def key(path: str) -> str:
        module = path.partition("/")[2].rpartition("/")[0]
        return f"{modules[module]}.{torch_leaf(path)}"

    return key


def _shape(state: StateDict, key: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor whose every axis is at least 1 long."""
    found = state[key].shape if key in state else None
    if found is None or len(found) != ndim or not all(found):
        raise ValueError(f"it must have {key} with {ndim} axes, this checkpoint has {found}")
    return tuple(found)


def _quotient(dividend: int, divisor: int, what: str) -> int:
    if dividend % divisor:
        raise ValueError(f"{what} must be a multiple of {divisor}, found {dividend}")
    return dividend // divisor


FAMILIES = (
    Family("WeSpeaker CAM++", _wespeaker_campplus, _campplus_key_of, ignored=lambda key: key.startswith(_CLASSIFIER)),
    Family("3D-Speaker CAM++", _3d_speaker_campplus, _campplus_key_of),
    Family("3D-Speaker ERes2NetV2", _eres2netv2, _eres2netv2_key_of),
)
