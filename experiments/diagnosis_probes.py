"""Probes of a diagnosis: attributes of the test utterances, and how well embeddings tell them."""

import csv
import dataclasses
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import soundfile

from experiments.testing import TestSet
from qsv.analysis import probe, probe_folds
from qsv.data import (
    Augmenter,
    Record,
    audio_duration_seconds,
    folder_impulse_responses,
    folder_noise,
    read_audio,
)
from qsv.data.augmentation import change_speed

_DURATION_CLASSES = ("short", "medium", "long")
_SPEEDS = {"slower": 0.9, "faster": 1.1}

Augmentations = Mapping[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Attribute:
    """What a probe is to read.

    Attributes:
        rows: of the embeddings: of the test utterances in their order, the augmented ones behind them.
        values: one for each row.
        groups: what of these rows must not be in a fold's training and test part at once.
    """

    rows: tuple[int, ...]
    values: tuple[str, ...]
    groups: tuple[str, ...]


def read_attributes(path: str, test_set: TestSet) -> dict[str, dict[str, str]]:
    """{attribute: {utterance: value}} of a tab-separated file.

    Raises:
        ValueError: the file has no column `utterance` or no other, or names an utterance that is in no trial.
    """
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        columns = reader.fieldnames or []
        if "utterance" not in columns or len(columns) < 2:
            raise ValueError(f"{path}: the first line must name the columns, `utterance` and attributes, got {columns}")
        rows = list(reader)
    unknown = {row["utterance"] for row in rows} - set(test_set.trials.names)
    if unknown:
        raise ValueError(f"{path}: {len(unknown)} utterances are in no trial, such as {sorted(unknown)[0]!r}")
    # A row may leave an attribute open.
    return {name: {row["utterance"]: row[name] for row in rows if row[name]} for name in columns if name != "utterance"}


def augmentations(noise_dir: Sequence[str], reverberation_dir: str, *, sample_rate_hz: int) -> Augmentations:
    """{type: (waveform, generator) -> waveform}: speeds, and noise and rooms where there are folders of them.

    Raises:
        ValueError: a folder without audio.
    """
    found: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
        name: functools.partial(_at_speed, speed) for name, speed in _SPEEDS.items()
    }
    options: dict[str, Any] = {"probability": 1.0, "sample_rate_hz": sample_rate_hz}
    if noise_dir:
        found["noise"] = Augmenter([source for one in noise_dir for source in folder_noise(one)], **options).augment
    if reverberation_dir:
        responses = folder_impulse_responses(reverberation_dir)
        found["reverberation"] = Augmenter(impulse_responses=responses, **options).augment
    return found


def _at_speed(speed: float, waveform: np.ndarray, _: np.random.Generator) -> np.ndarray:
    return change_speed(waveform, speed)


def augmented_utterances(
    types: Augmentations, test_set: TestSet, places: Sequence[int], *, sample_rate_hz: int
) -> list[tuple[str, Record]]:
    """(name, recording in memory) of every type of every utterance, type by type; the same in every run."""
    recordings = []
    for name, augment in types.items():
        for place in places:
            waveform = read_audio(test_set.utterances[place].path, sample_rate_hz=sample_rate_hz)
            changed, file = augment(waveform, np.random.default_rng(place)), io.BytesIO()
            soundfile.write(file, changed, sample_rate_hz, format="WAV", subtype="PCM_16")
            label = f"{test_set.trials.names[place]} ({name})"
            recordings.append((label, Record([{"audio": file.getvalue()}], 0, label, len(changed), sample_rate_hz)))
    return recordings


