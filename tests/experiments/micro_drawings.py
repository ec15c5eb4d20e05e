"""Omniglot in small: random drawings of a few pixels, and drawings that tell which split they are of."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from recollect.data import Characters, Episodes, Sequences
from recollect.experiments.meta import drawings
from recollect.experiments.runner import Run


def use_random_drawings(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """Lets experiments read as many random drawings as Omniglot has, of ``side`` x ``side`` pixels."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(1623)
    pixels = torch.randint(256, (1623, 20, side, side), dtype=torch.uint8, generator=g)
    data = Characters(pixels, tuple(map(str, range(1623))), rows[:964], rows[964:])
    monkeypatch.setattr(drawings, "omniglot", lambda size, watch: data)


class Log(NamedTuple):
    """What an experiment draws, and what it records."""

    splits: list[int | str]
    """The split of all drawings of each draw, and between them the part of each row that is added."""
    turned: list[tuple[int, bool]]
    """The split of each draw, and whether any of its drawings was turned."""


def use_marked_drawings(monkeypatch: pytest.MonkeyPatch, module: ModuleType, draw: str, side: int) -> Log:
    """Lets an experiment read drawings that tell their split, and logs what it then does.

    Args:
        monkeypatch: Undoes it.
        module: The experiment.
        draw: What it draws tasks by, ``episodes`` or ``sequences``.
        side: Of the drawings, in pixels.
    """
    splits = torch.arange(30).split(10)
    pixels = torch.zeros(30, 20, side, side, dtype=torch.uint8)
    for split, rows in enumerate(splits):
        pixels[rows, :, 0, 0] = 1 + split  # one corner: it is another one after a turn
    monkeypatch.setattr(module, "drawings", lambda size, seed: drawings.Drawings(pixels, splits))
    log = Log([], [])
    real: Callable[..., Episodes | Sequences] = getattr(module, draw)
    add = Run.add

    def drawn(images: torch.Tensor, *args: object, **settings: object) -> Episodes | Sequences:
        found = real(images, *args, **settings)
        shown = torch.cat([part.flatten(0, 1) for part in found if part.is_floating_point()])
        split = split_of(shown)
        log.splits.append(split)
        log.turned.append((split, bool((shown[..., 0, 0] == 0).any())))
        return found

    def added(self: Run, **row: object) -> None:
        log.splits.append(str(row["part"]))
        add(self, **row)

    monkeypatch.setattr(module, draw, drawn)
    monkeypatch.setattr(Run, "add", added)
    return log


def split_of(images: torch.Tensor) -> int:
    """Returns the split of marked drawings, which must be the same for all, given in numbers from 0 to 1."""
    (mark,) = (255 * images).amax((-2, -1)).round().unique().tolist()
    return int(mark) - 1
