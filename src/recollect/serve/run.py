"""``run``: what ``recollect serve`` does, from the command line to the last answer."""

import logging
import math
import os
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

from recollect.errors import MissingExtraError
from recollect.serve import settings, sources, store
from recollect.serve.engine import Engine


def run(words: list[str]) -> None:
    """Serves until it is told to stop (Ctrl-C or SIGTERM); then requests that have begun are answered.

    Raises:
        MissingExtraError: If the extra is not installed.
        RecollectError: If the command line or what it names is wrong.
        OSError: If the address is taken.
    """
    chosen = settings.command(words)
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("recollect serve needs uvicorn: pip install 'recollect[serve]'.") from error
    from recollect.serve.app import application

    signal.signal(signal.SIGTERM, _end)
    logging.basicConfig(format="recollect: %(message)s", level=logging.WARNING)
    with _listen(chosen.host, chosen.port) as listening:
        served = store.kept(sources.service(chosen))
        engine = Engine(served, store.journal(served))
        app = application(engine, chosen.settings)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(chosen.settings.drain),
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(
            f"recollect serves {len(engine.names)} classes at http://{shown}:{port} (stop it with Ctrl-C)", flush=True
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has drained, and raises the signal that it was stopped by again
            return
        finally:
            if not app.state.is_done:  # Python would wait for the thread; what is committed is safe
                print("recollect: the model is stuck; the service ends without it.", file=sys.stderr, flush=True)
                os._exit(1)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}. Choose another --port or --host", f"{host}:{port}") from error


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Exits with status 0: what uvicorn was doing is done by the time that it raises the signal again."""
    sys.exit(0)
