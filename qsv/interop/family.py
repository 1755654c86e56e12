"""What the importer needs to know of a family of foreign checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from qsv.interop.state_dict import KeyOf, StateDict
from qsv.models import Network


def _none(key: str) -> bool:
    return False


@dataclasses.dataclass(frozen=True)
class Family:
    """Checkpoints of one architecture as one toolkit writes them.

    Attributes:
        name: what users call it, such as "WeSpeaker ResNet".
        network_of: (state dict, settings beside it or {}) -> our network. None if the checkpoint is of another
            family; ValueError, with the reason, if it is of this one in a variant that we don't have.
        key_of: our network -> the function from a path of its leaves to the name of their tensor.
        ignored: whether a tensor that no leaf asks for may be left out, such as a training's classifier.
    """

    name: str
    network_of: Callable[[StateDict, Mapping[str, Any]], Network | None]
    key_of: Callable[[Network], KeyOf]
    ignored: Callable[[str], bool] = _none
