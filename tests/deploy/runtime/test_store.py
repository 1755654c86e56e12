"""The store of voice prints: what was enrolled stays, whatever else happens."""

import multiprocessing
import os
import signal
import sqlite3
import stat
import time

import numpy as np
import pytest

from qsv.deploy.runtime import StoreError, UnknownSpeakerError, VoicePrintStore
from qsv.deploy.runtime.store import SCHEMA_VERSION

ONE, OTHER = "1" * 64, "2" * 64


def embeddings(seed, count=1):
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


@pytest.fixture
def store(tmp_path):
    return VoicePrintStore(tmp_path / "folder" / "prints.sqlite")


def test_a_voice_print_is_the_mean_direction_of_its_utterances(store):
    rows = embeddings(0, 3)
    store.enrol("Ann", ONE, rows[:2])
    made = store.enrol("Ann", ONE, rows[2:])
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(made.embeddings, units, rtol=1e-6)
    expected = units.mean(axis=0) / np.linalg.norm(units.mean(axis=0))
    np.testing.assert_allclose(store.voice_print("Ann").direction, expected, rtol=1e-5)
    assert made.model == ONE and made.enrolled_at.endswith("+00:00")


def test_speakers_are_listed_replaced_and_forgotten(store):
    assert store.names() == []
    for name in ("Zoë", "Ann"):
        store.enrol(name, ONE, embeddings(0, 2))
    assert VoicePrintStore(store.path).names() == ["Ann", "Zoë"]
    replaced = store.enrol("Ann", OTHER, embeddings(1), replace=True)
    assert replaced.model == OTHER and len(replaced.embeddings) == 1
    store.forget("Ann")
    assert store.names() == ["Zoë"]
    for call in (store.voice_print, store.forget):
        with pytest.raises(UnknownSpeakerError, match="no speaker 'Ann'"):
            call("Ann")


def test_a_forgotten_voice_print_leaves_no_bytes(store):
    store.enrol("Ann", ONE, embeddings(0))
    store.enrol("Bob", ONE, embeddings(1))
    blob = store.voice_print("Ann").embeddings.tobytes()
    assert blob in store.path.read_bytes()
    store.forget("Ann")
    assert blob not in store.path.read_bytes()


def test_only_the_owner_may_read_it(store):
    store.enrol("Ann", ONE, embeddings(0))
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_models_are_not_mixed(store):
    store.enrol("Ann", ONE, embeddings(0))
    with pytest.raises(StoreError, match="enrolled by another model"):
        store.enrol("Ann", OTHER, embeddings(1))
    assert len(store.voice_print("Ann").embeddings) == 1


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (" ", embeddings(0), "name must be"),
        ("a\nb", embeddings(0), "name must be"),
        ("Ann", np.full((1, 8), np.nan), "finite"),
        ("Ann", np.zeros((1, 8)), "not zero"),
        ("Ann", np.zeros((0, 8)), "utterances, embedding_size"),
        ("Ann", np.zeros(8), "utterances, embedding_size"),
    ],
)
def test_bad_entries_are_refused_before_a_file_is_made(store, name, rows, message):
    with pytest.raises(ValueError, match=message):
        store.enrol(name, ONE, rows)
    assert not store.path.exists()


def test_a_store_of_a_newer_schema_is_left_alone(store):
    store.enrol("Ann", ONE, embeddings(0))
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    before = store.path.read_bytes()
    for call in (lambda: VoicePrintStore(store.path), store.names, lambda: store.enrol("Bob", ONE, embeddings(1))):
        with pytest.raises(StoreError, match="schema 2, this qsv knows 1"):
            call()
    assert store.path.read_bytes() == before


def test_what_is_no_store_is_left_alone(tmp_path):
    text, database = tmp_path / "text", tmp_path / "database"
    text.write_bytes(b"voice prints\n" * 100)
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE speaker (name)")
    for path, message in ((text, "not a database"), (database, "another program's"), (tmp_path, "unable to open")):
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(StoreError, match=message):
            VoicePrintStore(path)
        assert before is None or path.read_bytes() == before


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "prints").touch()
    store = VoicePrintStore(tmp_path / "prints")
    assert store.names() == []
    store.enrol("Ann", ONE, embeddings(0))
    assert store.names() == ["Ann"]


@pytest.mark.parametrize("blob", [b"123", np.full(8, np.nan, "<f4").tobytes(), np.zeros(8, "<f4").tobytes()])
def test_a_damaged_voice_print_is_told(store, blob):
    store.enrol("Ann", ONE, embeddings(0))
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE utterance SET embedding = ?", (blob,))
    with pytest.raises(StoreError, match="'Ann' is damaged"):
        store.voice_print("Ann")
    # The way out that the message names.
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM utterance")
    store.enrol("Ann", ONE, embeddings(0), replace=True)
    assert len(store.voice_print("Ann").embeddings) == 1


def test_a_damaged_voice_print_can_be_forgotten(store):
    for name in ("Ann", "Bob"):
        store.enrol(name, ONE, embeddings(0))
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE utterance SET embedding = ? WHERE speaker = 1", (b"123",))
    assert store.names() == ["Ann", "Bob"]
    store.forget("Ann")
    assert [own.name for own in store.voice_prints()] == ["Bob"]


def enrol_many(path, start, count, barrier):
    barrier.wait()
    store = VoicePrintStore(path)
    for i in range(start, start + count):
        store.enrol(f"speaker {i % 10}", ONE, embeddings(i))


def test_processes_that_enrol_at_once_lose_nothing(store):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    workers = [context.Process(target=enrol_many, args=(store.path, 30 * i, 30, barrier)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    prints = store.voice_prints()
    assert len(prints) == 10
    for number, own in enumerate(prints):
        expected = np.concatenate([embeddings(i) for i in range(90) if i % 10 == number])
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        found = own.embeddings
        assert found.shape == expected.shape
        assert all(np.isclose(found, row, atol=1e-6).all(axis=1).any() for row in expected)


def enrol_until_killed(path, pipe):
    store = VoicePrintStore(path)
    for i in range(100_000):
        store.enrol(f"speaker {i}", ONE, embeddings(i))
        pipe.send(i)


def test_a_killed_process_loses_nothing_that_it_was_told_is_stored(tmp_path):
    context = multiprocessing.get_context("spawn")
    path, rng = tmp_path / "prints", np.random.default_rng(0)
    for _ in range(3):
        path.unlink(missing_ok=True)
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=enrol_until_killed, args=(path, sender))
        worker.start()
        assert receiver.poll(60)
        time.sleep(rng.uniform(0.0, 0.3))
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        sender.close()
        done = 0
        while receiver.poll(0):
            try:
                done = receiver.recv() + 1
            except EOFError:
                break
        prints = VoicePrintStore(path).voice_prints()
        # The last one may have been stored before it was told.
        assert len(prints) in (done, done + 1)
        assert {own.name for own in prints} >= {f"speaker {i}" for i in range(done)}


def test_a_store_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"):
        VoicePrintStore(tmp_path / "file" / "prints").enrol("Ann", ONE, embeddings(0))


def test_a_busy_store_is_waited_for_and_then_told(store):
    store.enrol("Ann", ONE, embeddings(0))
    impatient = VoicePrintStore(store.path, wait_seconds=0.1)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="locked"):
        impatient.enrol("Bob", ONE, embeddings(1))
    other.close()
    impatient.enrol("Bob", ONE, embeddings(1))
    assert store.names() == ["Ann", "Bob"]
