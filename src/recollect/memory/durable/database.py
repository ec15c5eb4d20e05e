"""``Database``: the SQLite file below a durable memory.

    settings    what the memory was made with, for good
    state       one row: ring position, step, number of entries, and a version that every transaction raises
    blocks      the slots' records, some dozens in each blob, changed in place
    changes     the version at which each block was last changed

The file tells by its header whose it is. WAL mode: readers see the last commit, and never half of one.
"""

import contextlib
import itertools
import json
import os
import secrets
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from recollect.errors import FormatError, MissingDataError, StorageError
from recollect.memory.durable.records import Layout

_FILE = "memory.sqlite"
_MAGIC = b"SQLite format 3\0"
_APPLICATION = int.from_bytes(b"rcol")
_VERSION = 1
_PAGE = 16 * 2**10
_CACHE = 16 * 2**20  # bytes of pages that a writer keeps: SQLite's 2 MiB hold no large batch
_MAPPED = 2**31  # bytes of the file that are mapped for loading; SQLite maps no more
_SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE state (id INTEGER PRIMARY KEY CHECK (id = 0), position INTEGER NOT NULL, step INTEGER NOT NULL,
    size INTEGER NOT NULL, forgets INTEGER NOT NULL, version INTEGER NOT NULL, epoch INTEGER NOT NULL);
CREATE TABLE blocks (number INTEGER PRIMARY KEY, entries BLOB NOT NULL);
CREATE TABLE changes (number INTEGER PRIMARY KEY, version INTEGER NOT NULL);
INSERT INTO state VALUES (0, 0, 0, 0, 0, 0, 0);
"""

Sync = Literal["full", "normal"]

# How many connections this process has to each file, by its inode. Where there is one, nobody else here may open the
# file: the system's locks on it go with the first of our descriptors that is closed, SQLite's or not, and then another
# program that closes the file takes itself for the last one, and removes the log below a writer.
_connections: Counter[tuple[int, int]] = Counter()
_connecting = threading.Lock()


class State(NamedTuple):
    """What changes with every transaction."""

    position: int = 0
    step: int = 0
    size: int = 0
    forgets: int = 0
    """How often entries were forgotten."""
    version: int = 0
    """How many transactions there were."""
    epoch: int = 0
    """How often all was replaced: within an epoch a record changes only with its stamp."""

    def next(self, **changed: int) -> "State":
        """Returns the state after a transaction."""
        return self._replace(version=self.version + 1, **changed)


@dataclass(frozen=True)
class Settings:
    """What a memory was made with; the same as the arguments of ``EpisodicMemory``."""

    capacity: int
    key_size: int
    value_shape: tuple[int, ...] = ()
    value_dtype: torch.dtype = torch.long
    key_dtype: torch.dtype = torch.float32
    history: int = 0

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.capacity + self.history

    @property
    def layout(self) -> Layout:
        """How the entries are stored."""
        return Layout(self.key_size, self.key_dtype, self.value_shape, self.value_dtype)


def create(folder: Path, settings: Settings) -> None:
    """Makes a file for an empty memory, whole or not at all. The folder must be locked by the caller.

    Raises:
        StorageError: If it cannot be written.
    """
    _remove_unfinished(folder)
    temporary = folder / f".{_FILE}.{secrets.token_hex(8)}"
    with _explained(folder, "nothing was made"), contextlib.ExitStack() as stack:
        stack.callback(_remove_unfinished, folder)
        connection = sqlite3.connect(temporary, isolation_level=None)
        stack.callback(connection.close)
        connection.execute(f"PRAGMA page_size = {_PAGE}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_VERSION}")
        connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.executescript(f"BEGIN;{_SCHEMA}")
        rows = [(name, json.dumps(_as_json(value))) for name, value in asdict(settings).items()]
        connection.executemany("INSERT INTO settings VALUES (?, ?)", rows)
        connection.execute("COMMIT")
        connection.close()  # which brings all that the WAL holds into the file, and removes it
        sync(temporary)
        temporary.rename(folder / _FILE)
    sync(folder)


def _remove_unfinished(folder: Path) -> None:
    for leftover in folder.glob(f".{_FILE}.*"):
        leftover.unlink()


def exists(folder: Path) -> bool:
    """Whether there is a file, of whatever kind, where a memory's file would be."""
    return (folder / _FILE).exists()


