"""Embeddings of a whole corpus in a folder, by as many processes and devices as there are; goes on where it stopped.

    python -m experiments.embed --model=runs/resnet34 --data_dir=voxceleb1 --data_layout=voxceleb \
        --output=runs/resnet34/voxceleb1
    python -m experiments.evaluate --model=runs/resnet34 --embeddings=runs/resnet34/voxceleb1 \
        --test_dir=voxceleb1 --test_layout=voxceleb --trials=list_test_hard2.txt

The corpus is cut into shards of `--shard_size` utterances; each is written when all of it is embedded, and shards that
are there aren't made again. `--share=K/N` makes every Nth shard only, from the Kth on (0 to N - 1): start N of them, on
one machine or on many that share the folder, which need not know of each other. Files that can't be read are skipped,
written down and listed at the end.
"""

import dataclasses
import pathlib

import jax

from experiments.configuration import launch, require, setting
from experiments.models import load_embedder, model_digest
from experiments.speech import report_bad_files
from qsv.data import BadFiles, Corpus, CorpusLayout, load_corpus
from qsv.deploy import Embedder, EmbeddingStore


@dataclasses.dataclass(frozen=True)
class EmbedConfig:
    """Flags of an extraction."""

    model: str = setting("", "Model: a run's folder, a model file or another toolkit's checkpoint.")
    data_dir: str = setting("", "Folder (or list file, see --data_layout) of the speech.")
    data_layout: str = setting(
        "folder",
        "How --data_dir is laid out: folder, voxceleb, cn_celeb, list, flat or prepared, as in experiments.train.",
        choices=[layout.value for layout in CorpusLayout],
    )
    output: str = setting("", "Folder for the embeddings; what is there of them isn't made again.")
    shard_size: int = setting(4096, "Utterances in a shard, and lost by a kill at most.", minimum=1)
    share: str = setting("0/1", "K/N: make shards K, K + N, K + 2 N and so on, for N processes.")
    batch_size: int = setting(16, "Utterances in a batch, of like length.", minimum=1)
    loader_threads: int = setting(2, "Threads that decode.", minimum=1)
    max_bad_files: int = setting(
        100, "Unreadable audio files are skipped and listed; more than this stop the run.", minimum=0
    )

    def __post_init__(self) -> None:
        first, _, count = self.share.partition("/")
        if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
            raise ValueError(f"--share must be K/N with K from 0 to N - 1, got {self.share!r}")

    @property
    def own(self) -> tuple[int, int]:
        """(K, N)."""
        first, count = self.share.split("/")
        return int(first), int(count)


def run(config: EmbedConfig) -> pathlib.Path:
    """Make the missing shards; returns the folder."""
    require(model=config.model, data_dir=config.data_dir, output=config.output)
    embedder, _ = load_embedder(config.model)
    corpus = load_corpus(config.data_dir, CorpusLayout(config.data_layout))
    store = EmbeddingStore.create(config.output, corpus, model=model_digest(config.model), shard_size=config.shard_size)
    first, count = config.own
    shards = [shard for shard in store.missing() if shard % count == first]
    print(f"{len(corpus):,} utterances in {store.num_shards} shards, {len(shards)} of them to be made here")
    bad_files = BadFiles(config.max_bad_files, len(corpus))
    for name, reason in store.unreadable().items():
        bad_files.add(name, reason)
    for shard in shards:
        _embed_shard(config, embedder, corpus, store, shard, bad_files)
    report_bad_files(bad_files.sorted())
    print(f"wrote {store.folder}, {len(store.missing())} shards are missing")
    return store.folder


def _embed_shard(
    config: EmbedConfig, embedder: Embedder, corpus: Corpus, store: EmbeddingStore, shard: int, bad_files: BadFiles
) -> None:
    utterances = corpus.utterances[store.rows(shard)]
    before = dict(bad_files.sorted())
    embeddings = embedder.embed_files(
        utterances,
        batch_size=config.batch_size,
        num_threads=config.loader_threads,
        bad_files=bad_files,
        devices=jax.local_devices(),
    )
    found = {name: reason for name, reason in bad_files.sorted() if name not in before}
    store.write(shard, embeddings, found)


if __name__ == "__main__":
    launch(EmbedConfig, run)
