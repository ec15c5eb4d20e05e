"""Networks that predict the next character of a text, and how many bits each character costs them."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, one_hot, pad

from recollect.language.lstm import State
from recollect.meta import HyperLSTM, HyperLSTMCell
from recollect.meta.hyper_lstm import HyperLSTMState
from recollect.meta.initial import drawn

_EPSILON = 1e-3  # as in HyperLSTMCell
Carried = State | HyperLSTMState


class _Weights(NamedTuple):
    """Those of ``nn.LSTM``, in its order."""

    ih: nn.Parameter
    hh: nn.Parameter
    bias: nn.Parameter
    unused: nn.Parameter
    """A second bias, which stays 0."""


class LSTM(nn.Module):
    """An LSTM that is a ``HyperLSTM`` without its small LSTM: nothing rescales the rows of its matrices.

        y_t = LN(W_h h_{t-1} + W_x x_t) + b
        c_t = sigmoid(f_t) * c_{t-1} + sigmoid(i_t) * dropout(tanh(g_t)),    h_t = sigmoid(o_t) * tanh(LN(c_t))

    Matrices are orthogonal for each gate at first, biases 0, and 1 for the forget gate.

    Args:
        input_size: Numbers in an input.
        hidden_size: Units.
        layer_norm: Whether the gates and the cell have LayerNorm.
        dropout: The chance of a unit of tanh(g_t) to be dropped in training.
        generator: Draws the initial weights.
    """

    def __init__(
        self, input_size: int, hidden_size: int, *, layer_norm: bool, dropout: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.plain = nn.LSTM(input_size, hidden_size, device="meta").to_empty(device="cpu")
        self.scale = nn.Parameter(torch.ones(4, hidden_size)) if layer_norm else None
        self.cell_norm = nn.LayerNorm(hidden_size, eps=_EPSILON) if layer_norm else nn.Identity()
        with torch.no_grad():
            weights = self._weights
            for matrix in weights[:2]:
                for gate in matrix.chunk(4):
                    nn.init.orthogonal_(gate, generator=generator)
            for bias in weights[2:]:
                bias.zero_()
            weights.bias[hidden_size : 2 * hidden_size] = 1.0
        weights.unused.requires_grad_(False)

    @property
    def _weights(self) -> "_Weights":
        return _Weights(*self.plain.all_weights[0])

    def initial(self, batch: int) -> State:
        """Returns the state at the beginning of ``batch`` texts: zeros."""
        return State(*self._weights.hh.new_zeros(2, batch, self.plain.hidden_size).unbind())

    def forward(
        self, inputs: Float[Tensor, "b t d"], state: State, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b t h"], State]:
        """Returns the outputs after each input, and the state after the last."""
        dropped = self.training and self.dropout > 0
        inputs = inputs.transpose(0, 1)
        if self.scale is None and not dropped:  # the same in half the time
            outputs, after = self.plain(inputs, (state.hidden.unsqueeze(0), state.cell.unsqueeze(0)))
            return outputs.transpose(0, 1), State(*(part.squeeze(0) for part in after))
        seen = linear(inputs, self._weights.ih)
        masks = torch.ones(1, dtype=seen.dtype).expand(len(seen), 1)
        if dropped:
            kept = 1 - self.dropout
            masks = seen.new_empty(*seen.shape[:2], state.cell.shape[1]).bernoulli_(kept, generator=generator) / kept
        outputs = []
        for gates, mask in zip(seen.unbind(), masks.unbind(), strict=True):
            state = self._step(gates, state, mask)
            outputs.append(state.hidden)
        return torch.stack(outputs, 1), state

    def _step(self, seen: Float[Tensor, "b g"], state: State, mask: Tensor) -> State:
        weights = self._weights
        gates = torch.addmm(seen, state.hidden, weights.hh.mT).unflatten(1, (4, -1))
        if self.scale is not None:
            gates = layer_norm(gates, gates.shape[-1:], eps=_EPSILON) * self.scale
        enter, forget, new, leave = (gates + weights.bias.view(4, -1)).unbind(1)
        cell = torch.addcmul(forget.sigmoid() * state.cell, enter.sigmoid(), new.tanh() * mask)
        return State(leave.sigmoid() * self.cell_norm(cell).tanh(), cell)


class CharacterModel(nn.Module):
    """Predicts the next character: one-hot characters, an LSTM, and a softmax layer.

    Args:
        kind: ``"lstm"``, ``"ln-lstm"``, ``"hyperlstm"`` or ``"ln-hyperlstm"``; with "ln" the LSTM that predicts has
            LayerNorm.
        symbols: How many characters there are.
        units: Of the LSTM.
        hyper: Units of the small LSTM, where there is one.
        embedding: N_z.
        dropout: Of what enters the cell, in training.
        generator: Draws the initial weights.
    """

    def __init__(
        self,
        kind: str,
        symbols: int,
        units: int,
        *,
        hyper: int,
        embedding: int,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.symbols = symbols
        normed = kind.startswith("ln-")
        if kind.endswith("hyperlstm"):
            sizes = {"hyper_size": hyper, "embedding": embedding}
            cell = HyperLSTMCell(symbols, units, layer_norm=normed, dropout=dropout, generator=generator, **sizes)
            self.lstm = HyperLSTM(cell)
        else:
            self.lstm = LSTM(symbols, units, layer_norm=normed, dropout=dropout, generator=generator)
        self.decoder = drawn(nn.Linear(units, symbols, device="meta"), units, generator)

    def initial(self, batch: int) -> Carried:
        """Returns the state at the beginning of ``batch`` texts."""
        return self.lstm.cell.initial(batch) if isinstance(self.lstm, HyperLSTM) else self.lstm.initial(batch)

    def forward(
        self, characters: Int[Tensor, "b t"], state: Carried, *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b t c"], Carried]:
        """Returns the logits of the character after each, and the state after the last, without its gradient."""
        inputs = one_hot(characters, self.symbols).to(self.decoder.weight.dtype)
        outputs, after = self.lstm(inputs, state, generator=generator)
        return self.decoder(outputs), type(state)(*(part.detach() for part in after))


class Rows(NamedTuple):
    """A text in rows of equal length, and which of its characters count."""

    characters: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    """The characters that come after them."""
    counted: Float[Tensor, "b t"]
    """0 behind the end of the text, else 1."""


def rows(text: Int[Tensor, " n"], count: int) -> Rows:
    """Cuts a text into so many rows; each of its characters but the first is a target once."""
    length = math.ceil((len(text) - 1) / count)
    missing = count * length - (len(text) - 1)
    parts = (text[:-1], text[1:], torch.ones(len(text) - 1))
    return Rows(*(pad(part, (0, missing)).view(count, length) for part in parts))


@torch.no_grad()
def bits_per_character(model: CharacterModel, text: Int[Tensor, " n"], *, count: int, length: int = 100) -> float:
    """Returns the mean of -log2 p(character | all before it in its row), without dropout.

    Args:
        model: Is left in training mode.
        text: The characters.
        count: Rows that are read side by side, each from a state of zeros.
        length: Characters of each row that are read at once; the state is carried on.
    """
    model.eval()
    state, total = model.initial(count), 0.0
    for characters, targets, counted in zip(*(part.split(length, 1) for part in rows(text, count)), strict=True):
        logits, state = model(characters, state)
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        total += float((losses.double() * counted.flatten()).sum())
    model.train()
    return total / math.log(2) / (len(text) - 1)
