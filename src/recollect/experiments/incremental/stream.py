"""A stream of images of all classes: the last layer is fine-tuned on it, and each batch is written to the memory."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect import EpisodicMemory
from recollect.errors import SettingError
from recollect.experiments.incremental.models import FineTuning


class Stream:
    """The head and the memory while images of all classes come by, in a new order in every epoch.

    Args:
        keys: The features of the images of the stream, ``(n, d)``.
        labels: Their classes.
        head: The last layer, which is trained.
        tuning: How.
        capacity: Of the memory; as many entries as there are images when None.
        batch: Images for each step; after it they are written to the memory.
        seed: Determines the orders.
    """

    def __init__(
        self,
        keys: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
        head: nn.Linear,
        tuning: FineTuning,
        *,
        capacity: int | None = None,
        batch: int = 128,
        seed: int = 0,
    ) -> None:
        self.head = head
        self.memory = EpisodicMemory(capacity or len(labels), keys.shape[1])
        self.rows = torch.full((self.memory.capacity,), -1)
        """Which image of the stream each slot of the memory holds; -1: none."""
        self._keys = keys
        self._labels = labels
        self._optimizer = tuning.optimize(head)
        self._batch = batch
        self._generator = torch.Generator().manual_seed(seed)
        self._left = torch.empty(0, dtype=torch.long)  # images to come
        self._steps = 0

    def advance(self, epochs: float) -> None:
        """Goes on until so many epochs of images have come since the beginning, to the nearest whole batch.

        Raises:
            SettingError: If that lies behind.
        """
        steps = round(epochs * len(self._labels) / self._batch)
        if steps < self._steps:
            raise SettingError(f"{epochs} epochs of this stream are over; it cannot go back.")
        while self._steps < steps:
            self._step(self._next())
            self._steps += 1

    def _next(self) -> Int[Tensor, " b"]:
        """Returns the images of the next batch: epochs follow each other without a gap, so every batch is full."""
        while len(self._left) < self._batch:
            order = torch.randperm(len(self._labels), generator=self._generator)
            self._left = torch.cat([self._left, order])
        rows, self._left = self._left[: self._batch], self._left[self._batch :]
        return rows

    def _step(self, rows: Int[Tensor, " b"]) -> None:
        keys, labels = self._keys[rows], self._labels[rows]
        loss = cross_entropy(self.head(keys), labels)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        slots = self.memory.write(keys, labels)
        self.rows[slots] = rows[len(rows) - len(slots) :]  # of a batch larger than the memory the end is kept
