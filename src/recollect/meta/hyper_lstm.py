"""``HyperLSTMCell`` and ``HyperLSTM``: an LSTM whose weights another, smaller LSTM rescales at every step."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm as normalized
from torch.nn.functional import linear

from recollect.errors import SettingError, ShapeError, require, require_number, require_tensor, require_whole
from recollect.meta.checks import require_dtype, require_state

_EPSILON = 1e-3  # hardmaru/supercell, "found this works best"
_FORGET = 1  # the number of the forget gate; the gates are in torch's order: input, forget, cell, output


class HyperLSTMState(NamedTuple):
    """What a HyperLSTM carries from step to step."""

    hidden: Float[Tensor, "b h"]
    """The main LSTM's output."""
    cell: Float[Tensor, "b h"]
    hyper_hidden: Float[Tensor, "b m"]
    """The small LSTM's output."""
    hyper_cell: Float[Tensor, "b m"]


class HyperLSTMCell(nn.Module):
    """One step of an LSTM whose matrices have their rows rescaled by a small LSTM that reads along.

    The small LSTM (quantities with a hat) sees the input and the main LSTM's last output. For each gate y of the main
    LSTM, its output makes three embeddings, and these the scales of the rows and the bias:

        h^_t = LSTM^(h^_{t-1}, (h_{t-1}, x_t)), with LayerNorm of gates and cell
        z_h = W_hh h^_t + b_hh,    z_x = W_hx h^_t + b_hx,    z_b = W_hb h^_t
        y_t = LN(W_hz z_h * W_h h_{t-1} + W_xz z_x * W_x x_t + W_bz z_b + b_0)
        c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * dropout(tanh(g_t)),    h_t = sigmoid(o_t) * tanh(LN(c_t))

    Paper: Ha, Dai and Le 2017, "HyperNetworks", Eq. (10) to (13), Appendix A.2.2 and A.2.3, which has the initial
    values: W_x, W_h and the small LSTM's matrices orthogonal for each gate, W_hh = W_hx = 0, b_hh = b_hx = 1, W_hb
    normal with deviation 0.01, W_hz = W_xz = 0.1 / N_z, W_bz = b_0 = 0. *Differs from the paper:* Eq. (11) has
    h^_{t-1}; its text ("at the same timestep") and its code (hardmaru/supercell) take h^_t, as we do. As in that
    code, the forget gates start with a bias of 1 (here in what LayerNorm adds, or in b_0 without it), and the small
    LSTM has no biases beside LayerNorm's.

    Args:
        input_size: Numbers in x_t.
        hidden_size: Units of the main LSTM. (Paper: 1000 for the characters of PTB.)
        hyper_size: Units of the small LSTM. (Paper: 128.)
        embedding: N_z, the length of each embedding. (Paper: 4, and 16 for "large embedding".)
        layer_norm: Whether the main LSTM has LayerNorm: "Layer Norm HyperLSTM" in the paper's Table 3, where plain
            "HyperLSTM" has it in the small LSTM only.
        dropout: The chance of a unit of tanh(g_t) to be dropped in training; a fresh mask for each step (recurrent
            dropout without memory loss, Semeniuta et al. 2016). (Paper: 0.1.)
        generator: Draws the initial weights; torch's global random state does when None.

    Raises:
        SettingError: If a size is not a positive whole number, ``layer_norm`` not True or False or ``dropout`` not in
            [0, 1).

    Example:
        >>> cell = HyperLSTMCell(50, 100, hyper_size=16)
        >>> state = cell(torch.zeros(2, 50))
        >>> state = cell(torch.zeros(2, 50), state)
        >>> state.hidden.shape, state.hyper_hidden.shape
        (torch.Size([2, 100]), torch.Size([2, 16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        hyper_size: int = 128,
        embedding: int = 4,
        layer_norm: bool = True,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "hyper_size": hyper_size, "embedding": embedding}
        for name, size in sizes.items():
            require_whole(name, size)
        require("layer_norm", layer_norm, bool, "True or False")
        require_number("dropout", dropout, low=0.0)
        if dropout >= 1:
            raise SettingError(f"dropout must be in [0, 1), got {dropout}.")
        self.input_size, self.hidden_size, self.hyper_size, self.embedding = sizes.values()
        self.dropout = dropout
        # The rows of both matrices: four gates of the small LSTM, then four of the main one.
        rows = 4 * (hyper_size + hidden_size)
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.hyper_hh = nn.Parameter(torch.empty(4 * hyper_size, hyper_size))
        self.hyper_norm = _Norms(hyper_size)
        # For each gate z_h, for each gate z_x; for each gate z_b.
        self.scale_embedding = nn.Linear(hyper_size, 8 * embedding, device="meta").to_empty(device="cpu")
        self.shift_embedding = nn.Linear(hyper_size, 4 * embedding, bias=False, device="meta").to_empty(device="cpu")
        self.scale = nn.Parameter(torch.full((8, embedding, hidden_size), 0.1 / embedding))
        self.shift = nn.Parameter(torch.zeros(4, embedding, hidden_size))
        self.bias = nn.Parameter(torch.zeros(4, hidden_size))
        self.norm = _Norms(hidden_size) if layer_norm else None
        self._initialize(generator)

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator | None) -> None:
        small = 4 * self.hyper_size
        seen = torch.empty(small, self.hidden_size + self.input_size)  # the small LSTM's input is h and x in one
        for matrix in (seen, self.hyper_hh, self.weight_hh[small:], self.weight_ih[small:]):
            for gate in matrix.chunk(4):
                nn.init.orthogonal_(gate, generator=generator)
        self.weight_hh[:small], self.weight_ih[:small] = seen.split((self.hidden_size, self.input_size), 1)
        self.scale_embedding.weight.zero_()
        self.scale_embedding.bias.fill_(1.0)
        self.shift_embedding.weight.normal_(0.0, 0.01, generator=generator)
        (self.bias if self.norm is None else self.norm.shift)[_FORGET] = 1.0
        self.hyper_norm.shift[_FORGET] = 1.0

    def initial(self, batch: int) -> HyperLSTMState:
        """Returns the state at the beginning of ``batch`` sequences: zeros.

        Raises:
            SettingError: If ``batch`` is no whole number of at least 0.
        """
        require_whole("batch", batch, low=0)
        hidden, hyper = (self.weight_hh.new_zeros(batch, size) for size in (self.hidden_size, self.hyper_size))
        return HyperLSTMState(hidden, hidden, hyper, hyper)

    def forward(
        self,
        inputs: Float[Tensor, "b d"],
        state: HyperLSTMState | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> HyperLSTMState:
        """Returns the state after one more input; its ``hidden`` is the output.

        Args:
            inputs: x_t of ``b`` sequences.
            state: As returned for the step before, with its gradient; the beginning of the sequences when None.
            generator: Draws the dropout mask in training mode; torch's global random state does when None.

        Raises:
            ShapeError: If inputs or state do not fit the cell or each other.
            DtypeError: If they are not of the dtype of the weights.
        """
        require_tensor("inputs", inputs)
        if inputs.dim() != 2 or inputs.shape[1] != self.input_size:
            raise ShapeError(f"inputs must have shape (b, {self.input_size}), got {tuple(inputs.shape)}.")
        return self.steps(inputs.unsqueeze(0), state, generator=generator)[-1]

    def steps(
        self,
        inputs: Float[Tensor, "t b d"],
        state: HyperLSTMState | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> list[HyperLSTMState]:
        """Returns the states after each of several inputs: the same in less time, as their products are one.

        Args:
            inputs: x_1 to x_t of ``b`` sequences, the steps first.
            state: As in ``forward``.
            generator: As in ``forward``.

        Raises:
            ShapeError: If there are no steps, or inputs and state do not fit the cell or each other.
            DtypeError: If they are not of the dtype of the weights.
        """
        require_tensor("inputs", inputs)
        if inputs.dim() != 3 or len(inputs) == 0 or inputs.shape[2] != self.input_size:
            raise ShapeError(
                f"inputs must have shape (steps, batch, {self.input_size}) with at least one step, "
                f"got {tuple(inputs.shape)}."
            )
        require_dtype("inputs", inputs, self.weight_ih)
        state = self._started(state, inputs.shape[1])
        masks = self._masks(inputs.shape[:2], generator)
        states = []
        for t, seen in enumerate(linear(inputs, self.weight_ih).unbind()):
            state = self._step(seen, state, None if masks is None else masks[t])
            states.append(state)
        return states

    def _step(self, inputs: Float[Tensor, "b g"], state: HyperLSTMState, mask: Tensor | None) -> HyperLSTMState:
        """Takes a step; ``inputs`` is what x_t adds to the gates of both LSTMs, ``mask`` has the dropout's factors."""
        sizes = 4 * self.hyper_size, 4 * self.hidden_size
        small_x, main_x = inputs.split(sizes, 1)
        small_h, main_h = linear(state.hidden, self.weight_hh).split(sizes, 1)
        gates = small_x + torch.addmm(small_h, state.hyper_hidden, self.hyper_hh.mT)
        hyper_hidden, hyper_cell = _advance(_by_gate(gates), state.hyper_cell, self.hyper_norm, None)
        scales = torch.bmm(_by_gate(self.scale_embedding(hyper_hidden), 8), self.scale)
        shifts = torch.baddbmm(self.bias.unsqueeze(1), _by_gate(self.shift_embedding(hyper_hidden)), self.shift)
        gates = torch.addcmul(shifts, scales[:4], _by_gate(main_h))
        gates = torch.addcmul(gates, scales[4:], _by_gate(main_x))
        hidden, cell = _advance(gates, state.cell, self.norm, mask)
        return HyperLSTMState(hidden, cell, hyper_hidden, hyper_cell)

    def _masks(self, shape: torch.Size, generator: torch.Generator | None) -> Float[Tensor, "t b h"] | None:
        if not self.training or self.dropout == 0:
            return None
        kept = self.weight_hh.new_empty(*shape, self.hidden_size).bernoulli_(1 - self.dropout, generator=generator)
        return kept.div_(1 - self.dropout)

    def _started(self, state: HyperLSTMState | None, batch: int) -> HyperLSTMState:
        if state is None:
            return self.initial(batch)
        shapes = [(batch, self.hidden_size)] * 2 + [(batch, self.hyper_size)] * 2
        require_state(state, "a HyperLSTMState", shapes, batch, self.weight_hh)
        return HyperLSTMState(*state)


