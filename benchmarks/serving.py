"""``python -m benchmarks.serving``: predictions per second of ``recollect serve``, gathered and not, and a mixed load.

Not one of the benchmarks that compare calls in one process: server and clients are processes of their own. The two
services, the same but for ``--gather 1``, get their load in turns, so that whatever else the machine does hits both.
The floor is a service whose model costs nothing: what HTTP and JSON take.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recollect.serve import Service

_PATH = Path(__file__).parents[1]


def digits() -> "Service":
    """Returns the model of ``recollect serve --demo``, on scikit-learn's digits."""
    from recollect.serve.sources import demo

    return demo()


def free() -> "Service":
    """Returns a model of the same inputs and outputs that does next to nothing: the floor."""
    from torch import nn

    from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
    from recollect.serve import Service

    memory = EpisodicMemory(10, 1)  # empty, so nothing is looked for, and the head alone predicts
    layer = MbPA(nn.Linear(1, 12), memory, neighbors=1, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    return Service(lambda inputs: inputs[:, 0, :1], layer, input_shape=(8, 8), classes=tuple("012345678"))


@contextlib.contextmanager
def server(factory: str, *arguments: str) -> Iterator[tuple[int, int]]:
    """Starts a service; gives its port and process id."""
    path = os.pathsep.join(filter(None, [str(_PATH), os.environ.get("PYTHONPATH")]))
    nothing = str(Path(__file__).parent)  # MNIST is not there, so the demo takes the small digits
    known = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RECOLLECT_DATA": nothing}
    words = [sys.executable, "-m", "recollect", "serve", f"benchmarks.serving:{factory}", "--port", "0", *arguments]
    process = subprocess.Popen(words, env=known, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r":(\d+) \(", process.stdout.readline())
    assert found is not None, "the service did not start"
    try:
        yield int(found[1]), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(60)
        process.stdout.close()
    assert status == 0, status


@dataclass
class Load:
    """What a number of clients saw."""

    seconds: list[float] = field(default_factory=list)
    """To each answer."""
    statuses: Counter[int] = field(default_factory=Counter)
    wall: float = 0.0

    @property
    def rate(self) -> float:
        """Answers in a second."""
        return len(self.seconds) / self.wall

    def percentile(self, share: float) -> float:
        """Returns within how many seconds this share was answered."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


class Client:
    """One connection that is kept open; as little Python as can be, for it shares the machine with the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Sends a request and returns status and body."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        body = await self._reader.readexactly(int(length[1])) if length else b""
        return int(head[9:12]), body

    def close(self) -> None:
        """Closes the connection."""
        self._writer.close()


def request(method: str, path: str, content: Any = None) -> bytes:
    """Returns the bytes of a request."""
    body = b"" if content is None else json.dumps(content).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return f"{head}\r\n\r\n".encode() + body


def picture(draw: random.Random) -> list[list[float]]:
    """Returns a picture of noise."""
    return [[round(draw.random(), 3) for _ in range(8)] for _ in range(8)]


async def predictions(port: int, connections: int, seconds: float) -> Load:
    """Lets each connection ask for one prediction after the other."""
    load, draw = Load(), random.Random(0)
    requests = [request("POST", "/v1/predict", {"inputs": [picture(draw)]}) for _ in range(100)]
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        while (begun := time.perf_counter()) < end:
            status, _ = await client.ask(requests[(number + len(load.seconds)) % 100])
            load.seconds.append(time.perf_counter() - begun)
            load.statuses[status] += 1
        client.close()

    begun = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(connections)))
    load.wall = time.perf_counter() - begun
    return load


