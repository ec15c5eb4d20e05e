"""The small networks of the experiments."""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from recollect.errors import SettingError
from recollect.models import mlp

Untouched = Callable[[], AbstractContextManager[None]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_layers_and_sizes() -> None:
    net = mlp(6, 5, 4, 3, generator=generator())
    assert [type(layer) for layer in net] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert net(torch.zeros(2, 7, 6)).shape == (2, 7, 3)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in net.parameters())


def test_two_sizes_make_one_linear_layer() -> None:
    assert [type(layer) for layer in mlp(6, 3, generator=generator())] == [nn.Linear]


def test_weights_come_from_the_generator_alone(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, same, other = (mlp(6, 5, 3, generator=generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_weights_are_uniform_as_those_of_nn_linear() -> None:
    theirs, ours = nn.Linear(400, 300), mlp(400, 300, generator=generator())[0]
    assert isinstance(ours, nn.Linear)
    for a, b in ((theirs.weight, ours.weight), (theirs.bias, ours.bias)):
        assert b.abs().max() <= 400**-0.5
        assert b.abs().max() > 0.95 * 400**-0.5
        assert b.std().item() == pytest.approx(a.std().item(), rel=0.1)


def test_without_a_generator_the_global_random_state_is_used() -> None:
    torch.manual_seed(7)
    one = mlp(6, 3)[0].weight
    torch.manual_seed(7)
    assert torch.equal(one, mlp(6, 3)[0].weight)


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (-1, 2)])
def test_impossible_sizes_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match="input size and an output size"):
        mlp(*sizes)


def test_generator_is_keyword_only() -> None:
    assert inspect.signature(mlp).parameters["generator"].kind is inspect.Parameter.KEYWORD_ONLY
