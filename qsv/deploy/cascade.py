"""The multi-precision cascade at work: stages are loaded, and utterances embedded, only when a trial needs them."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from qsv.data import audio_duration_seconds
from qsv.deploy.atomic_write import write_atomically
from qsv.deploy.embedder import Embedder
from qsv.deploy.packed_file import load_packed
from qsv.precision import bit_operations
from qsv.scoring import AffineCalibration, Cascade, CascadeOutcome, cosine_scores

FORMAT_VERSION = 1
# Rows in a batch of many utterances; a trial's one or two get a batch of their own, so that little else compiles.
_BATCH_SIZE = 16
_UTTERANCES_OF_A_TRIAL = 2
# Multiplications are nearly proportional to an utterance's length; they are counted for one of this length.
_COUNTED_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a cascade makes of a trial.

    Attributes:
        accepted: whether both utterances are one speaker's.
        llr: log-likelihood ratio of the stage that settled it.
        stage: number of that stage, from 0.
    """

    accepted: bool
    llr: float
    stage: int


@dataclasses.dataclass(frozen=True)
class StageUse:
    """What a stage has been asked for so far.

    Attributes:
        loaded: whether its file has been read.
        utterances: how many it has embedded.
        seconds: of speech that it has embedded.
        bit_operations: of these embeddings: multiplications times bits of the weight times bits of the activation.
        bytes_read: of its file, once.
        resident_bytes: of its parameters and statistics in memory. Levels are stored as float32 there, since JAX
            multiplies no others, so this doesn't fall with the bits.
    """

    loaded: bool = False
    utterances: int = 0
    seconds: float = 0.0
    bit_operations: float = 0.0
    bytes_read: int = 0
    resident_bytes: int = 0


class CascadeVerifier:
    """Decides trials by the first stage that is sure of them.

    Each utterance is embedded at most once at each precision, as long as the verifier lives; embeddings are kept by
    the file's path. A stage is read from its file when the first trial reaches it. Recordings of a prepared corpus
    stand wherever a path does.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]], cascade: Cascade) -> None:
        """Stages, cheapest first.

        Args:
            files: packed files, one for each of the cascade's stages; float ones count 32 bits.
            cascade: calibrations, bounds and threshold.

        Raises:
            ValueError: there isn't one file for each stage.
            FileNotFoundError: a file is missing.
        """
        self.files = tuple(pathlib.Path(file) for file in files)
        self.cascade = cascade
        if len(self.files) != len(cascade.calibrations):
            raise ValueError(f"the cascade has {len(cascade.calibrations)} stages, got {len(self.files)} files")
        for file in self.files:
            if not file.exists():
                raise FileNotFoundError(f"no model file {file}")
        self._embedders: dict[int, Embedder] = {}
        self._operations_per_second: dict[int, float] = {}
        self._embeddings: list[dict[str, np.ndarray]] = [{} for _ in self.files]
        self._use = [StageUse() for _ in self.files]

    @property
    def use(self) -> tuple[StageUse, ...]:
        """What each stage has been asked for."""
        return tuple(self._use)

    def verify(self, enrolment: str | os.PathLike[str], test: str | os.PathLike[str]) -> Decision:
        """Decide one trial.

        Args:
            enrolment: audio file.
            test: audio file.

        Raises:
            FileNotFoundError: a file is missing.
            AudioError: (a ValueError) a file can't be decoded or is too short.
        """
        outcome = self.verify_trials([enrolment, test], [0], [1], progress=False)
        return Decision(bool(outcome.accepted[0]), float(outcome.llrs[0]), int(outcome.stages[0]))

    def verify_trials(
        self,
        files: Sequence[str | os.PathLike[str]],
        enrolment: ArrayLike,
        test: ArrayLike,
        *,
        progress: bool = True,
    ) -> CascadeOutcome:
        """Decide many trials; at each stage only the utterances of trials that reach it are embedded.

        Args:
            files: audio files.
            enrolment: `[trials]` integers, the file on one side of each trial.
            test: `[trials]` integers, that on the other side.
            progress: whether to show a progress bar on standard error.

        Returns:
            The outcome, that of `qsv.scoring.run_cascade` on the scores of all stages.

        Raises:
            FileNotFoundError: a file is missing.
            AudioError: (a ValueError) a file can't be decoded or is too short.
            ValueError: indices of different lengths or out of range.
        """
        sides = np.stack([np.asarray(enrolment), np.asarray(test)])
        if sides.ndim != 2 or not np.issubdtype(sides.dtype, np.integer):
            raise ValueError("enrolment and test must be [trials] integers")
        if sides.size and not (sides.min() >= 0 and sides.max() < len(files)):
            raise ValueError(f"trials name files {sides.min()} to {sides.max()}, there are {len(files)}")
        llrs, stages = np.zeros(sides.shape[1]), np.zeros(sides.shape[1], np.intp)
        remaining = np.arange(sides.shape[1])
        for stage, calibration in enumerate(self.cascade.calibrations):
            if not remaining.size:
                break
            used, index = np.unique(sides[:, remaining], return_inverse=True)
            embeddings = self._embedded(stage, [files[number] for number in used], progress)
            own = calibration(cosine_scores(embeddings, *index.reshape(2, -1)))
            llrs[remaining], stages[remaining] = own, stage
            remaining = remaining[~self.cascade.settles(stage, own)]
        return CascadeOutcome(llrs, llrs >= self.cascade.threshold, stages, len(self.files))

    def _embedded(self, stage: int, files: Sequence[str | os.PathLike[str]], progress: bool) -> np.ndarray:
        """[files, dimensions]; those that aren't known yet are embedded together."""
        known = self._embeddings[stage]
        by_path = {os.fspath(file): file for file in files}
        new = {path: file for path, file in by_path.items() if path not in known}
        if new:
            batch_size = len(new) if len(new) <= _UTTERANCES_OF_A_TRIAL else _BATCH_SIZE
            found = self._embedder(stage).embed_files(list(new.values()), batch_size=batch_size, progress=progress)
            known.update(zip(new, found, strict=True))
            seconds = sum(audio_duration_seconds(file) for file in new.values())
            use = self._use[stage]
            self._use[stage] = dataclasses.replace(
                use,
                utterances=use.utterances + len(new),
                seconds=use.seconds + seconds,
                bit_operations=use.bit_operations + seconds * self._operations_per_second[stage],
            )
        return np.stack([known[os.fspath(file)] for file in files])

    def _embedder(self, stage: int) -> Embedder:
        """The stage's network, read when it is first needed."""
        if stage not in self._embedders:
            file = self.files[stage]
            model = load_packed(file)
            embedder = Embedder.of(model)
            operations = bit_operations(
                model.network,
                embedder.variables,
                model.packed_params,
                seconds=_COUNTED_SECONDS,
                activation_bits=model.activation_bits,
            )
            self._operations_per_second[stage] = operations / _COUNTED_SECONDS
            self._embedders[stage] = embedder
            self._use[stage] = dataclasses.replace(
                self._use[stage],
                loaded=True,
                bytes_read=file.stat().st_size,
                resident_bytes=resident_bytes(embedder.variables),
            )
        return self._embedders[stage]


