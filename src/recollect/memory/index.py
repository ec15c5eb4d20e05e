"""Finding the nearest keys: the ``Index`` protocol, and what every index does with its candidates.

An index never owns the keys. It keeps what can be derived from them, is told which slots changed, and can be rebuilt
at any time, so a memory's ``state_dict`` is complete without it.
"""

from abc import abstractmethod
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_GATHER = 4 * 2**20  # bytes of keys gathered at once when distances are recomputed


class Neighbors(NamedTuple):
    """The result of a search, near to far; places that nothing fills have slot -1 and infinite distance."""

    distances: Float[Tensor, "b k"]
    slots: Int[Tensor, "b k"]


@runtime_checkable
class Index(Protocol):
    """Finds neighbors among ``keys``, of which the slots with ``written >= 0`` are occupied.

    The memory calls ``rebuild`` once before anything else, and ``update`` after every change.
    """

    def rebuild(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"]) -> None:
        """Forgets everything derived and derives it anew (after loading, moving, converting)."""
        ...

    def update(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"], slots: Int[Tensor, " m"]) -> None:
        """Learns that ``slots`` were written or forgotten."""
        ...

    def search(
        self,
        keys: Shaped[Tensor, "n d"],
        written: Int[Tensor, " n"],
        queries: Float[Tensor, "b d"],
        neighbors: int,
        before: Int[Tensor, " b"] | None,
    ) -> Neighbors:
        """Returns the nearest entries of each query, of equally near ones the older first.

        Args:
            keys: All slots, in the dtype in which they are stored.
            written: When each slot was written; -1 where it is empty.
            queries: One or more, in the dtype in which distances are computed.
            neighbors: How many to find; at least one, and never more than there are entries.
            before: Where given, each query sees only the entries with ``written < before``.
        """
        ...


class WindowIndex(Index):
    """An index that can also hide what is too old, as a memory with ``history`` needs it."""

    @abstractmethod
    def search(
        self,
        keys: Shaped[Tensor, "n d"],
        written: Int[Tensor, " n"],
        queries: Float[Tensor, "b d"],
        neighbors: int,
        before: Int[Tensor, " b"] | None = None,
        span: int | None = None,
    ) -> Neighbors:
        """Returns the nearest entries of each query as an ``Index`` does.

        Args:
            keys, written, queries, neighbors, before: As in ``Index.search``.
            span: Where given, with ``before``, each query sees only the entries with
                ``before - span <= written < before``. There may be fewer of them than ``neighbors``.
        """


def compute_dtype(keys: Tensor) -> torch.dtype:
    """Returns the dtype in which distances are computed: float64 for float64 keys, float32 for all others."""
    return torch.float64 if keys.dtype == torch.float64 else torch.float32


def exact_distances(
    queries: Float[Tensor, "b d"], keys: Shaped[Tensor, "n d"], slots: Int[Tensor, "b m"]
) -> Float[Tensor, "b m"]:
    """Returns ``||q - h||^2`` by differences, in chunks that fit the cache.

    The expanded form ``|h|^2 - 2 q.h + |q|^2`` loses small distances to cancellation (0 where the truth is 0.008),
    and small distances are where the kernel weighs most.
    """
    batch, count = slots.shape
    out = queries.new_empty(batch, count)
    at_once = max(1, _GATHER // (keys.shape[1] * queries.element_size()))
    rows, columns = max(1, min(batch, at_once // max(1, count))), max(1, min(count, at_once))
    room = keys.new_empty(rows * columns, keys.shape[1])  # made once: fresh memory costs more than the arithmetic
    for row in range(0, batch, rows):
        for column in range(0, count, columns):
            part = slice(row, row + rows), slice(column, column + columns)
            chunk = slots[part]
            found = torch.index_select(keys, 0, chunk.reshape(-1), out=room[: chunk.numel()])
            found = found.to(queries.dtype).view(*chunk.shape, -1).sub_(queries[part[0]].unsqueeze(1))
            torch.sum(found.square_(), dim=-1, out=out[part])
    return out


def expanded_distances(queries: Float[Tensor, "b d"], keys: Float[Tensor, "n d"]) -> Float[Tensor, "b n"]:
    """Returns all squared distances by one product, in float64 and around the center: there the loss is small."""
    h = keys.double()
    center = h.sum(0) / max(1, len(h))
    h, q = h - center, queries.double() - center
    squares = torch.addmm(h.square().sum(1), q, h.mT, alpha=-2).add_(q.square().sum(1, keepdim=True))
    return squares.clamp_(min=0).to(queries.dtype)


def nearest_first(
    distances: Float[Tensor, "b m"], slots: Int[Tensor, "b m"], written: Int[Tensor, " n"], count: int
) -> Neighbors:
    """Sorts by distance and, where that is equal, by age (older first), and keeps the first ``count``."""
    near, order = distances.sort(dim=1)
    if bool(((near[:, 1:] == near[:, :-1]) & (near[:, 1:] < torch.inf)).any()):
        age = written[slots].argsort(dim=1)
        distances, slots = distances.gather(1, age), slots.gather(1, age)
        near, order = distances.sort(dim=1, stable=True)
    near, slots = near[:, :count], slots.gather(1, order[:, :count])
    return Neighbors(near, slots.masked_fill(near == torch.inf, -1))
