"""``linear_cross_entropy`` against ``F.cross_entropy`` of all logits at once."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from recollect.errors import SettingError, ShapeError
from recollect.language.loss import linear_cross_entropy

DOUBLE = torch.float64
CHUNK = 256


class Inputs(NamedTuple):
    inputs: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor


def draw(rows: int, *, size: int = 5, classes: int = 11, dtype: torch.dtype = DOUBLE, scale: float = 1.0) -> Inputs:
    g = torch.Generator().manual_seed(rows)
    parts = [scale * torch.randn(*shape, generator=g, dtype=DOUBLE) for shape in ((rows, size), (classes, size))]
    parts.append(torch.randn(classes, generator=g, dtype=DOUBLE))
    inputs, weight, bias = (part.to(dtype).requires_grad_() for part in parts)
    return Inputs(inputs, weight, bias, torch.randint(0, classes, (rows,), generator=g))


def literal(inputs: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(linear(inputs, weight, bias), targets)


def pulled(function: Callable[..., Tensor], given: Inputs, factor: float = 1.0) -> tuple[Tensor, ...]:
    """The loss, and the gradients of ``factor * loss``."""
    loss = function(*given)
    return loss.detach(), *torch.autograd.grad(factor * loss, given[:3])


@pytest.mark.parametrize("rows", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK - 100])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_torch(rows: int, factor: float) -> None:
    given = draw(rows)
    for ours, theirs in zip(pulled(linear_cross_entropy, given, factor), pulled(literal, given, factor), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """One class at 1000, one at -1000: sure and right costs nothing, sure and wrong 1000 or 2000."""
    inputs, weight = torch.ones(3, 1, dtype=dtype), torch.tensor([[1000.0], [-1000.0], [0.0]], dtype=dtype)
    given = Inputs(inputs, weight, torch.zeros(3, dtype=dtype), torch.tensor([0, 1, 2]))
    for part in given[:3]:
        part.requires_grad_()
    ours, theirs = pulled(linear_cross_entropy, given), pulled(literal, given)
    assert float(ours[0]) == 1000.0
    torch.testing.assert_close(ours, theirs)
    assert linear_cross_entropy(inputs[:1], *given[1:3], given.targets[:1]).item() == 0.0


def test_autocast_is_close_and_stays_in_the_dtype_of_the_weight() -> None:
    given = draw(CHUNK + 50, size=32, dtype=torch.float32, scale=0.5)
    exact = pulled(linear_cross_entropy, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close = pulled(linear_cross_entropy, given)
        narrow = given._replace(inputs=given.inputs.detach().bfloat16().requires_grad_())
        from_narrow = pulled(linear_cross_entropy, narrow)
    for one, other in zip(close, exact, strict=True):
        assert one.dtype == torch.float32
        assert not torch.equal(one, other), "the products were not computed in bfloat16"
        assert (one - other).norm() < 0.02 * other.norm()
    assert from_narrow[1].dtype == torch.bfloat16, "a gradient has the dtype of what it belongs to"
    assert torch.equal(from_narrow[1], close[1].bfloat16())
    assert all(torch.equal(one, other) for one, other in zip(from_narrow[2:], close[2:], strict=True))


def test_the_upstream_gradient_may_come_from_another_dtype() -> None:
    given = draw(7, dtype=torch.float32)
    wide = torch.autograd.grad(3 * linear_cross_entropy(*given).double(), given[:3])
    assert all(
        torch.equal(one, other) for one, other in zip(wide, pulled(linear_cross_entropy, given, 3)[1:], strict=True)
    )


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(2 * CHUNK)
    frozen = Inputs(*(part.detach() for part in given))
    loss = linear_cross_entropy(*given).detach()

    def pull(*_: object) -> None:
        raise AssertionError("a gradient is made")

    monkeypatch.setattr(Tensor, "scatter_add_", pull)
    with pytest.raises(AssertionError, match="a gradient"):
        linear_cross_entropy(*given)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*given), loss)
    assert torch.equal(linear_cross_entropy(*frozen), loss)


def test_a_part_may_be_frozen() -> None:
    given = draw(9)
    frozen = given._replace(inputs=given.inputs.detach(), weight=given.weight.detach())
    (ours,) = torch.autograd.grad(linear_cross_entropy(*frozen), given.bias)
    torch.testing.assert_close(ours, pulled(literal, given)[3], rtol=1e-12, atol=1e-14)


def test_targets_may_be_narrow() -> None:
    given = draw(9)
    for dtype in (torch.int8, torch.int16, torch.int32):
        narrow = given._replace(targets=given.targets.to(dtype))
        assert torch.equal(linear_cross_entropy(*narrow), linear_cross_entropy(*given))


def test_no_rows_have_no_mean() -> None:
    """``F.cross_entropy`` returns NaN here, which would end a training without a word."""
    with pytest.raises(ShapeError, match="one or more rows, got 0 for 0"):
        linear_cross_entropy(*draw(0))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("count", [0, 1, 299, 301])
def test_one_target_for_each_row(count: int) -> None:
    given = draw(300)
    with pytest.raises(ShapeError, match=f"got {count} for 300"):
        linear_cross_entropy(*given[:3], torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("wrong", [-1, 11, -100])
def test_targets_are_classes(wrong: int) -> None:
    given = draw(3)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(*given[:3], torch.tensor([0, wrong, 1]))


def test_no_second_derivatives() -> None:
    given = draw(3)
    with pytest.raises(SettingError, match=r"linear_cross_entropy has no second derivatives.*create_graph=False"):
        torch.autograd.grad(linear_cross_entropy(*given), given.weight, create_graph=True)


def test_inputs_and_random_state_stay(rng_untouched: Callable[[], AbstractContextManager[None]]) -> None:
    given = draw(CHUNK + 1)
    before = [part.detach().clone() for part in given]
    with rng_untouched():
        pulled(linear_cross_entropy, given)
    assert all(torch.equal(part, old) for part, old in zip(given, before, strict=True))
