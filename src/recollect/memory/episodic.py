"""``EpisodicMemory``: a circular buffer of (key, value) pairs in RAM or on a GPU, read by nearest neighbors."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from recollect.errors import (
    DeviceError,
    DtypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_tensor,
)
from recollect.kernels import Kernel, inverse_distance
from recollect.memory.exact import ExactIndex
from recollect.memory.index import Index, compute_dtype, expanded_distances
from recollect.memory.protocol import Context

_FORGOTTEN = -1  # the write time of a slot that holds nothing
_KEY_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8)


class EpisodicMemory(nn.Module):
    """A memory of fixed size that overwrites its oldest entries first.

    Paper: Section 2 ("the memory has a fixed size and acts as a circular buffer"), Algorithm 1, MbPA-Train line 5 and
    MbPA-Test line 3.

    All contents are buffers: ``state_dict()`` holds keys, values, write times and the ring position, ``.to()`` moves
    them, and the index over them is derived.

    Args:
        capacity: The largest number of entries.
        key_size: The length ``d`` of a key.
        value_shape: The shape of one value: ``()`` for a label, ``(outputs,)`` for a regression target.
        value_dtype: The dtype of the values.
        key_dtype: How keys are stored: float32, float64, float16, bfloat16 or uint8 (whole numbers from 0 to 255).
            Distances are computed in float32 (float64 for float64 keys) from the keys as they are stored.
        index: Finds the neighbors; exact search by default.

    Raises:
        SettingError: If a size is not a positive whole number.
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
    ) -> None:
        super().__init__()
        for name, value in (("capacity", capacity), ("key_size", key_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"{name} must be a whole number above 0, got {value!r}.")
        if key_dtype not in _KEY_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _KEY_DTYPES)
            raise DtypeError(f"keys can be stored as one of {allowed}, got key_dtype={key_dtype}.")
        self.register_buffer("keys", torch.zeros(capacity, key_size, dtype=key_dtype))
        self.register_buffer("values", torch.zeros(capacity, *value_shape, dtype=value_dtype))
        self.register_buffer("written", torch.full((capacity,), _FORGOTTEN))
        # The slots in the order in which they will be overwritten, read circularly from `position`. Forgetting
        # moves slots to its front, so "oldest first" holds after any history of writes and deletions.
        self.register_buffer("queue", torch.arange(capacity))
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("size", torch.tensor(0))
        self.index: Index = ExactIndex() if index is None else index
        self.index.rebuild(self.keys, self.written)
        self.register_load_state_dict_post_hook(_rebuild_index)

    @property
    def capacity(self) -> int:
        """The largest number of entries."""
        return self.keys.shape[0]

    @property
    def key_size(self) -> int:
        """The length of a key."""
        return self.keys.shape[1]

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of one value."""
        return tuple(self.values.shape[1:])

    def __len__(self) -> int:
        return int(self.size)

    def __bool__(self) -> bool:
        return True  # an empty memory is still a memory: `memory or default` must not drop it

    def extra_repr(self) -> str:
        return f"{len(self)} of {self.capacity} entries, key_size={self.key_size}, key_dtype={self.keys.dtype}"

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Stores pairs, overwriting the oldest entries when the memory is full.

        The t-th entry ever written has write time t, starting from 0. Of a batch larger than the capacity only the
        last ``capacity`` entries remain, as if they had been written one by one. Either the whole batch is stored
        or, on an error, nothing of it.

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
        new_keys, new_values = self._check_entries(keys, values)
        count = len(new_keys)
        if count == 0:
            return self.queue[:0]
        kept = min(count, self.capacity)
        first = int(self.position) + count - kept
        slots = self.queue[(first + torch.arange(kept, device=self.queue.device)) % self.capacity]
        self.size.add_(count).clamp_(max=self.capacity)  # empty slots come first in the queue
        self.keys[slots] = new_keys[-kept:]
        self.values[slots] = new_values[-kept:]
        step = int(self.step) + count
        self.written[slots] = torch.arange(step - kept, step, device=slots.device)
        self.step.fill_(step)
        self.position.fill_((first + kept) % self.capacity)
        self.index.update(self.keys, self.written, slots)
        return slots

    def _check_entries(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._check_keys(keys, "keys")
        require_tensor("values", values)
        rows = keys.shape[:-1]
        if tuple(values.shape) != (*rows, *self.value_shape):
            raise ShapeError(
                f"values must have shape {(*rows, *self.value_shape)} to match keys of shape {tuple(keys.shape)} in "
                f"this memory, got {tuple(values.shape)}."
            )
        if values.device != self.values.device:
            raise DeviceError(_other_device("values", values, self.values))
        flat = keys.detach().reshape(-1, self.key_size)
        stored = flat.to(self.keys.dtype)
        if self.keys.dtype == torch.uint8:
            bad = (stored.to(flat.dtype) != flat).any(1)
            if flat.dtype.is_signed:
                bad |= (flat < 0).any(1)  # as an int8, 255 reads -1
        else:
            bad = _too_large(stored)
        if bool(bad.any()):
            self._refuse_rows(flat, bad)
        return stored, self._as_stored(values.detach().reshape(len(flat), *self.value_shape))

    def _as_stored(self, values: Tensor) -> Tensor:
        if values.is_floating_point() and not bool(values.isfinite().all()):
            row = int((~values.isfinite()).nonzero()[0, 0])
            raise NonFiniteError(
                f"values must be finite, but row {row} holds NaN or infinity. Nothing of the batch was stored."
            )
        wanted = self.values.dtype
        stored = values.to(wanted)
        lossy = not torch.can_cast(values.dtype, wanted)
        if not lossy and values.dtype != wanted:
            whole = not (wanted.is_floating_point or wanted.is_complex)
            lossy = bool((stored != values).any()) if whole else _overflows(values, stored)
        if lossy:
            raise DtypeError(
                f"these values of {values.dtype} cannot be stored as {wanted}: they would lose their fractions or "
                f"overflow. Convert them, or create the memory with value_dtype={values.dtype}."
            )
        return stored

    def _refuse_rows(self, keys: Tensor, bad: Tensor) -> None:
        row = int(bad.nonzero()[0])
        more = f" ({int(bad.sum())} rows in all)" if int(bad.sum()) > 1 else ""
        if not bool(keys[row].isfinite().all()):
            raise NonFiniteError(
                f"keys must be finite, but row {row} holds NaN or infinity{more}. Nothing of the batch was stored. "
                "Check the network that makes the keys."
            )
        if self.keys.dtype == torch.uint8:
            raise DtypeError(
                f"a uint8 memory stores whole numbers from 0 to 255, but row {row} holds others{more}. Nothing of the "
                "batch was stored. Use key_dtype=torch.float32, or scale the keys to 0..255."
            )
        raise NonFiniteError(
            f"row {row} of keys is too large for key_dtype={self.keys.dtype}{more}: it, or its squared distance to "
            "other keys, overflows. Nothing of the batch was stored. Scale the keys down, or use a wider key_dtype."
        )

    def _check_keys(self, keys: Tensor, name: str) -> None:
        require_tensor(name, keys)
        if keys.dim() < 1 or keys.shape[-1] != self.key_size:
            raise ShapeError(
                f"{name} must have shape (*, {self.key_size}) to match this memory, got {tuple(keys.shape)}. "
                "Did you pass logits instead of features?"
            )
        if keys.is_complex() or keys.dtype == torch.bool:
            raise DtypeError(f"{name} must be real numbers, got {keys.dtype}.")
        if keys.device != self.keys.device:
            raise DeviceError(_other_device(name, keys, self.keys))

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
                those has been overwritten.

        Returns:
            The context, with leading dimensions ``*batch``.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: If the queries do not fit this memory.
            SettingError: If ``neighbors`` is not a positive whole number or None.
        """
        if neighbors is not None and (isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1):
            raise SettingError(f"neighbors must be a whole number above 0, or None for all entries, got {neighbors!r}.")
        require("kernel", kernel, Kernel, "a kernel, such as inverse_distance(epsilon=1e-3)")
        self._check_keys(queries, "queries")
        batch = queries.shape[:-1]
        flat = queries.reshape(-1, self.key_size).to(compute_dtype(self.keys))
        bad = _too_large(flat)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            finite = bool(flat[row].isfinite().all())
            what = "is so large that squared distances overflow" if finite else "holds NaN or infinity"
            raise NonFiniteError(f"queries must be finite, but row {row} {what}. Check the network that makes them.")
        limit = None if before is None else self._limit(before, batch)
        # Autocast would compute the distances in bfloat16.
        with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
            if neighbors is None:
                context = self._read_all(flat, kernel, limit)
            else:
                context = self._read_nearest(flat, min(neighbors, len(self)), kernel, limit)
        return Context(*(part.reshape(*batch, *part.shape[1:]) for part in context))

    def _limit(self, before: int | Tensor, batch: torch.Size) -> Int[Tensor, " b"]:
        limit = torch.as_tensor(before, device=self.keys.device)
        if limit.is_floating_point() or limit.dtype == torch.bool:
            raise DtypeError(f"before must be a write time, which is a whole number, got {limit.dtype}.")
        if limit.dim() and limit.shape != batch:
            raise ShapeError(
                f"before must be one number or have one for each query, shape {tuple(batch)}, got {tuple(limit.shape)}."
            )
        return limit.expand(batch).reshape(-1)

    def _read_nearest(self, queries: Tensor, count: int, kernel: Kernel, limit: Tensor | None) -> Context:
        if count == 0 or len(queries) == 0:
            distances = queries.new_zeros(len(queries), count)
            slots = torch.zeros(distances.shape, dtype=torch.long, device=queries.device)
        else:
            distances, slots = self.index.search(self.keys, self.written, queries, count, limit)
        places = slots.clamp(min=0).reshape(-1)
        keys = self.keys.index_select(0, places).to(queries.dtype).view(*slots.shape, self.key_size)
        values = self.values.index_select(0, places).view(*slots.shape, *self.value_shape)
        visible = slots >= 0
        if not bool(visible.all()):
            values[~visible] = 0
        weights = _normalize(kernel.log_weights(queries, keys, distances), visible)
        return Context(keys, values, weights, distances, slots)

    def _read_all(self, queries: Tensor, kernel: Kernel, limit: Tensor | None) -> Context:
        order = self.written.argsort(stable=True)[self.capacity - len(self) :]  # occupied slots, oldest first
        keys, values = self.keys[order].to(queries.dtype), self.values[order]
        shape = (len(queries), len(order))
        distances = expanded_distances(queries, keys)
        log_weights = kernel.log_weights(queries, keys, distances)
        slots, values = order.expand(shape), values.expand(*shape, *self.value_shape)
        visible = torch.ones(shape, dtype=torch.bool, device=queries.device)
        if limit is not None:
            visible = self.written[order] < limit.unsqueeze(1)
            hidden = ~visible
            slots, distances = slots.masked_fill(hidden, -1), distances.masked_fill_(hidden, torch.inf)
            values = values.masked_fill(hidden.view(*shape, *(1 for _ in self.value_shape)), 0)
        return Context(keys.expand(*shape, -1), values, _normalize(log_weights, visible), distances, slots)

    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries at once and for good; their slots are the next to be reused.

        What was derived from them may stay in RAM for a while, unused: see ``ApproximateIndex`` and ``keep_base``.

        Args:
            slots: One slot or a tensor of them, as ``read`` and ``write`` return them. Slots that are empty already,
                and the places that ``read`` marks with -1, are passed over.

        Raises:
            SettingError: If a slot is outside the memory; then nothing is forgotten.
        """
        asked = torch.as_tensor(slots, device=self.keys.device).reshape(-1)
        if len(asked) == 0:
            return
        if asked.is_floating_point() or asked.dtype == torch.bool:
            raise SettingError(f"slots must be whole numbers, got {asked.dtype}. Turn a mask into slots by .nonzero().")
        asked = asked.long().unique()
        if not (-1 <= int(asked[0]) and int(asked[-1]) < self.capacity):
            outside = int(asked[0]) if int(asked[0]) < -1 else int(asked[-1])
            raise SettingError(f"slots must be from 0 to {self.capacity - 1} in this memory, got {outside}.")
        asked = asked[asked >= 0]
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
        self.queue.copy_(torch.arange(self.capacity))
        self.index.rebuild(self.keys, self.written)

    def _apply(self, fn, recurse: bool = True):  # what .to(), .cuda(), .half() and .double() call
        key_dtype, value_dtype = fn(self.keys[:0]).dtype, fn(self.values[:0]).dtype
        if (key_dtype != self.keys.dtype and bool(_too_large(self.keys.to(key_dtype)).any())) or (
            value_dtype != self.values.dtype and _overflows(self.values, self.values.to(value_dtype))
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


def _other_device(name: str, given: Tensor, memory: Tensor) -> str:
    return f"{name} are on {given.device}, the memory is on {memory.device}. Move one of them with .to()."


def _too_large(keys: Float[Tensor, "b d"]) -> Bool[Tensor, " b"]:
    """Whether a key is NaN, infinite, or so large that a sum of squares in a search could overflow."""
    dtype = compute_dtype(keys)
    return ~(torch.linalg.vector_norm(keys, dim=1, dtype=dtype) < (torch.finfo(dtype).max / 64) ** 0.5)


def _overflows(values: Tensor, stored: Tensor) -> bool:
    return bool((stored.isinf() & ~values.isinf()).any())


def _normalize(log_weights: Float[Tensor, "b k"], visible: Bool[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    # The largest finite numbers instead of infinite ones: inf - inf is NaN. A row without neighbors gets zeros.
    limits = torch.finfo(log_weights.dtype)
    log_weights = log_weights.clamp(limits.min, limits.max).masked_fill_(~visible, -torch.inf)
    return log_weights.softmax(-1).masked_fill(~visible, 0.0)
