"""Reading from a Milvus collection: its index says which entries may be near, and a ring of these says which are.

So distances, ties, weights and places that nothing fills are what they are in ``EpisodicMemory``, by its own code.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from recollect.kernels import Kernel
from recollect.memory.episodic import EpisodicMemory
from recollect.memory.milvus.collection import MOST, Collection
from recollect.memory.milvus.rows import Kept, Rows, Stamps
from recollect.memory.protocol import Context

_SPARE = 16  # candidates beyond the neighbors, or a quarter of them: what rounds as equal there, may not be equal here


class Finder:
    """Finds entries.

    Args:
        collection: Where they lie.
        kept: Those that need not be fetched, as long as they are what the collection has.
    """

    def __init__(self, collection: Collection, kept: Kept | None) -> None:
        self.collection, self.kept = collection, kept

    def all(self, queries: Float[Tensor, "b d"], kernel: Kernel, limit: Int[Tensor, " b"] | None) -> Context:
        """Returns all entries for each query, those hidden that were not written before its limit."""
        return self._ranked(self._entries(self.collection.all_stamps()), queries, None, kernel, limit)

    def near(
        self, queries: Float[Tensor, "b d"], neighbors: int, kernel: Kernel, limit: Int[Tensor, " b"] | None
    ) -> Context:
        """Returns the neighbors of each query among those written before its limit."""
        count = min(neighbors + max(_SPARE, neighbors // 4), MOST)
        whole = self.kept is None and self.collection.at_once(count, whole=True) > 0
        size = max(1, self.collection.at_once(count, whole=whole))
        limits = [None] if limit is None else sorted(set(limit.tolist()))
        places: list[Tensor] = []
        parts: list[Context] = []
        for before in limits:
            rows = torch.arange(len(queries)) if limit is None else (limit == before).nonzero().squeeze(1)
            for some in rows.split(size) if len(rows) else ():
                stamps, entries = self.collection.search(queries[some], count, before, whole=whole)
                entries = self._entries(stamps) if entries is None else entries
                part = None if limit is None else limit[some]
                places.append(some)
                parts.append(self._ranked(entries, queries[some], neighbors, kernel, part))
        width = max((part.slots.shape[1] for part in parts), default=0)
        if width < neighbors:  # as many as there are, be they hidden or missed
            width = max(width, min(neighbors, self.collection.count()))
        if not parts:
            return _widened(self.nothing(queries, neighbors, kernel), width)
        order = torch.cat(places).argsort()
        wide = [_widened(part, width) for part in parts]
        return Context(*(torch.cat(some)[order] for some in zip(*wide, strict=True)))

    def nothing(self, queries: Float[Tensor, "b d"], neighbors: int | None, kernel: Kernel) -> Context:
        """Returns what there is in an empty memory."""
        return self._ranked(self.collection.no_rows(), queries, neighbors, kernel, None)

    def _ranked(
        self,
        rows: Rows,
        queries: Float[Tensor, "b d"],
        neighbors: int | None,
        kernel: Kernel,
        limit: Int[Tensor, " b"] | None,
    ) -> Context:
        """Ranks entries as the ring does: it makes a ring of them."""
        count, settings = len(rows.keys), self.collection.settings
        ring = EpisodicMemory(
            max(1, count), settings.key_size, value_shape=settings.value_shape, value_dtype=settings.value_dtype
        )
        if count:
            ring.load_state_dict(
                {
                    "keys": rows.keys,
                    "values": rows.values,
                    "written": rows.stamps.written,
                    "queue": rows.stamps.written.argsort(),
                    "position": torch.tensor(0),
                    "step": rows.stamps.written.amax() + 1,
                    "size": torch.tensor(count),
                }
            )
        context = ring.read(queries, neighbors, kernel=kernel, before=limit)
        slots = rows.stamps.slots if count else torch.zeros(1, dtype=torch.long)
        return context._replace(slots=slots[context.slots.clamp(min=0)].masked_fill(context.slots < 0, -1))

    def _entries(self, stamps: Stamps) -> Rows:
        """Returns the entries of these slots, from what is kept where that is what Milvus has."""
        if self.kept is None:
            return self.collection.rows(stamps.slots)
        known, missing = self.kept.look_up(stamps)
        if len(missing) == 0:
            return known
        new = self.collection.rows(missing)
        self.kept.keep(new)
        return Rows.joined([known, new])


def _widened(context: Context, width: int) -> Context:
    """Adds places that nothing fills."""
    more = width - context.slots.shape[1]
    if more == 0:
        return context
    keys, values = (pad(part, (*(0, 0) * (part.dim() - 2), 0, more)) for part in (context.keys, context.values))
    distances, slots = pad(context.distances, (0, more), value=torch.inf), pad(context.slots, (0, more), value=-1)
    return Context(keys, values, pad(context.weights, (0, more)), distances, slots)
