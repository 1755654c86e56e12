"""Resemblyzer's checkpoints of the GE2E encoder."""

import re
from collections.abc import Mapping
from typing import Any

from qsv.frontend import MelSpectrogram
from qsv.interop.family import Family
from qsv.interop.state_dict import KeyOf, StateDict, torch_leaf
from qsv.models import Network

_LAYER = re.compile(r"lstm\.weight_ih_l(\d+)")
# Scale and offset of the GE2E loss; the encoder has no use for them.
_LOSS = ("similarity_weight", "similarity_bias")


def _network_of(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    if not {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "linear.weight"} <= state.keys():
        return None
    strange = [key for key in state if key.endswith("_reverse") or key.startswith("lstm.weight_hr_")]
    if strange:
        raise ValueError(f"a GE2E encoder must have plain one-way LSTMs, got one with {strange[0]}")
    inputs, hidden = state["lstm.weight_ih_l0"], state["lstm.weight_hh_l0"]
    arguments = {
        "hidden_size": int(hidden.shape[-1]),
        "num_layers": sum(_LAYER.fullmatch(key) is not None for key in state),
        "embedding_size": int(state["linear.weight"].shape[0]),
    }
    return Network("ge2e", arguments, MelSpectrogram(num_mels=int(inputs.shape[-1])))


def _key_of(network: Network) -> KeyOf:
    def key(path: str) -> str | tuple[str, ...]:
        _, module, *rest = path.split("/")
        if module == "embedding":
            return f"linear.{torch_leaf(path)}"
        layer = int(module.removeprefix("lstm")) - 1
        if rest == ["hidden", "bias"]:
            return f"lstm.bias_ih_l{layer}", f"lstm.bias_hh_l{layer}"
        return f"lstm.weight_{'ih' if rest[0] == 'input' else 'hh'}_l{layer}"

    return key


FAMILY = Family(
    name="Resemblyzer GE2E",
    network_of=_network_of,
    key_of=_key_of,
    ignored=lambda key: key in _LOSS,
)
