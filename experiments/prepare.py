"""Prepare a corpus for training at full size: a few large shards in place of a million files.

    python -m experiments.prepare --corpus=voxceleb1 --source=vox1 --output=prepared

`--source` is the folder of the corpus as it is published: unpacked, or its zip files and their parts. Shards are
written by Apache Beam (`qsv[prepare]`), on this machine with `--runner=DirectRunner
--beam_options=--direct_num_workers=8 --beam_options=--direct_running_mode=multi_processing`, on a cluster with another
runner. Recordings that can't be read are left out and listed in `report.json` beside the shards. A preparation that
was interrupted leaves no dataset; the same command begins anew, and removes what was begun.
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from experiments.configuration import launch, require, setting, write_json
from qsv.data import CorpusLayout
from qsv.data.prepared import INCOMPLETE
from qsv.data.recordings import Recording, cn_celeb, speaker_folders, voxceleb1, voxceleb2, with_validation
from qsv.data.tfds_voxceleb import BAD_SUFFIX, ENCODINGS, Encoding, SpeakerRecordings, beam_config, read_table

REPORT = "report.json"

_CORPORA: Mapping[str, Callable[[str], dict[str, list[Recording]]]] = {
    "voxceleb1": voxceleb1,
    "voxceleb2": voxceleb2,
    "cn_celeb": cn_celeb,
    "folder": speaker_folders,
    "list": lambda path: speaker_folders(path, CorpusLayout.LIST),
}


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Flags of a preparation."""

    corpus: str = setting(
        "folder",
        "Which corpus --source is: voxceleb1, voxceleb2 or cn_celeb as published; folder is "
        "SPEAKER/**/UTT.{wav,flac,ogg,mp3}, list a file of `SPEAKER PATH` lines.",
        choices=list(_CORPORA),
    )
    source: str = setting("", "Folder of the corpus, or the list file.")
    output: str = setting("", "Folder for prepared corpora.")
    name: str = setting("", "What to call this one there; --corpus when absent.")
    encoding: Encoding = setting(
        "flac",
        "flac: 16 bits without loss; pcm16: WAV, twice as large; original: as it is.",
        choices=ENCODINGS,
    )
    sample_rate_hz: int = setting(16000, "Rate of the prepared audio.", minimum=1)
    validation_share: float = setting(0.0, "Share of the training speakers to put into a split `validation`.")
    shard_mbytes: float = setting(256.0, "Published bytes of the recordings in a shard, in megabytes.", minimum=1e-3)
    runner: str = setting(
        "DirectRunner", "Apache Beam's runner; empty to do without Beam, one shard after the other in this process."
    )
    beam_options: tuple[str, ...] = setting((), "Options of Beam's pipeline, such as --direct_num_workers=8.")


def run(config: PrepareConfig) -> pathlib.Path:
    """Prepare what isn't there yet; returns the dataset's folder."""
    require(source=config.source, output=config.output)
    splits = with_validation(_CORPORA[config.corpus](config.source), config.validation_share)
    builder = SpeakerRecordings(
        splits,
        config=config.name or config.corpus,
        encoding=config.encoding,
        sample_rate_hz=config.sample_rate_hz,
        shard_bytes=round(config.shard_mbytes * 1e6),
        data_dir=config.output,
        file_format="array_record",
    )
    folder = pathlib.Path(builder.data_path)
    if (folder / REPORT).exists():
        print(f"{folder} is there already; remove it to prepare it anew")
        return folder
    for split, recordings in splits.items():
        speakers = len({own.speaker for own in recordings})
        print(f"{split}: {len(recordings):,} recordings of {speakers:,} speakers")
    if not folder.exists():
        for leftover in folder.parent.glob(f"{INCOMPLETE}*_{folder.name}"):
            print(f"removing {leftover}, which was interrupted")
            shutil.rmtree(leftover)
        builder.download_and_prepare(
            download_config=beam_config(config.runner, config.beam_options) if config.runner else None
        )
    for leftover in folder.glob("*.shard_infos.json"):
        # Beam's note of what it wrote, in the order in which workers were done.
        leftover.unlink()
    report = _report(folder, splits, builder)
    write_json(folder / REPORT, report)
    print(json.dumps({split: own["prepared"] for split, own in report["splits"].items()}))
    for split, own in report["splits"].items():
        for name, reason in own["bad"][:5]:
            print(f"{split}: left out {name}: {reason}")
    print(f"wrote {folder}")
    return folder


def _report(folder: pathlib.Path, splits: Mapping[str, list[Recording]], builder: SpeakerRecordings) -> dict[str, Any]:
    """Counts of every split, and what was left out and why."""
    report = {}
    for split, recordings in splits.items():
        info = builder.info.splits[split]
        report[split] = {
            "found": len(recordings),
            "prepared": info.num_examples,
            "shards": info.num_shards,
            "bad": sorted(row for path in info.filepaths for row in read_table(f"{path}{BAD_SUFFIX}")),
        }
    return {"dataset": folder.name, "splits": report}


if __name__ == "__main__":
    launch(PrepareConfig, run)
