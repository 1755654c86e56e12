"""Mix clean speech with noise, and label every clip with its quality.

    python -m experiments.quality_corpus --data_dir=DATA/librispeech251 --data_dir=DATA/an4 --noise_dir=DATA/noise \
        --hours=10 --output=runs/noisy_speech

The folder then holds `train/`, `validation/` and `test/`, which share no speaker and no noise recording, and
`labels.csv` with the wideband PESQ of each clip (needs `qsv[quality]`). With `--dnsmos=model_v8.onnx`, Microsoft's
file, each has its DNSMOS P.808 score too. The same command again goes on where an interrupted one was.
"""

import csv
import dataclasses
import io
import pathlib

import tqdm

from experiments.configuration import launch, require, setting
from experiments.models import load_embedder
from experiments.speech import SpeechConfig, training_corpus
from qsv.data import CorpusLayout, build_noisy_corpus, draw_mixtures, folder_noise
from qsv.deploy import QualityEstimator
from qsv.deploy.atomic_write import write_atomically

_DNSMOS_COLUMN = "dnsmos_p808"


@dataclasses.dataclass(frozen=True)
class QualityCorpusConfig:
    """Flags of a corpus of noisy speech."""

    data_dir: tuple[str, ...] = setting((), "Folder (or list file, see --data_layout) of clean speech.")
    data_layout: str = setting(
        "folder",
        "How --data_dir is laid out, as in experiments.train.",
        choices=[layout.value for layout in CorpusLayout],
    )
    noise_dir: tuple[str, ...] = setting((), "Folder of noise.")
    output: str = setting("", "Folder of the corpus; an interrupted one there is gone on with.")
    hours: float = setting(10.0, "Length of all clips together.", minimum=0.0)
    validation_share: float = setting(0.08, "Share of the clips to choose settings on.", minimum=0.0)
    test_share: float = setting(0.12, "Share of the clips to test on.", minimum=0.0)
    clip_seconds: float = setting(5.0, "Length of a clip.", minimum=0.5)
    lowest_snr_db: float = setting(-15.0, "Least ratio of speech to noise.")
    highest_snr_db: float = setting(25.0, "Largest ratio of speech to noise.")
    dnsmos: str = setting("", "Microsoft's model_v8.onnx, for labels by DNSMOS P.808 beside PESQ.")
    workers: int = setting(2, "Processes that mix and label.", minimum=0)
    seed: int = setting(0, "Seed of all draws.", minimum=0)


def run(config: QualityCorpusConfig) -> pathlib.Path:
    """Build the corpus, or go on with it; returns its table of labels."""
    require(data_dir=config.data_dir, noise_dir=config.noise_dir, output=config.output)
    held_out = config.validation_share + config.test_share
    if not 0 < held_out < 1:
        raise ValueError(f"--validation_share and --test_share must leave clips to train on, got {held_out:g} together")
    estimate = QualityEstimator(load_embedder(config.dnsmos, use="quality")[0]) if config.dnsmos else None
    speech = training_corpus(SpeechConfig(data_dir=config.data_dir, data_layout=config.data_layout))
    noise = [clip for folder in config.noise_dir for source in folder_noise(folder) for clip in source.clips]
    count = round(config.hours * 3600 / config.clip_seconds)
    validation, test = (max(1, round(share * count)) for share in (config.validation_share, config.test_share))
    mixtures = draw_mixtures(
        speech,
        noise,
        counts=(count - validation - test, validation, test),
        snr_db=(config.lowest_snr_db, config.highest_snr_db),
        seed=config.seed,
    )
    table = build_noisy_corpus(config.output, mixtures, seconds=config.clip_seconds, num_workers=config.workers)
    if estimate is not None:
        _add_scores(table, estimate)
    print(f"wrote {table}: {len(mixtures)} clips of {config.clip_seconds:g} s")
    return table


def _add_scores(table: pathlib.Path, estimate: QualityEstimator) -> None:
    """A column of the network's scores, unless it is there."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if _DNSMOS_COLUMN in rows[0]:
        return
    for row in tqdm.tqdm(rows, "scoring", unit="clip"):
        row[_DNSMOS_COLUMN] = f"{estimate.score_file(table.parent / row['path']):.5f}"
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(table, text.getvalue().encode())


if __name__ == "__main__":
    launch(QualityCorpusConfig, run)
