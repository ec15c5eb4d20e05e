"""Omniglot as MANN and MAML learn and are judged by it."""

from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from recollect.data import class_split, omniglot
from recollect.experiments.runner import Progress

TRAIN, VALID, TEST = range(3)


class Drawings(NamedTuple):
    """Twenty drawings of each character, and which characters are for what."""

    pixels: UInt8[Tensor, "c n h w"]
    splits: tuple[Int[Tensor, " m"], ...]
    """Rows of characters for training, validation and test."""


def drawings(size: int, *, seed: int) -> Drawings:
    """Returns all drawings, ``size`` x ``size`` pixels, and 1,100, 100 and 423 characters drawn by a seed."""
    with Progress(1.0, "reading Omniglot") as progress:
        pixels = omniglot(size, watch=progress.advance).pixels
    return Drawings(pixels, class_split(len(pixels), 1100, 100, 423, generator=torch.Generator().manual_seed(seed)))
