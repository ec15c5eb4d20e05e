"""The LSTM's recurrence with dropout on its state, and its gradient written out.

``nn.LSTM`` has no dropout between its steps. Unrolled step by step under autograd, the gradient of the recurrent
matrix would be summed from one full-size matrix for each step; here it is one product over all of them.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from recollect.errors import SettingError


def unroll(
    gates: Float[Tensor, "t b g"],
    hidden: Float[Tensor, "b h"],
    cell: Float[Tensor, "b h"],
    weight: Float[Tensor, "g h"],
    mask: Float[Tensor, "b h"],
) -> tuple[Float[Tensor, "t b h"], Float[Tensor, "b h"]]:
    """Runs an LSTM over time; the state that each step sees is multiplied by ``mask``, the same at all steps.

    Source: Gal and Ghahramani 2016 (one mask for the whole sequence), Melis et al. 2017 (on the hidden state alone).
    Under autocast the recurrent products are computed in its dtype, everything else in that of ``gates``. Gradients go
    into ``gates`` and ``weight``. None goes into the initial state, which belongs to the segment before (truncated
    backpropagation), or into the mask.

    Args:
        gates: What the inputs and biases add to the four gates, in torch's order: input, forget, cell, output.
        hidden: The initial hidden state, in the dtype of ``gates``, as all others.
        cell: The initial cell state.
        weight: ``weight_hh`` of ``nn.LSTM``.
        mask: 0 where a unit is dropped, ``1 / (1 - p)`` elsewhere.

    Returns:
        The hidden states after all steps, and the last cell state.

    Raises:
        SettingError: From ``backward`` with ``create_graph=True``: there are no second derivatives.
    """
    device = gates.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else gates.dtype
    with torch.autocast(device, enabled=False):
        outputs, cells = cast("tuple[Tensor, Tensor]", _Unroll.apply(gates, hidden, cell, weight, mask, dtype))
    return outputs, cells


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        gates, hidden, cell, weight, mask, dtype = inputs
        shape = *gates.shape[:2], hidden.shape[1]
        size = shape[2]
        weight = weight.to(dtype)
        outputs, cells, squashed = (gates.new_empty(shape) for _ in range(3))
        seen = gates.new_empty(shape, dtype=dtype)
        gates = gates.clone()
        start = cell
        for t, gate in enumerate(gates.unbind()):
            seen[t] = hidden * mask
            gate.add_(seen[t] @ weight.mT)
            gate[:, : 2 * size].sigmoid_()
            gate[:, 2 * size : 3 * size].tanh_()
            gate[:, 3 * size :].sigmoid_()
            enter, forget, new, leave = gate.split(size, 1)
            cell = torch.mul(forget, cell, out=cells[t]).addcmul_(enter, new)
            hidden = torch.mul(leave, torch.tanh(cell, out=squashed[t]), out=outputs[t])
        ctx.save_for_backward(gates, cells, squashed, seen, start, weight, mask)
        return outputs, cell.clone()

    @staticmethod
    def backward(ctx: Any, *pulls_in: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise SettingError("unroll has no second derivatives: take its gradient with create_graph=False.")
        from_outputs, from_cell = pulls_in
        gates, cells, squashed, seen, start, weight, mask = ctx.saved_tensors
        size = mask.shape[1]
        pulls = torch.empty_like(gates)
        rounded = pulls if weight.dtype == pulls.dtype else torch.empty_like(pulls, dtype=weight.dtype)
        to_hidden, to_cell = torch.zeros_like(mask), from_cell.clone()
        with torch.autocast(gates.device.type, enabled=False):  # what forward chose, wherever backward is called
            for t in reversed(range(len(gates))):
                enter, forget, new, leave = gates[t].split(size, 1)
                to_enter, to_forget, to_new, to_leave = pulls[t].split(size, 1)
                to_hidden += from_outputs[t]
                to_cell += to_hidden * leave * (1 - squashed[t].square())
                torch.mul(to_hidden * squashed[t], leave * (1 - leave), out=to_leave)
                torch.mul(to_cell * new, enter * (1 - enter), out=to_enter)
                torch.mul(to_cell * enter, 1 - new.square(), out=to_new)
                torch.mul(to_cell * (cells[t - 1] if t else start), forget * (1 - forget), out=to_forget)
                to_cell *= forget
                if rounded is not pulls:
                    rounded[t] = pulls[t]
                to_hidden = (rounded[t] @ weight).to(mask.dtype) * mask
            to_weight = rounded.flatten(0, 1).mT @ seen.flatten(0, 1)
        return pulls, None, None, to_weight.to(mask.dtype), None, None
