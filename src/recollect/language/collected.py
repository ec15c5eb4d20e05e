"""What was found word by word, put together while it comes."""

import torch
from torch import Tensor


class Collected:
    """Results of one block of words after the other, joined along their last dimension.

    Blocks are joined at once with those before them that are no longer, so that a text's results are a few tensors at
    any time. A list of thousands of small ones, each allocated between the large arrays of two blocks, would leave no
    room in the heap that the next block's arrays fit into: it would grow with every word by a row of logits.

    Example:
        >>> collected = Collected()
        >>> for block in torch.arange(10).split(3):
        ...     collected.add(block, -block)
        >>> [part.tolist() for part in collected.joined()]
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, -1, -2, -3, -4, -5, -6, -7, -8, -9]]
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, *block: Tensor) -> None:
        """Adds what was found of the next words, as many tensors as of the words before."""
        while self._parts and self._parts[-1][0].shape[-1] <= block[0].shape[-1]:
            block = _joined(self._parts.pop(), block)
        self._parts.append(block)

    def joined(self) -> tuple[Tensor, ...]:
        """Returns what was found of all words; nothing where there were none."""
        return _joined(*self._parts)


def _joined(*parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(some, -1) for some in zip(*parts, strict=True))
