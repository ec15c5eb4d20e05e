"""Approximate search in a ring that is overwritten again and again: its time, its recall and its price at writing."""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import floors, memories
from benchmarks.case import Case
from recollect import EpisodicMemory, ExactIndex
from recollect.memory import Index

NAME = "approximate"
TITLE = "Finding the nearest keys, approximately"

_SIZE = 128
_NEIGHBORS = 50
_QUERIES = 200  # that the recall is taken over
_ROWS = 256  # written at a time
_TURNS = 5


@dataclass(frozen=True)
class Setting:
    """What happens to a memory before it is searched.

    Args:
        slots: N.
        turns: How often it is overwritten once it is full; then an eighth of it once more, so that the search does
            not meet the ring at the end of a turn.
        drift: Whether the network that makes the keys is replaced every half turn.
        forget: Whether a tenth of the entries is then forgotten, and searched again.
        batches: Numbers of queries.
    """

    slots: int
    turns: int = 0
    drift: bool = False
    forget: bool = False
    batches: tuple[int, ...] = (1, 32)

    @property
    def label(self) -> str:
        kind = "drift" if self.drift else "stationary"
        return f"overwritten {self.turns} 1/8 times, {kind}" if self.turns else "just filled"


def _grid(full: bool) -> list[Setting]:
    if not full:
        return [Setting(200_000, forget=True)]
    return [
        Setting(200_000, forget=True),
        Setting(200_000, turns=_TURNS, forget=True),
        Setting(200_000, turns=_TURNS, drift=True),
        Setting(1_000_000, forget=True),
        Setting(1_000_000, turns=_TURNS, drift=True),
        Setting(1_000_000, turns=_TURNS, forget=True),
    ]


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return sum(len(setting.batches) * (2 if setting.forget else 1) for setting in _grid(full))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other."""
    for setting in _grid(full):
        yield from _cases(setting, device)


def _cases(setting: Setting, device: torch.device) -> Iterator[Case]:
    memory = EpisodicMemory(setting.slots, _SIZE, index=_index()).to(device)
    written = _fill(setting, memory)
    yield from _searches(setting, written, memory)
    if setting.forget:
        generator = torch.Generator(device).manual_seed(4)
        gone = torch.randperm(setting.slots, generator=generator, device=device)[: setting.slots // 10]
        before = time.process_time()
        memory.forget(gone)
        rate = len(gone) / (time.process_time() - before)
        after = written._replace(label=f"{written.label}, a tenth forgotten", rows_per_second=rate)
        yield from _searches(setting, after, memory)


def _index() -> Index:
    from recollect.memory.approximate import ApproximateIndex  # brings packages that not every install has

    return ApproximateIndex()


class _Written(NamedTuple):
    """How the memory came to be."""

    label: str
    rows_per_second: float  # written, or forgotten if that came last
    keys: memories.Keys  # the network of the last keys


def _fill(setting: Setting, memory: EpisodicMemory) -> _Written:
    """Writes so many half turns, and an eighth of one."""
    device = memory.keys.device
    generator = torch.Generator(device).manual_seed(1)
    parts = [setting.slots // 2] * 2 * (1 + setting.turns) + [setting.slots // 8] * bool(setting.turns)
    keys, seconds = memories.features(_SIZE, device), 0.0
    for number, count in enumerate(parts):
        if setting.drift:
            keys = memories.features(_SIZE, device, seed=number)
        seconds += _write(memory, keys, count, generator=generator)
    return _Written(setting.label, sum(parts) / seconds, keys)


def _write(memory: EpisodicMemory, keys: memories.Keys, count: int, *, generator: torch.Generator) -> float:
    """Returns the processor's seconds that writing took; making the keys does not count."""
    seconds = 0.0
    for batch in memories.batches(keys, count, generator, rows=_ROWS):
        values = torch.zeros(len(batch), dtype=torch.long, device=batch.device)
        before = time.process_time()
        memory.write(batch, values)
        seconds += time.process_time() - before
    return seconds


def _searches(setting: Setting, written: _Written, memory: EpisodicMemory) -> Iterator[Case]:
    """Makes the cases of the memory as it is now."""
    exact = ExactIndex()
    exact.rebuild(memory.keys, memory.written)
    queries = memories.queries(written.keys, _QUERIES, memory.keys.device)
    recall = _recall(_slots(memory.index, memory, queries), _slots(exact, memory, queries))
    for batch in setting.batches:
        part = queries[:batch]
        yield Case(
            group=f"N={setting.slots:,} d={_SIZE} K={_NEIGHBORS}",
            label=f"{written.label}, B={batch}",
            contenders={
                "approximate": functools.partial(_slots, memory.index, memory, part),
                "exact": functools.partial(_slots, exact, memory, part),
            },
            ours="approximate",
            work=floors.search(len(memory), _SIZE, batch),  # that of exact search: it may well take less
            queries=batch,
            extra={
                f"recall of {_NEIGHBORS}": f"{recall:.4f}",
                "rows written or forgotten per CPU second": f"{written.rows_per_second:,.0f}",
            },
        )


def _slots(index: Index, memory: EpisodicMemory, queries: Tensor) -> Tensor:
    with torch.no_grad():
        return index.search(memory.keys, memory.written, queries, _NEIGHBORS, None)[1]


def _recall(found: Tensor, true: Tensor) -> float:
    """Returns which part of the true neighbors were found."""
    return float((true.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean())
