"""Layers of many tasks at once: PyTorch's values, exact derivatives of three orders, every layout of ``vmap``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from recollect.meta.folded import batch_norm, convolution

EPS = 1e-2
SHAPES = [(5, 3), (4, 3, 6), (3, 2, 2, 4), (2, 2, 3, 2, 2)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def made(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (shape, shape[1:2], shape[1:2])
    x, weight, bias = (drawn(*size, seed=seed).requires_grad_() for seed, size in enumerate(sizes))
    return x, weight, bias


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm(x, weight, bias, EPS)


def written_out(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    over, wide = (0, *range(2, x.dim())), (-1, *(1 for _ in x.shape[2:]))
    away = x - x.mean(over, keepdim=True)
    return away / ((away**2).mean(over, keepdim=True) + EPS).sqrt() * weight.view(wide) + bias.view(wide)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_values(shape: tuple[int, ...], affine: bool) -> None:
    x, weight, bias = made(shape)
    found = batch_norm(x, weight, bias, EPS) if affine else batch_norm(x, None, None, EPS)
    weight, bias = (weight, bias) if affine else (torch.ones_like(weight), torch.zeros_like(bias))
    torch.testing.assert_close(found, torch.nn.functional.batch_norm(x, None, None, weight, bias, True, eps=EPS))
    torch.testing.assert_close(found, written_out(x, weight, bias))


@pytest.mark.parametrize("shape", SHAPES)
def test_two_derivatives_against_differences(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(ours, made(shape))
    assert torch.autograd.gradgradcheck(ours, made(shape))


def three(call: Callable[..., Tensor], parts: tuple[Tensor, ...], held: tuple[int, ...] = ()) -> list[Tensor]:
    """Returns the derivatives of three orders of something that bends everywhere; those held are numbers."""
    parts = tuple(part.detach().clone().requires_grad_(place not in held) for place, part in enumerate(parts))
    y, found = call(*parts), list[Tensor]()
    parts = tuple(part for part in parts if part.requires_grad)
    loss = (y.sin() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    for _ in range(3):
        grads = torch.autograd.grad(loss, parts, create_graph=True)
        found += [grad.detach() for grad in grads]
        weights = [torch.linspace(1, 2, grad.numel(), dtype=grad.dtype).view_as(grad) for grad in grads]
        loss = sum(((g.cos() * w).sum() for g, w in zip(grads, weights, strict=True)), torch.zeros(()))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_three_derivatives_against_the_formula(shape: tuple[int, ...]) -> None:
    for got, expected in zip(three(ours, made(shape)), three(written_out, made(shape)), strict=True):
        torch.testing.assert_close(got, expected)


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    """The same values, and the same derivatives by the leaves."""
    torch.testing.assert_close(found, expected)
    push = drawn(*found.shape, seed=7)
    for got, right in zip(
        torch.autograd.grad(found, leaves, push), torch.autograd.grad(expected, leaves, push), strict=True
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("dims", [(0, 0, 0), (1, 1, 0), (2, None, None), (None, 0, 1), (3, None, 0), (None, None, 0)])
def test_many_tasks(dims: tuple[int | None, ...]) -> None:
    parts = [drawn(*shape, seed=seed) for seed, shape in enumerate([(5, 3, 4), (3,), (3,)])]
    many = [
        part if dim is None else torch.stack([part + task * drawn(*part.shape, seed=9) for task in range(2)], dim)
        for part, dim in zip(parts, dims, strict=True)
    ]
    leaves = [part.clone().requires_grad_() for part in many]
    found = vmap(ours, in_dims=dims)(*leaves)
    each = [
        [part if dim is None else part.select(dim, task) for part, dim in zip(leaves, dims, strict=True)]
        for task in range(2)
    ]
    expected = torch.stack([written_out(*own) for own in each])
    assert_same(found, expected, leaves)


def test_a_single_number_has_no_statistics() -> None:
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 3\)"):
        batch_norm(drawn(1, 3), None, None, EPS)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 3\)"):
        vmap(lambda x: batch_norm(x, None, None, EPS))(drawn(4, 1, 3))


LAYERS: dict[str, Callable[[], nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "plain": lambda: nn.Conv2d(2, 3, 2),
    "no bias": lambda: nn.Conv2d(2, 3, 2, bias=False),
    "stride, padding": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=(1, 2)),
    "dilation": lambda: nn.Conv2d(2, 3, 2, dilation=2),
    "groups": lambda: nn.Conv2d(2, 4, 2, groups=2),
    "1d": lambda: nn.Conv1d(2, 3, 3, stride=2),
    "3d": lambda: nn.Conv3d(2, 3, 2),
    "same": lambda: nn.Conv2d(2, 3, 3, padding="same"),
    "circular": lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="circular"),
}


def layer_and_parts(name: str) -> tuple[nn.Conv1d | nn.Conv2d | nn.Conv3d, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    return layer, (drawn(2, 2, *[4] * (layer.weight.dim() - 2)), *(p.detach() for p in layer.parameters()))


def under(layer: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Returns a layer's call as a function of inputs and parameters."""
    holder = nn.Module()
    holder.layer = layer
    holder.forward = call
    names = [f"layer.{name}" for name, _ in layer.named_parameters()]
    return lambda x, *own: functional_call(holder, dict(zip(names, own, strict=True)), (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_and_their_derivatives(name: str) -> None:
    layer, parts = layer_and_parts(name)
    mine, theirs = under(layer, lambda x: convolution(x, layer)), under(layer, layer.forward)
    torch.testing.assert_close(mine(*parts), theirs(*parts))
    for got, expected in zip(three(mine, parts), three(theirs, parts), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradgradcheck(mine, tuple(part.requires_grad_() for part in parts))


@pytest.mark.parametrize("still", [0, 1, 2, (0, 1), (1, 2), (0, 2)])
def test_second_derivatives_where_some_parts_are_numbers(still: int | tuple[int, ...]) -> None:
    layer, parts = layer_and_parts("stride, padding")
    held = (still,) if isinstance(still, int) else still
    for place, part in enumerate(parts):
        part.requires_grad_(place not in held)
    mine = under(layer, lambda x: convolution(x, layer))
    assert torch.autograd.gradgradcheck(mine, parts)
    for got, expected in zip(three(mine, parts, held), three(under(layer, layer.forward), parts, held), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "dims", [(0, 0, 0), (1, 1, 0), (2, None, None), (None, 0, 1), (3, None, 0), (0, 1, None), (None, None, 0)]
)
def test_convolutions_of_many_tasks(name: str, dims: tuple[int | None, ...]) -> None:
    layer, parts = layer_and_parts(name)
    dims = dims[: len(parts)]
    if all(dim is None for dim in dims):
        return
    dims = tuple(None if dim is None else min(dim, part.dim()) for dim, part in zip(dims, parts, strict=True))
    leaves = [
        (part if dim is None else torch.stack([part, part + drawn(*part.shape, seed=9)], dim)).requires_grad_()
        for part, dim in zip(parts, dims, strict=True)
    ]
    found = vmap(under(layer, lambda x: convolution(x, layer)), in_dims=dims)(*leaves)
    theirs = under(layer, layer.forward)
    expected = torch.stack(
        [
            theirs(*(part if dim is None else part.select(dim, task) for part, dim in zip(leaves, dims, strict=True)))
            for task in range(2)
        ]
    )
    assert_same(found, expected, leaves)


def test_an_image_alone_is_no_batch() -> None:
    layer, (x, *_) = layer_and_parts("plain")
    torch.testing.assert_close(convolution(x[0], layer), layer(x)[0])
