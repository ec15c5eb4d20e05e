"""``Going``: a function that reads a whole text, a part of it in each call."""

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Going(Generic[T]):
    """Reads some more of a text in each call, by a function that reads it from its first word to its last.

    Args:
        read: That function; it is left waiting between the calls, in a thread of its own.
        parts: The text. The first part is read at once.
    """

    def __init__(self, read: Callable[[Iterator[T]], object], parts: Iterator[T]) -> None:
        self._read = read
        self._parts = parts
        self._wanted, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()
        self()

    def __call__(self) -> None:
        self._wanted.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._read(self._handed_out())
            self._error = EOFError("the text has ended")
        except Exception as error:  # raised again where it is seen
            self._error = error
        self._done.release()

    def _handed_out(self) -> Iterator[T]:
        for part in self._parts:
            self._wanted.acquire()
            yield part
            self._done.release()  # it is the next that is asked for
        self._wanted.acquire()
