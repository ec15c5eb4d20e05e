"""``python -m benchmarks.milvus``: what a memory in Milvus costs, in a file or on a server, beside one in RAM.

    python -m benchmarks.milvus                                                    a file of milvus-lite
    python -m benchmarks.milvus http://localhost:19530 --token root:Milvus         a server that runs already

Not one of the benchmarks that compare calls in one process, for the server is a process of its own and most of the time
is waiting: the wall time of each call is measured, and the median of the rounds counts. ``make test-milvus`` installs a
server; ``tests/servers/milvus_process.py`` starts it.
"""

import argparse
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import memories
from recollect import EpisodicMemory, LocalAdaptation, MbPA, MilvusMemory, rules
from recollect.memory import Memory

_BATCH = 256
_NEIGHBORS = 50
_CLASSES = 100


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Returns what a call takes: the median, after one that does not count."""
    walls: list[float] = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        call()
        walls.append(time.perf_counter() - begun)
    return statistics.median(walls[1:])


class Bench:
    """One collection, a memory in RAM of the same entries, and the table of what was measured."""

    def __init__(self, uri: str, token: str | None, slots: int, size: int, index: str, rounds: int) -> None:
        self.uri, self.token, self.index, self.rounds = uri, token, index, rounds
        self.slots, self.size = slots, size
        self.name = f"bench_{secrets.token_hex(4)}"
        self.draw = torch.Generator().manual_seed(0)
        self.keys = memories.features(size, torch.device("cpu"))
        self.beside = EpisodicMemory(slots, size)

    def open(self, **settings: str | bool | int) -> MilvusMemory:
        """Returns another handle to the collection."""
        sizes = {"capacity": self.slots, "key_size": self.size}
        return MilvusMemory(self.uri, self.name, **sizes, token=self.token, index=self.index, timeout=60.0, **settings)

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """Returns so many new entries."""
        return self.keys(count, self.draw), torch.randint(_CLASSES, (count,), generator=self.draw)

    def written(self, memory: Memory, count: int) -> float:
        """Writes so many rows to both and returns how many a second the first has taken."""
        wall = 0.0
        for _ in range(count // _BATCH):
            keys, values = self.rows(_BATCH)
            begun = time.perf_counter()
            memory.write(keys, values)
            wall += time.perf_counter() - begun
            self.beside.write(keys, values)
        return count // _BATCH * _BATCH / wall

    def show(self, what: str, number: str) -> None:
        """Prints a row of the table."""
        print(f"| {what} | {number} |", flush=True)

    def timed(self, what: str, call: Callable[[], object]) -> None:
        """Measures a call and prints a row of the table."""
        self.show(what, f"{1000 * seconds(call, self.rounds):,.1f} ms")

    def run(self) -> None:
        """Measures all."""
        memory = self.open()
        memory.connect()
        print(f"| {self.slots:,} x {self.size}, {self.index} | |\n|---|---|")
        self.show(f"first fill, batches of {_BATCH}", f"{self.written(memory, self.slots):,.0f} rows/s")
        self.show("overwriting all", f"{self.written(memory, self.slots):,.0f} rows/s")
        self._read(memory)
        self._both(memory)
        self._reopen()

    def _read(self, memory: MilvusMemory) -> None:
        one, some = self.rows(1)[0], self.rows(32)[0]
        self._recall(memory, some, "")
        self.timed(f"read, B=1 K={_NEIGHBORS}", lambda: memory.read(one, _NEIGHBORS))
        self.timed("... B=32", lambda: memory.read(some, _NEIGHBORS))
        self.timed("... B=32, before=", lambda: memory.read(some, _NEIGHBORS, before=self.slots * 3 // 2))
        whole = self.open(local_keys=False)
        self.timed("... B=1, keys come with the hits", lambda: whole.read(one, _NEIGHBORS))
        self.timed("... B=32, keys come with the hits", lambda: whole.read(some, _NEIGHBORS))
        for level in ("strong", "eventually"):
            other = self.open(consistency=level)
            self.timed(f"... B=1, {level}", lambda other=other: other.read(one, _NEIGHBORS))
            other.close()
        whole.close()
        adaptation = LocalAdaptation(rules.sgd(0.1), steps=5)
        models = [
            MbPA(nn.Linear(self.size, _CLASSES), each, neighbors=_NEIGHBORS, adaptation=adaptation)
            for each in (memory, self.beside)
        ]
        self.timed("MbPA, B=32", lambda: models[0](some))
        self.timed("... on a memory in RAM", lambda: models[1](some))

    def _recall(self, memory: MilvusMemory, queries: Tensor, what: str) -> None:
        found, there = (each.read(queries, _NEIGHBORS).slots.tolist() for each in (memory, self.beside))
        hits = sum(len(set(a) & set(b)) for a, b in zip(found, there, strict=True))
        self.show(f"recall, K={_NEIGHBORS}{what}", f"{hits / len(queries) / _NEIGHBORS:.3f}")

    def _both(self, memory: MilvusMemory) -> None:
        keys, values = self.rows(1)
        self.timed("write 1", lambda: memory.write(keys, values))

        def both() -> None:
            memory.write(keys, values)
            memory.read(keys, _NEIGHBORS)

        self.timed(f"write 1 and read it, K={_NEIGHBORS}", both)
        queries = self.rows(32)[0]
        self._recall(memory, queries, ", at the end")
        for ef in (256, 512):
            other = self.open(ef=ef)
            self._recall(other, queries, f", ef={ef}")
            self.timed(f"... B=32, ef={ef}", lambda other=other: other.read(queries, _NEIGHBORS))
            other.close()
        memory.close()

    def _reopen(self) -> None:
        def opened() -> None:
            again = self.open()
            again.read(self.beside.keys[:1], _NEIGHBORS)
            again.close()

        self.show("open and read once", f"{seconds(opened, 2):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.milvus", description="Measures a memory in Milvus.")
    parser.add_argument("uri", nargs="?", help="a file that ends in .db or a server's address; default: a new file")
    parser.add_argument("--token", help="what the server asks for")
    parser.add_argument("--slots", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=512, help="of a key")
    parser.add_argument("--index", choices=("HNSW", "FLAT"), default="HNSW")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        chosen["uri"] = chosen["uri"] or str(Path(folder) / "memory.db")
        Bench(**chosen).run()


if __name__ == "__main__":
    main()
