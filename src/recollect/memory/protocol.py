"""What a predictor may ask of a memory, and what it gets back."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from recollect.kernels import Kernel, inverse_distance


class Context(NamedTuple):
    """The neighbors of each query: ``C = {(h_k, v_k, w_k)}`` of Section 2.

    ``k`` is the number of neighbors asked for or the number of entries, whichever is smaller, sorted from near to
    far; of equally near entries the older comes first. Where ``before=`` hides so much that a query has fewer
    neighbors, the places left over have slot -1, weight 0, value 0 and infinite distance; their keys mean nothing.
    """

    keys: Float[Tensor, "*b k d"]
    """The neighbors' keys, float32 (float64 in a float64 memory)."""
    values: Shaped[Tensor, "..."]
    """The neighbors' values as they were written, ``(*b, k, *value_shape)``."""
    weights: Float[Tensor, "*b k"]
    """The kernel's weights, normalized to sum to one over the neighbors."""
    distances: Float[Tensor, "*b k"]
    """Squared Euclidean distances, as exact as the kernel needs them: see ``EpisodicMemory.read``."""
    slots: Int[Tensor, "*b k"]
    """Where the entries lie in the memory."""


class Entries(NamedTuple):
    """What a batch of queries has found, each entry once, whatever number of queries it is a neighbor of.

    The neighbors of query i are the entries ``place[i]``, in the order of a context. What fills the places with slot -1
    is an entry of its own, with slot -1.
    """

    slots: Int[Tensor, " u"]
    keys: Float[Tensor, "u d"]
    values: Shaped[Tensor, "u *v"]
    place: Int[Tensor, "b k"]
    weights: Float[Tensor, "b k"]


@runtime_checkable
class Memory(Protocol):
    """All that ``MbPA`` and the other predictors know of a memory."""

    @property
    def capacity(self) -> int: ...

    def __len__(self) -> int: ...

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]: ...

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context: ...

    def forget(self, slots: int | Int[Tensor, "..."]) -> None: ...

    def clear(self) -> None: ...


@runtime_checkable
class SharesEntries(Protocol):
    """A memory that can also hand out each entry once for a whole batch, which spares ``MbPA`` copies of keys."""

    def read_entries(
        self,
        queries: Shaped[Tensor, "b d"],
        neighbors: int,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, " b"] | None = None,
    ) -> Entries: ...


@runtime_checkable
class KeepsHistory(Protocol):
    """A memory that answers for a while as it did before its oldest entries were overwritten."""

    @property
    def history(self) -> int: ...


def normalize(log_weights: Float[Tensor, "b k"], hidden: Bool[Tensor, "b k"] | None) -> Float[Tensor, "b k"]:
    """Returns weights that sum to one over the neighbors; those ``hidden`` get 0, a row without others only zeros."""
    # The largest finite numbers instead of infinite ones: inf - inf is NaN.
    limits = torch.finfo(log_weights.dtype)
    log_weights = log_weights.clamp(limits.min, limits.max)
    if hidden is None:
        return log_weights.softmax(-1)
    # Not in place: the softmax is needed for its gradient.
    return log_weights.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)
