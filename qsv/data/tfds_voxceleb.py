"""VoxCeleb, CN-Celeb and any folders of speakers as a TensorFlow Dataset: few large shards in place of many files.

    recordings = voxceleb1("vox1")
    builder = SpeakerRecordings(recordings, config="voxceleb1", data_dir="prepared", file_format="array_record")
    builder.download_and_prepare(download_config=beam_config("DirectRunner"))
    source = builder.as_data_source("train")

No part of it needs TensorFlow. Shards are written by Apache Beam (`qsv[prepare]`), each by one worker that holds one
recording at a time; which recording is in which shard, and in which order, depends on their names alone.
"""

from __future__ import annotations

import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import soundfile
import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder
from tensorflow_datasets.core.writer import ExampleWriter
from tensorflow_datasets.proto import tf_example_pb2

from qsv.data.audio import AudioError, decode_audio, resample, to_int16
from qsv.data.recordings import TRAIN, Recording, shuffled

Encoding = Literal["original", "pcm16", "flac"]
ENCODINGS: tuple[Encoding, ...] = ("flac", "pcm16", "original")
INDEX_SUFFIX, BAD_SUFFIX = ".index.tsv", ".bad.tsv"

_FORMATS = {"pcm16": "WAV", "flac": "FLAC"}
_SHARD_BYTES = 2**28


class SpeakerRecordings(ShardBasedBuilder):
    """Recordings with their speakers.

    An example is `{"audio": bytes of an audio file, "name": text, "speaker": class, "num_samples": int64}`. Classes of
    the split "train" come first, so that a classifier has as many outputs as they are. Beside each shard lie a table of
    what is in it, `NAME SPEAKER NUM_SAMPLES` in its order, and one of what could not be read, `NAME REASON`.

    Args:
        recordings: {split: recordings}, from `qsv.data.recordings`.
        config: name of the corpus, a folder of the dataset's.
        encoding: "flac" or "pcm16" (WAV), mono at the sample rate in 16 bits; "original" keeps the bytes as they are.
        sample_rate_hz: of what is encoded anew.
        shard_bytes: of the recordings in a shard, as they are published.
        kwargs: `data_dir`, and `file_format="array_record"`.

    Raises:
        ValueError: an option is unknown, or original files are AAC, which the loaders can't decode.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Audio bytes, name, speaker, length."}

    def __init__(
        self,
        recordings: Mapping[str, Sequence[Recording]],
        *,
        config: str,
        encoding: Encoding = "flac",
        sample_rate_hz: int = 16000,
        shard_bytes: int = _SHARD_BYTES,
        **kwargs: Any,
    ) -> None:
        if encoding not in ENCODINGS:
            raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
        aac = sum(own.path.endswith(".m4a") for split in recordings.values() for own in split)
        if encoding == "original" and aac:
            raise ValueError(f"{aac} recordings are AAC, which loaders can't decode; take the encoding flac or pcm16")
        self._recordings = {split: shuffled(own) for split, own in recordings.items()}
        self._encoding, self._sample_rate_hz, self._shard_bytes = encoding, sample_rate_hz, shard_bytes
        super().__init__(config=tfds.core.BuilderConfig(name=config), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        first = sorted({own.speaker for own in self._recordings.get(TRAIN, ())})
        others = sorted({own.speaker for split in self._recordings.values() for own in split} - set(first))
        features = tfds.features.FeaturesDict(
            {
                "audio": tfds.features.Tensor(shape=(), dtype=np.object_),
                "name": tfds.features.Text(),
                "speaker": tfds.features.ClassLabel(names=[*first, *others]),
                "num_samples": tfds.features.Scalar(np.int64),
            }
        )
        metadata = tfds.core.MetadataDict(
            sample_rate_hz=self._sample_rate_hz, encoding=self._encoding, train_speakers=len(first)
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Recordings of speakers, for verification.",
            features=features,
            metadata=metadata,
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        # After Beam, TFDS 4.9.10 has the lengths of shards in the order of their numbers as text: 10 before 2.
        counted = [
            info.replace(shard_lengths=[len(read_table(f"{path}{INDEX_SUFFIX}")) for path in info.filepaths])
            for info in self.info.splits.values()
        ]
        self.info.set_splits(tfds.core.SplitDict(counted))

    def _example_writer(self) -> ExampleWriter:
        return _SameBytesWriter(self.info.file_format)

    def _shard_iterators_per_split(self, _: Any) -> dict[str, list[Callable[[], Iterator[tuple[str, Any]]]]]:
        """{split: a function for each shard that gives (key, example)}; TFDS calls them, on the workers."""
        iterators: dict[str, list[Callable[[], Iterator[tuple[str, Any]]]]] = {}
        for split, recordings in self._recordings.items():
            shards = _shards(recordings, self._shard_bytes)
            template = self._get_filename_template(split_name=split)
            iterators[split] = [
                functools.partial(
                    _examples,
                    shard,
                    self._encoding,
                    self._sample_rate_hz,
                    str(template.sharded_filepath(shard_index=number, num_shards=len(shards))),
                )
                for number, shard in enumerate(shards)
            ]
        return iterators


class _SameBytesWriter(ExampleWriter):
    """Writes the fields of an example in one order, where protobuf's own differs from process to process."""

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """As TFDS's writer does."""
        parsed = ((key, tf_example_pb2.Example.FromString(data)) for key, data in examples)
        return super().write(path, ((key, own.SerializeToString(deterministic=True)) for key, own in parsed))


