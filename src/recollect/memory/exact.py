"""``ExactIndex``: the nearest keys of each query, found by products and proven."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from recollect.memory.index import Neighbors, WindowIndex, compute_dtype, exact_distances, nearest_first
from recollect.memory.scan import Scan, multiplies_bfloat16, slack

_CHUNK = 16 * 2**20  # bytes that deriving from keys works on at once
_BATCH = 256  # queries that one scan serves
_COARSE = 96  # the smallest number of queries for which converting the keys to bfloat16 pays
_MANY = 300  # ... and the smallest number of entries per neighbor: it takes more candidates, each of which is gathered
_MARGIN = 16  # how many more candidates than neighbors a scan in full precision keeps at least
_PAUSE = 20  # batches after which bfloat16 is tried again, when it proved less than half of one
_SPARE = 50  # how many candidates a scan in bfloat16 keeps beside twice the neighbors
_NEGLIGIBLE = 1 / 16  # a center whose square is this part of the keys' is none: that saves subtracting it
_SAMPLE = 1000  # keys that tell where the center is
_SETTLED = 32 * 2**20  # bytes of the candidates that settle what a scan could not prove


class ExactIndex(WindowIndex):
    """Exact search by blocked matrix products, with a proof for every query.

    A scan ranks all entries by a lower bound of their distance, which is one matrix product, and keeps more candidates
    than needed; the candidates' distances are then computed by differences. The result stands where the bound of
    every other entry lies above the K-th distance. Otherwise (duplicates, tight clusters) all entries whose bound
    does not become candidates. So the neighbors are those that the distances by differences, in float32 or float64,
    define: always, and whatever else is in the batch.

    For large batches the first scan multiplies in bfloat16 where the processor has instructions for it. Its bounds
    are wider; the queries that it cannot prove are scanned again in float32.

    Example:
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=3, key_size=1, index=ExactIndex())  # as it is by default
        >>> slots = memory.write(torch.tensor([[1.0], [5.0], [2.0]]), torch.arange(3))
        >>> memory.read(torch.tensor([3.0]), neighbors=2).slots  # of the equally near 1.0 and 5.0 the older
        tensor([2, 0])
    """

    def __init__(self) -> None:
        self._norms = torch.empty(0)  # |h - center|^2 of each slot, infinite where it is empty
        self._rounding = torch.empty(0)  # how far bfloat16 moves h - center
        self._center = torch.empty(0)  # the smaller the norms, the tighter the bounds
        self._end = 0  # all slots from here on are empty
        self._due = 0  # after this many changes we look whether the keys have moved away from the center
        self._coarse = False  # whether a scan may multiply in bfloat16
        self._pause = 0  # so many batches do not try it; changes how fast they are, never their result

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def rebuild(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"]) -> None:
        dtype = compute_dtype(keys)
        occupied = (written >= 0).nonzero().squeeze(1)
        self._center = torch.zeros(keys.shape[1], dtype=dtype, device=keys.device)
        squares = torch.zeros((), dtype=dtype, device=keys.device)
        for chunk in _chunks(occupied, keys):
            rows = _rows(keys, chunk).to(dtype)
            self._center += rows.sum(0)
            squares += torch.dot(
                rows.flatten(), rows.flatten()
            )  # one pass, where squares would need memory of their own
        self._center /= max(1, len(occupied))
        if bool(self._center.square().sum() * len(occupied) <= _NEGLIGIBLE * squares):
            self._center.zero_()
        self._coarse, self._pause = dtype == torch.float32 and multiplies_bfloat16(keys.device), 0
        self._norms = torch.full((len(keys),), torch.inf, dtype=dtype, device=keys.device)
        self._rounding = torch.zeros_like(self._norms) if self._coarse else self._norms
        self._end = 0
        self._due = max(1, len(occupied))
        self._derive(keys, written, occupied)

    def update(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"], slots: Int[Tensor, " m"]) -> None:
        self._derive(keys, written, slots)
        self._due -= len(slots)
        if self._due <= 0:
            self._follow(keys, written)

    def _follow(self, keys: Tensor, written: Tensor) -> None:
        """Takes the center anew if the keys have moved away from it, as far as a sample of them tells."""
        occupied = (written >= 0).nonzero().squeeze(1)
        sample = keys[occupied[:: 1 + len(occupied) // _SAMPLE]].to(self._center.dtype)
        moved = (sample.mean(0) - self._center).square().sum()
        if len(sample) and bool(moved > 2 * _NEGLIGIBLE * sample.var(0, correction=0).sum()):
            self.rebuild(keys, written)
        self._due = max(1, len(occupied))

    def _derive(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        for chunk in _chunks(slots, keys):
            centered = _rows(keys, chunk).to(self._center.dtype) - self._center
            self._norms[chunk] = centered.square().sum(1).masked_fill_(written[chunk] < 0, torch.inf)
            if self._rounding is not self._norms:
                self._rounding[chunk] = centered.sub_(centered.bfloat16()).norm(dim=1)
            self._end = max(self._end, int(chunk.max()) + 1)

    def search(
        self,
        keys: Shaped[Tensor, "n d"],
        written: Int[Tensor, " n"],
        queries: Float[Tensor, "b d"],
        neighbors: int,
        before: Int[Tensor, " b"] | None = None,
        span: int | None = None,
    ) -> Neighbors:
        found = []
        for start in range(0, len(queries), _BATCH):
            part = slice(start, start + _BATCH)
            limit = None if before is None else before[part]
            scan = self._scan(keys[: self._end], written[: self._end], queries[part], limit)
            found.append(self._search(scan._replace(span=span), queries[part], neighbors))
        return Neighbors(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _scan(self, keys: Tensor, written: Tensor, queries: Tensor, before: Tensor | None) -> Scan:
        part = slack(queries)
        shifted = queries - self._center
        length = shifted.norm(dim=1)
        base = shifted.square().sum(1) + 2 * (shifted * self._center).sum(1)
        base -= part * length * (length + self._center.norm())
        base -= 16 * (queries.shape[1] + 8) * torch.finfo(base.dtype).tiny  # products below it are lost altogether
        return Scan(keys, written, self._norms[: self._end] * (1 - part), shifted.mul_(-2), base, before)

    def _coarse_scan(self, scan: Scan) -> Scan:
        """Returns the scan in bfloat16, its scores lowered by what that rounds: of the queries and of the keys."""
        factors, norms = scan.factors, scan.norms
        moved = (factors - factors.bfloat16()).norm(dim=1).max()
        moved = norms.sqrt() * (1 + 2.0**-8) * moved + self._rounding[: self._end] * factors.norm(dim=1).max()
        norms = torch.where(norms == torch.inf, norms, norms - moved * (1 + 2.0**-10))
        base = scan.base + (factors * self._center).sum(1)  # the keys are centered too
        center = self._center if bool(self._center.any()) else None
        return scan._replace(norms=norms, base=base, center=center, coarse=True)

    def _search(self, scan: Scan, queries: Tensor, neighbors: int) -> Neighbors:
        shape = len(queries), neighbors
        nearest = Neighbors(queries.new_empty(shape), torch.empty(shape, dtype=torch.long, device=queries.device))
        rows = torch.arange(len(queries), device=queries.device)
        if self._coarse and len(rows) >= _COARSE and len(scan.keys) >= _MANY * neighbors:
            if self._pause == 0:
                rows = self._prove(self._coarse_scan(scan), queries, nearest, rows, 2 * neighbors + _SPARE)
                if 2 * len(rows) > len(queries):  # these keys lie too close for it
                    self._pause = _PAUSE
            else:
                self._pause -= 1
        if len(rows):
            rows = self._prove(scan.only(rows), queries, nearest, rows, neighbors + max(_MARGIN, neighbors // 4))
        if len(rows):
            self._settle(scan.only(rows), queries, nearest, rows)
        return nearest

    def _prove(self, scan: Scan, queries: Tensor, nearest: Neighbors, rows: Tensor, candidates: int) -> Tensor:
        """Fills in the neighbors of the queries ``rows``, and returns those among them that the scan cannot prove."""
        scores, slots = scan.lowest(min(candidates, len(scan.keys)))
        distances = exact_distances(queries[rows], scan.keys, slots).masked_fill_(scores == torch.inf, torch.inf)
        found = nearest_first(distances, slots, scan.written, nearest.slots.shape[1])
        nearest.distances[rows], nearest.slots[rows] = found
        if candidates >= len(scan.keys):
            return rows[:0]
        farthest = found.distances[:, -1]
        return rows[(scan.proven(scores.amax(1)) <= farthest) & (farthest < torch.inf)]

    def _settle(self, scan: Scan, queries: Tensor, nearest: Neighbors, rows: Tensor) -> None:
        """Replaces the neighbors of the queries ``rows``, which no scan could prove, by ranking all that may be."""
        near = scan.within(nearest.distances[rows, -1], _SETTLED // 32)
        if near is None:
            for half in torch.arange(len(rows), device=rows.device).chunk(2):
                self._settle(scan.only(half), queries, nearest, rows[half])
            return
        for row, slots in zip(rows.tolist(), near, strict=True):
            distances = exact_distances(queries[row : row + 1], scan.keys, slots.unsqueeze(0))
            proven = nearest_first(distances, slots.unsqueeze(0), scan.written, nearest.slots.shape[1])
            nearest.distances[row], nearest.slots[row] = proven.distances[0], proven.slots[0]


def _chunks(slots: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    return slots.split(max(1, _CHUNK // (8 * keys.shape[1]))) if len(slots) else ()


def _rows(keys: Shaped[Tensor, "n d"], slots: Int[Tensor, " m"]) -> Shaped[Tensor, "m d"]:
    """Returns keys to be read from: without a copy where the slots follow on each other."""
    if len(slots) and bool((slots.diff() == 1).all()):
        return keys[int(slots[0]) : int(slots[-1]) + 1]
    return keys[slots]