def resident_bytes(variables: Any) -> int:
    """Bytes of a network's parameters and statistics in memory, as `StageUse` counts them."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(variables))


def save_cascade(path: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], cascade: Cascade) -> None:
    """Write a cascade as JSON: calibrations, bounds and threshold, and its files relative to this one.

    Args:
        path: the file; one that exists is replaced atomically.
        files: packed files, one for each stage.
        cascade: what decides.

    Raises:
        ValueError: there isn't one file for each stage.
        OSError: the file can't be written.
    """
    if len(files) != len(cascade.calibrations):
        raise ValueError(f"the cascade has {len(cascade.calibrations)} stages, got {len(files)} files")
    folder = pathlib.Path(path).resolve().parent
    stages = [
        {
            "file": os.path.relpath(pathlib.Path(file).resolve(), folder),
            "slope": calibration.slope,
            "offset": calibration.offset,
            # JSON has no infinity: a stage that passes everything on has no bound.
            "bound": None if bound is None or math.isinf(bound) else bound,
        }
        for file, calibration, bound in zip(files, cascade.calibrations, (*cascade.bounds, None), strict=True)
    ]
    description = {"format_version": FORMAT_VERSION, "threshold": cascade.threshold, "stages": stages}
    write_atomically(path, (json.dumps(description, indent=2) + "\n").encode())


def load_cascade(path: str | os.PathLike[str]) -> CascadeVerifier:
    """The verifier that `save_cascade` described.

    Raises:
        FileNotFoundError: the file or one of its stages' is missing.
        ValueError: it isn't a cascade's description, or one of a newer qsv.
    """
    target = pathlib.Path(path)
    try:
        description = json.loads(target.read_text(encoding="utf-8"))
        version, stages = description["format_version"], description["stages"]
        calibrations = tuple(AffineCalibration(float(stage["slope"]), float(stage["offset"])) for stage in stages)
        bounds = tuple(math.inf if stage["bound"] is None else float(stage["bound"]) for stage in stages[:-1])
        files = [target.parent / stage["file"] for stage in stages]
        threshold = float(description["threshold"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a cascade's description: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {version}, this qsv reads {FORMAT_VERSION}")
    return CascadeVerifier(files, Cascade(calibrations, bounds, threshold))
