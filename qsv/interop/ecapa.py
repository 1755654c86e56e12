"""Checkpoints of ECAPA-TDNN from WeSpeaker, SpeechBrain and 3D-Speaker."""

from collections.abc import Mapping
from typing import Any

from qsv.frontend import KaldiFbank, SpeechBrainFbank
from qsv.interop.family import Family
from qsv.interop.state_dict import KeyOf, StateDict, torch_leaf
from qsv.interop.wespeaker import wespeaker_frontend
from qsv.models import Network
from qsv.models.ecapa import DILATIONS

_BLOCKS = range(1, len(DILATIONS) + 1)

_FBANK_TAG = "new:speechbrain.lobes.features.Fbank"
# Fields of speechbrain.lobes.features.Fbank -> ours.
_FBANK_FIELDS = {
    "sample_rate": "sample_rate_hz",
    "n_fft": "fft_size",
    "win_length": "frame_length_ms",
    "hop_length": "frame_shift_ms",
    "f_min": "low_hz",
    "f_max": "high_hz",
}


def _wespeaker(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    if "layer2.se_res2block.1.convs.0.weight" not in state:
        return None
    if "pool.linear1.weight" not in state:
        raise ValueError("a WeSpeaker ECAPA must have attentive pooling (ASTP), this one has no pool.linear1.weight")
    channels, mels = _shape(state, "layer1.conv.weight")[:2]
    pooled = _shape(state, "conv.weight")[0]
    arguments = {
        "channels": channels,
        "embedding_size": _shape(state, "linear.weight", 2)[0],
        "aggregation_channels": pooled,
        "scale": channels // _shape(state, "layer2.se_res2block.1.convs.0.weight")[0],
        "se_channels": _shape(state, "layer2.se_res2block.3.linear1.weight", 2)[0],
        "attention_channels": _shape(state, "pool.linear1.weight")[0],
        "global_context": _shape(state, "pool.linear1.weight")[1] != pooled,
        "normalize_embedding": "bn2.weight" in state,
    }
    return Network("ecapa", arguments, wespeaker_frontend(config, mels))


def _wespeaker_key_of(network: Network) -> KeyOf:
    names = {
        "stem/conv": "layer1.conv",
        "stem/norm": "layer1.bn",
        "aggregation/conv": "conv",
        "pooling/attention": "pool.linear1",
        "pooling/logits": "pool.linear2",
        "pooled_norm": "bn",
        "embedding": "linear",
        "embedding_norm": "bn2",
    }
    for block in _BLOCKS:
        ours, theirs = f"block{block}", f"layer{block + 1}.se_res2block"
        for place, layer in {0: "pointwise1", 2: "pointwise2"}.items():
            names[f"{ours}/{layer}/conv"] = f"{theirs}.{place}.conv"
            names[f"{ours}/{layer}/norm"] = f"{theirs}.{place}.bn"
        for branch in _branches(network):
            names[f"{ours}/branch{branch}/conv"] = f"{theirs}.1.convs.{branch - 1}"
            names[f"{ours}/branch{branch}/norm"] = f"{theirs}.1.bns.{branch - 1}"
        names[f"{ours}/squeeze"] = f"{theirs}.3.linear1"
        names[f"{ours}/excite"] = f"{theirs}.3.linear2"
    return _key_in(names)


def _speechbrain(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    if not _has_speechbrain_keys(state) or _is_3d_speaker(config):
        return None
    mels = _shape(state, "blocks.0.conv.conv.weight")[1]
    frontend = _speechbrain_frontend(config, mels) if config else SpeechBrainFbank(num_mels=mels)
    return Network("ecapa_speechbrain", _speechbrain_arguments(state, _section(config, "embedding_model")), frontend)


def _3d_speaker(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    # Nothing in the tensors tells this toolkit's checkpoints from SpeechBrain's, whose front end is another.
    if not _has_speechbrain_keys(state) or not _is_3d_speaker(config):
        return None
    settings = _section(_section(config, "embedding_model"), "args")
    frontend = KaldiFbank(num_mels=_shape(state, "blocks.0.conv.conv.weight")[1])
    return Network("ecapa_speechbrain", _speechbrain_arguments(state, settings), frontend)


def _has_speechbrain_keys(state: StateDict) -> bool:
    return {"blocks.1.res2net_block.blocks.0.conv.conv.weight", "asp.tdnn.conv.conv.weight"} <= state.keys()


def _is_3d_speaker(config: Mapping[str, Any]) -> bool:
    return "speakerlab." in repr(config)


def _speechbrain_arguments(state: StateDict, settings: Mapping[str, Any]) -> dict[str, Any]:
    dilations = list(settings.get("dilations", (1, *DILATIONS, 1)))
    if dilations != [1, *DILATIONS, 1]:
        raise ValueError(f"an ECAPA must have the dilations {[1, *DILATIONS, 1]}, the settings say {dilations}")
    channels = _shape(state, "blocks.0.conv.conv.weight")[0]
    pooled = _shape(state, "mfa.conv.conv.weight")[0]
    return {
        "channels": channels,
        "embedding_size": _shape(state, "fc.conv.weight")[0],
        "aggregation_channels": pooled,
        "scale": channels // _shape(state, "blocks.1.res2net_block.blocks.0.conv.conv.weight")[0],
        "se_channels": _shape(state, "blocks.1.se_block.conv1.conv.weight")[0],
        "attention_channels": _shape(state, "asp.tdnn.conv.conv.weight")[0],
        "global_context": _shape(state, "asp.tdnn.conv.conv.weight")[1] != pooled,
    }


def _speechbrain_frontend(config: Mapping[str, Any], mels: int) -> SpeechBrainFbank:
    fbank = _section(config, "compute_features")
    kind = fbank.get("!", _FBANK_TAG)
    if not fbank or kind != _FBANK_TAG:
        found = f"say {kind!r}" if fbank else "have no compute_features"
        raise ValueError(f"features must be made by speechbrain.lobes.features.Fbank, the settings {found}")
    extra = [name for name in ("deltas", "context") if fbank.get(name)]
    if extra:
        raise ValueError(f"features must be plain filter banks, the settings say compute_features.{extra[0]}=True")
    if "mean_var_norm" in config:
        # Their defaults: global statistics, with deviations.
        normalization = {"norm_type": "global", "std_norm": True, **_section(config, "mean_var_norm")}
        if normalization["norm_type"] != "sentence" or normalization["std_norm"]:
            raise ValueError(
                "features must be normalised by each utterance's mean (mean_var_norm: norm_type sentence, std_norm "
                f"False), the settings say {normalization}"
            )
    given = {ours: fbank[theirs] for theirs, ours in _FBANK_FIELDS.items() if fbank.get(theirs) is not None}
    strange = {name: value for name, value in given.items() if not isinstance(value, int | float)}
    if strange:
        raise ValueError(f"settings of compute_features must be numbers, these aren't: {strange}")
    return SpeechBrainFbank(num_mels=mels, **given)


def _speechbrain_key_of(network: Network) -> KeyOf:
    tdnns = {"stem": "blocks.0", "aggregation": "mfa", "pooling/attention": "asp.tdnn"}
    names = {"pooling/logits": "asp.conv.conv", "pooled_norm": "asp_bn.norm", "embedding": "fc.conv"}
    for block in _BLOCKS:
        ours, theirs = f"block{block}", f"blocks.{block}"
        tdnns[f"{ours}/pointwise1"] = f"{theirs}.tdnn1"
        tdnns[f"{ours}/pointwise2"] = f"{theirs}.tdnn2"
        for branch in _branches(network):
            tdnns[f"{ours}/branch{branch}"] = f"{theirs}.res2net_block.blocks.{branch - 1}"
        names[f"{ours}/squeeze"] = f"{theirs}.se_block.conv1.conv"
        names[f"{ours}/excite"] = f"{theirs}.se_block.conv2.conv"
    for ours, theirs in tdnns.items():
        names[f"{ours}/conv"] = f"{theirs}.conv.conv"
        names[f"{ours}/norm"] = f"{theirs}.norm.norm"
    return _key_in(names)


def _shape(state: StateDict, key: str, ndim: int = 3) -> tuple[int, ...]:
    """The shape of a tensor whose every axis is at least 1 long."""
    found = state[key].shape if key in state else None
    if found is None or len(found) != ndim or not all(found):
        raise ValueError(f"an ECAPA-TDNN must have {key} with {ndim} axes, this checkpoint has {found}")
    return tuple(found)


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A mapping inside the settings, its references such as `<n_mels>` resolved; empty where there is none."""
    section = config.get(name)
    if not isinstance(section, Mapping):
        return {}
    return {key: _resolved(value, config) for key, value in section.items()}


def _resolved(value: Any, config: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and value.startswith("<") and value.endswith(">"):
        return config.get(value[1:-1])
    return value


def _branches(network: Network) -> range:
    return range(1, network.module().scale)


def _key_in(names: Mapping[str, str]) -> KeyOf:
    """From our modules' names to theirs -> from the paths of our leaves to their tensors' names."""

    def key(path: str) -> str:
        module = path.partition("/")[2].rpartition("/")[0]
        return f"{names[module]}.{torch_leaf(path)}"

    return key


FAMILIES = (
    Family("WeSpeaker ECAPA-TDNN", _wespeaker, _wespeaker_key_of, ignored=lambda key: key.startswith("projection.")),
    Family("3D-Speaker ECAPA-TDNN", _3d_speaker, _speechbrain_key_of),
    Family("SpeechBrain ECAPA-TDNN", _speechbrain, _speechbrain_key_of),
)