async def mixed(port: int, pid: int, connections: int, seconds: float) -> tuple[Load, list[tuple[float, float]]]:
    """Lets connections predict, observe, explain and forget; watches the service's resident memory (time, MB)."""
    load, sizes = Load(), list[tuple[float, float]]()
    begun = time.perf_counter()
    end = begun + seconds

    async def one(number: int) -> None:
        draw = random.Random(number)
        client = Client(*await asyncio.open_connection("127.0.0.1", port))
        while (start := time.perf_counter()) < end:
            kind = draw.random()
            if kind < 0.8:
                sent = request(
                    "POST", "/v1/predict", {"inputs": [picture(draw) for _ in range(draw.choice((1, 1, 8)))]}
                )
            elif kind < 0.9:
                content = {"inputs": [picture(draw)], "labels": [str(draw.randrange(12))]}
                sent = request("POST", "/v1/observe", {**content, "idempotency_key": f"{number}-{start}"})
            elif kind < 0.97:
                sent = request("POST", "/v1/explain", {"input": picture(draw)})
            else:
                sent = request("DELETE", f"/v1/memories/{draw.randrange(1000)}")
            status, _ = await client.ask(sent)
            load.seconds.append(time.perf_counter() - start)
            load.statuses[status] += 1
        client.close()

    async def watch() -> None:
        while time.perf_counter() < end:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            sizes.append((time.perf_counter() - begun, pages * os.sysconf("SC_PAGE_SIZE") / 1e6))
            await asyncio.sleep(min(5.0, seconds / 12))

    await asyncio.gather(watch(), *(one(number) for number in range(connections)))
    load.wall = time.perf_counter() - begun
    return load, sizes


def compare(connections: int, seconds: float, rounds: int) -> None:
    """Measures the service, the same without gathering, and the floor, in turns."""
    with server("digits") as on, server("digits", "--gather", "1") as off, server("free") as floor:
        ports = {"gathered": on[0], "one by one": off[0], "floor": floor[0]}
        loads: dict[str, list[Load]] = {name: [] for name in ports}
        for port in ports.values():
            asyncio.run(predictions(port, connections, min(2.0, seconds)))  # warms up
        for _ in range(rounds):
            for name, port in ports.items():
                loads[name].append(asyncio.run(predictions(port, connections, seconds)))
                last = loads[name][-1]
                print(f"{name:12}{last.rate:8.0f}/s  p99 {1000 * last.percentile(0.99):6.0f} ms  {dict(last.statuses)}")
    print(f"\n| {connections} connections | predictions/s | p50 | p99 |\n|---|---|---|---|")
    for name, runs in loads.items():
        rate, half, most = (
            statistics.median(values)
            for values in (
                [run.rate for run in runs],
                [run.percentile(0.5) for run in runs],
                [run.percentile(0.99) for run in runs],
            )
        )
        print(f"| {name} | {rate:.0f} | {1000 * half:.0f} ms | {1000 * most:.0f} ms |")
    pairs = zip(loads["gathered"], loads["one by one"], strict=True)
    print(f"\ngathered / one by one: {statistics.median(one.rate / other.rate for one, other in pairs):.1f}x")


def endure(connections: int, seconds: float) -> int:
    """Runs the mixed load against a durable service; returns how many answers were errors of the service."""
    with tempfile.TemporaryDirectory() as folder, server("digits", "--memory", f"{folder}/memory") as (port, pid):
        load, sizes = asyncio.run(mixed(port, pid, connections, seconds))
    failed = sum(count for status, count in load.statuses.items() if status >= 500 or status == 429)
    print(f"{len(load.seconds)} requests in {load.wall:.0f} s, {failed} errors, {dict(sorted(load.statuses.items()))}")
    print(f"p50 {1000 * load.percentile(0.5):.0f} ms, p99 {1000 * load.percentile(0.99):.0f} ms")
    middle = [size for at, size in sizes if load.wall / 3 < at < 2 * load.wall / 3]
    late = [size for at, size in sizes if at > 2 * load.wall / 3]
    print(f"resident: {statistics.mean(middle):.0f} MB in the second third, {statistics.mean(late):.0f} MB in the last")
    return failed


def main(words: list[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    parser = argparse.ArgumentParser("python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0, help="of one turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed", type=float, default=0.0, metavar="S", help="a mixed load of so many seconds instead")
    chosen = parser.parse_args(words)
    if chosen.mixed:
        return int(endure(chosen.connections, chosen.mixed) > 0)
    compare(chosen.connections, chosen.seconds, chosen.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
