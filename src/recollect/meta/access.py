"""The two ways into an external memory: a cell that reads and writes for a controller, one step at a time."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from recollect.errors import SettingError, ShapeError, require, require_number, require_tensor, require_whole
from recollect.meta.checks import require_dtype, require_state
from recollect.meta.initial import drawn

# Keeps cosines of empty slots finite: 0. The default of torch.cosine_similarity.
SMALLEST = 1e-8
# Each number of a memory that holds nothing yet: not 0, where a cosine has no direction. (tristandeleu/ntm-one-shot.)
EMPTY = 1e-6


@runtime_checkable
class Access(Protocol):
    """What ``MANN`` needs of an access: a cell like ``nn.LSTMCell``, with a memory for its state."""

    inputs: int
    reads: int
    width: int

    def initial(self, batch: int) -> Any:
        """Returns the state before the first step."""
        ...

    def __call__(self, hidden: Float[Tensor, "b h"], state: Any) -> tuple[Float[Tensor, "b r w"], Any]:
        """Returns what was read, and the next state."""
        ...


class LRUState(NamedTuple):
    """The memory between two steps of ``LRUAccess``."""

    memory: Float[Tensor, "b n w"]
    usage: Float[Tensor, "b n"]
    weights: Float[Tensor, "b r n"]


class NTMState(NamedTuple):
    """The memory between two steps of ``NTMAccess``, and where each head is."""

    memory: Float[Tensor, "b n w"]
    reading: Float[Tensor, "b r n"]
    writing: Float[Tensor, "b v n"]


class LRUAccess(nn.Module):
    """Least recently used access (LRUA): writes to where it has read last, or to the slots that are used least.

    One step makes for each head a key ``k = tanh(W h + b)`` and a gate ``alpha = w h + b``, and then

        w^w  = sigma(alpha) w^r_{t-1} + (1 - sigma(alpha)) w^lu_{t-1}                   (22)
        M(i) = M_{t-1}(i) + sum over the heads of w^w(i) k                              (23)
        w^r  = softmax of cosine(k, M(i)) over the slots i;   r = sum_i w^r(i) M(i)     (17)-(19)
        w^u  = gamma w^u_{t-1} + sum over the heads of w^r + w^w                        (20)
        w^lu = 1 for the n slots with the smallest w^u, else 0;   n = number of reads   (21)

    where the single least used slot, by ``w^u_{t-1}``, is set to zero before (23).

    Paper: Santoro et al. (2016), Eq. (17) to (23). Each head has its own key, gate and weights; all of them write to
    all of the ``n`` least used slots, as the equations say. In (23) a key is what is written, and at once what is
    looked for; with ``separate`` each head writes a vector of its own, ``a = tanh(W' h + b')``, in the place of ``k``.
    That is not in the paper but in public implementations that reach its accuracy, and a MANN learns several times
    faster so (docs/learned.md).

    *Differs from the paper:* Eq. (21) with "<=" marks more than ``n`` slots where several are tied; here there are
    always ``n``, of tied ones the first. The paper leaves open how keys are bounded (``tanh``, as in its public
    implementations) and the state at the beginning (weights and usage 0, each number in the memory 1e-6). The choice
    of slots is a step function: no gradient goes into the usage.

    Args:
        inputs: The length of the controller's output.
        slots: The number of slots. (128: Santoro et al.)
        width: The length of a slot, and of a key. (40: Santoro et al.)
        reads: The number of heads. (4: Santoro et al., who also tried 1.)
        gamma: How much of the usage is kept from step to step, from 0 to 1. (0.95: all public implementations; notes on
            the paper say 0.99.)
        separate: Whether heads write vectors of their own, not their keys.
        generator: Draws the initial weights, uniform in ``+-1/sqrt(inputs)``. From torch's global random state when
            None.

    Raises:
        SettingError: If a size is not a positive whole number, there are more heads than slots, or ``gamma`` is not in
            [0, 1].

    Example:
        >>> access = LRUAccess(200, generator=torch.Generator().manual_seed(0))
        >>> reads, state = access(torch.ones(16, 200), access.initial(16))
        >>> reads.shape, state.memory.shape
        (torch.Size([16, 4, 40]), torch.Size([16, 128, 40]))
    """

    def __init__(
        self,
        inputs: int,
        *,
        slots: int = 128,
        width: int = 40,
        reads: int = 4,
        gamma: float = 0.95,
        separate: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        require("separate", separate, bool, "True or False")
        for name, size in {"inputs": inputs, "slots": slots, "width": width, "reads": reads}.items():
            require_whole(name, size)
        if reads > slots:
            raise SettingError(
                f"each of the {reads} reads needs a least used slot of its own, but slots={slots}. Use fewer reads or "
                "more slots."
            )
        require_number("gamma", gamma, low=0.0)
        if gamma > 1:
            raise SettingError(f"gamma must be in [0, 1]: above 1 the usage grows without end. Got {gamma}.")
        self.inputs, self.slots, self.width, self.reads, self.gamma = inputs, slots, width, reads, gamma
        self.separate = separate
        # Keys and gates; with ``separate`` what is written, too.
        self._sizes = [reads * width, reads, reads * width] if separate else [reads * width, reads]
        self.heads = drawn(nn.Linear(inputs, sum(self._sizes), device="meta"), inputs, generator)

    def initial(self, batch: int) -> LRUState:
        """Returns the state before the first step of ``batch`` sequences: nothing read, nothing used.

        Raises:
            SettingError: If ``batch`` is no whole number of at least 0.
        """
        require_whole("batch", batch, low=0)
        zeros = self.heads.weight.new_zeros
        memory = self.heads.weight.new_full((batch, self.slots, self.width), EMPTY)
        return LRUState(memory, zeros(batch, self.slots), zeros(batch, self.reads, self.slots))

    def forward(self, hidden: Float[Tensor, "b h"], state: LRUState) -> tuple[Float[Tensor, "b r w"], LRUState]:
        """Writes, then reads.

        Args:
            hidden: The controller's output.
            state: As returned by the step before, or by ``initial``.

        Returns:
            What each head has read, and the next state.

        Raises:
            ShapeError: If ``hidden`` is not of shape ``(sequences, inputs)``, or the state not of as many sequences.
            DtypeError: If one of them is not of the dtype of the weights.
        """
        _check_hidden(hidden, self.inputs, self.heads.weight)
        batch, slots = len(hidden), self.slots
        shapes = [(batch, slots, self.width), (batch, slots), (batch, self.reads, slots)]
        require_state(state, "an LRUState", shapes, batch, self.heads.weight)
        memory, usage, weights = state
        keys, gates, *own = self.heads(hidden).split(self._sizes, 1)
        keys, gates = keys.tanh().unflatten(1, (self.reads, self.width)), gates.sigmoid().unsqueeze(2)
        written = own[0].tanh().unflatten(1, (self.reads, self.width)) if own else keys

        least = usage.sort(dim=1, stable=True).indices[:, : self.reads]  # topk says nothing about the order of ties
        marked = torch.zeros_like(usage).scatter_(1, least, 1.0)
        writes = torch.lerp(marked.unsqueeze(1), weights, gates)
        memory = memory.scatter(1, least[:, :1, None].expand(-1, -1, self.width), 0.0)
        memory = torch.baddbmm(memory, writes.mT, written)

        weights = _cosines(keys, memory).softmax(2)
        usage = self.gamma * usage + (weights.detach() + writes.detach()).sum(1)
        return weights @ memory, LRUState(memory, usage, weights)


class NTMAccess(nn.Module):
    """The access of the neural Turing machine: by content and by place, with erasing.

    One step makes, for each head, a key ``k``, its strength ``beta >= 0``, a gate ``g`` in [0, 1], the chances ``s`` of
    the shifts from ``-shift`` to ``shift``, and a sharpening ``gamma >= 1``, and with them the head's weights:

        w^c  = softmax of beta cosine(k, M(i)) over the slots i         (5), (6)
        w^g  = g w^c + (1 - g) w_{t-1}                                  (7)
        w~(i) = sum_j w^g(j) s(i - j), around the end                   (8)
        w(i) = w~(i)^gamma / sum_j w~(j)^gamma                          (9)

    A writing head also has what it erases, ``e`` in [0, 1], and what it adds, ``a``:

        M(i) = M_{t-1}(i) (1 - w(i) e) + w(i) a                         (3), (4)

    and a reading head returns ``sum_i w(i) M(i)`` (2). Writing heads look for their keys in ``M_{t-1}``, reading ones
    in ``M``. Of several writing heads, all erase before one adds.

    Paper: Graves et al. (2014), Section 3; in Santoro et al. (2016) the memory that ``LRUAccess`` is compared with. The
    papers leave open the maps into the ranges (here ``tanh`` for ``k`` and ``a``, sigmoid for ``g`` and ``e``, softplus
    for ``beta`` and ``gamma - 1``) and the state at the beginning (here each number in the memory 1e-6, and all heads
    at the first slot: from uniform weights all slots would stay alike for ever).

    Args:
        inputs: The length of the controller's output.
        slots: The number of slots. (128: Graves et al., Santoro et al.)
        width: The length of a slot, and of a key. (40: Santoro et al.)
        reads: The number of reading heads. (4: Santoro et al.)
        writes: The number of writing heads. (1: Graves et al., for most tasks.)
        shift: How far a head can move in one step. (1: Graves et al.)
        generator: Draws the initial weights, uniform in ``+-1/sqrt(inputs)``. From torch's global random state when
            None.

    Raises:
        SettingError: If a size is not a positive whole number, or a shift goes around all slots.

    Example:
        >>> access = NTMAccess(200, reads=1, generator=torch.Generator().manual_seed(0))
        >>> reads, state = access(torch.ones(16, 200), access.initial(16))
        >>> reads.shape, state.writing.shape
        (torch.Size([16, 1, 40]), torch.Size([16, 1, 128]))
    """

    def __init__(
        self,
        inputs: int,
        *,
        slots: int = 128,
        width: int = 40,
        reads: int = 4,
        writes: int = 1,
        shift: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"inputs": inputs, "slots": slots, "width": width, "reads": reads, "writes": writes}
        for name, size in sizes.items():
            require_whole(name, size)
        require_whole("shift", shift, low=0)
        if 2 * shift + 1 > slots:
            raise SettingError(f"shifts from {-shift} to {shift} go around all slots={slots}. Use more slots.")
        self.inputs, self.slots, self.width = inputs, slots, width
        self.reads, self.writes, self.shift = reads, writes, shift
        numbers = width + 1 + 1 + (2 * shift + 1) + 1  # key, strength, gate, shifts, sharpening
        self.reading = drawn(nn.Linear(inputs, reads * numbers, device="meta"), inputs, generator)
        self.writing = drawn(nn.Linear(inputs, writes * numbers, device="meta"), inputs, generator)
        self.changes = drawn(nn.Linear(inputs, writes * 2 * width, device="meta"), inputs, generator)

    def initial(self, batch: int) -> NTMState:
        """Returns the state before the first step of ``batch`` sequences: nothing written, all heads at slot 0.

        Raises:
            SettingError: If ``batch`` is no whole number of at least 0.
        """
        require_whole("batch", batch, low=0)
        memory = self.reading.weight.new_full((batch, self.slots, self.width), EMPTY)
        weights = memory.new_zeros(batch, self.reads + self.writes, self.slots)
        weights[:, :, 0] = 1.0
        return NTMState(memory, *weights.split([self.reads, self.writes], 1))

    def forward(self, hidden: Float[Tensor, "b h"], state: NTMState) -> tuple[Float[Tensor, "b r w"], NTMState]:
        """Writes, then reads.

        Args:
            hidden: The controller's output.
            state: As returned by the step before, or by ``initial``.

        Returns:
            What each reading head has read, and the next state.

        Raises:
            ShapeError: If ``hidden`` is not of shape ``(sequences, inputs)``, or the state not of as many sequences.
            DtypeError: If one of them is not of the dtype of the weights.
        """
        _check_hidden(hidden, self.inputs, self.reading.weight)
        batch, slots = len(hidden), self.slots
        shapes = [(batch, slots, self.width), (batch, self.reads, slots), (batch, self.writes, slots)]
        require_state(state, "an NTMState", shapes, batch, self.reading.weight)
        memory, reading, writing = state
        writing = self._weights(self.writing(hidden).unflatten(1, (self.writes, -1)), memory, writing)
        erased, added = self.changes(hidden).unflatten(1, (self.writes, -1)).chunk(2, 2)
        erased, added = erased.sigmoid(), added.tanh()
        for place, gone in zip(writing.unbind(1), erased.unbind(1), strict=True):
            memory = memory * (1 - place.unsqueeze(2) * gone.unsqueeze(1))
        memory = torch.baddbmm(memory, writing.mT, added)
        reading = self._weights(self.reading(hidden).unflatten(1, (self.reads, -1)), memory, reading)
        return reading @ memory, NTMState(memory, reading, writing)

    def _weights(self, raw: Tensor, memory: Tensor, weights: Tensor) -> Tensor:
        """Returns where the heads are after this step: Eq. (5) to (9)."""
        keys, strength, gate, shifts, sharpening = raw.split([self.width, 1, 1, 2 * self.shift + 1, 1], 2)
        content = (softplus(strength) * _cosines(keys.tanh(), memory)).softmax(2)
        weights = torch.lerp(weights, content, gate.sigmoid())
        moved = torch.stack([weights.roll(by, 2) for by in range(-self.shift, self.shift + 1)], 3)
        weights = (moved @ shifts.softmax(2).unsqueeze(3)).squeeze(3)
        # The same as powers that are divided by their sum, which for high powers would be 0 / 0.
        tiny = torch.finfo(weights.dtype).tiny
        return ((1 + softplus(sharpening)) * weights.clamp_min(tiny).log()).softmax(2)


def _cosines(keys: Tensor, memory: Tensor) -> Tensor:
    """Returns the cosine between each key (b, r, w) and each slot (b, n, w)."""
    lengths = torch.linalg.vector_norm(memory, dim=2).clamp_min(SMALLEST)
    return normalize(keys, dim=2, eps=SMALLEST) @ memory.mT / lengths.unsqueeze(1)


def _check_hidden(hidden: Tensor, inputs: int, weight: Tensor) -> None:
    require_tensor("hidden", hidden)
    if hidden.dim() != 2 or hidden.shape[1] != inputs:
        raise ShapeError(
            f"hidden must be the controller's outputs at one step, of shape (sequences, {inputs}), got "
            f"{(*hidden.shape,)}."
        )
    require_dtype("hidden", hidden, weight)
