"""``MANN``: a network that learns to learn, with a memory beside its controller; and the LSTM it is compared with."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from recollect.errors import (
    DtypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_choice,
    require_tensor,
    require_whole,
)
from recollect.meta.access import Access, LRUAccess
from recollect.meta.checks import require_state
from recollect.meta.initial import drawn


class MANNState(NamedTuple):
    """What a MANN carries from one step to the next.

    ``cell`` is that of the LSTM controller (a feedforward one leaves it at 0), ``memory`` the state of the access.
    """

    hidden: Float[Tensor, "b h"]
    cell: Float[Tensor, "b h"]
    reads: Float[Tensor, "b r"]
    memory: Any


class MANN(nn.Module):
    """A memory-augmented neural network: a controller that writes to and reads from a memory at each step.

        h_t = controller of (x_t, r_{t-1});   r_t = what the access has read for h_t
        logits = W (h_t, r_t) + b                                                       (16)

    Paper: Santoro et al. (2016). There the inputs are ``(image, label of the image before)``; see ``offset``. The
    controller is an LSTM, or one hidden layer with ``tanh``, of which the paper says no more than "feedforward".

    The state at the beginning is 0 and an empty memory: nothing stays from one episode to the next but the weights.

    Args:
        inputs: The length of an input.
        outputs: The number of logits.
        access: The memory; ``LRUAccess(hidden)`` when None.
        controller: "lstm" or "feedforward".
        hidden: The units of the controller. (200: Santoro et al.)
        generator: Draws the initial weights as torch does, uniform in ``+-1/sqrt(units)`` of an LSTM and
            ``+-1/sqrt(inputs)`` elsewhere, and those of ``access`` when it is None; but the LSTM's forget gate starts
            with a bias of 1. From torch's global random state when None.

    Raises:
        SettingError: If a size is not a positive whole number, the controller not one of the two, or the access for
            another number of hidden units.

    Example:
        >>> mann = MANN(20 * 20 + 5, 5, generator=torch.Generator().manual_seed(0))
        >>> logits, state = mann(torch.zeros(16, 50, 405))  # 16 episodes of 50 steps
        >>> logits.shape, state.memory.memory.shape
        (torch.Size([16, 50, 5]), torch.Size([16, 128, 40]))
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        access: Access | None = None,
        controller: str = "lstm",
        hidden: int = 200,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, size in {"inputs": inputs, "outputs": outputs, "hidden": hidden}.items():
            require_whole(name, size)
        require_choice("controller", controller, ("lstm", "feedforward"))
        access = LRUAccess(hidden, generator=generator) if access is None else access
        if not isinstance(access, nn.Module) or not isinstance(access, Access):
            raise SettingError(f"access must be a cell such as LRUAccess(hidden) or NTMAccess(hidden), got {access!r}.")
        if access.inputs != hidden:
            raise SettingError(
                f"the access takes {access.inputs} numbers, but the controller has hidden={hidden} units. Make both of "
                "the same size."
            )
        self.inputs, self.outputs, self.hidden = inputs, outputs, hidden
        self.access = access
        reads = access.reads * access.width
        if controller == "lstm":
            cell = drawn(nn.LSTMCell(inputs + reads, hidden, device="meta"), hidden, generator)
            _open_forget_gate(cell.bias_ih, cell.bias_hh)
            self.controller: nn.LSTMCell | nn.Linear = cell
        else:
            self.controller = drawn(nn.Linear(inputs + reads, hidden, device="meta"), inputs + reads, generator)
        self.output = drawn(nn.Linear(hidden + reads, outputs, device="meta"), hidden + reads, generator)

    def initial(self, batch: int) -> MANNState:
        """Returns the state at the beginning of ``batch`` episodes.

        Raises:
            SettingError: If ``batch`` is no whole number of at least 0.
        """
        require_whole("batch", batch, low=0)
        zeros = self.output.weight.new_zeros
        reads = zeros(batch, self.output.in_features - self.hidden)
        return MANNState(zeros(batch, self.hidden), zeros(batch, self.hidden), reads, self.access.initial(batch))

    def forward(
        self, inputs: Float[Tensor, "b t d"], state: MANNState | None = None
    ) -> tuple[Float[Tensor, "b t o"], MANNState]:
        """Returns the logits at each step, and the state after the last.

        Step by step with the state gives the same as all steps at once, where later inputs are not known yet.

        Args:
            inputs: The inputs of ``b`` episodes.
            state: As returned for the steps before; the beginning of the episodes when None.

        Raises:
            ShapeError: If the inputs are not of shape ``(episodes, steps, inputs)``, with at least one step, or the
                state is none, or that of another batch.
            DtypeError: If they are not of the dtype of the weights.
            NonFiniteError: If the inputs hold NaN or infinite numbers.
        """
        _check(inputs, self.inputs, self.output.weight.dtype)
        batch, weight = len(inputs), self.output.weight
        if state is not None:  # what is in its memory, the access checks
            shapes = [(batch, self.hidden)] * 2 + [(batch, weight.shape[1] - self.hidden)]
            own = state[:3] if isinstance(state, tuple) and len(state) == 4 else state
            require_state(own, "a MANNState", shapes, batch, weight)
        hidden, cell, reads, memory = self.initial(batch) if state is None else state
        # What the inputs add is one product over all steps; only what goes round is left for the loop.
        if isinstance(self.controller, nn.LSTMCell):
            entering, back = self.controller.weight_ih.split([self.inputs, reads.shape[1]], 1)
            given = linear(inputs, entering, self.controller.bias_ih + self.controller.bias_hh)
            back = torch.cat([self.controller.weight_hh, back], 1).mT
        else:
            entering, back = self.controller.weight.split([self.inputs, reads.shape[1]], 1)
            given, back = linear(inputs, entering, self.controller.bias), back.mT
        seen = list[Tensor]()
        for step in given.unbind(1):
            if isinstance(self.controller, nn.LSTMCell):
                hidden, cell = _lstm(torch.addmm(step, torch.cat([hidden, reads], 1), back), cell)
            else:
                hidden = torch.addmm(step, reads, back).tanh()
            read, memory = self.access(hidden, memory)
            reads = read.flatten(1)
            seen.append(torch.cat([hidden, reads], 1))
        return self.output(torch.stack(seen, 1)), MANNState(hidden, cell, reads, memory)