class HyperLSTM(nn.Module):
    """Runs a ``HyperLSTMCell`` over sequences.

    Args:
        cell: The cell. Its ``dropout`` acts in training mode.

    Raises:
        SettingError: If ``cell`` is no ``HyperLSTMCell``.

    Example:
        >>> lstm = HyperLSTM(HyperLSTMCell(50, 100, hyper_size=16))
        >>> outputs, state = lstm(torch.zeros(2, 7, 50))
        >>> outputs.shape, torch.equal(outputs[:, -1], state.hidden)
        (torch.Size([2, 7, 100]), True)
    """

    def __init__(self, cell: HyperLSTMCell) -> None:
        super().__init__()
        require("cell", cell, HyperLSTMCell, "a cell, such as HyperLSTMCell(50, 1000)")
        self.cell = cell

    def forward(
        self,
        inputs: Float[Tensor, "b t d"],
        state: HyperLSTMState | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, "b t h"], HyperLSTMState]:
        """Returns the outputs after each input, and the state after the last.

        Args:
            inputs: ``b`` sequences of ``t`` inputs.
            state: As returned for the segment before; the beginning of the sequences when None. Gradients go on into
                it: for truncated backpropagation pass ``HyperLSTMState(*(part.detach() for part in state))``.
            generator: Draws the dropout masks in training mode; torch's global random state does when None.

        Raises:
            ShapeError: If there are no steps, or inputs and state do not fit the cell or each other.
            DtypeError: If they are not of the dtype of the weights.
        """
        require_tensor("inputs", inputs)
        if inputs.dim() != 3:
            raise ShapeError(
                f"inputs must have shape (batch, steps, {self.cell.input_size}), got {tuple(inputs.shape)}."
            )
        states = self.cell.steps(inputs.transpose(0, 1), state, generator=generator)
        return torch.stack([step.hidden for step in states], 1), states[-1]