class Database:
    """A connection to the file of a memory.

    Args:
        folder: Where the file is.
        write: Whether to write; the folder must then be locked by the caller.
        sync: When a commit counts as done: once it is on the disk, or once the system has it.

    Raises:
        MissingDataError: If there is no such file.
        FormatError: If it is not a memory's, or a newer version's.
    """

    def __init__(self, folder: Path, *, write: bool, sync: Sync = "full") -> None:
        self.path = folder / _FILE
        with _connecting:
            self._inode, length = _look(folder)
            _connections[self._inode] += 1
        try:
            self._check_length(length)
            with _explained(self.path):
                self._connection = sqlite3.connect(
                    f"{self.path.absolute().as_uri()}?mode={'rw' if write else 'ro'}",
                    uri=True,
                    isolation_level=None,
                    check_same_thread=False,  # the memory lets one thread at a time in
                )
        except BaseException:
            self._leave()
            raise
        try:
            with _explained(self.path):
                if write:
                    self._connection.execute(f"PRAGMA synchronous = {sync}")
                    self._connection.execute(f"PRAGMA cache_size = {-_CACHE // 1024}")
                self.settings = self._read_settings()
        except BaseException:
            self.close()
            raise
        self.layout = self.settings.layout
        self.per_block = min(self.layout.block, self.settings.slots)
        self._made: set[int] = set()  # blocks that are known to be there

    def _check_length(self, needed: int) -> None:
        """Refuses a file that lacks its end. While there is a log, the end may still be in that."""
        size, log = self.path.stat().st_size, self.path.with_name(f"{_FILE}-wal")
        if size < needed and not (log.exists() and log.stat().st_size):
            raise self.damaged(f"it is truncated: got {size} bytes, need {needed}")

    def _read_settings(self) -> Settings:
        try:
            stored: dict[str, Any] = {}
            for name, text in self._connection.execute("SELECT name, value FROM settings"):
                value = json.loads(text)
                stored[name] = getattr(torch, value) if name.endswith("dtype") else value
            stored["value_shape"] = tuple(stored["value_shape"])
            return Settings(**stored)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise self.damaged(f"its settings cannot be read ({error})") from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[State]:
        """Within it, all that is read is of one moment: the state that it gives."""
        with _explained(self.path):
            self._connection.execute("BEGIN")
            try:
                found = self._connection.execute("SELECT * FROM state").fetchone()
                if found is None:
                    raise self.damaged("it says no state")
                yield State(*found[1:])
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def blocks(self, since: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Returns the blocks that there are, or those that were changed after a version."""
        if since is None:
            self._connection.execute(f"PRAGMA mmap_size = {_MAPPED}")
            try:
                yield from self._connection.execute("SELECT number, entries FROM blocks ORDER BY number")
            finally:
                self._connection.execute("PRAGMA mmap_size = 0")
        else:
            query = "SELECT number, entries FROM changes JOIN blocks USING (number) WHERE version > ? ORDER BY number"
            yield from self._connection.execute(query, (since,))

    @contextlib.contextmanager
    def writing(self, state: State) -> Iterator[None]:
        """A transaction that ends in this state: when it is over, all of it is on the disk, or on an error nothing.

        Raises:
            StorageError: If it cannot be written.
        """
        with _explained(self.path, "nothing of it was stored"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                values = (state.position, state.step, state.size, state.forgets, state.version, state.epoch)
                self._connection.execute(
                    "UPDATE state SET position = ?, step = ?, size = ?, forgets = ?, version = ?, epoch = ?", values
                )
                self._connection.execute("COMMIT")
            except BaseException:
                self._made = set()  # who knows: the commit itself may have been done before it was broken off
                if self._connection.in_transaction:  # SQLite has rolled back by itself after some errors
                    self._connection.execute("ROLLBACK")
                raise

    def put(self, slots: Int[Tensor, " n"], data: bytearray, version: int) -> None:
        """Writes records, in the order of their slots, which rise."""
        length, per_block = self.layout.length, self.per_block
        numbers = slots // per_block
        breaks = (slots.diff() != 1) | (numbers.diff() != 0)
        starts = [0, *(breaks.nonzero().squeeze(1) + 1).tolist(), len(slots)]
        view = memoryview(data)
        for start, end in itertools.pairwise(starts):
            number, first = divmod(int(slots[start]), per_block)
            self._make(number)
            with self._connection.blobopen("blocks", "entries", number) as blob:
                blob.seek(first * length)
                blob.write(view[start * length : end * length])
        rows = [(number, version) for number in numbers.unique().tolist()]
        self._connection.executemany("INSERT OR REPLACE INTO changes VALUES (?, ?)", rows)

    def _make(self, number: int) -> None:
        if number not in self._made:
            size = self.per_block * self.layout.length
            self._connection.execute("INSERT OR IGNORE INTO blocks VALUES (?, zeroblob(?))", (number, size))
            self._made.add(number)

    def remove_all(self) -> None:
        """Removes all blocks."""
        self._connection.execute("DELETE FROM blocks")
        self._connection.execute("DELETE FROM changes")
        self._made = set()

    def erase(self, *, shrink: bool = False) -> None:
        """Takes what was removed out of the files, too, unless a reader is in the way; later commits do it then."""
        with _explained(self.path):
            if shrink:
                self._connection.execute("VACUUM")
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def integrity(self) -> list[str]:
        """Returns what SQLite finds wrong with the file's structure."""
        with _explained(self.path):
            return [line for (line,) in self._connection.execute("PRAGMA integrity_check(20)") if line != "ok"]

    def damaged(self, what: str) -> FormatError:
        """Returns the error that says so."""
        return FormatError(f"{self.path} is damaged: {what}. {_RESTORE}")

    def close(self) -> None:
        """Ends the connection. The last to write leaves one file behind."""
        self._connection.close()
        self._leave()

    def _leave(self) -> None:
        with _connecting:
            _connections[self._inode] -= 1
            if not _connections[self._inode]:
                del _connections[self._inode]


_RESTORE = "It was left as it is: restore a copy of the folder, or import an export of it elsewhere."


def check_header(folder: Path) -> None:
    """Looks at the first bytes, before SQLite does: it may change a file that it opens.

    Raises:
        MissingDataError: If there is no file.
        FormatError: If it is not a memory's, or a newer version's.
        StorageError: If it cannot be read.
    """
    with _connecting:
        _look(folder)


def _look(folder: Path) -> tuple[tuple[int, int], int]:
    """Does so, and returns the file's inode and how long it must be; 0 where it is open in this process already."""
    path = folder / _FILE
    try:
        status = path.stat()
        inode = status.st_dev, status.st_ino
        if inode in _connections:
            return inode, 0
        with path.open("rb") as file:
            header = file.read(100)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingDataError(f"there is no memory in {folder}: it has no {_FILE}.") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}. Name another folder, or see to it.") from error
    if len(header) < 100 or not header.startswith(_MAGIC) or int.from_bytes(header[68:72]) != _APPLICATION:
        raise FormatError(f"{path} is not the file of a memory, or damaged. Name another folder. {_RESTORE}")
    version = int.from_bytes(header[60:64])
    if version != _VERSION:
        raise FormatError(
            f"{path} has format version {version}, and this recollect reads version {_VERSION}. Update recollect: "
            "pip install -U recollect."
        )
    return inode, int.from_bytes(header[28:32]) * _PAGE


@contextlib.contextmanager
def _explained(path: Path, outcome: str = "") -> Iterator[None]:
    """Turns SQLite's errors into ours."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise StorageError(f"the memory in {path.parent} was closed. Open it again.") from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}:
            raise FormatError(f"{path} is damaged: {error}. {_RESTORE}") from error
        outcome = f", and {outcome}" if outcome else ""
        remedy = "Make room on the disk" if code == sqlite3.SQLITE_FULL else "See to the disk, its room and permissions"
        raise StorageError(f"{path}: {error}{outcome}. {remedy}.") from error


def _as_json(value: object) -> object:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
