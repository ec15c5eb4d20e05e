"""Heads for more classes: what they predict before anything is learned, and after one write to the memory."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.errors import HeadError, SettingError
from recollect.heads import grow

Untouched = Callable[[], AbstractContextManager[None]]


def made(inputs: int = 6, outputs: int = 4, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    g = torch.Generator().manual_seed(0)
    head = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=dtype)
    for parameter in head.parameters():
        parameter.data.normal_(generator=g)
    return head


def keys(count: int = 500, size: int = 6) -> torch.Tensor:
    return 3 * torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [4, 5, 9])
def test_logits_are_the_old_ones_and_their_mean(bias: bool, classes: int) -> None:
    head = made(bias=bias)
    before, after = head(keys()), grow(head, classes)(keys())
    assert after.shape == (500, classes)
    torch.testing.assert_close(after[:, :4], before, rtol=1e-12, atol=1e-12)
    mean = before.mean(1, keepdim=True).expand(-1, classes - 4)
    torch.testing.assert_close(after[:, 4:], mean, rtol=1e-12, atol=1e-12)


def test_no_prediction_changes() -> None:
    head = made()
    before, after = head(keys()), grow(head, 50)(keys())
    assert torch.equal(before.argmax(1), after.argmax(1))
    old, new = before.softmax(1), after.softmax(1)[:, :4]
    torch.testing.assert_close(new / new.sum(1, keepdim=True), old, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_old_weights_are_kept_bit_for_bit(bias: bool, dtype: torch.dtype) -> None:
    head = made(bias=bias, dtype=dtype)
    grown = grow(head, 7)
    assert type(grown) is nn.Linear
    assert (grown.in_features, grown.out_features, grown.bias is not None) == (6, 7, bias)
    for name, old in head.named_parameters():
        assert torch.equal(grown.get_parameter(name)[:4], old)
    assert {parameter.dtype for parameter in grown.parameters()} == {dtype}


@pytest.mark.parametrize(("weight", "bias"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("training", [True, False])
def test_what_was_frozen_stays_so(weight: bool, bias: bool, training: bool) -> None:
    head = made().train(training)
    head.weight.requires_grad_(weight)
    head.bias.requires_grad_(bias)
    grown = grow(head, 7)
    assert (grown.weight.requires_grad, grown.bias.requires_grad, grown.training) == (weight, bias, training)
    assert grown.weight.is_leaf
    assert grown.bias.is_leaf


def test_the_old_head_is_left_alone() -> None:
    head = made()
    weight, bias = head.weight.clone(), head.bias.clone()
    for classes in (4, 7):
        grown = grow(head, classes)
        for parameter in grown.parameters():
            parameter.data.fill_(9)
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert head.out_features == 4


def test_a_grown_head_grows_on() -> None:
    head = made()
    one, two = grow(head, 9), grow(grow(head, 6), 9)
    torch.testing.assert_close(one(keys()), two(keys()), rtol=1e-10, atol=1e-10)


def test_a_grown_head_learns() -> None:
    grown = grow(made(), 6)
    nn.functional.cross_entropy(grown(keys(8)), torch.full((8,), 5)).backward()
    assert grown.weight.grad is not None
    assert (grown.weight.grad.abs().sum(1) > 0).all()


def test_growing_draws_nothing(rng_untouched: Untouched) -> None:
    head = made()
    with rng_untouched():
        grow(head, 7)


def test_only_linear_layers_grow(untyped: None) -> None:
    with pytest.raises(HeadError, match=r"torch.nn.Linear, got Sequential.*net\[-1\] = grow"):
        grow(nn.Sequential(made()), 7)
    with pytest.raises(HeadError, match="got NoneType"):
        grow(None, 7)


def test_a_layer_whose_weight_is_made_from_others_does_not_grow() -> None:
    with pytest.raises(HeadError, match=r"torch.nn.Linear, got ParametrizedLinear"):
        grow(nn.utils.parametrizations.weight_norm(made()), 7)


def test_a_layer_that_computes_something_else_does_not_grow() -> None:
    class Cosine(nn.Linear):
        def forward(self, keys: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.normalize(keys))

    with pytest.raises(HeadError, match=r"torch.nn.Linear, got Cosine"):
        grow(Cosine(6, 4), 7)


@pytest.mark.parametrize("classes", [3, 0, -1, True, 7.0, "7", None])
def test_a_head_does_not_shrink(untyped: None, classes: object) -> None:
    with pytest.raises(SettingError, match=f"a whole number of at least 4, got {classes!r}"):
        grow(made(), classes)


def test_a_class_that_nobody_foresaw_is_predicted_once_it_is_written() -> None:
    grown = grow(made(dtype=torch.float32), 6)
    memory = EpisodicMemory(capacity=10, key_size=6)
    model = MbPA(grown, memory, neighbors=3, adaptation=LocalAdaptation(rules.sgd(1.0), steps=5))
    queries = keys(20).float()
    before = model(queries).argmax(1)
    assert (before < 4).all()
    memory.write(queries[:1], torch.tensor([5]))
    memory.write(queries[1:2], torch.tensor([4]))
    assert model(queries[:2]).argmax(1).tolist() == [5, 4]
    assert model(queries[:1] + 0.01).argmax(1).tolist() == [5]
    assert torch.equal(grown(queries).argmax(1), before), "the head itself learns nothing"
