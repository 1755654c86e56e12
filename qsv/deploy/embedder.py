"""From waveforms and audio files to speaker embeddings, with a network in memory or from a packed file."""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import soxr
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qsv.data import AudioError, AudioPath, BadFiles, Record, Utterance, evaluation_batches, read_audio
from qsv.deploy.compact import fold_batch_norms, in_half_precision
from qsv.deploy.packed_file import PackedModel, describe_plan, load_packed, save_packed
from qsv.deploy.size_report import SizeReport, size_report
from qsv.models.network import Network
from qsv.quant import Plan, QuantizedActivations, quantize
from qsv.quant.transform import States

AudioFile = Utterance | tuple[str, AudioPath] | str | os.PathLike[str]

# A waveform is padded to the next of 0.5 s * 1.25**k, so that utterances of any length compile a dozen times.
_SHORTEST_PADDED_SECONDS = 0.5
_LENGTH_RATIO = 1.25
# Above this, samples are surely in another scale (16-bit units), not merely overdriven.
_LARGEST_PLAUSIBLE_PEAK = 8.0


@dataclasses.dataclass(frozen=True, eq=False)
class Embedder:
    """A network ready to embed.

    Attributes:
        network: the model, its arguments and its front end.
        variables: `{"params", "batch_stats"}` of float arrays; moved to the default device.
        threshold: calibrated score above which two utterances are one speaker's, or None.
        activations: codes of the inputs of layers; None for float ones.
    """

    network: Network
    variables: Mapping[str, Any]
    threshold: float | None = None
    activations: QuantizedActivations | None = None

    @classmethod
    def of(cls, model: PackedModel) -> "Embedder":
        """The embedder of what a packed file holds."""
        return cls(model.network, model.variables(), model.threshold, model.activations)

    def __post_init__(self) -> None:
        object.__setattr__(self, "variables", jax.device_put(self.variables))

    def __call__(self, waveform: np.ndarray, sample_rate_hz: float) -> np.ndarray:
        """The embedding of one waveform.

        Args:
            waveform: [samples] or [samples, channels] float in [-1, 1]; channels are averaged, and samples
                beyond the range clipped.
            sample_rate_hz: its rate; resampled with soxr (HQ) where the network's is another.

        Returns:
            [embedding_size] float32, not length normalised.

        Raises:
            ValueError: the waveform has another shape or type, holds NaN or infinity, is in another scale or
                is shorter than the network's front end takes.
        """
        return self._embed_one(self.prepared(waveform, sample_rate_hz))

    def prepared(self, waveform: np.ndarray, sample_rate_hz: float) -> np.ndarray:
        """A waveform as the network takes it; arguments and errors as above.

        Returns:
            [samples] float32 in [-1, 1] at the network's rate.
        """
        mono = _mono(waveform, sample_rate_hz)
        rate = self.network.frontend.sample_rate_hz
        needed = math.ceil(self.network.frontend.min_samples * sample_rate_hz / rate)
        if len(mono) >= needed and sample_rate_hz != rate:
            mono = soxr.resample(mono, sample_rate_hz, rate, quality="HQ")
        if len(mono) < self.network.frontend.min_samples:
            raise ValueError(
                f"waveform has {len(waveform)} samples at {sample_rate_hz:g} Hz, the network needs at least {needed}"
            )
        return np.clip(mono, -1.0, 1.0)

    def embed_file(self, path: str | os.PathLike[str]) -> np.ndarray:
        """The embedding of one audio file.

        Args:
            path: wav, flac, ogg or mp3, of any rate and number of channels.

        Returns:
            [embedding_size] float32, not length normalised.

        Raises:
            FileNotFoundError: there is no such file.
            AudioError: (a ValueError) it can't be decoded or is shorter than the network's front end takes.
        """
        waveform = read_audio(path, sample_rate_hz=self.network.frontend.sample_rate_hz)
        self.check_length(path, len(waveform))
        return self._embed_one(waveform)

    def embed_files(
        self,
        files: Sequence[AudioFile],
        *,
        batch_size: int = 16,
        max_seconds: float | None = None,
        num_threads: int = 2,
        progress: bool = True,
        bad_files: BadFiles | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> np.ndarray:
        """Embeddings of many files, each embedded once, in batches of like length.

        Args:
            files: paths, utterances, or pairs of a name and a path.
            batch_size: files in a batch.
            max_seconds: only so much of each file's beginning; None for all.
            num_threads: threads that decode ahead.
            progress: whether to show a progress bar on standard error.
            bad_files: notes the files that can't be used, whose rows are NaN; None to stop at the first.
            devices: share each batch, whose size becomes a multiple of their number; the default one if none are given.

        Returns:
            [n, embedding_size] float32 in the order of `files`; padding changes none of them.

        Raises:
            ValueError: there are no files, or a setting is out of range.
            FileNotFoundError: a file is missing.
            AudioError: a file can't be decoded or is shorter than the network's front end takes.
            BadFilesError: more files can't be used than `bad_files` takes.
        """
        utterances = [_named(file) if isinstance(file, str | os.PathLike) else file for file in files]
        batches = evaluation_batches(
            utterances,
            batch_size=-(-batch_size // max(1, len(devices))) * max(1, len(devices)),
            max_seconds=max_seconds,
            sample_rate_hz=self.network.frontend.sample_rate_hz,
            num_threads=num_threads,
            bad_files=bad_files,
        )
        embed = self._shared_by(devices) if devices else lambda *batch: self.embed_batch(*jax.device_put(batch))
        done: list[tuple[np.ndarray, np.ndarray]] = []
        running: tuple[np.ndarray, jax.Array, np.ndarray] | None = None
        with tqdm.tqdm(total=len(files), unit="file", desc="embedding", disable=not progress) as bar:
            for batch in batches:
                lengths = zip(batch.indices, batch.lengths.tolist(), strict=False)
                usable = [self._is_usable(utterances[index], length, bad_files) for index, length in lengths]
                started = embed(batch.waveform, batch.lengths)
                # One batch behind, so that the device computes while the next one is decoded.
                if running is not None:
                    done.append((running[0], np.asarray(running[1])[running[2]]))
                running = (batch.indices[usable], started, np.flatnonzero(usable))
                bar.update(len(batch.indices))
            if running is not None:
                done.append((running[0], np.asarray(running[1])[running[2]]))
        embeddings = np.full((len(files), self.network.embedding_size), np.nan, np.float32)
        for indices, rows in done:
            embeddings[indices] = rows
        return embeddings

    def _shared_by(self, devices: Sequence[jax.Device]) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        """`embed_batch` of rows that are split over devices."""
        mesh = Mesh(np.asarray(devices), ("data",))
        whole, rows = PartitionSpec(), PartitionSpec("data")
        variables = jax.device_put(self.variables, NamedSharding(mesh, whole))

        def embed(variables: Any, waveform: jax.Array, lengths: jax.Array) -> jax.Array:
            return self.network.embed(variables, waveform, lengths, self.activations)

        # Unchecked: recurrent layers start from zeros that no device owns.
        mapped = jax.shard_map(embed, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows, check_vma=False)
        return functools.partial(jax.jit(mapped), variables)

    def _is_usable(
        self, utterance: Utterance | tuple[str, AudioPath], num_samples: int, bad_files: BadFiles | None
    ) -> bool:
        """Whether a file is long enough; noted, or else raised, where it isn't."""
        path = utterance.path if isinstance(utterance, Utterance) else utterance[1]
        try:
            self.check_length(path, num_samples)
        except AudioError as error:
            if bad_files is None:
                raise
            bad_files.add(utterance.name if isinstance(utterance, Utterance) else utterance[0], error.reason)
            return False
        return True

    def embed_batch(self, waveform: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """[batch, embedding_size] of a batch, as `Network.embed` makes them."""
        return self.network.embed(self.variables, waveform, lengths, self.activations)

    def _embed_one(self, waveform: np.ndarray) -> np.ndarray:
        shortest = _SHORTEST_PADDED_SECONDS * self.network.frontend.sample_rate_hz
        # The slack keeps a length on the grid from being rounded up to the next.
        exponent = math.ceil(math.log(max(1.0, len(waveform) / shortest), _LENGTH_RATIO) - 1e-9)
        padded = np.zeros((1, max(math.ceil(shortest * _LENGTH_RATIO**exponent), len(waveform))), np.float32)
        padded[0, : len(waveform)] = waveform
        lengths = np.array([len(waveform)], np.int32)
        return np.array(self.embed_batch(*jax.device_put((padded, lengths)))[0])

    def check_length(self, path: str | os.PathLike[str], num_samples: int) -> None:
        """Raises AudioError where a file, in samples at the network's rate, is shorter than its front end takes."""
        frontend = self.network.frontend
        if num_samples < frontend.min_samples:
            raise AudioError(
                path,
                f"has {num_samples} samples at {frontend.sample_rate_hz} Hz, "
                f"the network needs at least {frontend.min_samples}",
            )


def save(
    path: str | os.PathLike[str],
    network: Network,
    plan: Plan,
    params: Any,
    qstate: States,
    batch_stats: Any,
    *,
    compact: bool = False,
    threshold: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    activations: QuantizedActivations | None = None,
) -> SizeReport:
    """Quantize a network and write its packed file.

    Args:
        path: the file; one that exists is replaced atomically.
        network: what the parameters are of.
        plan: from `qsv.resolve`; one without quantizers gives a float file.
        params: the float parameters.
        qstate: from `qsv.init`, `{}` for a float file.
        batch_stats: running statistics.
        compact: fold batch normalisations and store what stays float in float16 where that changes it by less than
            2^-11. Half to a third of those bytes; for a file to run, not to train further.
        threshold: calibrated score of the decision, if there is one.
        provenance: JSON-compatible notes, such as the run's name and its error rates.
        activations: codes of the inputs of layers, one range each; None for float.

    Returns:
        What the file holds, byte by byte; its `file_bytes` is the size of the whole file.

    Raises:
        ValueError: plan, parameters and network don't belong together, or hold NaN or infinity.
        OSError: the file can't be written.
    """
    packed, description = quantize(plan, params, qstate), describe_plan(plan)
    if compact:
        packed, batch_stats = map(in_half_precision, fold_batch_norms(packed, batch_stats))
    file_bytes = save_packed(
        path,
        network,
        packed,
        batch_stats,
        plan_description=description,
        threshold=threshold,
        provenance=provenance,
        activations=activations,
    )
    return size_report(packed, batch_stats, plan_description=description, file_bytes=file_bytes)


def load(path: str | os.PathLike[str]) -> Embedder:
    """The embedder of a packed file; raises what `load_packed` raises."""
    return Embedder.of(load_packed(path))


def _mono(waveform: np.ndarray, sample_rate_hz: float) -> np.ndarray:
    """[samples] float32, after the checks that need no knowledge of the network."""
    waveform = np.asarray(waveform)
    if waveform.ndim not in (1, 2) or 0 in waveform.shape[1:]:
        raise ValueError(f"waveform must be [samples] or [samples, channels], got shape {waveform.shape}")
    if not len(waveform):
        raise ValueError("waveform is empty")
    if waveform.ndim == 2 and waveform.shape[1] > waveform.shape[0]:
        raise ValueError(f"waveform must be [samples, channels], got shape {waveform.shape}; transpose it")
    if not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(f"waveform must be float in [-1, 1], got {waveform.dtype}; divide 16-bit samples by 32768")
    if not (math.isfinite(sample_rate_hz) and sample_rate_hz > 0):
        raise ValueError(f"sample_rate_hz must be positive, got {sample_rate_hz}")
    bad = np.argwhere(~np.isfinite(waveform))
    if len(bad):
        raise ValueError(f"waveform must be finite, {len(bad)} samples aren't, the first at index {bad[0][0]}")
    peak = np.max(np.abs(waveform))
    if peak > _LARGEST_PLAUSIBLE_PEAK:
        raise ValueError(f"waveform must be in [-1, 1], its samples reach {peak:g}; rescale it")
    return (waveform if waveform.ndim == 1 else waveform.mean(axis=1)).astype(np.float32)


def _named(file: str | os.PathLike[str]) -> tuple[str, AudioPath]:
    return os.fspath(file), file if isinstance(file, Record) else pathlib.Path(file)
