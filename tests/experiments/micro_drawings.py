"""Omniglot in small: random drawings of a few pixels."""

import pytest
import torch

from recollect.data import Characters
from recollect.experiments.meta import drawings


def use_random_drawings(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    """Lets experiments read as many random drawings as Omniglot has, of ``side`` x ``side`` pixels."""
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(1623)
    pixels = torch.randint(256, (1623, 20, side, side), dtype=torch.uint8, generator=g)
    data = Characters(pixels, tuple(map(str, range(1623))), rows[:964], rows[964:])
    monkeypatch.setattr(drawings, "omniglot", lambda size, watch: data)
