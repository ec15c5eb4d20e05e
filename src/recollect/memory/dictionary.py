"""``NeuralDictionary``: a memory whose keys and values are trained, and through which an embedding is trained.

A read finds its neighbors by exact search, without gradients, and computes their distances, weights and values once
more with them. What an optimizer does to the keys, the index learns before the next search: see ``_follow``.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from recollect.errors import (
    DtypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_number,
    require_tensor,
    require_whole,
)
from recollect.kernels import Kernel, inverse_distance
from recollect.memory.checks import (
    check_entries,
    check_limit,
    check_neighbors,
    check_queries,
    check_slots,
    check_value_settings,
    too_large,
)
from recollect.memory.exact import ExactIndex
from recollect.memory.index import compute_dtype
from recollect.memory.placing import assign
from recollect.memory.protocol import Context, normalize

_EMPTY = -1  # the write time of a slot that holds nothing
_KEY_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class NeuralDictionary(nn.Module):
    """The Differentiable Neural Dictionary of Neural Episodic Control: gradients reach keys, values and queries.

    Paper: Pritzel et al. (2017), *Neural Episodic Control*, arXiv:1703.01988, Sections 3.1, 3.3 and 3.4. MbPA's memory
    is "similar" to it, with "one key difference": MbPA does "not train the embedding network through the gradients from
    the memories" (Section 3 of its paper). ``EpisodicMemory`` is that memory; this one is the original.

    ``keys`` and ``values`` are parameters: hand ``parameters()`` to an optimizer, together with the embedding's. A
    ``NonParametric`` over a dictionary passes gradients on, so that a loss of its prediction trains all three:

    - Real-valued targets (Q-values, or one-hot rows for classes): ``value_shape=(outputs,)`` and ``Gaussian()``.
    - Labels: ``value_dtype=torch.long`` and ``Categorical()``. Labels are a buffer, as they have no gradient; those of
      keys and queries are that of the vote's log-probabilities.

    A write of a key that is in the dictionary changes that entry's value, ``v <- v + rate (target - v)``; any other key
    is appended, and takes the place of the entry that was used least recently when the dictionary is full. *Used*
    means written, or a neighbor in a read that ``touch`` was told of: reading by itself changes nothing.

    Differs from the paper: one dictionary serves all actions (a value can be a vector); the search is exact, where
    theirs is approximate; a write counts as use, and of the neighbors of one read the farthest counts as used least
    recently (the paper does not say).

    Args:
        capacity: The largest number of entries.
        key_size: The length ``d`` of a key.
        value_shape: The shape of one value: ``(outputs,)``, or ``()`` for a label.
        value_dtype: The dtype of the values.
        key_dtype: The dtype of the keys: float32, float64, float16 or bfloat16. Distances are computed in float32
            (float64 for float64 keys).
        rate: How far the value of a known key moves to its target, from 0 to 1: alpha in the paper's Eq. (4). The paper
            does not give its number; 0.1 is that of a public implementation (Kaixhin/EC). Whole numbers, such as
            labels, have no between: they are replaced, whatever the rate.

    Raises:
        SettingError: If a size is not a positive whole number, ``value_shape`` no tuple of whole numbers,
            ``value_dtype`` no dtype, or ``rate`` is not from 0 to 1.
        DtypeError: If keys cannot be stored as ``key_dtype``.

    Example:
        >>> import torch
        >>> from recollect import Gaussian, NonParametric
        >>> dictionary = NeuralDictionary(capacity=3, key_size=2, value_shape=(1,), rate=0.5)
        >>> slots = dictionary.write(torch.eye(2), torch.tensor([[1.0], [3.0]]))
        >>> slots = dictionary.write(torch.tensor([0.0, 1.0]), torch.tensor([5.0]))  # known: 3 + 0.5 (5 - 3)
        >>> query = torch.tensor([0.5, 0.5], requires_grad=True)
        >>> NonParametric(dictionary, neighbors=2, likelihood=Gaussian())(query).sum().backward()
        >>> dictionary.values.grad.flatten(), query.grad
        (tensor([0.5000, 0.5000, 0.0000]), tensor([-2.9940,  2.9940]))
    """

    keys: Tensor
    values: Tensor
    written: Tensor
    used: Tensor
    step: Tensor
    clock: Tensor

    def __init__(
        self,
        capacity: int,
        key_size: int,
        *,
        value_shape: tuple[int, ...] = (),
        value_dtype: torch.dtype = torch.float32,
        key_dtype: torch.dtype = torch.float32,
        rate: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value in (("capacity", capacity), ("key_size", key_size)):
            require_whole(name, value)
        if key_dtype not in _KEY_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in _KEY_DTYPES)
            raise DtypeError(f"keys that are trained can be stored as one of {allowed}, got key_dtype={key_dtype}.")
        check_value_settings(value_shape, value_dtype)
        require_number("rate", rate, low=0.0)
        if rate > 1:
            raise SettingError(
                f"rate must be from 0 to 1, what part of its way to the target a value goes, got {rate}."
            )
        self.rate = rate
        self.keys = nn.Parameter(torch.zeros(capacity, key_size, dtype=key_dtype))
        values = torch.zeros(capacity, *value_shape, dtype=value_dtype)
        if values.is_floating_point():
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)
        self.register_buffer("written", torch.full((capacity,), _EMPTY))  # when each entry was appended
        self.register_buffer("used", torch.full((capacity,), _EMPTY))  # when it was last used, by `clock`
        self.register_buffer("step", torch.tensor(0))  # rows written so far
        self.register_buffer("clock", torch.tensor(0))  # uses so far
        self._index = ExactIndex()
        self._follow_anew()
        self.register_load_state_dict_post_hook(_follow_loaded)

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
        return int((self.written >= 0).sum())

    def __bool__(self) -> bool:
        return True  # an empty dictionary is still a memory

    def extra_repr(self) -> str:
        return f"{len(self)} of {self.capacity} entries, key_size={self.key_size}, rate={self.rate}"

    @torch.no_grad()
    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Moves the values of known keys to their targets, and appends the other keys with theirs.

        Paper: Pritzel et al. (2017), Section 3.3, Eq. (4): "the exact same key h is already in K". A key is known if an
        entry has the very same numbers (of several such entries the oldest counts). A batch does what its rows would do
        one by one, those with equal keys included. Either the whole batch is stored or, on an error, nothing of it.

        What an optimizer keeps for an overwritten row (momentum, Adam's averages) is not reset, and would move the new
        entry by the old one's gradients. SGD without momentum and RMSprop, the paper's choice, move no row by itself.
        For others: ``for kept in optimizer.state[dictionary.keys].values(): kept[slots] = 0`` (without the scalars).

        Args:
            keys: ``(*batch, key_size)``; gradients are not kept.
            values: The targets, ``(*batch, *value_shape)``.

        Returns:
            The slot of each row's key, in the order of the batch; -1 where the same batch has overwritten it again.

        Raises:
            ShapeError: If keys or values do not fit this memory or each other.
            DtypeError: If they cannot be stored in this memory's dtypes without loss of meaning.
            DeviceError: If they are on another device than the memory.
            NonFiniteError: If a value or a key is not finite, or a key so large that squared distances overflow, by
                row number; or if training has made a stored key so.
        """
        new_keys, targets = check_entries(self, keys, values)
        if len(new_keys) == 0:
            return self.written[:0]
        different, inverse = new_keys.unique(dim=0, return_inverse=True)
        groups = inverse.tolist()
        known = {group: slot for group, slot in enumerate(self._find(different)) if slot >= 0}
        rows, fresh, place = assign(groups, known, self._least_used(len(groups)))
        step, clock, device = int(self.step), int(self.clock), self.written.device
        appended = torch.tensor([(slot, rows[slot][0]) for slot in fresh], dtype=torch.long, device=device).view(-1, 2)
        slots, sources = appended.unbind(1)
        self.keys[slots] = self._followed[slots] = new_keys[sources]
        self.values[slots] = targets[sources]
        self.written[slots] = step + sources
        self._index.update(self.keys.detach(), self.written, slots)
        changed = [(slot, some[1:] if slot in fresh else some) for slot, some in rows.items()]
        self._tabular_update(changed, targets)
        last = torch.tensor([(slot, some[-1]) for slot, some in rows.items()], device=device)
        self.used[last[:, 0]] = clock + last[:, 1]
        self.step.fill_(step + len(groups))
        self.clock.fill_(clock + len(groups))
        return torch.tensor([place.get(group, -1) for group in groups], device=device)

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context:
        """Retrieves the nearest entries of each query; weights, values, keys and distances pass gradients on.

        Paper: Pritzel et al. (2017), Eq. (1), (2) and (5): ``w_i = k(h, h_i) / sum_j k(h, h_j)`` with
        ``k(h, h_i) = 1 / (||h - h_i||^2 + 1e-3)``, over the neighbors. *Which* entries are neighbors has no gradient.
        The search is exact; of equally near entries the older comes first. Nothing of the dictionary changes.

        Args:
            queries: ``(*batch, key_size)``.
            neighbors: How many entries to retrieve for each query; all of them, oldest first, when None.
            kernel: Weighs the neighbors.
            before: Only entries that were appended before the row of this number was written are seen: one number, or
                one for each query ``(*batch)``. They are seen as they are now.

        Returns:
            The context, with leading dimensions ``*batch``.

        Raises:
            ShapeError, DtypeError, DeviceError: If the queries do not fit this memory.
            NonFiniteError: If a query, or a key that was trained, is not finite.
            SettingError: If ``neighbors`` is not a positive whole number or None.
        """
        if neighbors is not None:
            check_neighbors(neighbors, ", or None for all entries")
        require("kernel", kernel, Kernel, "a kernel, such as inverse_distance(epsilon=1e-3)")
        flat = check_queries(self, queries)
        limit = None if before is None else check_limit(before, queries.shape[:-1], self.keys.device)
        with torch.autocast(flat.device.type, enabled=False):  # it would compute the distances in bfloat16
            slots = self._search(flat.detach(), neighbors, limit)
            hidden, at = slots < 0, slots.clamp(min=0)
            keys = self.keys[at].to(flat.dtype)
            distances = (keys - flat.unsqueeze(1)).square().sum(-1).masked_fill(hidden, torch.inf)
            weights = normalize(kernel.log_weights(flat, keys, distances), hidden)
            values = self.values[at].masked_fill(hidden.view(*hidden.shape, *(1 for _ in self.value_shape)), 0)
            context = Context(keys, values, weights, distances, slots)
        return Context(*(part.reshape(*queries.shape[:-1], *part.shape[1:]) for part in context))

    @torch.no_grad()
    def touch(self, slots: Int[Tensor, "*b k"]) -> None:
        """Says that these entries were used in reads: they are now the last to be overwritten.

        Paper: Pritzel et al. (2017), Section 3.3: "We overwrite the item that has least recently shown up as a
        neighbour".

        Args:
            slots: ``read(...).slots``, ``(*batch, k)``: reads one after the other, the neighbors of each near to far.
                Places with -1 and slots that are empty by now are passed over.

        Raises:
            DtypeError: If it is no tensor.
            ShapeError: If it is a single number.
            SettingError: If a slot is outside the memory; then nothing changes.
        """
        require_tensor("slots", slots)
        check_slots(slots, self.keys)
        if slots.dim() == 0:
            raise ShapeError("slots must have shape (*, k), as read(...).slots has, got a single number.")
        flat = slots.to(self.used).flip(-1).reshape(-1)  # from far to near
        times = int(self.clock) + torch.arange(len(flat), device=flat.device)
        there = (flat >= 0) & (self.written[flat.clamp(min=0)] >= 0)
        self.used.scatter_reduce_(0, flat[there], times[there], "amax")
        self.clock += len(flat)

    @torch.no_grad()
    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries at once and for good; their slots are the next to be used.

        Args:
            slots: One slot or a tensor of them, as ``read`` and ``write`` return them. Those that are empty already,
                and -1, are passed over.

        Raises:
            SettingError: If a slot is outside the memory; then nothing is forgotten.
        """
        gone = check_slots(slots, self.keys)
        self.keys[gone] = self._followed[gone] = 0
        self.values[gone] = 0
        self.written[gone] = self.used[gone] = _EMPTY
        self._index.update(self.keys.detach(), self.written, gone)

    @torch.no_grad()
    def clear(self) -> None:
        """Removes all entries and starts counting write times from 0 again."""
        for tensor in (self.keys, self.values, self.step, self.clock):
            tensor.zero_()
        self.written.fill_(_EMPTY)
        self.used.fill_(_EMPTY)
        self._follow_anew()

    def _search(self, queries: Tensor, neighbors: int | None, limit: Tensor | None) -> Int[Tensor, "b k"]:
        """Returns the slots of the neighbors, -1 where nothing fills a place."""
        self._follow()
        count = len(self) if neighbors is None else min(neighbors, len(self))
        if neighbors is None:
            slots = self.written.argsort(stable=True)[self.capacity - count :].expand(len(queries), count)
            return slots if limit is None else slots.masked_fill(self.written[slots] >= limit.unsqueeze(1), -1)
        if count == 0 or len(queries) == 0:
            return torch.zeros(len(queries), count, dtype=torch.long, device=queries.device)
        with torch.no_grad():
            return self._index.search(self.keys.detach(), self.written, queries, count, limit).slots

    def _find(self, keys: Float[Tensor, "m d"]) -> list[int]:
        """Returns the slot of the oldest entry with each of these keys, -1 where there is none."""
        if len(self) == 0:
            return [-1] * len(keys)
        self._follow()
        queries = keys.to(compute_dtype(keys))
        distances, slots = self._index.search(self.keys.detach(), self.written, queries, 1, None)
        distances, slots = distances[:, 0], slots[:, 0]
        equal = (self.keys[slots] == keys).all(1)
        slots = slots.masked_fill(~equal, -1)
        for row in ((distances == 0) & ~equal).nonzero():  # keys so close that only their numbers tell them apart
            same = ((self.keys == keys[row]).all(1) & (self.written >= 0)).nonzero().squeeze(1)
            if len(same):
                slots[row] = same[self.written[same].argmin()]
        return slots.tolist()

    def _least_used(self, count: int) -> list[int]:
        """Returns up to so many slots in the order in which they will be overwritten: empty ones, then by use."""
        numbers = torch.arange(-self.capacity, 0, device=self.used.device)
        order = torch.where(self.written < 0, numbers, self.used)
        return order.topk(min(count, self.capacity), largest=False).indices.tolist()

    def _tabular_update(self, rows: list[tuple[int, list[int]]], targets: Tensor) -> None:
        """Moves the value in each slot to the targets in its rows, one after the other."""
        for turn in range(max(len(some) for _, some in rows)):
            rows = [(slot, some) for slot, some in rows if len(some) > turn]
            slots, now = torch.tensor([(slot, some[turn]) for slot, some in rows], device=targets.device).unbind(1)
            old, new = self.values[slots], targets[now]
            self.values[slots] = old + self.rate * (new - old) if old.is_floating_point() else new

    @torch.no_grad()
    def _follow(self) -> None:
        """Tells the index which keys have changed: by an optimizer, of which no version counter knows for sure.

        Raises:
            NonFiniteError: If a key has become NaN, infinite or too large.
        """
        if torch.equal(self._followed, self.keys):  # a third of the time of the comparison row by row
            return
        changed = ((self._followed != self.keys).any(1) & (self.written >= 0)).nonzero().squeeze(1)
        if len(changed) == 0:
            return
        keys = self.keys[changed]
        bad = too_large(keys)
        if bool(bad.any()):
            raise NonFiniteError(
                f"the key in slot {int(changed[bad][0])} has become NaN, infinite or too large since it was written. "
                "Lower the optimizer's rate for keys, or load an earlier state."
            )
        self._followed[changed] = keys
        self._index.update(self.keys.detach(), self.written, changed)

    def _follow_anew(self) -> None:
        with torch.inference_mode(False):
            self._followed = self.keys.detach().clone()
            self._followed[self.written >= 0] = torch.nan  # equal to no key: each is checked before the next search
            self._index.rebuild(self.keys.detach(), self.written)

    def _apply(self, fn, recurse: bool = True):  # what .to(), .cuda(), .half() and .double() call
        result = super()._apply(fn, recurse)
        self._follow_anew()
        return result


def _follow_loaded(dictionary: NeuralDictionary, incompatible: object) -> None:
    dictionary._follow_anew()
