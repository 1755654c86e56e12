"""Stores of embeddings: whole or missing shards, and what doesn't belong together."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from qsv.data import Corpus, Utterance
from qsv.deploy import EmbeddingStore, StoredEmbeddings


def corpus_of(count):
    return Corpus.of(Utterance(f"{n}.wav", pathlib.Path(f"{n}.wav"), f"speaker{n % 3}") for n in range(count))


@pytest.fixture
def store(tmp_path):
    return EmbeddingStore.create(tmp_path / "store", corpus_of(7), model="abc", shard_size=3)


def rows_of(store, shard):
    rows = store.rows(shard)
    return np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] * [1, 10]


def test_shards_in_any_order_make_the_whole(store):
    assert store.num_shards == 3 and store.missing() == [0, 1, 2]
    for shard in (2, 0, 1):
        assert shard in store.missing()
        store.write(shard, rows_of(store, shard).astype(np.float32), {})
    again = EmbeddingStore.open(store.folder)
    np.testing.assert_array_equal(again.read(), np.arange(7)[:, None] * [1, 10])
    assert again.read().dtype == np.float32
    assert (again.names, again.speakers, again.shard_size) == (store.names, store.speakers, 3)
    assert again.missing() == [] and again.unreadable() == {}


def test_utterances_are_found_by_name_and_unreadable_ones_named(store):
    for shard in range(3):
        embeddings = rows_of(store, shard).astype(np.float32)
        if shard == 1:
            embeddings[1] = np.nan
        store.write(shard, embeddings, {"4.wav": "is empty"} if shard == 1 else {})
    stored, corpus = StoredEmbeddings(store), corpus_of(9)
    np.testing.assert_array_equal(stored.embed_files([corpus.utterances[i] for i in (6, 2)])[:, 0], [6, 2])
    assert store.unreadable() == {"4.wav": "is empty"}
    with pytest.raises(ValueError, match=r"1 utterances couldn't be read when they were embedded:\n  4\.wav"):
        stored.embed_files(corpus.utterances[:7])
    with pytest.raises(ValueError, match=r"lacks 2 utterances:\n  7\.wav\n  8\.wav"):
        stored.embed_files(corpus.utterances)


def test_what_is_missing_or_damaged(store):
    store.write(0, rows_of(store, 0).astype(np.float32), {})
    with pytest.raises(ValueError, match=r"lacks 2 of 3 shards, such as 1; run experiments\.embed again"):
        store.read()
    for shard in (1, 2):
        store.write(shard, rows_of(store, shard).astype(np.float32), {})
    file = store.folder / "00001-of-00003.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=r"00001-of-00003\.safetensors is damaged"):
        store.read()
    file.write_bytes((store.folder / "00002-of-00003.safetensors").read_bytes())
    with pytest.raises(ValueError, match="has 1 rows; delete it"):
        store.read()


def test_another_model_or_corpus_is_refused(store):
    create = EmbeddingStore.create
    assert create(store.folder, corpus_of(7), model="abc", shard_size=99).shard_size == 3
    with pytest.raises(ValueError, match="embeddings of another model"):
        create(store.folder, corpus_of(7), model="xyz")
    with pytest.raises(ValueError, match=r"embeddings of other speech \(7 utterances, not these 6\)"):
        create(store.folder, corpus_of(6), model="abc")
    renamed = [dataclasses.replace(own, speaker="x") for own in corpus_of(7).utterances]
    with pytest.raises(ValueError, match="other speech"):
        create(store.folder, Corpus.of(renamed), model="abc")
    with pytest.raises(ValueError, match="got 0"):
        create(store.folder, corpus_of(7), model="abc", shard_size=0)


def test_a_folder_that_is_no_store(tmp_path, store):
    with pytest.raises(FileNotFoundError, match=r"no embeddings in .*; see experiments\.embed"):
        EmbeddingStore.open(tmp_path)
    index = store.folder / "index.json"
    fields = json.loads(index.read_text())
    for text in ("{", "[]", json.dumps(fields | {"version": 9}), json.dumps(fields | {"names": None})):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json is no index of embeddings"):
            EmbeddingStore.open(store.folder)
