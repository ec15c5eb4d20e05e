"""``Gatherer``: one worker thread, and concurrent predictions that reach it as one batch.

While the worker is busy, requests wait and become the next batch. When it is free, a batch leaves as soon as a turn of
the event loop has brought nothing more, or after ``wait`` seconds: a lonely request does not wait for company. Writes
keep their place in the queue: what comes after one sees it.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, NamedTuple, TypeVar

from recollect.serve.problems import RefusedError

Item = TypeVar("Item")
Result = TypeVar("Result")
Other = TypeVar("Other")


class _Waiting(NamedTuple):
    size: int
    future: "asyncio.Future[Any]"
    item: Any = None
    job: Callable[[], Any] | None = None  # is done alone


class Gatherer(Generic[Item, Result]):
    """Hands work to one thread. To be used in one event loop.

    Args:
        work: Answers a list of items, each with a result or an exception; called in the thread.
        most: The size of a batch at most; an item that is larger goes alone. With 1 nothing is gathered.
        wait: For how many seconds a batch may wait for more.
        room: The size of all that waits or is being worked on at most; one item is taken however large it is.
        seconds: After how long a request that is not answered is given up.
        told: Is told the size of each batch.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], list[Result | Exception]],
        *,
        most: int,
        wait: float,
        room: int,
        seconds: float,
        told: Callable[[int], None],
    ) -> None:
        self._work = work
        self._most = most
        self._wait = wait
        self._room = room
        self._seconds = seconds
        self._told = told
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recollect")
        self._tickets = itertools.count()
        self._waiting: dict[int, _Waiting] = {}  # in the order in which they came
        self._working: Future[list[Any]] | None = None
        self._begun = 0.0  # when the thread has got what it works on
        self._checking = False
        self._size = 0

    @property
    def size(self) -> int:
        """The size of all that waits or is being worked on."""
        return self._size

    async def submit(self, item: Item, size: int) -> Result:
        """Returns the result for one item, which may be computed with others.

        Raises:
            RefusedError: If too much is waiting (429), or it took too long (503).
        """
        return await self._enter(_Waiting(size, asyncio.get_running_loop().create_future(), item=item))

    async def alone(self, job: Callable[[], Other], size: int) -> Other:
        """Returns what a job in the thread returns.

        Raises:
            RefusedError: If too much is waiting (429), or it took too long (503).
        """
        return await self._enter(_Waiting(size, asyncio.get_running_loop().create_future(), job=job))

    @property
    def is_stuck(self) -> bool:
        """Whether the thread is busy with one batch for longer than a request may take."""
        return self._working is not None and time.perf_counter() - self._begun > self._seconds

    def close(self, seconds: float) -> bool:
        """Ends the thread, which may finish what it has begun; returns whether it has, within so many seconds."""
        self._thread.shutdown(wait=False)
        return self._working is None or not wait([self._working], timeout=seconds).not_done

    async def _enter(self, waiting: _Waiting) -> Any:
        if self._size and self._size + waiting.size > self._room:
            raise RefusedError(
                429,
                "queue_full",
                got=f"{waiting.size} inputs while {self._size} are waiting",
                need=f"at most {self._room} waiting at once",
                do="Nothing was done. Try again in a moment.",
                retry=1,
            )
        ticket = next(self._tickets)
        self._waiting[ticket] = waiting
        self._size += waiting.size
        self._start()
        try:
            async with asyncio.timeout(self._seconds):
                return await waiting.future
        except TimeoutError as error:
            raise too_slow(self._seconds, begun=ticket not in self._waiting) from error
        finally:
            self._waiting.pop(ticket, None)
            self._size -= waiting.size

    def _start(self) -> None:
        if self._working is None and not self._checking:
            self._checking = True
            loop = asyncio.get_running_loop()
            loop.call_soon(self._check, loop, len(self._waiting), time.perf_counter() + self._wait)

    def _check(self, loop: asyncio.AbstractEventLoop, seen: int, until: float) -> None:
        """Sends a batch off, unless more came in the last turn of the event loop."""
        if len(self._waiting) > seen and time.perf_counter() < until and self._size < self._most:
            loop.call_soon(self._check, loop, len(self._waiting), until)
            return
        self._checking = False
        batch = self._take()
        if batch:
            self._begun = time.perf_counter()
            self._working = self._thread.submit(self._run, batch)
            asyncio.wrap_future(self._working).add_done_callback(lambda done: self._finish(batch, done.result()))

    def _take(self) -> list[_Waiting]:
        """Returns a job alone, or the predictions before the next job."""
        batch: list[_Waiting] = []
        size = 0
        while self._waiting:
            ticket, first = next(iter(self._waiting.items()))
            if batch and (first.job is not None or size + first.size > self._most):
                break
            del self._waiting[ticket]
            batch.append(first)
            size += first.size
            if first.job is not None:
                break
        return batch

    def _run(self, batch: list[_Waiting]) -> list[Any]:
        """Works, in the thread."""
        try:
            job = batch[0].job
            if job is not None:
                return [job()]
            self._told(sum(waiting.size for waiting in batch))
            return self._work([waiting.item for waiting in batch])
        except Exception as error:
            return [error] * len(batch)

    def _finish(self, batch: list[_Waiting], results: list[Any]) -> None:
        self._working = None
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():  # given up
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)
        if self._waiting:
            self._start()


def too_slow(seconds: float, *, begun: bool) -> RefusedError:
    """Returns the answer where the model has taken too long, and may have begun with the request."""
    unknown = "A write may have happened: repeat it with the same idempotency key to learn its result."
    return RefusedError(
        503,
        "too_slow",
        got=f"no result within {seconds:g} s",
        need="a server with less to do",
        do=unknown if begun else "Nothing was done. Try again in a moment.",
        retry=math.ceil(seconds),
    )
