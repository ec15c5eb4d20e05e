"""Opening the folder of a durable memory: who may, what it must hold, and that a damaged file stays as it is."""

import os
from pathlib import Path
from typing import Any

from recollect.errors import MissingDataError, SettingError, StorageError
from recollect.memory.durable import contents, database
from recollect.memory.durable.contents import Contents, new_ring
from recollect.memory.durable.database import Database, Settings, Sync
from recollect.memory.durable.locking import FolderLock
from recollect.memory.index import Index


def prepare(folder: Path, given: dict[str, Any], index: Index | None) -> FolderLock:
    """Locks a folder for writing, and makes a memory in it if there is none."""
    if not database.exists(folder):
        if missing := [name for name in ("capacity", "key_size") if name not in given]:
            raise MissingDataError(f"there is no memory in {folder}. Give {' and '.join(missing)} to make one.")
        new_ring(Settings(**given), index)  # refuses what cannot be, before anything is made
        _make(folder)
    lock = FolderLock(folder)
    try:
        if not database.exists(folder):
            database.create(folder, Settings(**given))
    except BaseException:
        lock.release()
        raise
    return lock


def open_file(
    folder: Path, given: dict[str, Any], index: Index | None, *, write: bool, sync: Sync
) -> tuple[Database, Contents]:
    """Opens and loads. Nothing is opened for writing before all was found to be sound."""
    reader = Database(folder, write=False)
    try:
        there = {name: getattr(reader.settings, name) for name in given}
        if there != given:
            other = [f"{name}={there[name]} there, {given[name]} asked" for name in given if there[name] != given[name]]
            raise SettingError(
                f"the memory in {folder} was made with other settings: {', '.join(other)}. Leave them out, or name "
                "another folder."
            )
        loaded = contents.load(reader, index)
        if not write:
            return reader, loaded
        writer = Database(folder, write=True, sync=sync)
    except BaseException:
        reader.close()
        raise
    reader.close()
    return writer, loaded


def close(database: Database, lock: FolderLock | None, process: int) -> None:
    """Closes what a process has opened."""
    if os.getpid() != process:
        return  # forked: file and lock are the parent's
    database.close()
    if lock is not None:
        lock.release()


def _make(folder: Path) -> None:
    """Makes a folder that is still there after a failure of the power, and those above it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            database.sync(path.parent)
    except FileExistsError as error:
        raise StorageError(f"{folder} is a file. Name a folder.") from error
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {error.strerror}. Name another folder, or see to it.") from error
