"""What is measured: a ``Case`` and the ``Work`` that it cannot do without."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """The least that one call must do; ``floors.py`` derives it.

    Args:
        multiply_adds: Multiplications with an addition each, two floating point operations.
        bytes: What has to be moved: read (``moves="read"``), or read and written, both counted (``"copy"``).
        moves: Which of the machine's two bandwidths bounds it.
        footprint: How many different bytes those are, where they are passed over more than once: what fits the caches
            moves faster.
    """

    multiply_adds: float
    bytes: float
    moves: Literal["read", "copy"] = "read"
    footprint: float | None = None


@dataclass(frozen=True)
class Case:
    """One row of a table: several ways to compute the same thing.

    Args:
        group: The table that the row belongs to.
        label: What is special about the row.
        contenders: The calls to measure, by name.
        ours: The name of the one that the others are compared with.
        work: The least that a call of ours must do.
        queries: How many queries (or rows written) one call answers; times are reported for one of them.
        fewer: The same for contenders that answer another number, because they are slow.
        left_out: Contenders that cannot be measured here, and in few words why.
        check: Raises where the contenders' outputs differ. It is called once, before anything is measured.
        derived: Makes more columns from the median wall time of one query of each contender, in seconds.
        note: What to know about the row.
        extra: More columns.
    """

    group: str
    label: str
    contenders: Mapping[str, Call]
    ours: str
    work: Work
    queries: int
    fewer: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[], None] | None = None
    derived: Callable[[Mapping[str, float]], Mapping[str, str]] | None = None
    note: str = ""
    extra: Mapping[str, str] = field(default_factory=dict)


class Benchmark(Protocol):
    """What a module of benchmarks has."""

    NAME: str
    TITLE: str

    def count(self, full: bool) -> int:
        """Returns how many cases there are."""
        ...

    def cases(self, full: bool, device: torch.device) -> Iterator[Case]:
        """Makes one case after the other, and keeps nothing of the last one: large arrays must not add up."""
        ...
