"""Approximate search for single queries in large memories: graphs in order of time, and a scan of the newest entries.

A graph that is changed in place loses its recall while a ring overwrites itself, or cannot forget at all. Here no
graph ever is: entries join the newest one, which is closed when it is full, and leave by growing old with all others
in theirs. Which hits are still valid is read off the memory's own write times.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from recollect.errors import MissingExtraError, require_whole
from recollect.memory.exact import ExactIndex
from recollect.memory.index import Neighbors, WindowIndex, exact_distances, nearest_first

_CHUNK = 8192  # rows added to a graph at once: bounds the float32 copies
_CANDIDATES = 80  # for the links of a new node; faiss's default of 40 makes graphs twice as fast, but worse ones
_ROWS = 64  # queries searched at once: bounds the tables of hits
_NODE = 100  # following a beam for one node takes as long as scanning about so many entries (measured: 2 us and 20 ns)


class ApproximateIndex(WindowIndex):
    """Finds nearly all of the nearest entries in a fraction of the time that exact search takes.

    The entries are split by age into several HNSW graphs (Malkov and Yashunin, https://arxiv.org/abs/1603.09320; the
    implementation is faiss's), and the newest few are scanned. A search follows a beam in each graph and looks where
    the farthest neighbor lies; where much of a beam fell within that distance, that graph is searched again with
    a wider beam, and where this would take longer than scanning everything, everything is scanned.

    What is approximate is only which entries are found. Entries are found, and not found any more, from the moment
    they are written or forgotten; distances are exact; there are never fewer neighbors than exact search gives. The
    same history and query give the same answer, but a memory that was loaded or moved has new graphs and may miss
    other entries than before. Memories of up to ``16 * recent`` entries are scanned.

    Writing costs about 0.2 ms per entry, in bursts: a quarter of ``recent`` entries at once join a graph. ``rebuild``
    (and so loading and moving a memory) joins all entries anew. Where most of a memory is forgotten, the entries
    that remain move into new graphs during later writes. The graphs hold the keys in float32 once more, and up to
    ``1 / graphs`` as many that are no longer valid, forgotten ones among them until their graph is dropped or the
    memory cleared; always on the CPU, wherever the memory is. Keys that float32 cannot tell apart (float64 keys far
    off the origin) are hard to find in them.

    Args:
        graphs: Over how many graphs a full memory is spread. Fewer are larger and hold more that is outdated; with
            2 and with 4 a search took the same time (measured with 200,000 keys of length 128).
        links: The number of links of each node, and twice as many in the lowest layer. The paper recommends 5 to 48;
            16 and 24 were equally fast at equal recall, and 24 took twice as long to write.
        beam: How many nodes a beam must follow beyond twice the neighbors it found: recall against time. The default
            finds at least 0.95 of 50 neighbors among 1,000,000 keys of intrinsic dimension 24.
        recent: How many of the newest entries may be in no graph yet.

    Raises:
        SettingError: If a setting is not a whole number, or too small.
        MissingExtraError: If faiss is not installed.

    Example:
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=100_000, key_size=2, index=ApproximateIndex())
        >>> slots = memory.write(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([7, 8]))
        >>> memory.read(torch.tensor([0.0, 2.0]), neighbors=1).values
        tensor([8])
    """

    def __init__(self, *, graphs: int = 4, links: int = 16, beam: int = 48, recent: int = 1024) -> None:
        for name, value, low in (("graphs", graphs, 1), ("links", links, 2), ("beam", beam, 1), ("recent", recent, 1)):
            require_whole(name, value, low=low)
        _import_faiss()
        self._spread, self._links, self._beam, self._most_recent = graphs, links, beam, recent
        self._scanned = 16 * recent  # up to as many entries a scan is as fast as graphs
        self._exact = ExactIndex()
        self._graphs: list[_Graph] = []  # oldest first; entries join the last one
        self._recent = _Entries(torch.empty(0), torch.empty(0))
        self._unchecked = 0  # how many entries joined since the graphs were last cleaned

    def rebuild(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"]) -> None:
        self._exact.rebuild(keys, written)
        self._graphs = []
        self._recent = _Entries(torch.empty(0, dtype=torch.long, device=keys.device), written[:0])
        order = written.argsort(stable=True)
        self._learn(keys, written, order[written[order] >= 0])

    def update(self, keys: Shaped[Tensor, "n d"], written: Int[Tensor, " n"], slots: Int[Tensor, " m"]) -> None:
        self._exact.update(keys, written, slots)
        self._learn(keys, written, slots[written[slots] >= 0])

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def _learn(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        if len(keys) <= self._scanned or len(slots) == 0:
            return
        old = self._recent
        recent = _Entries(torch.cat([old.slots, slots]), torch.cat([old.times, written[slots]]))
        self._recent = recent  # whatever happens below: an entry must be found
        if len(recent.slots) > self._most_recent:
            recent = recent.only(recent.valid(written))
            joining = max(0, len(recent.slots) - self._most_recent * 3 // 4)
            self._join(keys, written, recent.slots[:joining])
            recent = recent.only(slice(joining, None))
            self._unchecked += joining
            if self._unchecked > self._size(keys) // 16:  # checking every node each time would slow writing by 10 %
                self._clean(keys, written)
        self._recent = recent

    def _join(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        """Puts entries into the newest graph, and into new ones as each is full."""
        size = self._size(keys)
        while len(slots):
            if not self._graphs or len(self._graphs[-1]) == size:
                self._graphs.append(_Graph(size, keys, self._links))
            room = min(_CHUNK, size - len(self._graphs[-1]))
            self._graphs[-1].add(keys, written, slots[:room])
            slots = slots[room:]

    def _size(self, keys: Tensor) -> int:
        """Returns how many nodes a graph may have."""
        return max(self._scanned, -(-len(keys) // self._spread))

    def _clean(self, keys: Tensor, written: Tensor) -> None:
        """Drops graphs that hold nothing valid, and empties the emptiest one where most nodes are outdated."""
        valid = [graph.entries().valid(written) for graph in self._graphs]
        alive = {graph: int(part.sum()) for graph, part in zip(self._graphs, valid, strict=True)}
        self._unchecked = 0
        crowded = sum(len(graph) for graph in self._graphs) > 2 * sum(alive.values()) + self._size(keys)
        self._graphs = [graph for graph in self._graphs if alive[graph] > 0]
        if crowded and self._graphs:
            sparsest = min(self._graphs, key=lambda graph: alive[graph] / len(graph))
            rest = [graph for graph in self._graphs if graph is not sparsest]
            # It goes when its entries have joined others: whatever happens, they must be found.
            self._graphs = [sparsest, *rest] if rest else [sparsest, _Graph(self._size(keys), keys, self._links)]
            entries = sparsest.entries()
            self._join(keys, written, entries.only(entries.valid(written)).slots)
            self._graphs.remove(sparsest)

    def search(
        self,
        keys: Shaped[Tensor, "n d"],
        written: Int[Tensor, " n"],
        queries: Float[Tensor, "b d"],
        neighbors: int,
        before: Int[Tensor, " b"] | None = None,
        span: int | None = None,
    ) -> Neighbors:
        nodes = sum(len(graph) for graph in self._graphs)
        followed = len(self._graphs) * self._width(neighbors)
        if len(self._recent.slots) + nodes <= self._scanned or followed * _NODE > nodes:
            return self._exact.search(keys, written, queries, neighbors, before, span)
        parts = []
        for start in range(0, len(queries), _ROWS):
            rows = slice(start, start + _ROWS)
            limit = None if before is None else before[rows]
            parts.append(self._search(keys, _View(written, limit, span), queries[rows], neighbors))
        return Neighbors(torch.cat([part.distances for part in parts]), torch.cat([part.slots for part in parts]))

    def _search(self, keys: Tensor, view: "_View", queries: Tensor, neighbors: int) -> Neighbors:
        distances, slots, failed = self._follow(keys, view, queries, neighbors)
        missing = max(0, neighbors - distances.shape[1])  # then all queries have failed
        distances, slots = pad(distances, (0, missing), value=torch.inf), pad(slots, (0, missing))
        near, places = distances.topk(min(2 * neighbors + 8, distances.shape[1]), dim=1, largest=False)
        slots = slots.gather(1, places)
        near = near.masked_fill(_seen_before(slots), torch.inf)
        exact = exact_distances(queries, keys, slots).masked_fill_(near == torch.inf, torch.inf)
        found = nearest_first(exact, slots, view.written, neighbors)
        if bool(failed.any()):
            limit = None if view.before is None else view.before[failed]
            found.distances[failed], found.slots[failed] = self._exact.search(
                keys, view.written, queries[failed], neighbors, limit, view.span
            )
        return found

    def _follow(
        self, keys: Tensor, view: "_View", queries: Tensor, neighbors: int
    ) -> tuple[Float[Tensor, "b m"], Int[Tensor, "b m"], Bool[Tensor, " b"]]:
        """Returns candidates, infinitely far where they are not to be seen, and which queries must be scanned."""
        recent = self._recent.slots.expand(len(queries), -1)
        hidden = view.hidden(recent, self._recent.times.expand_as(recent))
        scanned = exact_distances(queries, keys, recent).masked_fill_(hidden, torch.inf)
        sizes = torch.tensor([len(graph) for graph in self._graphs], device=queries.device)
        width, nodes = self._width(neighbors), int(sizes.sum())
        hits = _Hits.none(len(queries), len(self._graphs), queries.device)
        due = torch.ones(hits.reached.shape[:2], dtype=torch.bool, device=queries.device)
        failed = torch.zeros_like(due[:, 0])
        while True:
            hits = self._widened(hits, queries, due, width)
            distances = hits.reached.masked_fill(view.hidden(hits.slots, hits.times), torch.inf)
            distances = torch.cat([scanned, distances.flatten(1)], 1)
            radius = _kth(distances, neighbors)
            arrived = hits.reached < torch.inf
            inside = (arrived & (hits.reached <= radius.view(-1, 1, 1))).sum(2)
            arrived = arrived.sum(2)
            wanted = torch.minimum(2 * inside + self._beam, sizes)
            narrow = wanted > arrived
            failed |= (due & narrow & (arrived < width)).any(1)  # the other nodes cannot be reached
            width += width // 2 + 1
            failed |= narrow.sum(1) * width * _NODE > nodes
            narrow &= ~failed.unsqueeze(1)
            due = narrow & (wanted <= width)  # the others wait for a beam that is wide enough
            if not bool(narrow.any()):
                slots = torch.cat([recent, hits.slots.flatten(1)], 1)
                return distances, slots, failed | (radius == torch.inf)

    def _width(self, neighbors: int) -> int:
        """Returns how many nodes a beam follows at first: half as many again as when the graphs share the hits."""
        return self._beam + 3 * neighbors // self._spread

    def _widened(self, hits: "_Hits", queries: Tensor, due: Bool[Tensor, "b g"], width: int) -> "_Hits":
        """Replaces the hits of the due graphs by those of a wider beam."""
        more = width - hits.reached.shape[2]
        hits = _Hits(*(pad(part, (0, more), value=fill) for part, fill in zip(hits, (torch.inf, 0, -2), strict=True)))
        vectors, settings = _float32(queries), _import_faiss().SearchParametersHNSW(efSearch=width)
        for number, graph in enumerate(self._graphs):
            rows = due[:, number].nonzero().squeeze(1)
            if len(rows):
                found = graph.search(vectors[rows.cpu()], width, settings)
                for part, wider in zip(hits, found, strict=True):
                    part[rows, number] = wider
        return hits


class _Entries(NamedTuple):
    """Which slots were written when: an entry is valid as long as the memory says the same."""

    slots: Int[Tensor, " m"]
    times: Int[Tensor, " m"]

    def only(self, which: Tensor | slice) -> "_Entries":
        return _Entries(self.slots[which], self.times[which])

    def valid(self, written: Tensor) -> Bool[Tensor, " m"]:
        return written[self.slots] == self.times


class _View(NamedTuple):
    """What the queries of one search may see."""

    written: Int[Tensor, " n"]
    before: Int[Tensor, " b"] | None
    span: int | None

    def hidden(self, slots: Int[Tensor, "b *m"], times: Int[Tensor, "b *m"]) -> Bool[Tensor, "b *m"]:
        hidden = self.written[slots] != times
        if self.before is not None:
            before = self.before.view(-1, *(1 for _ in slots.shape[1:]))
            hidden |= times >= before
            if self.span is not None:
                hidden |= times < before - self.span
        return hidden


class _Hits(NamedTuple):
    """The entries that beams reached in each graph, valid or not; infinitely far where there is none."""

    reached: Float[Tensor, "b g w"]
    slots: Int[Tensor, "b g w"]
    times: Int[Tensor, "b g w"]

    @staticmethod
    def none(queries: int, graphs: int, device: torch.device) -> "_Hits":
        nothing = torch.empty(queries, graphs, 0, dtype=torch.float32, device=device)
        return _Hits(nothing, nothing.long(), nothing.long())


class _Graph:
    """A faiss graph that entries join until it is full; none is ever taken out."""

    def __init__(self, size: int, keys: Tensor, links: int) -> None:
        self._graph = _import_faiss().IndexHNSWFlat(keys.shape[1], links)
        self._graph.hnsw.efConstruction = _CANDIDATES
        self._table = torch.empty(size, 2, dtype=torch.long, device=keys.device)  # the slot and time of each node

    def __len__(self) -> int:
        return self._graph.ntotal

    def entries(self) -> _Entries:
        return _Entries(*self._table[: len(self)].unbind(1))

    def add(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        place = slice(len(self), len(self) + len(slots))
        self._table[place] = torch.stack([slots, written[slots]], 1)
        faiss = _import_faiss()
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # several would link the nodes in an order that changes from run to run
        try:
            self._graph.add(_float32(keys[slots]).numpy())
        finally:
            faiss.omp_set_num_threads(threads)

    def search(self, vectors: Float[Tensor, "r d"], width: int, settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what beams of this width reach, near to far; infinitely far where they reach no more."""
        distances, nodes = self._graph.search(vectors.numpy(), width, params=settings)
        reached, places = torch.from_numpy(distances), torch.from_numpy(nodes)
        reached.masked_fill_(places < 0, torch.inf)
        slots, times = self._table[places.clamp_(min=0).to(self._table.device)].unbind(-1)
        return reached.to(self._table.device), slots, times


def _seen_before(slots: Int[Tensor, "b m"]) -> Bool[Tensor, "b m"]:
    """Whether a slot stands further left in its row: an interrupted write may leave an entry in two places."""
    ordered, order = slots.sort(dim=1, stable=True)
    return torch.zeros_like(slots, dtype=torch.bool).scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])


def _kth(distances: Float[Tensor, "b m"], count: int) -> Float[Tensor, " b"]:
    if distances.shape[1] < count:
        return torch.full_like(distances[:, 0], torch.inf)
    return distances.topk(count, dim=1, largest=False).values[:, -1]


def _float32(keys: Tensor) -> Float[Tensor, "m d"]:
    """Returns keys as faiss takes them; where they overflow, beams reach nothing, and everything is scanned."""
    return keys.detach().cpu().float().contiguous()


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("approximate search needs faiss: pip install 'recollect[faiss]'.") from error
    return faiss
