"""Every exception that recollect raises on bad input, each also a built-in one.

A message says what we got, what we need and what to do. ``except RecollectError`` catches them all;
``except ValueError`` keeps working for callers who do not know this library.
"""


class RecollectError(Exception):
    """The base of every error that recollect raises on purpose."""


class ShapeError(RecollectError, ValueError):
    """A tensor has the wrong shape."""


class DtypeError(RecollectError, TypeError):
    """A tensor has the wrong dtype."""


class DeviceError(RecollectError, ValueError):
    """Tensors that belong together lie on different devices."""


class NonFiniteError(RecollectError, ValueError):
    """A tensor holds NaN or infinite numbers where only finite ones make sense."""


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


class MissingExtraError(RecollectError, ImportError):
    """An optional dependency is not installed."""
