"""Where what is taught is kept: the memory of a service becomes a ``DurableMemory`` in a folder, with the journal."""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from recollect.errors import SettingError
from recollect.mbpa import MbPA
from recollect.memory import DurableMemory, EpisodicMemory
from recollect.memory.durable.database import exists, sync
from recollect.memory.durable.locking import holder
from recollect.serve.journal import Journal
from recollect.serve.service import Service

_JOURNAL = "service.sqlite"
_NEW = 60.0  # seconds in which who has just made a folder has surely locked it


def kept(service: Service) -> Service:
    """Returns the service with its memory in its folder, if it names one.

    The first time, the entries that the memory holds are copied there; from then on those in the folder count, and the
    memory that was given is left as it is.

    Raises:
        SettingError: If the memory cannot be kept in a folder, or the one there has keys of another size.
        LockedError, FormatError, StorageError: See ``DurableMemory``.
    """
    if service.folder is None:
        return service
    given, layer = service.layer.memory, service.layer
    if not isinstance(given, EpisodicMemory):
        raise SettingError(
            f"folder= keeps the entries of an EpisodicMemory, got a {type(given).__name__}, which keeps its own. Leave "
            "folder out."
        )
    folder = Path(service.folder).absolute()
    settings = {
        "capacity": given.capacity,
        "key_size": given.key_size,
        "value_shape": given.value_shape,
        "value_dtype": given.values.dtype,
        "key_dtype": given.keys.dtype,
        "history": given.history,
    }
    if not exists(folder):
        _copy(given, settings, folder)
    memory = DurableMemory(folder, **settings, index=given.index)
    durable = MbPA(
        layer.head,
        memory,
        neighbors=layer.neighbors,
        adaptation=layer.adaptation,
        kernel=layer.kernel,
        likelihood=layer.likelihood,
    )
    return dataclasses.replace(service, layer=durable, folder=None)


def journal(service: Service) -> Journal:
    """Returns the journal beside a memory on disk; beside any other one, a journal in RAM."""
    memory = service.layer.memory
    return Journal(memory.folder / _JOURNAL if isinstance(memory, DurableMemory) else None)


def _copy(given: EpisodicMemory, settings: dict[str, Any], folder: Path) -> None:
    """Makes a durable copy of a memory, which is in the folder as a whole or not at all."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise SettingError(f"{folder} holds something else than a memory. Name a new or an empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    leftover = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{16}}\.partial")
    for path in folder.parent.iterdir():
        if leftover.fullmatch(path.name) and _is_old(path) and holder(path) is None:  # nobody is making it
            shutil.rmtree(path, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.partial")
    try:
        with DurableMemory(partial, **settings) as copy:
            if len(given):
                copy.load_state_dict(given.state_dict())
        with contextlib.suppress(OSError):  # if another process was faster, its copy counts
            os.replace(partial, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _NEW
    except FileNotFoundError:  # another process was faster
        return False
