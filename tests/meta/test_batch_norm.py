"""Batch normalization for many tasks: PyTorch's values, exact derivatives of three orders, every layout of ``vmap``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from recollect.meta.batch_norm import batch_norm

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


@pytest.mark.parametrize("shape", SHAPES)
def test_three_derivatives_against_the_formula(shape: tuple[int, ...]) -> None:
    def gradients(norm: Callable[..., Tensor]) -> list[Tensor]:
        parts = made(shape)
        y, found = norm(*parts), list[Tensor]()
        loss = (y.sin() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        for _ in range(3):
            grads = torch.autograd.grad(loss, parts, create_graph=True)
            found += [grad.detach() for grad in grads]
            weights = [torch.linspace(1, 2, grad.numel(), dtype=grad.dtype).view_as(grad) for grad in grads]
            loss = sum(((g.cos() * w).sum() for g, w in zip(grads, weights, strict=True)), torch.zeros(()))
        return found

    for got, expected in zip(gradients(ours), gradients(written_out), strict=True):
        torch.testing.assert_close(got, expected)


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
    torch.testing.assert_close(found, expected)
    push = drawn(*found.shape, seed=7)
    for got, right in zip(
        torch.autograd.grad(found, leaves, push), torch.autograd.grad(expected, leaves, push), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_a_single_number_has_no_statistics() -> None:
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 3\)"):
        batch_norm(drawn(1, 3), None, None, EPS)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 3\)"):
        vmap(lambda x: batch_norm(x, None, None, EPS))(drawn(4, 1, 3))