def probed_attributes(
    labels: Mapping[str, Mapping[str, str]],
    test_set: TestSet,
    *,
    types: Sequence[str],
    places: Sequence[int],
    num_folds: int,
) -> tuple[dict[str, Attribute], dict[str, str]]:
    """What can be probed, checked before anything is embedded.

    Where every value is of one speaker (the speaker itself, a session), a fold must have seen the speaker: only the
    utterances are kept apart. All else is probed on speakers that the fold's training part doesn't have.

    Args:
        labels: from `read_attributes`. Speaker and duration come on top, the recording where the speakers' folders have
            folders in them, and the augmentation.
        test_set: the utterances.
        types: of the augmentation; none leaves it out.
        places: utterances that are augmented.
        num_folds: of the cross-validation.

    Returns:
        {name: attribute}, and {name: why it can't be probed} of those that nobody named.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: one of `labels` can't be probed.
    """
    names = test_set.trials.names
    speakers = [str(speaker) for speaker in test_set.speakers]
    own = {"speaker": dict(zip(names, speakers, strict=True)), "duration": _durations(test_set)}
    recordings = {name: name.rpartition("/")[0] for name in names}
    if len(set(recordings.values())) > len(set(speakers)):
        own["recording"] = recordings
    attributes = {name: _attribute(values, names, speakers) for name, values in (own | dict(labels)).items()}
    if types and places:
        kinds = ("clean", *types)
        beyond = range(len(names), len(names) + len(types) * len(places))
        attributes["augmentation"] = Attribute(
            (*places, *beyond),
            tuple(kind for kind in kinds for _ in places),
            tuple(speakers[place] for _ in kinds for place in places),
        )
    left_out = {}
    for name, attribute in list(attributes.items()):
        try:
            probe_folds(attribute.values, attribute.groups, num_folds=num_folds)
        except ValueError as error:
            if name in labels:
                raise ValueError(f"{name!r} of --labels can't be probed: {error}") from error
            del attributes[name]
            left_out[name] = str(error)
    return attributes, left_out


def _attribute(values: Mapping[str, str], names: Sequence[str], speakers: Sequence[str]) -> Attribute:
    rows = tuple(index for index, name in enumerate(names) if name in values)
    found = tuple(values[names[row]] for row in rows)
    of_one_speaker = len({(values[names[row]], speakers[row]) for row in rows}) == len(set(found))
    return Attribute(rows, found, tuple((names if of_one_speaker else speakers)[row] for row in rows))


def _durations(test_set: TestSet) -> dict[str, str]:
    """The third of all lengths that each utterance's is in."""
    seconds = np.array([audio_duration_seconds(utterance.path) for utterance in test_set.utterances])
    thirds = np.searchsorted(np.quantile(seconds, [1 / 3, 2 / 3]), seconds)
    return {name: _DURATION_CLASSES[third] for name, third in zip(test_set.trials.names, thirds, strict=True)}


def run_probes(
    attributes: Mapping[str, Attribute], embeddings: Mapping[str, np.ndarray], *, num_folds: int
) -> dict[str, Any]:
    """Balanced accuracy of both probes for every attribute, and each model's gap to float.

    Args:
        attributes: from `probed_attributes`.
        embeddings: {model: [test utterances, augmented ones behind them; dimensions]}, "float" among them.
        num_folds: folds of the cross-validation.

    Returns:
        {"attribute, probe": {model: figures}}.
    """
    found: dict[str, Any] = {}
    for name, attribute in attributes.items():
        for kind in ("logistic", "mlp"):
            results = {
                model: probe(
                    own[list(attribute.rows)], attribute.values, attribute.groups, kind=kind, num_folds=num_folds
                )
                for model, own in embeddings.items()
            }
            unquantized = results["float"]
            found[f"{name}, {kind}"] = {
                model: {
                    "utterances": len(attribute.rows),
                    "values": len(set(attribute.values)),
                    "majority": result.majority,
                    "balanced_accuracy": result.balanced_accuracy,
                    "interval": result.interval(),
                    "gap": result.balanced_accuracy - unquantized.balanced_accuracy,
                    "gap_interval": result.interval(unquantized),
                }
                for model, result in results.items()
            }
    return found
