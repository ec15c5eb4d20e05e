"""Replay buffers: which examples of an endless stream an ``EpisodicMemory`` keeps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import islice

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from recollect.continual.balance import Classes
from recollect.errors import DtypeError, SettingError, ShapeError, require, require_tensor, require_whole
from recollect.memory import EpisodicMemory
from recollect.memory.checks import check_entries


class _Replay(nn.Module, ABC):
    """What the buffers share: checking, counting, drawing and replacing; ``_store`` says what is kept."""

    seen: Tensor
    step: Tensor

    def __init__(
        self, memory: EpisodicMemory, *, shape: tuple[int, ...] | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        require("memory", memory, EpisodicMemory, "an EpisodicMemory")
        if memory.history:
            raise SettingError("a buffer says itself what its memory keeps: create the memory without history.")
        self.memory = memory
        self.shape = (memory.key_size,) if shape is None else tuple(shape)
        if any(size < 1 for size in self.shape) or math.prod(self.shape) != memory.key_size:
            raise SettingError(
                f"shape {self.shape} must hold key_size = {memory.key_size} numbers, as the memory's keys do. Create "
                "the memory with key_size=math.prod(shape)."
            )
        if generator is not None:
            require("generator", generator, torch.Generator, "a torch.Generator or None")
        self.generator = torch.Generator().manual_seed(0) if generator is None else generator
        self.register_buffer("seen", memory.step.clone())
        self.register_buffer("step", memory.step.clone())  # the memory's: where it differs, others wrote to it

    @property
    def capacity(self) -> int:
        """The largest number of examples."""
        return self.memory.capacity

    def __len__(self) -> int:
        return len(self.memory)

    def __bool__(self) -> bool:
        return True  # an empty buffer is still a buffer: `buffer or default` must not drop it

    def extra_repr(self) -> str:
        return f"{len(self)} of {int(self.seen)} examples seen, shape={self.shape}"

    def get_extra_state(self) -> Tensor:
        """The generator's state, so that a loaded buffer goes on as the saved one would have."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())

    def write(self, inputs: Shaped[Tensor, "b ..."], labels: Shaped[Tensor, "b ..."]) -> None:
        """Takes a batch of examples as the next ones of the stream, all of them or, on an error, none.

        On the CPU any split of the stream into batches keeps the same examples.

        Args:
            inputs: ``(b, *shape)``; gradients are not kept. They become the memory's keys.
            labels: ``(b, *memory.value_shape)``. They become the memory's values.

        Raises:
            ShapeError: If inputs or labels do not have these shapes.
            DtypeError, DeviceError, NonFiniteError: If the memory cannot store them, as in ``EpisodicMemory.write``.
        """
        require_tensor("inputs", inputs)
        require_tensor("labels", labels)
        if inputs.dim() == 0 or tuple(inputs.shape[1:]) != self.shape:
            sizes = "".join(f", {size}" for size in self.shape)
            raise ShapeError(
                f"inputs must have shape (b{sizes}), got {tuple(inputs.shape)}. A single example needs .unsqueeze(0); "
                "for inputs of another shape pass shape= to the constructor."
            )
        wanted = (len(inputs), *self.memory.value_shape)
        if tuple(labels.shape) != wanted:
            raise ShapeError(
                f"labels must have shape {wanted} to match {len(inputs)} inputs, got {tuple(labels.shape)}. Pass one "
                "label for each input."
            )
        keys, values = check_entries(self.memory, inputs.reshape(len(inputs), self.memory.key_size), labels)
        if len(keys) == 0:
            return
        others = int(self.memory.step) - int(self.step)
        self.seen.copy_(self.seen + others if others >= 0 else self.memory.step)
        self._store(keys, values)
        self.seen += len(keys)
        self.step.copy_(self.memory.step)

    @abstractmethod
    def _store(self, keys: Tensor, values: Tensor) -> None:
        """Keeps what is to be kept of a batch that has been checked and is not empty; ``seen`` is as before it."""

    def sample(self, count: int) -> tuple[Shaped[Tensor, "n ..."], Shaped[Tensor, "n ..."]]:
        """Draws examples uniformly, none of them twice.

        Args:
            count: How many; where fewer are stored, all of them, in random order.

        Returns:
            ``n = min(count, len(buffer))`` inputs ``(n, *shape)`` and their labels ``(n, *memory.value_shape)``, on
            the memory's device and in its dtypes.

        Raises:
            SettingError: If ``count`` is not a whole number of at least 0.
        """
        require_whole("count", count, low=0)
        memory, moved, ranks = self.memory, {}, []
        count = min(count, len(memory))
        for rank, draw in enumerate(self._draw(count).tolist()):  # shuffles the first `count` of all, as Fisher-Yates
            other = rank + draw % (len(memory) - rank)
            ranks.append(moved.get(other, other))
            moved[other] = moved.get(rank, rank)
        slots = torch.tensor(ranks, dtype=torch.long, device=memory.keys.device)
        if len(memory) < memory.capacity:
            slots = (memory.written >= 0).nonzero().squeeze(1)[slots]
        return memory.keys[slots].view(count, *self.shape), memory.values[slots]

    def _draw(self, count: int) -> Int[Tensor, " n"]:
        """Draws whole numbers below 2^63: modulo n they are uniform below n, but for a part in 2^63 / n."""
        numbers = torch.empty(count, dtype=torch.long, device=self.generator.device)
        return numbers.random_(generator=self.generator)

    def _next_slots(self, count: int) -> Tensor:
        """Returns the slots that the memory will write to next: the empty ones, then those of its oldest entries."""
        places = torch.arange(count, device=self.memory.queue.device)
        return self.memory.queue[(self.memory.position + places) % self.capacity]

    def _put(self, rows: Mapping[int, int], keys: Tensor, values: Tensor) -> None:
        """Replaces what slots hold; ``rows`` gives the row for each, and has empty slots in the memory's order."""
        if rows:
            self.memory.forget(torch.tensor(list(rows), device=keys.device))
            order = [rows[slot] for slot in self._next_slots(len(rows)).tolist()]
            chosen = torch.tensor(order, device=keys.device)
            self.memory.write(keys[chosen], values[chosen])


