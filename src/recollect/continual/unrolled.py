"""Recurrent layers written out step by step: torch's own add their biases in place, which ``vmap`` refuses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

State = tuple[Tensor, ...]  # (h,), or (h, c) of an LSTM
_CELLS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "tanh", "RNN_RELU": "relu"}


def unrolled(module: nn.Module) -> Callable[..., Any] | None:
    """Returns what a recurrent layer computes in evaluation mode, as a function of ``(params, *its arguments)``.

    Packed sequences are not understood. Other modules: None.
    """
    if isinstance(module, nn.RNNBase):
        return lambda params, x, hx=None: _layers(module, params, x, hx)
    if isinstance(module, nn.RNNCellBase):
        return lambda params, x, hx=None: _single(module, params, x, hx)
    return None


def _single(module: nn.RNNCellBase, params: dict[str, Tensor], x: Tensor, hx: Any) -> Any:
    kind = "lstm" if isinstance(module, nn.LSTMCell) else "gru" if isinstance(module, nn.GRUCell) else ""
    kind = kind or str(module.nonlinearity)
    zeros = x.new_zeros(*x.shape[:-1], module.hidden_size)
    state: State = (zeros, zeros) if hx is None else tuple(hx) if kind == "lstm" else (hx,)
    new = _step(kind, params, "", linear(x, params["weight_ih"], params.get("bias_ih")), state)
    return new if kind == "lstm" else new[0]


def _layers(module: nn.RNNBase, params: dict[str, Tensor], x: Tensor, hx: Any) -> Any:
    kind = _CELLS[module.mode]
    if x.dim() == 2:
        raise ValueError("a sequence needs its dimension of examples")
    steps = x.transpose(0, 1) if module.batch_first else x  # (t, b, d)
    directions = 2 if module.bidirectional else 1
    if hx is None:
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)
        start: State = tuple(x.new_zeros(module.num_layers * directions, steps.shape[1], size) for size in sizes)
    else:
        start = tuple(hx) if kind == "lstm" else (hx,)
    finals: list[State] = []
    for layer in range(module.num_layers):
        passes = []
        for direction in range(directions):
            state = tuple(part[len(finals)] for part in start[: 2 if kind == "lstm" else 1])
            suffix = f"_l{layer}{'_reverse' if direction else ''}"
            made, state = _sequence(kind, params, suffix, steps.flip(0) if direction else steps, state)
            passes.append(made.flip(0) if direction else made)
            finals.append(state)
        steps = torch.cat(passes, -1)
    last = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    output = steps.transpose(0, 1) if module.batch_first else steps
    return output, (last if kind == "lstm" else last[0])


def _sequence(kind: str, params: dict[str, Tensor], suffix: str, steps: Tensor, state: State) -> tuple[Tensor, State]:
    entering = linear(steps, params[f"weight_ih{suffix}"], params.get(f"bias_ih{suffix}"))
    made = []
    for gates in entering:
        state = _step(kind, params, suffix, gates, state)
        made.append(state[0])
    return torch.stack(made), state


def _step(kind: str, params: dict[str, Tensor], suffix: str, entering: Tensor, state: State) -> State:
    """Returns the next state; ``entering`` is what the input adds to the gates."""
    recurrent = linear(state[0], params[f"weight_hh{suffix}"], params.get(f"bias_hh{suffix}"))
    if kind == "gru":
        (r, z, n), (hr, hz, hn) = entering.chunk(3, -1), recurrent.chunk(3, -1)
        update = (z + hz).sigmoid()
        return ((1 - update) * (n + (r + hr).sigmoid() * hn).tanh() + update * state[0],)
    if kind != "lstm":
        total = entering + recurrent
        return (total.tanh() if kind == "tanh" else total.relu(),)
    enter, forget, cell, leave = (entering + recurrent).chunk(4, -1)
    memory = forget.sigmoid() * state[1] + enter.sigmoid() * cell.tanh()
    hidden = leave.sigmoid() * memory.tanh()
    project = params.get(f"weight_hr{suffix}")
    return (hidden if project is None else linear(hidden, project), memory)