def read_table(path: str | os.PathLike[str]) -> list[list[str]]:
    """The rows of a table beside a shard."""
    return [line.split("\t") for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def beam_config(runner: str, options: Sequence[str] = ()) -> tfds.download.DownloadConfig:
    """What `download_and_prepare` takes to run on Apache Beam.

    Args:
        runner: "DirectRunner" on this machine, "DataflowRunner", "FlinkRunner", "SparkRunner".
        options: of the pipeline, as on a command line, such as `--direct_num_workers=8`.

    Raises:
        ImportError: Beam isn't installed.
    """
    try:
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError("Apache Beam isn't installed: pip install 'qsv[prepare]'") from error
    return tfds.download.DownloadConfig(beam_runner=runner, beam_options=PipelineOptions(list(options)))


def _shards(recordings: Sequence[Recording], shard_bytes: int) -> list[list[Recording]]:
    """Parts of nearly the same number of recordings."""
    count = min(len(recordings), -(-sum(own.num_bytes for own in recordings) // shard_bytes))
    bounds = np.linspace(0, len(recordings), max(1, count) + 1).round().astype(int)
    return [list(recordings[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]


def _examples(
    recordings: Sequence[Recording], encoding: Encoding, sample_rate_hz: int, shard: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, example) of what can be read; then the two tables."""
    index, bad = [], []
    for own in recordings:
        try:
            audio, num_samples = encoded(own, encoding, sample_rate_hz)
        except (AudioError, OSError) as error:
            bad.append((own.name, error.reason if isinstance(error, AudioError) else str(error)))
            continue
        index.append((own.name, own.speaker, str(num_samples)))
        yield own.name, {"audio": audio, "name": own.name, "speaker": own.speaker, "num_samples": num_samples}
    for suffix, rows in ((INDEX_SUFFIX, index), (BAD_SUFFIX, bad)):
        lines = ["\t".join(" ".join(field.split()) for field in row) + "\n" for row in rows]
        pathlib.Path(shard + suffix).write_text("".join(lines), encoding="utf-8")


def encoded(recording: Recording, encoding: Encoding, sample_rate_hz: int) -> tuple[bytes, int]:
    """The bytes of a recording as a dataset holds them, and its samples at a rate.

    Raises:
        AudioError: it can't be decoded, or not whole.
        OSError: it can't be read.
        ImportError: it is AAC, and PyAV isn't installed.
    """
    data = recording.read()
    if recording.path.endswith(".m4a"):
        samples = _decode_aac(data, recording.name, sample_rate_hz)
    else:
        samples = to_int16(decode_audio(data, recording.name, sample_rate_hz=sample_rate_hz))
    if encoding == "original":
        return data, len(samples)
    file = io.BytesIO()
    soundfile.write(file, samples, sample_rate_hz, format=_FORMATS[encoding], subtype="PCM_16")
    return file.getvalue(), len(samples)


def _decode_aac(data: bytes, name: str, sample_rate_hz: int) -> np.ndarray:
    """[samples] int16, mono."""
    try:
        import av
    except ImportError as error:
        raise ImportError("AAC recordings need PyAV: pip install 'qsv[prepare]'") from error
    try:
        with av.open(io.BytesIO(data)) as container:
            resampler = av.AudioResampler(format="fltp", layout="mono")
            frames = [made for frame in container.decode(audio=0) for made in resampler.resample(frame)]
            rate = frames[0].sample_rate if frames else sample_rate_hz
            samples = np.concatenate([frame.to_ndarray()[0] for frame in frames]) if frames else np.empty(0, np.float32)
    except (av.FFmpegError, IndexError) as error:
        raise AudioError(name, f"cannot be decoded ({error})") from error
    if not len(samples):
        raise AudioError(name, "holds no samples")
    if rate != sample_rate_hz:
        samples = resample(samples, rate, sample_rate_hz, round(len(samples) * sample_rate_hz / rate))
    return to_int16(samples)
