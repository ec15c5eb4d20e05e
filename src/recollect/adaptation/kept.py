"""``Kept``: what a head says of memory entries, kept beside them for as long as it stays true."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from recollect.memory.protocol import Entries

_WIDTH = 512  # columns of one block of the table: one block of a few thousand rows stays in the cache
_CHUNK = 16 * 2**20  # bytes of rows that are computed at once


class Kept:
    """One row of numbers for each slot, computed from the entry in it and the parameters of a layer.

    Nobody has to tell this table what was overwritten, loaded or trained: a row counts only for the very key and value
    that it was computed from, and all rows only for the very parameters; they are compared number by number. It is
    derived data: copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # to be held from ``update`` to the last use: another thread may replace rows
        self._parameters: tuple[Tensor, ...] = ()
        self._known = torch.empty(0, dtype=torch.bool)
        self._keys = self._values = torch.empty(0)
        self._blocks: list[Tensor] = []  # the rows, cut by columns

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()

    def update(
        self,
        entries: Entries,
        parameters: tuple[Tensor, ...],
        compute: Callable[[Tensor, Tensor], Float[Tensor, "m c"]],
    ) -> None:
        """Computes the rows of the entries that are not known.

        Args:
            entries: Each with its slot; -1 marks what is no entry.
            parameters: What ``compute`` depends on beside the entries.
            compute: Maps keys and values of entries to their rows.
        """
        if not self._fits(entries, parameters):
            self._parameters = tuple(p.detach().clone() for p in parameters)
            self._known = torch.zeros(0, dtype=torch.bool, device=entries.keys.device)
        self._grow(entries, compute)
        missing = self._missing(entries).nonzero().squeeze(1)
        width = sum(block.shape[1] for block in self._blocks)
        for some in missing.split(max(1, _CHUNK // (4 * width))) if len(missing) else ():
            slots, keys, values = entries.slots[some], entries.keys[some], entries.values[some]
            rows = compute(keys, values)
            self._known[slots] = False  # until all is there: what is broken off half-way must not count
            for block, columns in zip(self._blocks, rows.split(_WIDTH, 1), strict=True):
                block[slots] = columns
            self._keys[slots], self._values[slots] = keys, values
            self._known[slots] = True

    def _fits(self, entries: Entries, parameters: tuple[Tensor, ...]) -> bool:
        """Whether the table is made for such entries, and its rows with these parameters."""
        if len(self._known) == 0 or len(self._parameters) != len(parameters):
            return False
        pairs = ((self._keys[:1], entries.keys[:1]), (self._values[:1], entries.values[:1]))
        if any((a.device, a.dtype, a.shape) != (b.device, b.dtype, b.shape) for a, b in pairs):
            return False
        # By value: a change in place through ``.data`` leaves no other trace.
        pairs = zip(self._parameters, parameters, strict=True)
        return all((a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b) for a, b in pairs)

    def _grow(self, entries: Entries, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Makes room for all slots, keeping what is known."""
        known, count = len(self._known), max(0, int(entries.slots.max())) + 1  # one row at least, for -1 to point at
        if count <= known:
            return
        size = max(count, 2 * known)

        def larger(old: Tensor, like: Tensor) -> Tensor:
            new = like.new_zeros(size, *like.shape[1:])
            if known:
                new[:known] = old
            return new

        like = compute(entries.keys[:1], entries.values[:1]).split(_WIDTH, 1)
        blocks = [larger(old, row) for old, row in zip(self._blocks if known else like, like, strict=True)]
        keys, values = larger(self._keys, entries.keys), larger(self._values, entries.values)
        now_known = larger(self._known, self._known)
        # All at once: where memory ran out, the smaller table stays whole.
        self._blocks, self._keys, self._values, self._known = blocks, keys, values, now_known

    def _missing(self, entries: Entries) -> Bool[Tensor, " u"]:
        at = entries.slots.clamp(min=0)
        same = self._known[at] & (self._keys.index_select(0, at) == entries.keys).all(1)
        same &= (self._values[at] == entries.values).view(len(at), -1).all(1)
        return ~same & (entries.slots >= 0)

    def rows(self, slots: Int[Tensor, "*b"]) -> Float[Tensor, "*b c"]:
        """Returns the rows of the entries in ``slots``."""
        at = slots.clamp(min=0).reshape(-1)
        parts = [block.index_select(0, at) for block in self._blocks]
        return (torch.cat(parts, 1) if len(parts) > 1 else parts[0]).unflatten(0, slots.shape)

    def weighted_sum(self, slots: Int[Tensor, "b k"], shares: Float[Tensor, "b k"]) -> Float[Tensor, "b c"]:
        """Returns the sum of the rows of each query's entries, each times its share."""
        at = slots.clamp(min=0)
        return torch.cat([embedding_bag(at, block, per_sample_weights=shares, mode="sum") for block in self._blocks], 1)
