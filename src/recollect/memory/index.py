"""Finding the nearest keys: the ``Index`` protocol and exact search.

An index never owns the keys. It keeps what can be derived from them (here: norms), is told which slots changed, and
can be rebuilt at any time, so a memory's ``state_dict`` is complete without it.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

_SCRATCH = 16 * 2**20  # bytes of the distance buffer of one block: stays in the cache
_GATHER = 4 * 2**20  # bytes of keys gathered at once when distances are recomputed


class Neighbors(NamedTuple):
    """The result of a search, near to far; places that nothing fills have slot -1 and infinite distance."""

    distances: Float[Tensor, "b k"]
    slots: Int[Tensor, "b k"]


@runtime_checkable
class Index(Protocol):
    """Finds neighbors among ``keys``, of which the slots with ``written >= 0`` are occupied."""

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
        """Returns the nearest entries of each query, written before ``before`` where that is given."""
        ...


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
    rows = max(1, _GATHER // max(1, count * keys.shape[1] * queries.element_size()))
    for start in range(0, batch, rows):
        chunk = slots[start : start + rows]
        found = keys.index_select(0, chunk.reshape(-1)).to(queries.dtype).view(*chunk.shape, -1)
        found.sub_(queries[start : start + rows].unsqueeze(1))
        torch.sum(found.square_(), dim=-1, out=out[start : start + rows])
    return out


def _nearest_first(
    distances: Float[Tensor, "b m"], slots: Int[Tensor, "b m"], written: Int[Tensor, " n"], count: int
) -> Neighbors:
    """Sorts by distance and, where that is equal, by age (older first), and keeps the first ``count``."""
    age = written[slots].argsort(dim=1, stable=True)
    distances, slots = distances.gather(1, age), slots.gather(1, age)
    order = distances.argsort(dim=1, stable=True)[:, :count]
    distances, slots = distances.gather(1, order), slots.gather(1, order)
    return Neighbors(distances, slots.masked_fill(distances == torch.inf, -1))


class ExactIndex:
    """Exact search by blocked matrix products, with a proof for every query.

    A first pass ranks all entries by the expanded form, which is fast and slightly wrong, and keeps twice as many
    candidates as needed; their distances are then computed exactly. The result stands where even the largest
    possible rounding error could not have hidden a nearer entry. Otherwise (duplicates, tight clusters) all
    entries within that error of the K-th neighbor become candidates. So the neighbors are always the true ones.
    """

    def __init__(self) -> None:
        self._norms = torch.empty(0)  # |h - center|^2 of each slot, infinite where it is empty
        self._center = torch.empty(0)  # a point near the keys: the smaller the norms, the smaller the rounding
        self._centered = False
        self._reach = torch.empty(0)  # no less than the largest |h| and the largest |h - center|^2 so far

    def rebuild(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"]) -> None:
        dtype = compute_dtype(keys)
        self._norms = torch.full((keys.shape[0],), torch.inf, dtype=dtype, device=keys.device)
        self._center = torch.zeros(keys.shape[1], dtype=dtype, device=keys.device)
        self._centered = False
        self._reach = torch.zeros(2, dtype=dtype, device=keys.device)
        self.update(keys, written, (written >= 0).nonzero().squeeze(1))

    def update(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"], slots: Int[Tensor, " m"]) -> None:
        if len(slots) == 0:
            return
        chunks = slots.split(max(1, _SCRATCH // (4 * keys.shape[1])))
        if not self._centered:
            for chunk in chunks:
                self._center += keys[chunk].to(self._center.dtype).sum(0)
            self._center /= len(slots)
            self._centered = True
        for chunk in chunks:
            rows = keys[chunk].to(self._center.dtype)
            length = rows.square().sum(1).max().sqrt()
            norms = (rows - self._center).square_().sum(1)
            self._reach = torch.maximum(self._reach, torch.stack([length, norms.max()]))
            self._norms[chunk] = norms.masked_fill_(written[chunk] < 0, torch.inf)

    def search(
        self,
        keys: Shaped[Tensor, "n d"],
        written: Int[Tensor, " n"],
        queries: Float[Tensor, "b d"],
        neighbors: int,
        before: Int[Tensor, " b"] | None = None,
    ) -> Neighbors:
        """Returns the ``neighbors`` nearest entries of each query. Needs at least that many occupied slots."""
        found = []
        for start in range(0, len(queries), 256):
            part = slice(start, start + 256)
            limit = None if before is None else before[part]
            found.append(self._search(keys, written, queries[part], neighbors, limit))
        return Neighbors(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _search(
        self, keys: Tensor, written: Tensor, queries: Tensor, neighbors: int, before: Tensor | None
    ) -> Neighbors:
        candidates = min(2 * neighbors + 1, len(keys))
        scores, slots = self._candidates(keys, written, queries, candidates, before)
        nearest = self._rerank(keys, written, queries, scores, slots, neighbors)
        if candidates == len(keys):
            return nearest
        # An entry that is no candidate scores at least scores[:, -1]; offset + score is its distance up to `error`.
        shifted = queries - self._center
        offset = shifted.square().sum(1) + 2 * (shifted * self._center).sum(1)
        error = self._error(shifted)
        doubtful = scores[:, -1] + offset - error <= nearest.distances[:, -1]
        doubtful &= nearest.distances[:, -1] < torch.inf
        rows = doubtful.nonzero().squeeze(1)
        for row in rows.split(16) if len(rows) else ():
            limit = None if before is None else before[row]
            radius = nearest.distances[row, -1] + error[row] - offset[row]
            wanted = self._count(keys, written, queries[row], radius, limit)
            scores, slots = self._candidates(keys, written, queries[row], wanted, limit)
            exact = self._rerank(keys, written, queries[row], scores, slots, neighbors)
            nearest.distances[row], nearest.slots[row] = exact.distances, exact.slots
        return nearest

    def _rerank(
        self, keys: Tensor, written: Tensor, queries: Tensor, scores: Tensor, slots: Tensor, neighbors: int
    ) -> Neighbors:
        distances = exact_distances(queries, keys, slots).masked_fill_(scores == torch.inf, torch.inf)
        return _nearest_first(distances, slots, written, neighbors)

    def _blocks(self, keys: Tensor, written: Tensor, queries: Tensor, before: Tensor | None):
        """Yields, block by block, the first slot and the scores ``|h - c|^2 - 2 (q - c).h`` of a block of keys."""
        widest = len(queries) if keys.dtype == queries.dtype else max(len(queries), keys.shape[1])
        size = max(1, _SCRATCH // (queries.element_size() * widest))  # scores, and keys that must be converted
        shifted = queries - self._center
        for start in range(0, len(keys), size):
            rows = keys[start : start + size].to(queries.dtype)
            scores = torch.addmm(self._norms[start : start + size], shifted, rows.mT, alpha=-2)
            if before is not None:
                scores.masked_fill_(written[start : start + size] >= before.unsqueeze(1), torch.inf)
            yield start, scores

    def _candidates(
        self, keys: Tensor, written: Tensor, queries: Tensor, count: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        best, slots = [], []
        for start, scores in self._blocks(keys, written, queries, before):
            top = scores.topk(min(count, scores.shape[1]), dim=1, largest=False)
            best.append(top.values)
            slots.append(top.indices + start)
        if len(best) == 1:
            return best[0], slots[0]
        merged = torch.cat(best, 1).topk(count, dim=1, largest=False)
        return merged.values, torch.cat(slots, 1).gather(1, merged.indices)

    def _count(
        self, keys: Tensor, written: Tensor, queries: Tensor, radius: Float[Tensor, " b"], before: Tensor | None
    ) -> int:
        counts = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
        for _, scores in self._blocks(keys, written, queries, before):
            near: Bool[Tensor, "b n"] = scores <= radius.unsqueeze(1)
            counts += near.sum(1)
        return int(counts.max())

    def _error(self, shifted: Tensor) -> Float[Tensor, " b"]:
        """Bounds how far ``offset + score`` can be from the true squared distance by rounding.

        The classical bound for sums of d products, ``d * eps`` times the sum of their absolute values, twice.
        """
        unit = torch.finfo(shifted.dtype).eps * (shifted.shape[1] + 8)
        if shifted.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            unit = max(unit, 2.0**-6)  # the process allows products to round their factors to bfloat16
        length, norm = self._reach.unbind()
        shift = shifted.norm(dim=1)
        return 2 * unit * (norm + shift.square() + shift * (length + self._center.norm()))
