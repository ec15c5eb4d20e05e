"""Where and how to serve: the command line of ``recollect serve``, and what it refuses."""

import argparse
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from recollect.errors import SettingError, require_number, require_whole

_LEAST = 16  # characters of a token
_TOKEN = "RECOLLECT_TOKEN"


@dataclass(frozen=True)
class Settings:
    """How a service answers, and what it refuses.

    Args:
        token: What clients must send as ``Authorization: Bearer ...``. Without one the service listens on the loopback
            address only, and answers only those who call it by that name.
        body: Bytes of a request's body at most.
        inputs: Inputs in one request at most.
        queue: Inputs that wait for the model at most.
        gather: Inputs that are computed in one batch at most; 1 switches gathering off.
        wait: For how many seconds a batch waits for more at most.
        timeout: After how many seconds a request is given up, and likewise a body that does not arrive.
        drain: How many seconds requests have to finish once the service is told to stop.

    Raises:
        SettingError: If one is outside its range.
    """

    token: str | None = None
    body: int = 4 * 2**20
    inputs: int = 256
    queue: int = 1024
    gather: int = 64
    wait: float = 0.002
    timeout: float = 10.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        for name in ("body", "inputs", "queue", "gather"):
            require_whole(name, getattr(self, name))
        require_number("wait", self.wait, low=0.0)
        require_number("timeout", self.timeout, above=0.0)
        require_number("drain", self.drain, above=0.0)
        token = self.token
        if token is not None and not (len(token) >= _LEAST and token.isascii() and token.isprintable()):
            raise SettingError(
                f"a token needs at least {_LEAST} printable ASCII characters, got {len(token)} characters. Make one: "
                "python -c 'import secrets; print(secrets.token_urlsafe(32))'."
            )


@dataclass(frozen=True)
class Command:
    """What the command line says."""

    model: str | None
    demo: bool
    classes: tuple[str, ...]
    shape: tuple[int, ...] | None
    memory: Path | None
    host: str
    port: int
    settings: Settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{message}. See recollect serve --help.")


def command(words: list[str]) -> Command:
    """Reads the command line.

    Raises:
        SettingError: If it is wrong, or wants to listen to the network without a token.
    """
    chosen = _parser().parse_args(words)
    if (chosen.model is None) != chosen.demo:
        raise SettingError("name what to serve, a saved model's folder or module:factory, or --demo, and only one.")
    settings = Settings(
        token=_token(chosen.token_file),
        body=chosen.body,
        inputs=chosen.inputs,
        queue=chosen.queue,
        gather=chosen.gather,
        wait=chosen.wait / 1000,
        timeout=chosen.timeout,
        drain=chosen.drain,
    )
    if not 0 <= chosen.port <= 65535:
        raise SettingError(f"--port must be from 0 (any) to 65535, got {chosen.port}.")
    if settings.token is None and not is_loopback(chosen.host):
        raise SettingError(
            f"--host {chosen.host} would let others in without a token. Set {_TOKEN} or --token-file, or leave --host "
            "out to listen on this machine only."
        )
    is_saved = chosen.model is not None and is_folder(chosen.model)
    if not is_saved and (chosen.classes or chosen.shape):
        raise SettingError("--classes and --shape are for saved models; --demo and a function name their own.")
    names = tuple(name.strip() for name in chosen.classes.split(",")) if chosen.classes else ()
    return Command(
        chosen.model, chosen.demo, names, _shape(chosen.shape), chosen.memory, chosen.host, chosen.port, settings
    )


def is_folder(model: str) -> bool:
    """Whether what is to be served names a saved model, and not ``module:factory``."""
    return ":" not in model or Path(model).is_dir()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(size.strip().isdecimal() and int(size) > 0 for size in text.split(",")):
        raise SettingError(f"--shape must be sizes above 0 with commas between, such as 3,32,32, got {text!r}.")
    return tuple(int(size) for size in text.split(","))


def _token(file: Path | None) -> str | None:
    if file is not None:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    return os.environ.get(_TOKEN) or None


def _parser() -> _Parser:
    parser = _Parser("recollect serve", description="A model and its memory behind HTTP, with a page to try them.")
    add = parser.add_argument
    usual = Settings()
    add("model", nargs="?", metavar="FOLDER | module:factory", help="what recollect.save wrote, or a function of yours")
    add("--demo", action="store_true", help="digits, one of which the network has never seen")
    add("--classes", metavar="A,B,...", help="the names of a saved model's outputs; by default their numbers")
    add("--shape", metavar="N,N,...", help="of one input of a saved model, where its first layer does not say")
    add("--memory", type=Path, metavar="FOLDER", help="where what is taught is kept (FOLDER/memory; the demo: nowhere)")
    add("--host", default="127.0.0.1", help="default: %(default)s; another one needs a token")
    add("--port", type=int, default=8000, help="default: %(default)s; 0 takes any")
    add("--token-file", type=Path, metavar="FILE", help=f"holds the bearer token; or set {_TOKEN}")
    add("--body", type=int, default=usual.body, metavar="BYTES", help="largest body of a request (%(default)s)")
    add("--inputs", type=int, default=usual.inputs, metavar="N", help="most inputs in a request (%(default)s)")
    add("--queue", type=int, default=usual.queue, metavar="N", help="most inputs that wait (%(default)s)")
    add("--gather", type=int, default=usual.gather, metavar="N", help="most inputs in a batch; 1: off (%(default)s)")
    add("--wait", type=float, default=1000 * usual.wait, metavar="MS", help="longest wait for a batch (%(default)s)")
    add("--timeout", type=float, default=usual.timeout, metavar="S", help="longest time for a request (%(default)s)")
    add("--drain", type=float, default=usual.drain, metavar="S", help="time to finish after SIGTERM (%(default)s)")
    return parser
