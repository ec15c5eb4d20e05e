"""``FolderLock``: one writer at a time, by a lock that ends with its process however that ends."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from recollect.errors import LockedError, StorageError

_NAME = "writer.lock"
_PATIENCE = 0.2  # seconds for a process that has just taken the lock to write down who it is
_held: dict[tuple[int, int], int] = {}  # file -> our process id: the system keeps only other processes out


class FolderLock:
    """The right to write in a folder.

    The lock is the system's (``fcntl``): it is gone as soon as its process is, and a forked process does not have it.
    The file says who has it, and stays.

    Args:
        folder: Where to write.

    Raises:
        LockedError: If someone else has it.
        StorageError: If nothing can be written there, or the system has no such locks.
    """

    def __init__(self, folder: Path) -> None:
        path, end = folder / _NAME, time.monotonic() + _PATIENCE
        _refuse_twice(path)
        with _explained(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        while not _locked(self._file, shared=False):
            other = _written(self._file)
            if other is not None or time.monotonic() > end:
                os.close(self._file)
                raise _refusal(folder, other)
            time.sleep(0.01)  # someone looks who has it, or has just got it
        try:
            with _explained(path):
                os.ftruncate(self._file, 0)
                os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(self._file)
            raise
        self._inode = _inode(self._file)
        _held[self._inode] = os.getpid()

    def release(self) -> None:
        """Lets others write."""
        os.ftruncate(self._file, 0)
        os.close(self._file)
        del _held[self._inode]


def holder(folder: Path) -> int | None:
    """Returns the process id of the one who writes in a folder, or None where nobody does."""
    path = folder / _NAME
    try:
        _refuse_twice(path)
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except LockedError as error:
        return error.holder
    except FileNotFoundError:
        return None
    try:
        return None if _locked(file, shared=True) else _written(file)
    finally:
        os.close(file)


def _refuse_twice(path: Path) -> None:
    """Refuses a file that this process has locked: to open it again, and close it, would release the lock."""
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if _held.get((status.st_dev, status.st_ino)) == os.getpid():
            raise _refusal(path.parent, os.getpid())


def _locked(file: int, *, shared: bool) -> bool:
    """Whether we have got the lock."""
    try:
        import fcntl
    except ImportError as error:
        raise StorageError("a durable memory needs the file locks of a POSIX system (Linux, macOS).") from error
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them differs from system to system
        return False
    return True


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}. See to the disk and the permissions, name another folder, or "
            "open it with read_only=True."
        ) from error


def _written(file: int) -> int | None:
    text = os.pread(file, 20, 0).strip()
    return int(text) if text.isdigit() else None


def _inode(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _refusal(folder: Path, other: int | None) -> LockedError:
    who = "this process" if other == os.getpid() else "another process" if other is None else f"process {other}"
    return LockedError(
        f"{who} has the memory in {folder} open for writing, and only one may. Close it there, or open it for reading: "
        "DurableMemory(folder, read_only=True).",
        holder=other,
    )
