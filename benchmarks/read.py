"""Exact search for the nearest keys, and reading what lies there."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

from benchmarks import floors, memories
from benchmarks.case import Call, Case
from benchmarks.checks import agree
from recollect import EpisodicMemory

NAME = "read"
TITLE = "Finding the nearest keys, exactly"

_Found = Callable[[], Tensor]


@dataclass(frozen=True)
class Setting:
    """A search in N keys of size d; settings of the same N, d and data search in the same memory."""

    slots: int
    size: int
    batch: int
    neighbors: int
    data: str = "normal"

    @property
    def memory(self) -> tuple[int, int, str]:
        return self.slots, self.size, self.data

    @property
    def cdist(self) -> bool:
        """Whether to measure ``torch.cdist``: for large memories it needs a hundred times the floor, and a copy."""
        small = 5_000 if self.batch > 32 else 200_000
        return self.neighbors == 50 and (self.slots <= small or (self.batch == 1 and self.size <= 784))


def _grid(full: bool) -> list[Setting]:
    batches = (1, 32, 256)
    if not full:
        return [Setting(n, d, b, 50) for n in (5_000, 200_000) for d in (128, 784) for b in batches]
    settings = []
    for slots, size in itertools.product((5_000, 200_000, 1_000_000), (128, 784, 2048)):
        several = batches if slots < 1_000_000 else (32,)  # how many neighbors hardly matters in large memories
        settings += [Setting(slots, size, b, k) for k in (10, 50, 256) for b in batches if k == 50 or b in several]
        if (slots, size) == (200_000, 784):
            settings += [Setting(slots, size, b, 50, data="clusters off the origin") for b in batches]
    return settings


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_grid(full))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other; those with the same keys share them."""
    for (slots, size, data), settings in itertools.groupby(_grid(full), key=lambda setting: setting.memory):
        maker = {"normal": memories.normal, "clusters off the origin": memories.clustered}[data](size, device)
        memory = memories.filled(maker, slots, size, device=device)
        # faiss keeps a copy of its own. All at once: it would take twice the memory to grow.
        flat = _flat(memory) if device.type == "cpu" else None
        for setting in settings:
            yield _case(setting, memory, flat, memories.queries(maker, setting.batch, device))
        del memory, flat  # before the next ones are made


def _flat(memory: EpisodicMemory) -> faiss.IndexFlatL2:
    flat = faiss.IndexFlatL2(memory.key_size)
    flat.add(memory.keys.numpy())
    return flat


def _case(setting: Setting, memory: EpisodicMemory, flat: faiss.IndexFlatL2 | None, queries: Tensor) -> Case:
    neighbors = setting.neighbors
    found: dict[str, _Found] = {"search": functools.partial(_search, memory, queries, neighbors)}
    if flat is not None:
        rows = queries.numpy()
        found["faiss"] = functools.partial(_faiss, flat, rows, neighbors)
        found["faiss, BLAS"] = functools.partial(_faiss_by_products, flat, rows, neighbors)
        if setting.batch == 1 and torch.get_num_threads() > 1:
            found["faiss, 1 thread"] = functools.partial(_faiss_on_one_thread, flat, rows, neighbors)
    if setting.cdist:
        found["cdist, topk"] = functools.partial(_cdist, memory.keys, queries, neighbors)
    contenders: dict[str, Call] = {**found, "read": lambda: memory.read(queries, neighbors)}
    data = "" if setting.data == "normal" else f", {setting.data}"
    return Case(
        group=f"N={setting.slots:,} d={setting.size}{data}",
        label=f"B={setting.batch} K={neighbors}",
        contenders=contenders,
        ours="search",
        work=floors.search(setting.slots, setting.size, setting.batch),
        queries=setting.batch,
        check=lambda: agree(memory.keys, queries[:8], {name: call()[:8] for name, call in found.items()}),
    )


def _search(memory: EpisodicMemory, queries: Tensor, neighbors: int) -> Tensor:
    with torch.no_grad():
        return memory.index.search(memory.keys, memory.written, queries, neighbors, None)[1]


def _faiss(flat: faiss.IndexFlatL2, queries: np.ndarray, neighbors: int) -> Tensor:
    return torch.from_numpy(flat.search(queries, neighbors)[1])


def _faiss_by_products(flat: faiss.IndexFlatL2, queries: np.ndarray, neighbors: int) -> Tensor:
    """Searches with matrix products at once: since 1.15 faiss scans for most batches, which can be much slower."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = 0
    try:
        return _faiss(flat, queries, neighbors)
    finally:
        faiss.cvar.distance_compute_blas_threshold = before


def _faiss_on_one_thread(flat: faiss.IndexFlatL2, queries: np.ndarray, neighbors: int) -> Tensor:
    """Searches for a single query, for which faiss has work for one thread only: others are in its way."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return _faiss(flat, queries, neighbors)
    finally:
        faiss.omp_set_num_threads(before)


def _cdist(keys: Tensor, queries: Tensor, neighbors: int) -> Tensor:
    return torch.cdist(queries, keys).topk(neighbors, largest=False)[1]