class Ring(_Replay):
    """Keeps the last ``capacity`` examples.

    What is written to the memory directly counts as seen, and an emptied slot is filled by the next example.

    Args:
        memory: Where the examples are kept, inputs as keys and labels as values; what it holds counts as seen.
        shape: The shape of one input; ``(memory.key_size,)`` when None.
        generator: Draws the samples; one of its own with seed 0 when None. Its state is in ``state_dict()``.

    Raises:
        SettingError: If ``shape`` does not hold as many numbers as a key, or an argument is of another kind.

    Example:
        >>> import torch
        >>> from recollect.memory import EpisodicMemory
        >>> buffer = Ring(EpisodicMemory(capacity=3, key_size=4), shape=(2, 2))
        >>> buffer.write(torch.rand(5, 2, 2), torch.arange(5))
        >>> inputs, labels = buffer.sample(8)
        >>> inputs.shape, sorted(labels.tolist())
        (torch.Size([3, 2, 2]), [2, 3, 4])
    """

    def _store(self, keys: Tensor, values: Tensor) -> None:
        self.memory.write(keys, values)


class Reservoir(_Replay):
    """Keeps every example seen so far with the same chance, ``capacity / seen``.

    Source: J. S. Vitter, Random sampling with a reservoir, ACM TOMS 11 (1985), algorithm R: the t-th example goes to
    slot j, drawn uniformly from 0 to t - 1, if there is such a slot.

    What is written to the memory directly counts as seen, and overwrites the oldest entry as in any memory. A slot
    that ``memory.forget`` empties stays so until an empty slot is drawn: the examples left, and all later ones,
    then still have the same chance. After ``memory.clear()`` the count starts anew.

    Args:
        memory: Where the examples are kept, inputs as keys and labels as values; all that was ever written to it
            counts as seen.
        shape: The shape of one input; ``(memory.key_size,)`` when None.
        generator: Draws slots and samples; one of its own with seed 0 when None. Its state is in ``state_dict()``.

    Raises:
        SettingError: If ``shape`` does not hold as many numbers as a key, or an argument is of another kind.

    Example:
        >>> import torch
        >>> from recollect.memory import EpisodicMemory
        >>> buffer = Reservoir(EpisodicMemory(capacity=3, key_size=1))
        >>> buffer.write(torch.rand(1000, 1), torch.arange(1000))
        >>> len(buffer), int(buffer.seen), int(buffer.sample(3)[1].max()) > 2
        (3, 1000, True)
    """

    def _store(self, keys: Tensor, values: Tensor) -> None:
        seen = int(self.seen)
        first = min(len(keys), max(0, self.capacity - seen))  # so many go to empty slots without a draw
        times = torch.arange(seen + first, seen + len(keys), device=self.generator.device) + 1
        drawn = self._draw(len(times)) % times
        hits = (drawn < self.capacity).nonzero().squeeze(1)
        slots = drawn[hits].to(keys.device)
        empty = min(first + len(hits), self.capacity - len(self))
        free = iter(self._next_slots(empty).tolist())
        rows = dict(zip(islice(free, first), range(first), strict=True))
        held = (self.memory.written[slots] >= 0).tolist()
        for row, slot, occupied in zip((hits + first).tolist(), slots.tolist(), held, strict=True):
            # Which of the empty slots is filled makes no difference: the memory says which.
            rows[slot if occupied or slot in rows else next(free)] = row
        self._put(rows, keys, values)


