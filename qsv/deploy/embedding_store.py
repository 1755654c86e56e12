"""Embeddings of a corpus on disk, shard by shard: made by several processes, and resumed where they were killed."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors
import safetensors.numpy

from qsv.data import Corpus, Utterance
from qsv.deploy.atomic_write import write_atomically

_VERSION = 1
_INDEX = "index.json"
_TENSOR, _BAD = "embeddings", "unreadable"


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingStore:
    """A folder of `index.json`, which names utterances and model, and a safetensors file for each shard of them.

    A shard is written in one step: it is there as a whole, or not at all.

    Attributes:
        folder: where it is.
        model: SHA-256 of the model's file.
        names: of the utterances.
        speakers: of each of them.
        shard_size: utterances in a shard; the last one may have fewer.
    """

    folder: pathlib.Path
    model: str
    names: tuple[str, ...]
    speakers: tuple[str, ...]
    shard_size: int

    @classmethod
    def create(
        cls, folder: str | os.PathLike[str], corpus: Corpus, *, model: str, shard_size: int = 4096
    ) -> EmbeddingStore:
        """The store of a corpus and a model: a new one, or what is there of it.

        Args:
            folder: where it is.
            corpus: the utterances.
            model: SHA-256 of the model's file.
            shard_size: utterances in a shard, of a new store.

        Raises:
            ValueError: the folder has a store of another model or corpus, or the shards have no size.
        """
        if shard_size < 1:
            raise ValueError(f"a shard has one utterance or more, got {shard_size}")
        folder = pathlib.Path(folder)
        names = tuple(utterance.name for utterance in corpus.utterances)
        speakers = tuple(utterance.speaker for utterance in corpus.utterances)
        if not (folder / _INDEX).exists():
            index = {"version": _VERSION, "model": model, "shard_size": shard_size, "names": names}
            write_atomically(folder / _INDEX, json.dumps({**index, "speakers": speakers}).encode())
        store = cls.open(folder)
        store.check_model(model)
        if (store.names, store.speakers) != (names, speakers):
            raise ValueError(
                f"{folder} has embeddings of other speech ({len(store.names):,} utterances, not these {len(names):,}); "
                "name another folder"
            )
        return store

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> EmbeddingStore:
        """A store that is there.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is of another version, or no index of a store.
        """
        path = pathlib.Path(folder) / _INDEX
        if not path.exists():
            raise FileNotFoundError(f"no embeddings in {folder} ({_INDEX} is missing); see experiments.embed")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["version"] != _VERSION:
                raise ValueError(f"version {index['version']}, this qsv reads {_VERSION}")
            names, speakers = tuple(index["names"]), tuple(index["speakers"])
            return cls(path.parent, index["model"], names, speakers, int(index["shard_size"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no index of embeddings: {error}") from error

    def check_model(self, model: str) -> None:
        """Raises ValueError where the embeddings are of another model than that of this SHA-256."""
        if self.model != model:
            raise ValueError(f"{self.folder} has embeddings of another model; name another folder, or that model")

    @property
    def num_shards(self) -> int:
        """Shards of the whole corpus."""
        return -(-len(self.names) // self.shard_size)

    def rows(self, shard: int) -> slice:
        """Which utterances a shard is of."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.names)))

    def missing(self) -> list[int]:
        """Shards that aren't written yet."""
        return [shard for shard in range(self.num_shards) if not self._path(shard).exists()]

    def write(self, shard: int, embeddings: np.ndarray, unreadable: Mapping[str, str]) -> None:
        """Write a shard.

        Args:
            shard: its number.
            embeddings: [utterances of the shard, embedding_size] float32, NaN where an utterance is unreadable.
            unreadable: {name: reason} of these.
        """
        rows = self.rows(shard)
        assert len(embeddings) == rows.stop - rows.start
        metadata = {_BAD: json.dumps(dict(unreadable))}
        write_atomically(self._path(shard), safetensors.numpy.save({_TENSOR: embeddings}, metadata=metadata))

    def unreadable(self) -> dict[str, str]:
        """{name: reason} of the unreadable utterances of all shards that are written."""
        found: dict[str, str] = {}
        for shard in sorted(set(range(self.num_shards)) - set(self.missing())):
            with safetensors.safe_open(self._path(shard), framework="numpy") as file:
                found |= json.loads(file.metadata()[_BAD])
        return found

    def read(self) -> np.ndarray:
        """[utterances, embedding_size] float32 of the whole corpus, NaN where an utterance is unreadable.

        Raises:
            ValueError: shards are missing, or a file isn't one of them.
        """
        missing = self.missing()
        if missing:
            raise ValueError(
                f"{self.folder} lacks {len(missing)} of {self.num_shards} shards, such as {missing[0]}; run "
                "experiments.embed again, which goes on"
            )
        parts = []
        for shard in range(self.num_shards):
            try:
                parts.append(safetensors.numpy.load_file(self._path(shard))[_TENSOR])
            except (safetensors.SafetensorError, KeyError) as error:
                raise ValueError(f"{self._path(shard)} is damaged ({error}); delete it and embed again") from error
            rows = self.rows(shard)
            if len(parts[-1]) != rows.stop - rows.start:
                raise ValueError(f"{self._path(shard)} has {len(parts[-1])} rows; delete it and embed again")
        return np.concatenate(parts)

    def _path(self, shard: int) -> pathlib.Path:
        return self.folder / f"{shard:05d}-of-{self.num_shards:05d}.safetensors"


class StoredEmbeddings:
    """The embeddings of a store, by utterance; reads them once.

    Args:
        store: with all of its shards.

    Raises:
        ValueError: as `EmbeddingStore.read`.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self._folder = store.folder
        self._embeddings = store.read()
        self._places = {name: place for place, name in enumerate(store.names)}

    def embed_files(self, files: Sequence[Utterance]) -> np.ndarray:
        """[n, embedding_size] float32 of utterances, by their names.

        Raises:
            ValueError: the store doesn't have some of them, or they were unreadable; names all.
        """
        unknown = sorted(utterance.name for utterance in files if utterance.name not in self._places)
        if unknown:
            raise ValueError(f"{self._folder} lacks {len(unknown)} utterances:\n  " + "\n  ".join(unknown))
        places = [self._places[utterance.name] for utterance in files]
        found = self._embeddings[places]
        bad = sorted(files[row].name for row in np.flatnonzero(np.isnan(found).any(axis=1)).tolist())
        if bad:
            raise ValueError(f"{len(bad)} utterances couldn't be read when they were embedded:\n  " + "\n  ".join(bad))
        return found
