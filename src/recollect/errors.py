"""Every exception that recollect raises on bad input, each also a built-in one.

A message says what we got, what we need and what to do. ``except RecollectError`` catches them all;
``except ValueError`` keeps working for callers who do not know this library.
"""

import math
import textwrap
from numbers import Real
from typing import Any

import torch
from torch import Tensor


class RecollectError(Exception):
    """The base of every error that recollect raises on purpose."""


class ShapeError(RecollectError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(RecollectError, TypeError):
    """A tensor has the wrong dtype."""


class DeviceError(RecollectError, ValueError):
    """Tensors that belong together lie on different devices, or a device is not there."""


class NonFiniteError(RecollectError, ValueError):
    """A tensor holds NaN or infinite numbers where only finite ones make sense.

    Args:
        message: What is wrong.
        query: The row of the first bad query, where a query is what is bad.
    """

    def __init__(self, message: str, *, query: int | None = None) -> None:
        super().__init__(message)
        self.query = query


class LabelError(RecollectError, ValueError):
    """A stored label does not name one of the head's outputs."""


class SettingError(RecollectError, ValueError):
    """A constructor or function argument is outside its range."""


class HeadError(RecollectError, TypeError):
    """A head contains something that cannot be adapted exactly."""


class EmptyMemoryError(RecollectError, LookupError):
    """A prediction needs at least one memory entry, and there is none."""


class FormatError(RecollectError, ValueError):
    """A file is truncated, damaged, foreign, or of another format version."""


class MissingDataError(RecollectError, FileNotFoundError):
    """A data set or a saved model is not where it should be (and cannot be downloaded)."""


class StorageError(RecollectError, OSError):
    """A memory on disk cannot be written or read: the disk is full, it was closed, or opened for reading only."""


class LockedError(RecollectError, BlockingIOError):
    """Another process, or another object in this one, writes to a memory on disk.

    Args:
        message: What is wrong.
        holder: The process id of the one that does, where it is known.
    """

    def __init__(self, message: str, *, holder: int | None = None) -> None:
        super().__init__(message)
        self.holder = holder


class MissingExtraError(RecollectError, ImportError):
    """An optional dependency is not installed."""


def require(name: str, value: object, kind: type, example: str) -> None:
    """Refuses an argument that is not an instance of ``kind`` (a class in place of its instance is the usual slip).

    Raises:
        SettingError: If it is not.
    """
    if isinstance(value, type) or not isinstance(value, kind):
        raise SettingError(f"{name} must be {example}, got {value!r}.")


def require_number(name: str, value: Any, *, low: float | None = None, above: float | None = None) -> None:
    """Refuses an argument that is no finite number, or not at least ``low``, or not above ``above``.

    Raises:
        SettingError: If it is not.
    """
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not finite or (low is not None and value < low) or (above is not None and value <= above):
        limit = f" of at least {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
        raise SettingError(f"{name} must be a finite number{limit}, got {value!r}.")


def require_whole(name: str, value: object, *, low: int = 1) -> None:
    """Refuses an argument that is no whole number of at least ``low``.

    Raises:
        SettingError: If it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        limit = "above 0" if low == 1 else f"of at least {low}"
        raise SettingError(f"{name} must be a whole number {limit}, got {value!r}.")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses an argument that is not one of the words it may be.

    Raises:
        SettingError: If it is not.
    """
    if value not in choices:
        raise SettingError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_device(name: str) -> torch.device:
    """Returns the device of this name, once a tensor could be made on it.

    Raises:
        DeviceError: If none could.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # what PyTorch raises differs from device to device
        there = ", ".join(["'cpu'", *(f"'cuda:{number}'" for number in range(torch.cuda.device_count()))])
        reason = textwrap.shorten(str(error), 80, placeholder=" ...")
        raise DeviceError(
            f"device must be one that PyTorch can use here ({there}), got {name!r} ({reason}). Name one of those, or "
            "install a PyTorch and a driver for yours."
        ) from error
    return device


def require_tensor(name: str, value: object) -> None:
    """Refuses lists, arrays and numbers where a tensor is needed.

    Raises:
        DtypeError: If ``value`` is no tensor.
    """
    if not isinstance(value, Tensor):
        raise DtypeError(f"{name} must be a tensor, got {type(value).__name__}. Use torch.as_tensor(...).")
