"""From anybody's checkpoint to our network and its variables."""

import dataclasses
import os
import pathlib
from typing import Any

from qsv.interop import dnsmos, ecapa, resemblyzer, three_d_speaker, wespeaker
from qsv.interop.checkpoint import read_checkpoint, weight_file
from qsv.interop.family import Family
from qsv.interop.state_dict import StateDict, StateDictError, variables_from_state_dict
from qsv.models import Network

# The first that recognises a checkpoint reads it.
FAMILIES: tuple[Family, ...] = (
    wespeaker.FAMILY,
    wespeaker.GEMINI_FAMILY,
    *three_d_speaker.FAMILIES,
    *ecapa.FAMILIES,
    resemblyzer.FAMILY,
    dnsmos.FAMILY,
)

_SHOWN_KEYS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class ImportedCheckpoint:
    """A checkpoint of another toolkit as our network.

    Attributes:
        path: the file of weights that was read.
        network: the architecture, its arguments and its front end.
        variables: `{"params", "batch_stats"}`, float32 NumPy arrays.
        family: name of the family that recognised it.
    """

    path: pathlib.Path
    network: Network
    variables: dict[str, Any]
    family: str


def import_checkpoint(path: str | os.PathLike[str]) -> ImportedCheckpoint:
    """Read a checkpoint of another toolkit, without PyTorch and without running what is in it.

    Args:
        path: the file of weights, or the folder that it lies in; see `read_checkpoint`.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafePickleError: the file asks to run code.
        StateDictError: (a ValueError) its tensors aren't those of the network it seems to be.
        ValueError: it can't be read, is of no family in `FAMILIES`, or of one in a variant that we don't have; or
            its weights aren't finite floats.
    """
    path = weight_file(path)
    state, config = read_checkpoint(path)
    for family in FAMILIES:
        try:
            network = family.network_of(state, config)
            if network is not None:
                variables = variables_from_state_dict(network, state, family.key_of(network), ignored=family.ignored)
                return ImportedCheckpoint(path, network, variables, family.name)
        except StateDictError:
            raise
        # A TypeError is of settings that hold, say, a list where a number belongs.
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, which looks like a {family.name}: {error}") from error
    raise ValueError(_unrecognised(path, state))


def _unrecognised(path: pathlib.Path, state: StateDict) -> str:
    keys = ", ".join(key[:80] for key in list(state)[:_SHOWN_KEYS])
    return (
        f"{path} is of none of these families: {', '.join(family.name for family in FAMILIES)}; its "
        f"{len(state)} tensors begin with {keys}"
    )
