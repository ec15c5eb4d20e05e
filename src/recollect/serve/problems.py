"""What a request may be refused for: a status, and what came, what is needed, what to do."""

import errno

from recollect.errors import FormatError, RecollectError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LONG = 500  # characters of a message from elsewhere


class RefusedError(RecollectError):
    """A request that is refused.

    Args:
        status: The HTTP status.
        code: One word for programs.
        got: What came.
        need: What is needed.
        do: What to do.
        retry: After how many seconds to try again, where that may help.
    """

    def __init__(self, status: int, code: str, *, got: str, need: str, do: str, retry: int | None = None) -> None:
        super().__init__(f"{status} {code}: got {got}, need {need}. {do}")
        self.status = status
        self.retry = retry
        self.content = {"error": {"code": code, "got": got, "need": need, "do": do}}


def refused(error: Exception) -> RefusedError:
    """Returns the answer to a request that the encoder or the model could not take."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, ConnectionError):
        return _unreachable(error, "Nothing was done. Try again in a moment.")
    return RefusedError(
        422,
        "not_taken",
        got=f"inputs on which the model failed with {type(error).__name__}: {_short(error)}",
        need="inputs that encoder and model can take",
        do="Look at the values of your inputs; nothing was stored.",
    )


def not_stored(error: Exception) -> RefusedError:
    """Returns the answer to a write that memory or journal refused."""
    if isinstance(error, ConnectionError):
        return _unreachable(error, "A part of the write may have been stored; predictions see what was.")
    full = (isinstance(error, OSError) and error.errno in _FULL) or "disk is full" in str(error)
    mend = "Make room" if full else "Mend what the error says"
    return RefusedError(
        507 if full else 503,
        "disk_full" if full else "not_stored",
        got=f"an error of the disk: {_short(error)}",
        need="room for the write" if full else "files that can be written",
        do=f"Nothing of the request was stored, and predictions go on. {mend}, then send it again.",
        retry=None if full else 5,
    )


def is_of_the_disk(error: Exception) -> bool:
    """Whether memory or journal could not be written."""
    return isinstance(error, OSError | FormatError)


def _unreachable(error: ConnectionError, do: str) -> RefusedError:
    return RefusedError(
        503,
        "unreachable",
        got=f"no answer: {_short(error)}",
        need="the server that memory or model need",
        do=do,
        retry=5,
    )


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _LONG else text[:_LONG] + " ..."