class ClassBalanced(_Replay):
    """Keeps the classes as equal as the stream allows, and of each class a uniform sample.

    Source: A. Chrysakis and M.-F. Moens, Online continual learning from imbalanced data, ICML 2020, Algorithm 1
    (CBRS). While there is room everything is stored. Later an example of a class that never was the largest replaces
    a random one of the largest class or classes; one of class c, which has been, replaces with probability
    ``m_c / n_c`` (stored of c / seen of c) a random one of c. An example costs the same for any capacity and number
    of classes, but for one look over the labels for each batch, which finds out whether others changed the memory.

    What is written to the memory directly, and still there at the next ``write``, counts as seen. Slots emptied by
    ``memory.forget`` are filled by the next examples, whatever their class. The parts of the classes concerned are
    then uniform samples only but for these examples. After ``memory.clear()`` all counts start anew.

    Args:
        memory: Where the examples are kept, inputs as keys and labels as values. It needs values of shape ``()`` that
            are whole numbers, any at all; what it holds counts as seen.
        shape: The shape of one input; ``(memory.key_size,)`` when None.
        generator: Draws slots and samples; one of its own with seed 0 when None. Its state is in ``state_dict()``.

    Raises:
        SettingError: If ``shape`` does not hold as many numbers as a key, or an argument is of another kind.
        ShapeError: If the memory's values are not of shape ``()``.
        DtypeError: If they are not whole numbers.

    Example:
        >>> import torch
        >>> from recollect.memory import EpisodicMemory
        >>> buffer = ClassBalanced(EpisodicMemory(capacity=6, key_size=1))
        >>> labels = torch.tensor([7] * 990 + [8] * 8 + [9] * 2)
        >>> buffer.write(torch.rand(1000, 1), labels)
        >>> sorted(buffer.memory.values.tolist())
        [7, 7, 8, 8, 9, 9]
    """

    def __init__(
        self, memory: EpisodicMemory, *, shape: tuple[int, ...] | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(memory, shape=shape, generator=generator)
        dtype = memory.values.dtype
        if memory.value_shape != ():
            raise ShapeError(f"labels need a memory with value_shape=(), got one with {memory.value_shape}.")
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise DtypeError(f"labels need a memory with whole numbers, such as value_dtype=torch.long, got {dtype}.")
        self.classes = Classes(memory)

    def _store(self, keys: Tensor, values: Tensor) -> None:
        balance = self.classes.balance(self.memory, int(self.step))
        free = self._next_slots(min(len(keys), self.capacity - len(self))).tolist()
        rows = balance.choose(values.tolist(), free, self._draw(len(keys) - len(free)).tolist())
        self._put(rows, keys, values)
        self.classes.save(self.memory)
