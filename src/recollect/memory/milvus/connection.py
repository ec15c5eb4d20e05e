"""A connection to Milvus that answers in bounded time or says in one sentence why not."""

import importlib
import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

from recollect.errors import LockedError, MissingExtraError, SettingError, UnreachableError

if TYPE_CHECKING:
    from pymilvus import MilvusClient

_PAUSE = 0.1  # seconds before a request is made again, then twice as many each time
_REFUSALS = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_SHOWN = 240  # characters of a reason that an error repeats

Result = TypeVar("Result")


class Connection:
    """Makes requests, each a few times if need be. The client is made by the first request, in each process anew.

    Args:
        uri: A file that ends in .db, or a server's address.
        token: What the server asks for, ``user:password`` or a key.
        timeout: Seconds that one attempt may take.
        retries: How often a request that failed is made again.
        prepare: Called with each new client before it is used.

    Raises:
        MissingExtraError: If pymilvus or, for a file, milvus-lite is not installed.
    """

    def __init__(
        self, uri: str, *, token: str | None, timeout: float, retries: int, prepare: "Callable[[MilvusClient], None]"
    ) -> None:
        self.uri, self.timeout = uri, timeout
        self.is_file = "://" not in uri
        self._token, self._retries, self._prepare = token, retries, prepare
        self._client: MilvusClient | None = None
        self._process = os.getpid()
        _import_pymilvus(lite=self.is_file)

    def ask(self, request: "Callable[[MilvusClient], Result]") -> Result:
        """Makes a request, and makes it again on a new connection where it fails: it must bear to be made twice.

        Raises:
            UnreachableError: If the last attempt has failed, too.
            LockedError: If a file is open in another process.
            SettingError: If the server refuses the token.
        """
        attempt = 0
        while True:
            with _listening() as heard:
                try:
                    return request(self._connected())
                except _failures() as error:
                    self._drop()
                    reason = _reason(error, heard)
            if any(refusal in reason for refusal in _REFUSALS):
                raise SettingError(f"the Milvus server at {self.uri} refuses token= ({_short(reason)}). Check it.")
            if attempt == self._retries:
                raise self._failed(reason)
            time.sleep(_PAUSE * 2**attempt)
            attempt += 1

    def close(self) -> None:
        """Gives the connection back, and a file to other processes. The next request connects anew."""
        self._drop()
        if self.is_file and self._process == os.getpid():
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)

    def _connected(self) -> "MilvusClient":
        if self._client is not None and self._process != os.getpid():
            raise UnreachableError(
                f"process {os.getpid()} was forked from {self._process}, whose connection to {self.uri} it cannot use. "
                "Make the memory after the fork, or start processes by spawn."
            )
        if self._client is None:
            from pymilvus import MilvusClient

            self._process = os.getpid()
            # A channel of its own: the others to this address may still be waiting, two minutes at worst, to try again.
            options = {"grpc.use_local_subchannel_pool": 1}
            client = MilvusClient(
                self.uri, token=self._token or "", timeout=self.timeout, dedicated=True, grpc_options=options
            )
            try:
                self._prepare(client)
            except BaseException:
                client.close()
                raise
            self._client = client
        return self._client

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None and self._process == os.getpid():
            client.close()

    def _failed(self, reason: str) -> LockedError | UnreachableError:
        if "DataDirLocked" in reason:
            return LockedError(
                f"{self.uri} is open in another process ({_short(reason)}). milvus-lite serves one at a time: "
                "close it there, or let several share a server."
            )
        if self.is_file:
            return UnreachableError(
                f"milvus-lite could not read or write {self.uri} ({_short(reason)}). See that the file can be written "
                "and has room, or raise timeout=."
            )
        return UnreachableError(
            f"the Milvus server at {self.uri} did not answer: {self._retries + 1} attempts of at most "
            f"{self.timeout:g} s failed ({_short(reason)}). See that it runs and can be reached from here, or raise "
            "timeout=."
        )


def _import_pymilvus(*, lite: bool) -> None:
    try:
        importlib.import_module("pymilvus")
        if lite:
            importlib.import_module("milvus_lite.server_manager")
    except ImportError as error:
        raise MissingExtraError("a memory in Milvus needs pymilvus: pip install 'recollect[milvus]'.") from error


def _failures() -> tuple[type[Exception], ...]:
    """Returns what pymilvus raises when a request fails, whatever the reason."""
    from grpc import FutureTimeoutError, RpcError
    from pymilvus import MilvusException

    return MilvusException, RpcError, FutureTimeoutError


def _reason(error: Exception, heard: list[str]) -> str:
    """Returns the causes of an error in a line, from the outermost to the innermost, and what was logged about it."""
    from grpc import Call
    from pymilvus import MilvusException

    words: list[str] = []
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:  # pymilvus raises errors from themselves
        seen.append(cause)
        if isinstance(cause, MilvusException):
            words.append(str(cause.message))
        elif isinstance(cause, Call):  # what gRPC raises is one, too
            words.append(f"{cause.code().name}: {cause.details()}")
        else:
            words.append(f"{type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "; ".join(dict.fromkeys(words + heard))


def _short(reason: str) -> str:
    return textwrap.shorten(reason, _SHOWN, placeholder=" ...")


# pymilvus logs a traceback for every attempt. What it logs about our requests goes into our error instead; what it logs
# about those of others (in this process, in other threads) is none of our business.

_HEARD: ContextVar[list[str] | None] = ContextVar("heard", default=None)


class _Ear(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        heard = _HEARD.get()
        if heard is None:
            return True
        if record.exc_info and record.exc_info[1] is not None and not record.name.startswith("pymilvus"):
            heard.append(f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}")
        return False


_EAR = _Ear()


@contextmanager
def _listening() -> Iterator[list[str]]:
    """Keeps the loggers of pymilvus and milvus-lite silent for what happens inside, and returns what they had to say.

    A filter sits on each logger by itself, since a record passes by the filters of those above it.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.startswith(("pymilvus", "milvus_lite")) and isinstance(logger, logging.Logger):
            logger.addFilter(_EAR)  # once: a logger knows its filters
    heard: list[str] = []
    token = _HEARD.set(heard)
    try:
        yield heard
    finally:
        _HEARD.reset(token)
