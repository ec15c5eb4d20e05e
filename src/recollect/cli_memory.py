"""``recollect memory info | verify | export | import | forget``: durable memories from the command line."""

import argparse
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recollect.errors import FormatError, MissingDataError, SettingError
from recollect.experiments.runner import Progress
from recollect.memory import DurableMemory, EpisodicMemory
from recollect.memory.durable import contents, opening
from recollect.memory.durable.contents import Advance
from recollect.memory.durable.database import Database, Settings, sync
from recollect.memory.durable.locking import holder
from recollect.memory.durable.verifying import problems

_FORMAT = {"format": "recollect memory", "version": "1"}  # in the metadata of an export
_MOST_PROBLEMS = 20  # lines

_USAGE = """usage: recollect memory info FOLDER                    what is in it, and who writes to it
       recollect memory verify FOLDER                  looks for damage; exit status 1 where there is some
       recollect memory export FOLDER FILE             copies all entries into a safetensors file
       recollect memory import FOLDER FILE             makes a memory of such a file, all of it or nothing
       recollect memory forget FOLDER SLOT [SLOT ...]  removes entries for good

FOLDER is that of a DurableMemory. info, verify and export may run while another process writes to it.
export and import refuse to replace a file, or entries, that are there, unless --replace is given."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message}. See recollect memory --help.")


def main(arguments: list[str]) -> int:
    """Runs a command and returns the exit status."""
    command, *rest = arguments or ["--help"]
    if command in {"--help", "-h"} or "--help" in rest or "-h" in rest:
        print(_USAGE)
        return 0
    if command not in _COMMANDS:
        raise SettingError(f"there is no recollect memory {command}. There are: {', '.join(_COMMANDS)}.")
    parser = _Parser(f"recollect memory {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    if command in {"export", "import"}:
        parser.add_argument("file", type=Path, metavar="FILE")
        parser.add_argument("--replace", action="store_true")
    elif command == "forget":
        parser.add_argument("slots", type=int, nargs="+", metavar="SLOT")
    return _COMMANDS[command](**vars(parser.parse_args(rest)))


def _info(folder: Path) -> int:
    with closing(Database(folder, write=False)) as database, database.reading() as state:
        settings, files = database.settings, (database.path, database.path.with_name(f"{database.path.name}-wal"))
    writer = holder(folder)
    sizes = [path.stat().st_size / 2**20 if path.exists() else 0.0 for path in files]
    for name, value in {
        "entries": f"{state.size:,} of {settings.slots:,}"
        + (f", {settings.history:,} for the past" * bool(settings.history)),
        "keys": f"{settings.key_size} numbers, {settings.key_dtype}",
        "values": f"shape {settings.value_shape}, {settings.value_dtype}",
        "written": f"{state.step:,} so far",
        "on disk": f"{sizes[0]:,.1f} MiB, and {sizes[1]:,.1f} MiB in the log",
        "writer": "none" if writer is None else f"process {writer}",
    }.items():
        print(f"{name:9}{value}")
    return 0


def _verify(folder: Path) -> int:
    with closing(Database(folder, write=False)) as database:
        slots = database.settings.slots
    with _progress(slots, "checking") as advance:
        found = problems(folder, advance=advance)
    for problem in found[:_MOST_PROBLEMS]:
        print(problem)
    if len(found) > _MOST_PROBLEMS:
        print(f"and {len(found) - _MOST_PROBLEMS} more")
    print(f"{folder} is damaged: restore a copy of it." if found else f"{folder} is sound.")
    return 1 if found else 0


def _export(folder: Path, file: Path, replace: bool) -> int:
    if file.exists() and not replace:
        raise SettingError(f"{file} is there already. Name another file, or add --replace.")
    with closing(Database(folder, write=False)) as database, _progress(database.settings.slots, "reading") as advance:
        ring = contents.load(database, advance=advance).ring
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with _progress(1, "writing") as advance:
            _save(ring, temporary)
            temporary.replace(file)
            sync(file.absolute().parent)
            advance(1)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{len(ring):,} entries in {file}")
    return 0


def _save(ring: EpisodicMemory, path: Path) -> None:
    try:
        save_file(ring.state_dict(), path, {**_FORMAT, "history": str(ring.history)})
    except SafetensorError as error:  # all that it reports when it writes are errors of the file system
        raise OSError(f"{path}: {error}") from error
    sync(path)


def _import(folder: Path, file: Path, replace: bool) -> int:
    ring, settings = _read(file)
    given = dict(vars(settings))
    lock = opening.prepare(folder, given, None)
    try:
        database, there = opening.open_file(folder, given, None, write=True, sync="full")
        with closing(database):
            if there.state.size and not replace:
                raise SettingError(f"{folder} holds {there.state.size:,} entries. Name another, or add --replace.")
            with _progress(len(ring.written), "writing") as advance:
                contents.replace(database, ring, there.state, advance=advance)
    finally:
        lock.release()
    print(f"{len(ring):,} entries in {folder}")
    return 0


def _read(file: Path) -> tuple[EpisodicMemory, Settings]:
    """Returns the memory in an exported file."""
    if not file.is_file():
        raise MissingDataError(f"there is no file {file}.")
    try:
        with safe_open(file, "pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            if {name: metadata.get(name) for name in _FORMAT} != _FORMAT:
                raise FormatError(
                    f"{file} is no export of a memory of this version. Make one: recollect memory export."
                )
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
        history, keys, values = int(metadata["history"]), tensors["keys"], tensors["values"]
        sizes = len(keys) - history, keys.shape[1]
        settings = Settings(*sizes, tuple(values.shape[1:]), values.dtype, keys.dtype, history)
        ring = contents.new_ring(settings)
        ring.load_state_dict(tensors)
    except (SafetensorError, LookupError, ValueError, RuntimeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file} is damaged, or no export of a memory: {error}.") from error
    return ring, settings


def _forget(folder: Path, slots: list[int]) -> int:
    with DurableMemory(folder) as memory:
        before = len(memory)
        memory.forget(torch.tensor(slots))
        print(f"{before - len(memory)} forgotten, {len(memory):,} entries are left")
    return 0


@contextmanager
def _progress(total: int, title: str) -> Iterator[Advance]:
    """A bar, where the package that draws it is installed."""
    try:
        bar = Progress(total, title)
    except ImportError:
        yield lambda slots: None
        return
    with bar:
        yield bar.advance


_COMMANDS = {"info": _info, "verify": _verify, "export": _export, "import": _import, "forget": _forget}
