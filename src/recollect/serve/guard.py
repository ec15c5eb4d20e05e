"""``Guard``: what every request passes before and after its endpoint. The token, the host's name, headers, counts."""

import asyncio
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from recollect.serve.problems import RefusedError
from recollect.serve.settings import is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_OPEN = {"/", "/healthz", "/readyz"}  # without a token: the page asks for one
_PAGE = "/page/"
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::\d+)?")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
]


class Guard:
    """An ASGI application around another one.

    Args:
        app: The endpoints.
        token: What ``Authorization: Bearer`` must say. Without one, requests must call this machine by a loopback name:
            a page from elsewhere that has its own name point here (DNS rebinding) is refused.
        told: Is told endpoint, status and seconds of each answer.
    """

    def __init__(self, app: App, *, token: str | None, told: Callable[[str, int, float], None]) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._told = told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        try:
            problem = self._problem(scope)
            if problem is None:
                await self._app(scope, receive, sending)
            else:
                await _refuse(problem, sending)
        finally:
            route = scope.get("route")
            self._told("other" if route is None else route.path, status, time.perf_counter() - begun)

    def _problem(self, scope: Scope) -> RefusedError | None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if self._token is None:
            return None if is_loopback(_name(headers.get(b"host", b"localhost"))) else _WRONG_HOST
        if path in _OPEN or path.startswith(_PAGE):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(given.strip(), self._token)
        return None if right and scheme.lower() == b"bearer" else _NO_TOKEN


_WRONG_HOST = RefusedError(
    421,
    "wrong_host",
    got="a request that calls this machine by another name than localhost",
    need="a loopback name, as this service has no token",
    do="Open http://127.0.0.1 with its port, or start the service with a token.",
)
_NO_TOKEN = RefusedError(
    401,
    "no_token",
    got="no token, or a wrong one",
    need="the header Authorization: Bearer TOKEN",
    do="Ask who started the service for its token.",
)


def _name(host: bytes) -> str:
    """Returns the name in a Host header: without the port, and an IPv6 address without its brackets."""
    found = _HOST.fullmatch(host.decode("latin-1"))
    return "" if found is None else found[1] or found[2]


async def _refuse(problem: RefusedError, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    if problem.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(problem.content).encode()})


async def read_body(scope: Scope, receive: Receive, *, most: int, seconds: float) -> bytes:
    """Returns a request's body.

    One that is too large is read to its end all the same, without keeping it: a client that is still sending would not
    see the answer.

    Raises:
        RefusedError: If it is no JSON by its header (415), too large (413), or does not arrive in time (408).
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    length = headers.get(b"content-length", b"")
    announced = int(length) if length.isdigit() else 0
    if announced > most and b"expect" in headers:  # it waits for a word from us
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            await _read(receive, body, most)
    except TimeoutError as error:
        if len(body) <= most:
            raise RefusedError(
                408, "too_slow", got=f"no complete body within {seconds:g} s", need="all of it", do="Send it again."
            ) from error
    if len(body) > most:
        raise _too_large(most)
    if kind != b"application/json":
        shown = kind.decode("latin-1")[:60] or "no content type"
        raise RefusedError(
            415,
            "not_json",
            got=f"a body of {shown!r}",
            need="the header Content-Type: application/json",
            do="Set it.",
        )
    return bytes(body)


async def _read(receive: Receive, body: bytearray, most: int) -> None:
    """Reads a body to its end, and keeps it as long as it is not larger than ``most``."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if len(body) <= most:
            body += message.get("body", b"")
        if not message.get("more_body", False):
            return


class ClientGoneError(Exception):
    """The client has left before its request was complete."""


def _too_large(most: int) -> RefusedError:
    return RefusedError(
        413,
        "too_large",
        got=f"a body of more than {most} bytes",
        need=f"at most {most} bytes",
        do="Send fewer inputs at once.",
    )
