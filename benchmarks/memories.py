"""Memories to search in: filled with made keys, without holding those a second time."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from recollect import EpisodicMemory
from recollect.memory import Index

Keys = Callable[[int, torch.Generator], Tensor]
_ROWS = 8192  # written at a time


def normal(size: int, device: torch.device) -> Keys:
    """Returns a maker of standard normal keys: the hardest case for anything but exact search."""
    return lambda count, generator: torch.randn(count, size, generator=generator, device=device)


def clustered(size: int, device: torch.device) -> Keys:
    """Returns a maker of keys in 200 clusters far from the origin, where the expanded form of distances cancels."""
    centers = torch.randn(200, size, generator=torch.Generator(device).manual_seed(7), device=device) + 5

    def keys(count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(centers), (count,), generator=generator, device=device)
        return centers[chosen] + 0.05 * torch.randn(count, size, generator=generator, device=device)

    return keys


def features(size: int, device: torch.device, *, seed: int = 0, latent: int = 24) -> Keys:
    """Returns a maker of keys like a network's features: ReLU of a random map of a few latent numbers."""
    maps = torch.randn(latent, size, generator=torch.Generator(device).manual_seed(seed), device=device)
    return lambda count, generator: (torch.randn(count, latent, generator=generator, device=device) @ maps).relu_()


def batches(keys: Keys, count: int, generator: torch.Generator, *, rows: int = _ROWS) -> Iterator[Tensor]:
    """Makes ``count`` keys, some at a time."""
    for start in range(0, count, rows):
        yield keys(min(rows, count - start), generator)


def filled(
    keys: Keys, slots: int, size: int, *, classes: int = 10, device: torch.device, index: Index | None = None
) -> EpisodicMemory:
    """Returns a full memory of labeled keys."""
    generator = torch.Generator(device).manual_seed(1)
    memory = EpisodicMemory(capacity=slots, key_size=size, index=index).to(device)
    for batch in batches(keys, slots, generator):
        memory.write(batch, torch.randint(classes, (len(batch),), generator=generator, device=device))
    return memory


def queries(keys: Keys, count: int, device: torch.device) -> Tensor:
    """Returns queries made like the keys, none of which is in the memory."""
    return keys(count, torch.Generator(device).manual_seed(2))
