"""The memory entries that a batch of queries has found, each of them once."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.memory import Context
from recollect.memory.protocol import Entries
from recollect.memory.scan import products

_SHARED = 32 * 2**20  # bytes of the given head's outputs at entries that queries have in common, computed once for them
_TILE = 8 * 2**20  # bytes of rows that are made and used up at once: they stay in the cache
_MANY = 32  # products with so many times more entries than are needed take as long as repeating those that are
_FEWEST = 128  # rows to make at once at least: each time the head's weights have to be read


def distinct(context: Context) -> Entries:
    """Returns every entry of a context once, whatever number of queries it is a neighbor of."""
    slots, place = context.slots.unique(return_inverse=True)
    some = place.new_empty(len(slots)).scatter_(0, place.view(-1), torch.arange(place.numel(), device=place.device))
    keys, values = (part.flatten(0, 1).index_select(0, some) for part in (context.keys, context.values))
    return Entries(slots, keys, values, place, context.weights)


def dots(queries: Float[Tensor, "b d"], keys: Float[Tensor, "u d"], place: Int[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """Returns the product of each query with its own keys, ``keys[place]``."""
    if len(keys) <= _MANY * place.shape[1]:
        return products(keys, queries).gather(0, place.mT).mT
    rows = max(1, _TILE // (place.shape[1] * keys.shape[1] * keys.element_size()))
    parts = zip(place.split(rows), queries.split(rows), strict=True)
    near = ((keys.index_select(0, some.reshape(-1)).unflatten(0, some.shape), query) for some, query in parts)
    return torch.cat([(repeated @ query.unsqueeze(-1)).squeeze(-1) for repeated, query in near])


def groups(queries: Float[Tensor, "b d"], context: Context, outputs: int) -> Iterator[tuple[Tensor, Context]]:
    """Splits a batch so that the outputs at the entries of a group, each computed once, stay few enough.

    Args:
        queries: The batch.
        context: Its neighbors.
        outputs: How many numbers are computed for an entry.
    """
    size = max(1, _SHARED // (context.slots.shape[1] * outputs * queries.element_size()))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        yield queries[part], Context(*(field[part] for field in context))


def add_weighted_rows(
    outputs: Float[Tensor, "b c"],
    shares: Float[Tensor, "b k"],
    entries: Entries,
    compute: Callable[[Tensor, Tensor], Float[Tensor, "m c"]],
) -> Float[Tensor, "b c"]:
    """Adds to the output of each query its share of a row of each of its neighbors, and returns them.

    A row may be as wide as a vocabulary: only a tile of them exists at a time, each is computed once, and what a tile
    adds to the queries that know one of its entries is a small matrix product.

    Args:
        outputs: Changed in place.
        shares: How much of its neighbors' rows each query takes.
        entries: The neighbors.
        compute: Maps keys and values of entries to their rows.
    """
    count = shares.shape[1]
    place = entries.place.reshape(-1)
    order = place.argsort()
    ends = place.bincount(minlength=len(entries.keys)).cumsum(0)
    size = max(_FEWEST, _TILE // (outputs.shape[1] * outputs.element_size()))
    done = 0
    for start in range(0, len(entries.keys), size):
        rows = compute(entries.keys[start : start + size], entries.values[start : start + size])
        end = int(ends[start + len(rows) - 1])
        refs = order[done:end]
        users, user = (refs // count).unique(return_inverse=True)
        taken = shares.new_zeros(len(users), len(rows))
        taken.index_put_((user, place[refs] - start), shares.reshape(-1)[refs], accumulate=True)
        outputs.index_add_(0, users, taken @ rows)
        done = end
    return outputs