class _Norms(nn.Module):
    """LayerNorm of each of the four gates, and of the cell."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, size))
        self.shift = nn.Parameter(torch.zeros(4, size))
        self.cell = nn.LayerNorm(size, eps=_EPSILON)

    def forward(self, gates: Float[Tensor, "4 b h"]) -> Float[Tensor, "4 b h"]:
        plain = normalized(gates, gates.shape[-1:], eps=_EPSILON)
        return torch.addcmul(self.shift.unsqueeze(1), plain, self.scale.unsqueeze(1))


def _by_gate(rows: Float[Tensor, "b n"], gates: int = 4) -> Float[Tensor, "gates b h"]:
    return rows.unflatten(1, (gates, -1)).transpose(0, 1)


def _advance(
    gates: Float[Tensor, "4 b h"], cell: Float[Tensor, "b h"], norm: _Norms | None, mask: Float[Tensor, "b h"] | None
) -> tuple[Float[Tensor, "b h"], Float[Tensor, "b h"]]:
    """Returns an LSTM's output and cell after a step."""
    enter, forget, new, leave = gates if norm is None else norm(gates)
    new = new.tanh() if mask is None else new.tanh() * mask
    cell = torch.addcmul(forget.sigmoid() * cell, enter.sigmoid(), new)
    squashed = cell if norm is None else norm.cell(cell)
    return leave.sigmoid() * squashed.tanh(), cell
