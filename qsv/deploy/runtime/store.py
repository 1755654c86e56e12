"""Voice prints on disk: one SQLite file, which processes may share."""

import contextlib
import dataclasses
import datetime
import os
import pathlib
import sqlite3
from collections.abc import Iterator, Sequence

import numpy as np

SCHEMA_VERSION = 1
# "qsvp" in ASCII: SQLite's mark of whose file it is.
_APPLICATION_ID = 0x71737670
_SCHEMA = """
CREATE TABLE speaker (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    enrolled_at TEXT NOT NULL
) STRICT;
CREATE TABLE utterance (
    id INTEGER PRIMARY KEY,
    speaker INTEGER NOT NULL REFERENCES speaker (id) ON DELETE CASCADE,
    embedding BLOB NOT NULL,
    enrolled_at TEXT NOT NULL
) STRICT;
CREATE INDEX utterance_of_speaker ON utterance (speaker);
"""


class StoreError(RuntimeError):
    """A store that cannot be used, or an entry that can't be made; nothing was changed."""


class UnknownSpeakerError(StoreError):
    """There is no voice print of that name."""


@dataclasses.dataclass(frozen=True, eq=False)
class VoicePrint:
    """What is known of one speaker.

    Attributes:
        name: of the speaker.
        model: digest of the model that made the embeddings.
        embeddings: [utterances, embedding_size] float32 of length 1, in the order of enrolment.
        enrolled_at: when the first of them was, ISO 8601 in UTC.
    """

    name: str
    model: str
    embeddings: np.ndarray
    enrolled_at: str

    @property
    def direction(self) -> np.ndarray:
        """[embedding_size] float32 of length 1: the mean of the embeddings."""
        mean = self.embeddings.mean(axis=0)
        return np.asarray(mean / max(float(np.linalg.norm(mean)), 1e-12), np.float32)


