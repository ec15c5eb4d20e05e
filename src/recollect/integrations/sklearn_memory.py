"""What the scikit-learn estimators remember: a memory that grows, and what a prediction makes of it. Torch alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from recollect.adaptation import Adaptation, LocalAdaptation, rules
from recollect.adaptation.head import Head
from recollect.adaptation.local import Adapter
from recollect.errors import NonFiniteError
from recollect.integrations.sklearn_network import Network
from recollect.likelihoods import Likelihood
from recollect.mbpa import MbPA
from recollect.memory import Context, EpisodicMemory
from recollect.memory.checks import too_large

_PREDICTED = 1024  # rows that are predicted at once
_COMPARED = 8192  # keys that are compared at once


def new_memory(capacity: int, key_size: int, *, values: Shaped[Tensor, "n *v"]) -> EpisodicMemory:
    """Returns an empty memory for keys of this size and values of this shape and dtype."""
    return EpisodicMemory(capacity, key_size, value_shape=tuple(values.shape[1:]), value_dtype=values.dtype)


def filled_memory(
    keys: Float[Tensor, "n d"], values: Shaped[Tensor, "n *v"], capacity: int | None, generator: torch.Generator
) -> EpisodicMemory:
    """Returns a memory of the examples in a random order, of as many as ``capacity`` allows.

    Data are often sorted by class, and the oldest entries are the first to go: in a random order some of each stay.
    """
    slots = len(keys) if capacity is None else min(capacity, len(keys))
    memory = new_memory(slots, keys.shape[1], values=values)
    order = torch.randperm(len(keys), generator=generator)
    memory.write(keys[order], values[order])
    return memory


def remember(
    memory: EpisodicMemory, keys: Float[Tensor, "n d"], values: Shaped[Tensor, "n *v"], capacity: int | None
) -> EpisodicMemory:
    """Writes to the memory, or to one of another size in its place.

    Args:
        memory: Stays as it is where its size must change: it doubles when it is full, up to ``capacity``.
        keys, values: The entries.
        capacity: The most entries that are kept, the newest; no limit when None.

    Returns:
        The memory to use from now on.

    Raises:
        NonFiniteError: If a key is too large. Then nothing changes.
    """
    slots, needed = memory.capacity, len(memory) + len(keys)
    if needed > slots:
        slots = max(2 * slots, needed)
    if capacity is not None:
        slots = min(slots, capacity)
    if slots != memory.capacity:
        order = memory.written.argsort()[memory.capacity - len(memory) :][-slots:]  # the empty slots come first
        resized = new_memory(slots, memory.key_size, values=memory.values)
        resized.write(memory.keys[order], memory.values[order])
        memory = resized
    memory.write(keys, values)
    return memory


def equal_slots(memory: EpisodicMemory, keys: Float[Tensor, "n d"]) -> Int[Tensor, " m"]:
    """Returns the slots of all entries whose key equals one of these, looking at each entry once."""
    wanted = set(_as_bytes(keys))
    occupied = (memory.written >= 0).nonzero().squeeze(1)
    held = (key for slots in occupied.split(_COMPARED) for key in _as_bytes(memory.keys[slots]))
    return occupied[torch.tensor([key in wanted for key in held], dtype=torch.bool)]


def _as_bytes(keys: Float[Tensor, "n d"]) -> Iterator[bytes]:
    """Yields each row; rows of finite numbers are equal exactly where these are."""
    raw, width = (keys + 0.0).numpy().tobytes(), keys.shape[1] * keys.element_size()  # -0.0 + 0.0 is 0.0
    return (raw[start : start + width] for start in range(0, len(raw), width))


def equal_steps(rate: float, steps: int, reference: float) -> LocalAdaptation:
    """Returns gradient descent with the same steps for every query: of ``rate / (1 + reference)``."""
    return LocalAdaptation(rules.sgd(rate / (1 + reference)), steps)


@dataclass(frozen=True)
class Bounded:
    """Gradient descent whose steps are the smaller, the longer the longest of a query's own neighbors is.

    A regression's steps overshoot where ``rate * (1 + |h|^2)`` is above 1 at a neighbor, and run away above 2.

    Args:
        rate: ``rate * (1 + |h|^2)`` for the longest of the neighbors and of ``reference``; at most this for all.
        steps: The number of steps.
        reference: Neighbors up to this ``|h|^2`` change no step.
    """

    rate: float
    steps: int
    reference: float

    def bind(self, head: Head, likelihood: Likelihood) -> Adapter:
        """Returns what adapts the head."""
        adapt = equal_steps(self.rate, self.steps, self.reference).bind(head, likelihood)

        def bounded(queries: Float[Tensor, "b d"], context: Context) -> Float[Tensor, "b c"]:
            longest = squared_lengths(context.keys).amax(1, keepdim=True).clamp(min=self.reference)
            # A step is the rate times the weights: smaller weights are a smaller rate.
            weights = context.weights * ((1 + self.reference) / (1 + longest))
            return adapt(queries, context._replace(weights=weights))

        return bounded


def squared_lengths(keys: Float[Tensor, "*b d"]) -> Float[Tensor, "*b"]:
    """Returns ``|h|^2`` of each key in float64."""
    return keys.double().square().sum(-1)


def predict(
    network: Network,
    memory: EpisodicMemory,
    inputs: Any,
    *,
    neighbors: int,
    adaptation: Adaptation,
    likelihood: Likelihood,
) -> Float[Tensor, "n c"]:
    """Returns what ``MbPA`` predicts for each row of an array of NumPy, a part of the rows at a time.

    Raises:
        NonFiniteError: If a row is too far away to be compared with the memory.
    """
    model = MbPA(network.head, memory, neighbors=neighbors, adaptation=adaptation, likelihood=likelihood)
    parts = []
    for start in range(0, len(inputs), _PREDICTED):
        # torch.tensor makes a copy: the array may be read-only.
        keys = network.keys(torch.tensor(inputs[start : start + _PREDICTED]))
        if bool((bad := too_large(keys)).any()):
            row = start + int(bad.nonzero()[0])
            raise NonFiniteError(f"row {row} of X is so far away that squared distances overflow. Scale it down.")
        parts.append(model(keys))
    return torch.cat(parts)
