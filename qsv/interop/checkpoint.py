"""Checkpoints as toolkits publish them: a file of weights, and the settings beside it."""

import os
import pathlib
from typing import Any

import numpy as np
import yaml

from qsv.interop.onnx_file import read_onnx_weights
from qsv.interop.torch_file import read_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
ONNX_SUFFIX = ".onnx"

# In a folder, these are the network whatever else lies there: of WeSpeaker and of SpeechBrain.
_WEIGHT_FILES = ("avg_model.pt", "embedding_model.ckpt")
_WEIGHT_SUFFIXES = (*TORCH_SUFFIXES, ONNX_SUFFIX, ".safetensors")
_WRAPPERS = ("state_dict", "model_state_dict", "model", "model_state", "module")
# Of torch.nn.DataParallel and torch.compile.
_PREFIXES = ("module.", "_orig_mod.")
_TAG_KEY = "!"
_CONFIG_FILES = ("config.yaml", "hyperparams.yaml")
_MAX_CONFIG_BYTES = 2**18
_MAX_CONFIG_VALUES = 100_000


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state dict of a checkpoint, and its settings.

    Args:
        path: a file that `read_torch_file` reads, `*.onnx`, or a folder with one. In a folder, `avg_model.pt`
            (WeSpeaker) or `embedding_model.ckpt` (SpeechBrain) is taken, else the only file that ends like a
            checkpoint; where there is none, its folder `models` is searched too.

    Returns:
        The state dict {name: array}: of a training's checkpoint, what is under `state_dict`, `model`, `model_state`
        and the like, with a prefix `module.` that all names have removed. And what `read_config` reads of the
        `config.yaml` or `hyperparams.yaml` beside the file, or above a folder `models`; {} without.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        UnsafePickleError: the file asks to run code.
        ValueError: a file can't be read, holds no state dict, or it isn't clear which is meant; says what was found.
    """
    file = weight_file(path)
    content = read_onnx_weights(file) if file.suffix == ONNX_SUFFIX else read_torch_file(file)
    state = _without_prefix(_unwrapped(file, content))
    config = _config_of(file)
    return state, {} if config is None else read_config(config)


def weight_file(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file of weights that `read_checkpoint` reads."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint file or folder {path}")
    if not path.is_dir():
        return path
    for folder in (path, path / "models"):
        for name in _WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
        found = sorted(file for file in folder.glob("*") if file.suffix in _WEIGHT_SUFFIXES and file.is_file())
        if len(found) > 1:
            raise ValueError(f"{folder} has several checkpoints, name one: {', '.join(file.name for file in found)}")
        if found:
            return found[0]
    raise FileNotFoundError(
        f"{path} has no checkpoint: neither {' nor '.join(_WEIGHT_FILES)}, nor a file *{', *'.join(_WEIGHT_SUFFIXES)}"
    )


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a YAML file as plain data.

    Tags make no objects. A mapping with a tag gets it under the key `"!"`, as in `{"!": "new:speechbrain.lobes.
    features.Fbank", "n_mels": 80}`, and so does a tag on nothing; a list or a scalar, such as `!ref <n_mels>`,
    loses it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it isn't YAML, isn't a mapping, or is too large for settings.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has more than {_MAX_CONFIG_BYTES:,} bytes, too many for settings")
    try:
        loader = _PlainLoader(path.read_text(encoding="utf-8"))
        document = loader.get_single_node()
        # Before anything is made of it: aliases of aliases would fill any memory.
        _count(document, {})
        config = loader.construct_document(document) if document is not None else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} can't be read as settings: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a mapping, it is a {type(config).__name__}")
    return config


class _PlainLoader(yaml.SafeLoader):
    """YAML's own types; of other tags, what is under them."""


def _plain(loader: _PlainLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {_TAG_KEY: tag, **loader.construct_mapping(node, deep=True)}
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return node.value if node.value else {_TAG_KEY: tag}


_PlainLoader.add_multi_constructor("!", _plain)
_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def _count(node: yaml.Node | None, counts: dict[int, int]) -> int:
    """Nodes in a document, an aliased one as often as it occurs; raises ValueError where they are too many."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        # Met again inside itself, it is one too many.
        counts[id(node)] = _MAX_CONFIG_VALUES + 1
        pairs = isinstance(node, yaml.MappingNode)
        items = [item for pair in node.value for item in pair] if pairs else node.value
        counts[id(node)] = 1 + sum(_count(item, counts) for item in items)
    if counts[id(node)] > _MAX_CONFIG_VALUES:
        raise ValueError(f"with its aliases it has more than {_MAX_CONFIG_VALUES:,} values")
    return counts[id(node)]


def _config_of(file: pathlib.Path) -> pathlib.Path | None:
    """The settings beside a file of weights, or above it where its folder is WeSpeaker's `models`."""
    folder = file.absolute().parent
    folders = (folder, folder.parent) if folder.name == "models" else (folder,)
    for folder in folders:
        found = [folder / name for name in _CONFIG_FILES if (folder / name).is_file()]
        if len(found) > 1:
            raise ValueError(f"{folder} has both {' and '.join(_CONFIG_FILES)}; leave only the one of {file.name}")
        if found:
            return found[0]
    return None


def _unwrapped(file: pathlib.Path, content: Any) -> dict[str, np.ndarray]:
    """The state dict inside a training's checkpoint."""
    while isinstance(content, dict) and not any(isinstance(value, np.ndarray) for value in content.values()):
        inside = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
        if len(inside) != 1:
            break
        content = content[inside[0]]
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} holds no state dict, but a {type(content).__name__}")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, np.ndarray))]
    if others:
        raise ValueError(
            f"{file} must hold a state dict, alone or under one of {', '.join(_WRAPPERS)}; these of its entries aren't "
            f"tensors: {', '.join(str(key)[:80] for key in others[:8])}"
        )
    return content


def _without_prefix(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _PREFIXES * 2:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
