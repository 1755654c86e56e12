"""Microsoft's ONNX file of DNSMOS P.808."""

from collections.abc import Mapping
from typing import Any

from qsv.interop.family import Family
from qsv.interop.state_dict import KeyOf, StateDict
from qsv.models import Network

# The names that model_v8 has of its training.
_FIRST_CONV, _FIRST_DENSE = 5, 3
_DENSE = ("dense1", "dense2", "score")


def _network_of(state: StateDict, config: Mapping[str, Any]) -> Network | None:
    known = f"conv2d_{_FIRST_CONV}/kernel:0" in state and any("mos_estimator_small" in key for key in state)
    return Network("dnsmos_p808") if known else None


def _key_of(network: Network) -> KeyOf:
    def key(path: str) -> str:
        _, layer, leaf = path.split("/")
        if layer in _DENSE:
            operation = "MatMul" if leaf == "kernel" else "BiasAdd"
            number = _FIRST_DENSE + _DENSE.index(layer)
            return f"mos_estimator_small_1/dense_{number}/{operation}/ReadVariableOp/resource:0"
        return f"conv2d_{_FIRST_CONV + int(layer.removeprefix('conv')) - 1}/{leaf}:0"

    return key


FAMILY = Family(name="DNSMOS P.808", network_of=_network_of, key_of=_key_of)
