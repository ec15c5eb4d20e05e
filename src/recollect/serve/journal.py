"""``Journal``: what must outlive the process beside the memory, in one SQLite file.

The names of classes that were taught, the answers given under idempotency keys, and the inputs of entries, to show
them. Memory and journal are two files, and a process may be killed between their commits. So a write that the journal
must know of is announced first: the next start finds the announcement, looks whether the memory has taken the step,
and completes or drops it. This needs that nobody else writes to the memory meanwhile.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from recollect.errors import FormatError, StorageError

KEYS = 100_000  # idempotency keys that are kept; the oldest go first
_APPLICATION, _VERSION = 0x7265636A, 1  # "recj"
_TABLES = """
CREATE TABLE classes (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE answers (id INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, digest BLOB NOT NULL,
                      answer TEXT NOT NULL);
CREATE TABLE inputs (slot INTEGER PRIMARY KEY, written INTEGER NOT NULL, input BLOB NOT NULL);
CREATE TABLE announced (only INTEGER PRIMARY KEY CHECK (only = 0), content TEXT NOT NULL);
CREATE TABLE begun (only INTEGER PRIMARY KEY CHECK (only = 0));
"""


class Answer(NamedTuple):
    """What was answered under an idempotency key, and to which request."""

    digest: bytes
    text: str


class Announcement(NamedTuple):
    """A write that is about to happen."""

    step: int
    """How many entries the memory had ever taken before."""
    labels: list[str]
    names: list[str]
    """New classes, in the order of their outputs."""
    key: str | None
    digest: str
    """Of the request, in hexadecimal digits."""


class Journal:
    """The file; not for more than one thread at a time.

    Args:
        path: Where it lies or will be made; None keeps everything in RAM.

    Raises:
        FormatError: If the file is another program's, damaged, or of a newer version. It stays as it is. Every method
            raises this where damage shows later.
        StorageError: If it cannot be opened; by every method, if it cannot be read or written, as on a full disk.

    Example:
        >>> journal = Journal(None)
        >>> journal.complete(names=["cat"])
        >>> journal.names()
        ['cat']
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        with self._explained():
            # The worker thread uses what the main thread has opened, one after the other.
            self._data = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._data.close()
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns SQLite's errors into ours."""
        try:
            yield
        except sqlite3.OperationalError as error:  # locked, not allowed, a full disk
            remedy = " Make room on the disk." if "disk is full" in str(error) else ""
            raise StorageError(f"{self._path}: {error}.{remedy}") from error
        except sqlite3.DatabaseError as error:
            raise FormatError(
                f"{self._path} is damaged or no journal of recollect: {error}. Restore the folder from a copy."
            ) from error

    def _rows(self, query: str, values: tuple[object, ...] = ()) -> list[Any]:
        with self._explained():
            return self._data.execute(query, values).fetchall()

    def _open(self) -> None:
        read = self._data.execute
        application, version = (read(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        empty = read("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
        if not empty and application != _APPLICATION:
            raise FormatError(f"{self._path} is no journal of recollect serve. Move it away, or name another folder.")
        if version > _VERSION:
            raise FormatError(f"{self._path} has version {version}, and this recollect reads {_VERSION}. Update it.")
        read("PRAGMA journal_mode = WAL")
        read("PRAGMA synchronous = FULL")
        read("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
        if empty:
            marks = f"PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {_VERSION};"
            self._data.executescript(f"BEGIN; {_TABLES} {marks} COMMIT;")

    def close(self) -> None:
        """Closes the file."""
        self._data.close()

    def names(self) -> list[str]:
        """Returns the names of the classes, by output."""
        return [name for (name,) in self._rows("SELECT name FROM classes ORDER BY number")]

    def has_begun(self) -> bool:
        """Returns whether ``begin`` was called, by whatever process."""
        return bool(self._rows("SELECT * FROM begun"))

    def begin(self) -> None:
        """Remembers that the memory has what it begins with."""
        self._rows("INSERT OR IGNORE INTO begun VALUES (0)")

    def answer(self, key: str) -> Answer | None:
        """Returns what was answered under an idempotency key."""
        found = self._rows("SELECT digest, answer FROM answers WHERE key = ?", (key,))
        return Answer(*found[0]) if found else None

    def announce(self, write: Announcement) -> None:
        """Says what will be written."""
        self._rows("INSERT OR REPLACE INTO announced VALUES (0, ?)", (json.dumps(write),))

    def announced(self) -> Announcement | None:
        """Returns what was announced and neither completed nor dropped."""
        found = self._rows("SELECT content FROM announced")
        return Announcement(*json.loads(found[0][0])) if found else None

    def drop(self) -> None:
        """Takes an announcement back."""
        self._rows("DELETE FROM announced")

    def complete(
        self,
        *,
        names: list[str] | None = None,
        inputs: list[tuple[int, int, bytes]] | None = None,
        key: str | None = None,
        answer: Answer | None = None,
    ) -> None:
        """Records a write that has happened, as a whole.

        Args:
            names: New classes.
            inputs: Slot, write time and input of each entry.
            key: The idempotency key of the request.
            answer: What is answered under it.
        """
        with self._explained(), self._data:
            self._data.execute("BEGIN IMMEDIATE")
            known = self._data.execute("SELECT count(*) FROM classes").fetchone()[0]
            self._data.executemany("INSERT INTO classes VALUES (?, ?)", enumerate(names or [], known))
            self._data.executemany("INSERT OR REPLACE INTO inputs VALUES (?, ?, ?)", inputs or [])
            if key is not None and answer is not None:
                made = self._data.execute("INSERT INTO answers (key, digest, answer) VALUES (?, ?, ?)", (key, *answer))
                self._data.execute("DELETE FROM answers WHERE id <= ?", ((made.lastrowid or 0) - KEYS,))
            self._data.execute("DELETE FROM announced")

    def input(self, slot: int, written: int) -> bytes | None:
        """Returns the input of the entry that was written to a slot at that time."""
        found = self._rows("SELECT input FROM inputs WHERE slot = ? AND written = ?", (slot, written))
        return found[0][0] if found else None

    def forget(self, slot: int) -> None:
        """Removes the input of a slot, and its bytes from the files."""
        self._rows("DELETE FROM inputs WHERE slot = ?", (slot,))
        self._erase()

    def keep(self, written: list[int]) -> None:
        """Removes the inputs of entries that are no more, such as those forgotten while no service ran.

        Args:
            written: When each slot was written.
        """
        known = dict(enumerate(written))
        gone = [(slot,) for slot, time in self._rows("SELECT slot, written FROM inputs") if known.get(slot) != time]
        if gone:
            with self._explained(), self._data:
                self._data.execute("BEGIN IMMEDIATE")
                self._data.executemany("DELETE FROM inputs WHERE slot = ?", gone)
            self._erase()

    def _erase(self) -> None:
        """Takes what was deleted out of the log, too; if that fails, a later one does."""
        with contextlib.suppress(StorageError):
            self._rows("PRAGMA wal_checkpoint(TRUNCATE)")
