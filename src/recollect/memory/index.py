"""Finding the nearest keys: the ``Index`` protocol and exact search.

An index never owns the keys. It keeps what can be derived from them (here: norms), is told which slots changed, and
can be rebuilt at any time, so a memory's ``state_dict`` is complete without it.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

_SCRATCH = 16 * 2**20  # bytes that one block of a search works on: stays in the cache
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
    rows, columns = max(1, at_once // max(1, count)), max(1, min(count, at_once))
    for row in range(0, batch, rows):
        for column in range(0, count, columns):
            part = slice(row, row + rows), slice(column, column + columns)
            chunk = slots[part]
            found = keys.index_select(0, chunk.reshape(-1)).to(queries.dtype).view(*chunk.shape, -1)
            found.sub_(queries[part[0]].unsqueeze(1))
            torch.sum(found.square_(), dim=-1, out=out[part])
    return out


def _nearest_first(
    distances: Float[Tensor, "b m"], slots: Int[Tensor, "b m"], written: Int[Tensor, " n"], count: int
) -> Neighbors:
    """Sorts by distance and, where that is equal, by age (older first), and keeps the first ``count``."""
    age = written[slots].argsort(dim=1)
    distances, slots = distances.gather(1, age), slots.gather(1, age)
    order = distances.argsort(dim=1, stable=True)[:, :count]
    distances, slots = distances.gather(1, order), slots.gather(1, order)
    return Neighbors(distances, slots.masked_fill(distances == torch.inf, -1))


class _Scan(NamedTuple):
    """What one batch of queries needs to bound its distance to every entry from below.

    With a center c near the keys, ``|h - q|^2 = |h - c|^2 - 2 (q - c).h + |q - c|^2 + 2 (q - c).c``. The *score* is
    the first two terms and ``base`` the others, both lowered by as much as rounding can have raised them.
    """

    keys: Shaped[Tensor, "n d"]
    written: Int[Tensor, " n"]
    norms: Float[Tensor, " n"]
    shifted: Float[Tensor, "b d"]
    base: Float[Tensor, " b"]
    before: Int[Tensor, " b"] | None

    def only(self, rows: Tensor | slice) -> "_Scan":
        before = None if self.before is None else self.before[rows]
        return self._replace(shifted=self.shifted[rows], base=self.base[rows], before=before)

    def blocks(self) -> Iterator[tuple[int, Float[Tensor, "b m"]]]:
        """Yields, block by block, the first slot and the scores of a block of slots; infinite where none is seen."""
        widest = len(self.shifted)
        if self.keys.dtype != self.shifted.dtype:
            widest = max(widest, self.keys.shape[1])  # a block of keys is converted
        size = max(1, _SCRATCH // (self.shifted.element_size() * widest))
        for start in range(0, len(self.norms), size):
            block = slice(start, start + size)
            rows = self.keys[block].to(self.shifted.dtype)
            scores = torch.addmm(self.norms[block], self.shifted, rows.mT, alpha=-2)
            if self.before is not None:
                scores.masked_fill_(self.written[block] >= self.before.unsqueeze(1), torch.inf)
            yield start, scores

    def lowest(self, count: int) -> tuple[Float[Tensor, "b m"], Int[Tensor, "b m"]]:
        """Returns the ``count`` lowest scores of each query, ascending, and their slots."""
        best = slots = torch.empty(len(self.shifted), 0)
        for start, scores in self.blocks():
            top, places = scores.topk(min(count, scores.shape[1]), dim=1, largest=False)
            places += start
            if start > 0:
                both, where = torch.cat([best, top], 1), torch.cat([slots, places], 1)
                top, order = both.topk(min(count, both.shape[1]), dim=1, largest=False)
                places = where.gather(1, order)
            best, slots = top, places
        return best, slots

    def within(self, radius: Float[Tensor, " b"]) -> tuple[Int[Tensor, " m"], ...]:
        """Returns, for each query, the slots whose distance may be ``radius`` or less."""
        found = [torch.empty(0, 2, dtype=torch.long, device=self.keys.device)]
        limit = (radius - self.base).unsqueeze(1)
        for start, scores in self.blocks():
            found.append((scores <= limit).nonzero())
            found[-1][:, 1] += start
        rows, slots = torch.cat(found).unbind(1)
        return slots[rows.argsort(stable=True)].split(rows.bincount(minlength=len(radius)).tolist())


class ExactIndex:
    """Exact search by blocked matrix products, with a proof for every query.

    A first pass ranks all entries by a lower bound of their distance, which is one matrix product, and keeps twice
    as many candidates as needed; the candidates' distances are then computed by differences. The result stands
    where the bound of every other entry lies above the K-th distance. Otherwise (duplicates, tight clusters) all
    entries whose bound does not become candidates. So the neighbors are those that the distances by differences,
    in float32 or float64, define: always, and whatever else is in the batch.

    Example:
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=3, key_size=1, index=ExactIndex())  # as it is by default
        >>> slots = memory.write(torch.tensor([[1.0], [5.0], [2.0]]), torch.arange(3))
        >>> memory.read(torch.tensor([3.0]), neighbors=2).slots  # of the equally near 1.0 and 5.0 the older
        tensor([2, 0])
    """

    def __init__(self) -> None:
        self._norms = torch.empty(0)  # |h - center|^2 of each slot, infinite where it is empty
        self._center = torch.empty(0)  # the smaller the norms, the tighter the bounds
        self._end = 0  # all slots from here on are empty
        self._due = 0  # the center is taken anew after this many changes: the keys may drift

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def rebuild(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"]) -> None:
        dtype = compute_dtype(keys)
        occupied = (written >= 0).nonzero().squeeze(1)
        self._center = torch.zeros(keys.shape[1], dtype=dtype, device=keys.device)
        for chunk in _chunks(occupied, keys):
            self._center += keys[chunk].to(dtype).sum(0)
        self._center /= max(1, len(occupied))
        self._norms = torch.full((len(keys),), torch.inf, dtype=dtype, device=keys.device)
        self._end = 0
        self._due = max(1, len(occupied))
        self._derive(keys, written, occupied)

    def update(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"], slots: Int[Tensor, " m"]) -> None:
        self._due -= len(slots)
        if self._due > 0:
            self._derive(keys, written, slots)
        else:
            self.rebuild(keys, written)

    def _derive(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        for chunk in _chunks(slots, keys):
            norms = (keys[chunk].to(self._center.dtype) - self._center).square_().sum(1)
            self._norms[chunk] = norms.masked_fill_(written[chunk] < 0, torch.inf)
            self._end = max(self._end, int(chunk.max()) + 1)

    def search(
        self,
        keys: Shaped[Tensor, "n d"],
        written: Int[Tensor, " n"],
        queries: Float[Tensor, "b d"],
        neighbors: int,
        before: Int[Tensor, " b"] | None = None,
    ) -> Neighbors:
        end, slack = self._end, _slack(queries)
        shifted = queries - self._center
        length = shifted.norm(dim=1)
        base = shifted.square().sum(1) + 2 * (shifted * self._center).sum(1)
        base -= slack * length * (length + self._center.norm())
        scan = _Scan(keys[:end], written[:end], self._norms[:end] * (1 - slack), shifted, base, before)
        parts = [slice(start, start + 256) for start in range(0, len(queries), 256)]
        found = [self._search(scan.only(part), queries[part], neighbors) for part in parts]
        return Neighbors(torch.cat([part.distances for part in found]), torch.cat([part.slots for part in found]))

    def _search(self, scan: _Scan, queries: Tensor, neighbors: int) -> Neighbors:
        candidates = min(2 * neighbors + 1, len(scan.norms))
        scores, slots = scan.lowest(candidates)
        distances = exact_distances(queries, scan.keys, slots).masked_fill_(scores == torch.inf, torch.inf)
        nearest = _nearest_first(distances, slots, scan.written, neighbors)
        if candidates < len(scan.norms):
            farthest = nearest.distances[:, -1]
            doubtful = (scores[:, -1] + scan.base <= farthest) & (farthest < torch.inf)
            self._settle(scan, queries, nearest, doubtful.nonzero().squeeze(1))
        return nearest

    def _settle(self, scan: _Scan, queries: Tensor, nearest: Neighbors, rows: Tensor) -> None:
        """Replaces the neighbors of the queries ``rows``, which the first pass could not prove."""
        count = nearest.slots.shape[1]
        for some in rows.split(max(1, _SCRATCH // (16 * len(scan.norms)))) if len(rows) else ():
            near = scan.only(some).within(nearest.distances[some, -1])
            for row, slots in zip(some.tolist(), near, strict=True):
                distances = exact_distances(queries[row : row + 1], scan.keys, slots.unsqueeze(0))
                proven = _nearest_first(distances, slots.unsqueeze(0), scan.written, count)
                nearest.distances[row], nearest.slots[row] = proven.distances[0], proven.slots[0]


def _chunks(slots: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    return slots.split(max(1, _SCRATCH // (8 * keys.shape[1]))) if len(slots) else ()


def _slack(queries: Tensor) -> float:
    """Returns what part of ``A + S^2 + S |c|`` rounding can amount to, with ``A = |h - c|^2`` and ``S = |q - c|``.

    A sum of d products is wrong by at most d eps / 2 times the sum of their absolute values. The four sums in score
    and base are bounded by ``A + 2 S |h| + S^2 + 2 S |c| <= 2 (A + S^2 + 2 S |c|)``, as ``|h|`` is at most
    ``|h - c| + |c|``; the distance by differences adds ``|h - q|^2 <= 2 (A + S^2)``. That makes 2 d eps; 8 stands for
    the few operations around the sums.
    """
    slack = 2 * torch.finfo(queries.dtype).eps * (queries.shape[1] + 8)
    if queries.dtype == torch.float32 and _rounds_factors():
        slack += 2.0**-6
    return slack


def _rounds_factors() -> bool:
    """Whether this process allows float32 products to round their factors, to bfloat16 at worst (8 bits)."""
    if any(os.environ.get(f"{name}_DEFAULT_FPMATH_MODE", "STRICT").upper() != "STRICT" for name in ("DNNL", "ONEDNN")):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the settings of the backends differ
        return True
