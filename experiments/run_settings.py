"""What shaped a run, kept in its folder, so that nothing there is resumed or reused under other settings."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.calibration_file import CALIBRATION_FILE
from experiments.configuration import write_json
from experiments.models import MODEL_FILE, model_digest
from experiments.speech import SpeechConfig, speech_digests

SETTINGS_FILE = "settings.json"
# In a run's folder or below it: what later commands would take for theirs.
_MADE = (MODEL_FILE, CALIBRATION_FILE, "checkpoints/*", f"stages/*/{CALIBRATION_FILE}", "stages/*/checkpoints/*")

_NAMED = 5


def shaping_settings(config: Any) -> dict[str, Any]:
    """Settings of a config and of those nested in it, by flag, but for the incidental ones.

    Models and speech are told by what they are, not by where they lie.

    Raises:
        OSError: a model or a corpus isn't there.
    """
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.metadata.get("incidental"):
            continue
        if dataclasses.is_dataclass(value):
            settings |= shaping_settings(value)
        else:
            settings[field.name] = model_digest(value) if value and field.name == "pretrained" else value
    return settings | speech_digests(config) if isinstance(config, SpeechConfig) else settings


def claim_folder(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings in a run's folder, unless something has been made there: then they must be the same.

    Args:
        folder: of the run; made where it is missing.
        settings: all that shapes its outcome.

    Raises:
        ValueError: what is there was made with other settings; names these.
    """
    path = folder / SETTINGS_FILE
    if any(True for pattern in _MADE for _ in folder.glob(pattern)):
        _require_own(folder, settings)
    else:
        # Each process of a training writes the same: none finds another's work without it.
        write_json(path, settings)


def holds_model(folder: pathlib.Path, settings: Mapping[str, Any]) -> bool:
    """Whether the model of these settings is in a folder.

    Raises:
        ValueError: the folder's model was made with other settings; names these.
    """
    made = (folder / MODEL_FILE).exists()
    if made:
        _require_own(folder, settings)
    return made


def require_same(found: Mapping[str, Any], settings: Mapping[str, Any], place: pathlib.Path) -> None:
    """Refuse what was made with other settings.

    Args:
        found: settings as JSON gives them back.
        settings: those that are wanted.
        place: the file or folder that was made.

    Raises:
        ValueError: they differ; names each with both values.
    """
    wanted = json.loads(json.dumps(settings))
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if names:
        differences = [f"{name}={found.get(name)!r}, not {wanted.get(name)!r}" for name in names[:_NAMED]]
        differences += [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
        raise ValueError(f"{place} was made with {'; '.join(differences)}; choose another --workdir, or delete it")


def _require_own(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} holds a run without {SETTINGS_FILE}, which would tell how it was made; choose another "
            "--workdir, or delete it"
        )
    require_same(json.loads(path.read_text(encoding="utf-8")), settings, folder)
