"""Real servers on 127.0.0.1 for the tests: in a thread, or in a process of their own."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
import uvicorn
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.serve import Examples, Service
from recollect.serve.app import application
from recollect.serve.engine import Engine
from recollect.serve.settings import Settings
from recollect.serve.store import journal, kept

SHAPE = (4, 4)


def small_service(**changed) -> Service:
    """Three classes with names and room for two more; the memory begins with four pictures of each."""
    generator = torch.Generator().manual_seed(3)
    encode = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh())
    head = nn.Linear(8, 5)
    with torch.no_grad():
        for parameter in (*encode.parameters(), *head.parameters()):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    memory = EpisodicMemory(capacity=50, key_size=8)
    layer = MbPA(head, memory, neighbors=4, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    pictures = torch.rand(12, *SHAPE, generator=generator)
    examples = Examples(pictures, ["ant", "bee", "cat"] * 4)
    settings = {"input_shape": SHAPE, "classes": ("ant", "bee", "cat"), "examples": examples, "samples": examples}
    return Service(**{"encode": encode, "layer": layer, **settings, **changed})


def picture(seed: int) -> list[list[float]]:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)).tolist()


class Running(NamedTuple):
    """A service that listens."""

    url: str
    engine: Engine
    client: httpx.Client


@contextlib.contextmanager
def running(service: Service | None = None, settings: Settings | None = None) -> Iterator[Running]:
    """Serves in a thread; afterwards it is drained and closed as at a SIGTERM."""
    settings = settings or Settings()
    service = kept(service or small_service())
    engine = Engine(service, journal(service))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(application(engine, settings), log_config=None, timeout_graceful_shutdown=20)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                yield Running(url, engine, client)
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


class Process(NamedTuple):
    """A service in a process of its own."""

    url: str
    process: subprocess.Popen

    def ended(self) -> int:
        """Waits until it is over, and returns its exit status."""
        return self.process.wait(60)


@contextlib.contextmanager
def command(*arguments: str, folder: Path, **environment: str) -> Iterator[Process]:
    """Runs ``recollect serve``; what it prints on standard error is in ``folder/errors.txt``."""
    words = [sys.executable, "-m", "recollect", "serve", *arguments, "--port", "0"]
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (folder / "errors.txt").open("w") as errors:
        process = subprocess.Popen(words, cwd=folder, env=known, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert process.stdout is not None
    try:
        found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stdout)), None)
        assert found, (folder / "errors.txt").read_text()
        yield Process(found[0], process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()


def eventually(check, seconds: float = 30.0) -> None:
    """Waits until ``check`` returns something true."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
