"""``EpisodicMemory``: a circular buffer of (key, value) pairs in RAM or on a GPU, read by nearest neighbors."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from recollect.errors import DtypeError, NonFiniteError, SettingError, require, require_whole
from recollect.kernels import Kernel, dot_product, gaussian, inverse_distance
from recollect.memory.checks import (
    check_entries,
    check_limit,
    check_neighbors,
    check_queries,
    check_slots,
    check_value_settings,
    overflows,
    too_large,
)
from recollect.memory.exact import ExactIndex
from recollect.memory.index import Index, Neighbors, WindowIndex, expanded_distances
from recollect.memory.protocol import Context, Entries, normalize
from recollect.memory.scan import products

_FORGOTTEN = -1  # the write time of a slot that holds nothing
_KEY_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8)
_GATHER = 4 * 2**20  # bytes of keys that are repeated at once for a kernel that looks at them


class EpisodicMemory(nn.Module):
    """A memory of fixed size that overwrites its oldest entries first.

    Paper: Section 2 ("the memory has a fixed size and acts as a circular buffer"), Algorithm 1, MbPA-Train line 5 and
    MbPA-Test line 3.

    With ``history`` it also answers for a while as it did before its oldest entries were overwritten: a block of a
    sequence can be written first and then read at once, each query at its own moment (``read(before=...)``).

    All contents are buffers: ``state_dict()`` holds keys, values, write times and the ring position, ``.to()`` moves
    them, and the index over them is derived.

    Args:
        capacity: The largest number of entries that are seen at once.
        key_size: The length ``d`` of a key.
        value_shape: The shape of one value: ``()`` for a label, ``(outputs,)`` for a regression target.
        value_dtype: The dtype of the values.
        key_dtype: How keys are stored: float32, float64, float16, bfloat16 or uint8 (whole numbers from 0 to 255).
            Distances are computed in float32 (float64 for float64 keys) from the keys as they are stored.
        index: Finds the neighbors; exact search by default.
        history: How many overwritten entries are kept beside the others, for reads with ``before`` alone: these are
            then exact for every moment from ``step - history`` on. With history a read sees what has not been forgotten
            of the last ``capacity`` writes. So no older entry fills the place of a forgotten one; without history one
            stays until its slot is needed.

    Raises:
        SettingError: If a size is not a positive whole number, ``value_shape`` no tuple of whole numbers,
            ``value_dtype`` no dtype, ``history`` negative, or the index cannot hide what is too old (see
            ``WindowIndex``).
        DtypeError: If keys cannot be stored as ``key_dtype``.

    Example:
        >>> import torch
        >>> memory = EpisodicMemory(capacity=3, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([7, 8]))
        >>> memory.read(torch.tensor([1.0, 0.0]), neighbors=1).values
        tensor([7])
    """

    keys: Tensor
    values: Tensor
    written: Tensor
    queue: Tensor
    position: Tensor
    step: Tensor
    size: Tensor

    def __init__(
        self,
        capacity: int,
        key_size: int,
        *,
        value_shape: tuple[int, ...] = (),
        value_dtype: torch.dtype = torch.long,
        key_dtype: torch.dtype = torch.float32,
        index: Index | None = None,
        history: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("capacity", capacity), ("key_size", key_size)):
            require_whole(name, value)
        require_whole("history", history, low=0)
        if key_dtype not in _KEY_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _KEY_DTYPES)
            raise DtypeError(f"keys can be stored as one of {allowed}, got key_dtype={key_dtype}.")
        check_value_settings(value_shape, value_dtype)
        self.history, slots = history, capacity + history
        self.register_buffer("keys", torch.zeros(slots, key_size, dtype=key_dtype))
        self.register_buffer("values", torch.zeros(slots, *value_shape, dtype=value_dtype))
        self.register_buffer("written", torch.full((slots,), _FORGOTTEN))
        # The slots in the order in which they will be overwritten, read circularly from `position`. Forgetting
        # moves slots to its front, so "oldest first" holds after any history of writes and deletions.
        self.register_buffer("queue", torch.arange(slots))
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("size", torch.tensor(0))  # how many slots are occupied
        self.index: Index = ExactIndex() if index is None else index
        if history:
            _require_window(self.index)
        self.index.rebuild(self.keys, self.written)
        self.register_load_state_dict_post_hook(_rebuild_index)

    @property
    def capacity(self) -> int:
        """The largest number of entries that are seen at once."""
        return self.keys.shape[0] - self.history

    @property
    def key_size(self) -> int:
        """The length of a key."""
        return self.keys.shape[1]

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of one value."""
        return tuple(self.values.shape[1:])

    def __len__(self) -> int:
        if self.history:
            return int((self.written >= (self.step - self.capacity).clamp(min=0)).sum())
        return int(self.size)

    def __bool__(self) -> bool:
        return True  # an empty memory is still a memory: `memory or default` must not drop it

    def extra_repr(self) -> str:
        past = f", history={self.history}" if self.history else ""
        return f"{len(self)} of {self.capacity} entries, key_size={self.key_size}, key_dtype={self.keys.dtype}{past}"

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Stores pairs, overwriting the oldest entries when the memory is full.

        The t-th entry ever written has write time t, starting from 0. Of a batch larger than the memory only the last
        ``capacity + history`` entries remain, as if they had been written one by one. Either the whole batch is
        stored or, on an error, nothing of it.

        Args:
            keys: ``(*batch, key_size)``; gradients are not kept.
            values: ``(*batch, *value_shape)``.

        Returns:
            The slots of the entries that remain, in the order of the batch.

        Raises:
            ShapeError: If keys or values do not fit this memory or each other.
            DtypeError: If they cannot be stored in this memory's dtypes without loss of meaning.
            DeviceError: If they are on another device than the memory.
            NonFiniteError: If a value or a key is not finite, or a key so large that squared distances overflow, by
                row number.
        """
        new_keys, new_values = check_entries(self, keys, values)
        count, room = len(new_keys), len(self.queue)
        slots = self.upcoming(count)
        if count == 0:
            return slots
        kept = len(slots)
        self.size.add_(count).clamp_(max=room)  # empty slots come first in the queue
        self.keys[slots] = new_keys[-kept:]
        self.values[slots] = new_values[-kept:]
        step = int(self.step) + count
        self.written[slots] = torch.arange(step - kept, step, device=slots.device)
        self.step.fill_(step)
        self.position.fill_((int(self.position) + count) % room)
        self.index.update(self.keys, self.written, slots)
        return slots

    def upcoming(self, count: int) -> Int[Tensor, " n"]:
        """Returns the slots that a batch of ``count`` entries would take, were it written now."""
        room = len(self.queue)
        kept = min(count, room)
        first = int(self.position) + count - kept
        return self.queue[(first + torch.arange(kept, device=self.queue.device)) % room]

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context:
        """Retrieves the nearest entries of each query.

        Paper: Algorithm 1, MbPA-Test line 3. Of equally near entries the older comes first. The search is exact unless
        the memory has another index than ``ExactIndex``.

        Args:
            queries: ``(*batch, key_size)``.
            neighbors: How many entries to retrieve for each query; all of them when None.
            kernel: Weighs the neighbors.
            before: Only entries with a write time below this are seen: one number, or one for each query
                ``(*batch)``. ``before=t`` gives what the memory knew when it had seen t entries, as long as none of
                those has been overwritten. In a memory with ``history`` it hides what had been overwritten then, too
                (``t - capacity <= written < t``), and is exact for every t from ``step - history`` on; a t that lies
                ahead stands for now.

        Returns:
            The context, with leading dimensions ``*batch``. In a memory with ``history`` entries that no query sees
            are not among those of ``neighbors=None``. All entries under ``dot_product`` have distances by its products,
            which the precision of ``|q|^2 + |h|^2`` limits; all others are exact to their own last digits.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: If the queries do not fit this memory.
            SettingError: If ``neighbors`` is not a positive whole number or None.
        """
        if neighbors is not None:
            check_neighbors(neighbors, ", or None for all entries")
        flat, limit = self._check_read(queries, kernel, before)
        # Autocast would compute the distances in bfloat16.
        with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
            if neighbors is None:
                context = self._read_all(flat, kernel, limit)
            else:
                distances, slots = self._search(flat, neighbors, limit)
                keys, values = (part.unflatten(0, slots.shape) for part in self._entries(slots.view(-1), flat.dtype))
                weights = normalize(kernel.log_weights(flat, keys, distances), slots < 0)
                context = Context(keys, values, weights, distances, slots)
        return Context(*(part.reshape(*queries.shape[:-1], *part.shape[1:]) for part in context))

    def read_entries(
        self,
        queries: Shaped[Tensor, "b d"],
        neighbors: int,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, " b"] | None = None,
    ) -> Entries:
        """Retrieves what ``read`` does, but each entry once: the keys are not repeated for every query.

        Args:
            queries, neighbors, kernel, before: As in ``read``; one batch dimension.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: If the queries do not fit this memory.
            SettingError: If ``neighbors`` is not a positive whole number.
        """
        check_neighbors(neighbors)
        flat, limit = self._check_read(queries, kernel, before)
        with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
            distances, slots = self._search(flat, neighbors, limit)
            found, place = slots.unique(return_inverse=True)
            keys, values = self._entries(found, flat.dtype)
            if type(kernel) is inverse_distance or type(kernel) is gaussian:
                log_weights = kernel.log_weights(None, None, distances)
            else:
                rows = max(1, _GATHER // max(1, place.shape[1] * keys.shape[1] * keys.element_size()))
                parts = zip(flat.split(rows), place.split(rows), distances.split(rows), strict=True)
                log_weights = torch.cat([kernel.log_weights(query, keys[at], far) for query, at, far in parts])
            return Entries(found, keys, values, place, normalize(log_weights, slots < 0))

    def _check_read(
        self, queries: Tensor, kernel: Kernel, before: int | Tensor | None
    ) -> tuple[Float[Tensor, "b d"], Int[Tensor, " b"] | None]:
        """Returns the queries in rows and the limit of each."""
        require("kernel", kernel, Kernel, "a kernel, such as inverse_distance(epsilon=1e-3)")
        flat = check_queries(self, queries)
        limit = None if before is None else check_limit(before, queries.shape[:-1], self.keys.device)
        return flat, limit.minimum(self.step) if self.history and limit is not None else limit

    def _entries(self, slots: Int[Tensor, " u"], dtype: torch.dtype) -> tuple[Float[Tensor, "u d"], Tensor]:
        """Returns the keys and values in ``slots``; the value is 0 where the slot is -1."""
        at = slots.clamp(min=0)
        keys, values = self.keys.index_select(0, at).to(dtype), self.values.index_select(0, at)
        values[slots < 0] = 0
        return keys, values

    def _search(self, queries: Tensor, neighbors: int, limit: Tensor | None) -> Neighbors:
        # The past may have held more than is left of the last writes.
        most = min(self.capacity, int(self.size)) if self.history and limit is not None else len(self)
        count = min(neighbors, most)
        if count == 0 or len(queries) == 0:
            distances = queries.new_zeros(len(queries), count)
            return Neighbors(distances, torch.zeros(distances.shape, dtype=torch.long, device=queries.device))
        if not self.history:
            return self.index.search(self.keys, self.written, queries, count, limit)
        limit = self.step.expand(len(queries)) if limit is None else limit
        return _require_window(self.index).search(self.keys, self.written, queries, count, limit, self.capacity)

    def _read_all(self, queries: Tensor, kernel: Kernel, limit: Tensor | None) -> Context:
        order = self._seen(limit)
        keys, values = self._entries(order, queries.dtype)
        shape = (len(queries), len(order))
        if type(kernel) is dot_product:  # the distances count for nothing: its products give them, too
            dots = products(keys, queries).mT.contiguous()
            log_weights = kernel.flatness * dots
            distances = torch.add(keys.square().sum(1), dots, alpha=-2)
            distances.add_(queries.square().sum(1, keepdim=True)).clamp_(min=0)
        else:
            distances = expanded_distances(queries, keys)
            log_weights = kernel.log_weights(queries, keys, distances)
        slots, values, hidden = order.expand(shape), values.expand(*shape, *self.value_shape), None
        if limit is not None:
            times, limit = self.written[order], limit.unsqueeze(1)
            hidden = times >= limit
            if self.history:
                hidden |= times < limit - self.capacity
            slots, distances = slots.masked_fill(hidden, -1), distances.masked_fill_(hidden, torch.inf)
            values = values.masked_fill(hidden.view(*shape, *(1 for _ in self.value_shape)), 0)
        return Context(keys.expand(*shape, -1), values, normalize(log_weights, hidden), distances, slots)

    def _seen(self, limit: Tensor | None) -> Int[Tensor, " n"]:
        """Returns the occupied slots, oldest first; with history only those that a query sees."""
        if not self.history:
            return self.written.argsort(stable=True)[self.capacity - len(self) :]
        ends = self.step if limit is None or len(limit) == 0 else limit
        seen = (self.written >= (ends.min() - self.capacity).clamp(min=0)) & (self.written < ends.max())
        slots = seen.nonzero().squeeze(1)
        return slots[self.written[slots].argsort()]

    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries at once and for good; their slots are the next to be reused.

        What was derived from them may stay in RAM for a while, unused: see ``ApproximateIndex`` and ``keep_base``.

        Args:
            slots: One slot or a tensor of them, as ``read`` and ``write`` return them, those that are kept for the
                past included. Slots that are empty already, and the places that ``read`` marks with -1, are passed
                over.

        Raises:
            SettingError: If a slot is outside the memory; then nothing is forgotten.
        """
        asked = check_slots(slots, self.keys)
        gone = asked[self.written[asked] >= 0]
        if len(gone) == 0:
            return
        self.keys[gone] = 0
        self.values[gone] = 0
        self.written[gone] = _FORGOTTEN
        self.size -= len(gone)
        order = self.queue.roll(-int(self.position))
        self.queue.copy_(torch.cat([gone, order[~torch.isin(order, gone)]]))
        self.position.zero_()
        self.index.update(self.keys, self.written, gone)

    def clear(self) -> None:
        """Removes all entries and starts counting write times from 0 again."""
        for buffer in (self.keys, self.values, self.position, self.step, self.size):
            buffer.zero_()
        self.written.fill_(_FORGOTTEN)
        self.queue.copy_(torch.arange(len(self.queue)))
        self.index.rebuild(self.keys, self.written)

    def _apply(self, fn, recurse: bool = True):  # what .to(), .cuda(), .half() and .double() call
        key_dtype, value_dtype = fn(self.keys[:0]).dtype, fn(self.values[:0]).dtype
        if (key_dtype != self.keys.dtype and bool(too_large(self.keys.to(key_dtype)).any())) or (
            value_dtype != self.values.dtype and overflows(self.values, self.values.to(value_dtype))
        ):
            raise NonFiniteError(
                f"entries of this memory overflow {key_dtype}, so it was not converted. Scale keys and values down, or "
                "move the memory with .to(device) only."
            )
        result = super()._apply(fn, recurse)
        self.index.rebuild(self.keys, self.written)
        return result


def _rebuild_index(memory: EpisodicMemory, incompatible: object) -> None:
    memory.index.rebuild(memory.keys, memory.written)


def _require_window(index: Index) -> WindowIndex:
    if not isinstance(index, WindowIndex):
        raise SettingError(
            f"a memory with history needs an index that hides what is too old, got a {type(index).__name__}. Derive it "
            "from recollect.memory.index.WindowIndex, or use ExactIndex() or ApproximateIndex()."
        )
    return index
