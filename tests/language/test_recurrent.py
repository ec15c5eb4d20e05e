"""``unroll`` against ``nn.LSTM``, and against one step after the other under autograd."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recollect.errors import SettingError
from recollect.language.recurrent import unroll

DOUBLE = torch.float64


class Inputs(NamedTuple):
    gates: Tensor
    hidden: Tensor
    cell: Tensor
    weight: Tensor
    mask: Tensor


def draw(*, steps: int = 5, batch: int = 3, size: int = 4, dtype: torch.dtype = DOUBLE, seed: int = 0) -> Inputs:
    """Random inputs; a third of the state is dropped, and gates and weight take gradients."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=DOUBLE).to(dtype)

    mask = (torch.rand(batch, size, generator=g, dtype=DOUBLE) > 1 / 3).to(dtype) * 1.5
    gates, weight = normal(steps, batch, 4 * size), normal(4 * size, size) / size**0.5
    return Inputs(gates.requires_grad_(), normal(batch, size), normal(batch, size), weight.requires_grad_(), mask)


def literal(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for gate in gates:
        enter, forget, new, leave = (gate + (hidden * mask) @ weight.mT).chunk(4, dim=1)
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs), cell


def pulled(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs, seed: int = 1) -> tuple[Tensor, ...]:
    """Both results, and the gradients of gates and weight for random weights of all numbers in them."""
    g = torch.Generator().manual_seed(seed)
    outputs, cell = function(*inputs)
    weights = [torch.randn(part.shape, generator=g, dtype=DOUBLE).to(part.dtype) for part in (outputs, cell)]
    loss = (outputs * weights[0]).sum() + (cell * weights[1]).sum()
    return outputs.detach(), cell.detach(), *torch.autograd.grad(loss, (inputs.gates, inputs.weight))


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_literal_loop(steps: int, batch: int, size: int, seed: int) -> None:
    inputs = draw(steps=steps, batch=batch, size=size, seed=seed)
    for ours, theirs in zip(pulled(unroll, inputs), pulled(literal, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_torch() -> None:
    """With nothing dropped it is ``nn.LSTM``, gradients included."""
    g = torch.Generator().manual_seed(0)
    lstm = nn.LSTM(3, 4, dtype=DOUBLE)
    words = torch.randn(6, 2, 3, generator=g, dtype=DOUBLE)
    hidden, cell = torch.randn(2, 2, 4, generator=g, dtype=DOUBLE)
    weights = torch.randn(6, 2, 4, generator=g, dtype=DOUBLE)

    def gradients(outputs: Tensor, last: Tensor) -> list[Tensor]:
        loss = (outputs * weights).sum() + last.square().sum()
        return [outputs, last, *torch.autograd.grad(loss, list(lstm.parameters()))]

    theirs, (_, last) = lstm(words, (hidden.unsqueeze(0), cell.unsqueeze(0)))
    gates = words @ lstm.get_parameter("weight_ih_l0").mT
    gates = gates + lstm.get_parameter("bias_ih_l0") + lstm.get_parameter("bias_hh_l0")
    ours = unroll(gates, hidden, cell, lstm.get_parameter("weight_hh_l0"), torch.ones_like(hidden))
    for one, other in zip(gradients(*ours), gradients(theirs, last.squeeze(0)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    gates, hidden, cell, weight, mask = draw(steps=3, batch=2, size=3)
    torch.autograd.gradcheck(lambda g, w: unroll(g, hidden, cell, w, mask), (gates, weight))


def test_each_result_can_be_used_without_the_other() -> None:
    inputs = draw()
    for one in (0, 1):
        ours, theirs = (
            torch.autograd.grad(function(*inputs)[one].square().sum(), (inputs.gates, inputs.weight))
            for function in (unroll, literal)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_gradient_goes_into_state_and_mask() -> None:
    inputs = draw()
    for part in (inputs.hidden, inputs.cell, inputs.mask):
        part.requires_grad_()
    unroll(*inputs)[0].sum().backward()
    assert inputs.hidden.grad is None
    assert inputs.cell.grad is None
    assert inputs.mask.grad is None
    assert inputs.gates.grad is not None


def test_autocast_is_close_and_stays_in_the_dtype_of_the_gates() -> None:
    inputs = draw(steps=20, size=16, dtype=torch.float32)
    exact = pulled(unroll, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close = pulled(unroll, inputs)
    for one, other in zip(close, exact, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other), "the products were not computed in bfloat16"
        assert (one - other).norm() < 0.02 * other.norm()


def test_what_forward_computes_in_holds_for_backward() -> None:
    inputs = draw(dtype=torch.float32)
    gradients = []
    for within in (False, True):
        loss = unroll(*inputs)[0].sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            gradients.append(torch.autograd.grad(loss, (inputs.gates, inputs.weight)))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_no_second_derivatives() -> None:
    inputs = draw()
    with pytest.raises(SettingError, match=r"unroll has no second derivatives.*create_graph=False"):
        torch.autograd.grad(unroll(*inputs)[0].sum(), inputs.gates, create_graph=True)


def test_inputs_and_random_state_stay(rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    inputs = draw()
    before = [part.detach().clone() for part in inputs]
    with rng_untouched():
        pulled(unroll, inputs)
    assert all(torch.equal(part, old) for part, old in zip(inputs, before, strict=True))