class LSTMBaseline(nn.Module):
    """An LSTM without a memory, in the place of a ``MANN``.

    Paper: Santoro et al. (2016), the "LSTM" of Tables 1 and 2. The weights are drawn like those of ``MANN``.

    Args:
        inputs: The length of an input.
        outputs: The number of logits.
        hidden: The units of the LSTM. (200: Santoro et al. See ``like`` for as many parameters as a MANN has.)
        generator: Draws the initial weights; torch's global random state does when None.

    Raises:
        SettingError: If a size is not a positive whole number.

    Example:
        >>> lstm = LSTMBaseline(405, 5, generator=torch.Generator().manual_seed(0))
        >>> logits, state = lstm(torch.zeros(16, 50, 405))
        >>> logits.shape
        torch.Size([16, 50, 5])
    """

    def __init__(
        self, inputs: int, outputs: int, *, hidden: int = 200, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for name, size in {"inputs": inputs, "outputs": outputs, "hidden": hidden}.items():
            require_whole(name, size)
        self.inputs, self.outputs, self.hidden = inputs, outputs, hidden
        self.lstm = drawn(nn.LSTM(inputs, hidden, batch_first=True, device="meta"), hidden, generator)
        _open_forget_gate(*self.lstm.all_weights[0][2:])
        self.output = drawn(nn.Linear(hidden, outputs, device="meta"), hidden, generator)

    @classmethod
    def like(cls, mann: MANN, *, generator: torch.Generator | None = None) -> "LSTMBaseline":
        """Returns the LSTM for the same inputs and outputs whose number of parameters is nearest to the MANN's.

        Raises:
            SettingError: If ``mann`` is none.

        Example:
            >>> mann = MANN(405, 5)
            >>> lstm = LSTMBaseline.like(mann)
            >>> lstm.hidden, sum(p.numel() for p in lstm.parameters()), sum(p.numel() for p in mann.parameters())
            (247, 647392, 648369)
        """
        require("mann", mann, MANN, "a MANN, such as MANN(405, 5)")
        inputs, outputs, wanted = mann.inputs, mann.outputs, sum(p.numel() for p in mann.parameters())

        def surplus(hidden: int) -> int:
            return 4 * hidden * (inputs + hidden + 2) + (hidden + 1) * outputs - wanted

        linear_part = 4 * (inputs + 2) + outputs  # surplus(h) = 4 h^2 + linear_part h + outputs - wanted
        root = (math.sqrt(linear_part**2 + 16 * max(wanted - outputs, 0)) - linear_part) / 8
        around = max(1, math.floor(root)), max(1, math.ceil(root))
        hidden = min(around, key=lambda size: abs(surplus(size)))
        return cls(inputs, outputs, hidden=hidden, generator=generator)

    def forward(
        self, inputs: Float[Tensor, "b t d"], state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Float[Tensor, "b t o"], tuple[Tensor, Tensor]]:
        """Returns the logits at each step, and the state (``nn.LSTM``'s) after the last.

        Args:
            inputs: The inputs of ``b`` episodes.
            state: As returned for the steps before; the beginning of the episodes when None.

        Raises:
            ShapeError, DtypeError, NonFiniteError: As ``MANN``'s.
        """
        _check(inputs, self.inputs, self.output.weight.dtype)
        if state is not None:
            shapes = [(1, len(inputs), self.hidden)] * 2
            require_state(state, "a pair (hidden, cell)", shapes, len(inputs), self.output.weight)
        hidden, after = self.lstm(inputs, state)
        return self.output(hidden), after


def _lstm(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the hidden and the cell state, from the gates in torch's order: input, forget, cell, output."""
    enter, forget, new, leave = gates.chunk(4, 1)
    cell = torch.addcmul(forget.sigmoid() * cell, enter.sigmoid(), new.tanh())
    return leave.sigmoid() * cell.tanh(), cell


@torch.no_grad()
def _open_forget_gate(bias_ih: Tensor, bias_hh: Tensor) -> None:
    """Sets the two biases of an LSTM's forget gate to 1 and 0: it keeps its state until it learns what to forget."""
    bias_ih.chunk(4)[1].fill_(1.0)
    bias_hh.chunk(4)[1].zero_()


def _check(inputs: Tensor, size: int, dtype: torch.dtype) -> None:
    require_tensor("inputs", inputs)
    if inputs.dim() != 3 or inputs.shape[2] != size or 0 in inputs.shape[:2]:
        raise ShapeError(
            f"inputs must have shape (episodes, steps, {size}), with at least one step, got {(*inputs.shape,)}. Did "
            "you leave out the labels of the steps before? See offset(inputs, codes)."
        )
    if inputs.dtype != dtype:
        raise DtypeError(f"inputs are {inputs.dtype}, the weights {dtype}. Use .to({dtype}).")
    if not bool(inputs.isfinite().all()):
        raise NonFiniteError(
            "inputs hold NaN or infinite numbers, which would spread to all later steps. Clean or drop those episodes "
            "(inputs.isfinite().flatten(1).all(1) tells which are good)."
        )