class VoicePrintStore:
    """Voice prints in an SQLite file, which is made with the first one.

    Every change is one transaction: it is on the disk when the call returns, or nothing of it is. Several processes
    may read and enrol at once; each waits for the other's change. The file is readable by its owner alone, as voice
    prints are biometric data.

    Args:
        path: the file.
        wait_seconds: how long a change waits for those of other processes.

    Raises:
        StoreError: the file is of a newer schema, of another program, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, wait_seconds: float = 30.0) -> None:
        self.path = pathlib.Path(path)
        self._wait_seconds = wait_seconds
        if self._has_content():
            with self._connection():
                pass

    def names(self) -> list[str]:
        """Of all speakers, sorted."""
        if not self._has_content():
            return []
        with self._connection() as connection:
            return [name for (name,) in connection.execute("SELECT name FROM speaker ORDER BY name")]

    def voice_print(self, name: str) -> VoicePrint:
        """That of one speaker; raises UnknownSpeakerError where there is none."""
        found = self._read(name)
        if not found:
            raise self._unknown(name)
        return found[0]

    def voice_prints(self) -> list[VoicePrint]:
        """Those of all speakers, sorted by name."""
        return self._read(None)

    def enrol(self, name: str, model: str, embeddings: np.ndarray, *, replace: bool = False) -> VoicePrint:
        """Add utterances to a speaker, who is new or enrolled by the same model.

        Args:
            name: of the speaker.
            model: digest of the model that made the embeddings.
            embeddings: [utterances, embedding_size], of any length; they are stored with length 1.
            replace: forget the speaker's earlier utterances, of whichever model.

        Returns:
            The whole voice print.

        Raises:
            ValueError: the name is empty, or embeddings aren't finite, are zero or none.
            StoreError: the speaker was enrolled by another model, or the file can't be written.
        """
        if not name.strip() or not name.isprintable():
            raise ValueError(f"a speaker's name must be printable and not empty, got {name!r}")
        rows = _unit_rows(embeddings)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._connection(writing=True) as connection:
            if replace:
                connection.execute("DELETE FROM speaker WHERE name = ?", (name,))
            own = connection.execute("SELECT id, model FROM speaker WHERE name = ?", (name,)).fetchone()
            if own is None:
                cursor = connection.execute(
                    "INSERT INTO speaker (name, model, enrolled_at) VALUES (?, ?, ?)", (name, model, now)
                )
                speaker = cursor.lastrowid
            elif own[1] != model:
                raise StoreError(
                    f"{name!r} was enrolled by another model, whose embeddings don't compare with this one's; "
                    "replace the voice print"
                )
            else:
                speaker = own[0]
            connection.executemany(
                "INSERT INTO utterance (speaker, embedding, enrolled_at) VALUES (?, ?, ?)",
                [(speaker, row.astype("<f4").tobytes(), now) for row in rows],
            )
            (made,) = _rows(connection, name)
        return made

    def forget(self, name: str) -> None:
        """Remove a speaker for good, damaged or not; raises UnknownSpeakerError where there is none."""
        if name not in self.names():
            raise self._unknown(name)
        with self._connection(writing=True) as connection:
            if not connection.execute("DELETE FROM speaker WHERE name = ?", (name,)).rowcount:
                raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownSpeakerError:
        return UnknownSpeakerError(f"no speaker {name!r} is enrolled in {self.path}")

    def _read(self, name: str | None) -> list[VoicePrint]:
        if not self._has_content():
            return []
        with self._connection() as connection:
            return _rows(connection, name)

    def _has_content(self) -> bool:
        """Whether something was ever written; a file without bytes is one whose first entry is being made."""
        return self.path.exists() and self.path.stat().st_size > 0

    @contextlib.contextmanager
    def _connection(self, *, writing: bool = False) -> Iterator[sqlite3.Connection]:
        """A connection to a file of the right schema, in one transaction; errors are this module's."""
        try:
            if writing:
                self._make_file()
            connection = sqlite3.connect(self.path, timeout=self._wait_seconds, isolation_level=None)
            with contextlib.closing(connection):
                connection.execute("PRAGMA foreign_keys = ON")
                # What is deleted is overwritten: a forgotten voice print leaves no trace in the file.
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("BEGIN IMMEDIATE" if writing else "BEGIN")
                try:
                    self._check(connection, writing=writing)
                    yield connection
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            raise StoreError(f"{self.path}: {error}") from error

    def _make_file(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))

    def _check(self, connection: sqlite3.Connection, *, writing: bool) -> None:
        (owner,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if writing and not (tables or owner or version):
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            return
        if owner != _APPLICATION_ID:
            raise StoreError(f"{self.path} is another program's database, not a store of voice prints")
        if version > SCHEMA_VERSION:
            raise StoreError(
                f"{self.path} has schema {version}, this qsv knows {SCHEMA_VERSION}; a newer qsv wrote it, update qsv"
            )


def _rows(connection: sqlite3.Connection, name: str | None) -> list[VoicePrint]:
    """Voice prints of one speaker, or of all."""
    where, arguments = ("WHERE name = ?", (name,)) if name is not None else ("", ())
    prints = []
    query = f"SELECT id, name, model, enrolled_at FROM speaker {where} ORDER BY name"
    for speaker, own, model, enrolled_at in connection.execute(query, arguments).fetchall():
        blobs = connection.execute("SELECT embedding FROM utterance WHERE speaker = ? ORDER BY id", (speaker,))
        prints.append(VoicePrint(own, model, _embeddings(own, [blob for (blob,) in blobs]), enrolled_at))
    return prints


def _embeddings(name: str, blobs: Sequence[bytes]) -> np.ndarray:
    if not blobs or len({len(blob) for blob in blobs}) != 1 or len(blobs[0]) % 4:
        raise StoreError(f"the voice print of {name!r} is damaged; forget it and enrol again")
    embeddings = np.frombuffer(b"".join(blobs), "<f4").reshape(len(blobs), -1)
    if not np.allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-3):
        raise StoreError(f"the voice print of {name!r} is damaged; forget it and enrol again")
    return embeddings


def _unit_rows(embeddings: np.ndarray) -> np.ndarray:
    embeddings = np.asarray(embeddings, np.float32)
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(f"embeddings must be [utterances, embedding_size], got shape {embeddings.shape}")
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError("embeddings must be finite and not zero")
    return embeddings / lengths
