"""The grid of settings against the library's predictors, against autograd, and by the rules of honest scoring."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Parametric, neural_cache, rules
from recollect.errors import DtypeError, LabelError, NonFiniteError, SettingError, ShapeError
from recollect.language.dynamic import DynamicEvaluation, gradient_statistics
from recollect.language.evaluate import evaluate
from recollect.language.grid import Scores, score
from recollect.language.lstm import LSTMModel
from recollect.language.reading import Reading, read, read_dynamically
from recollect.language.settings import CacheGrid, CacheSetting, MbPAGrid, MbPASetting

WORDS, FIRST = 20, 3
CACHES = CacheGrid(sizes=(25, 4, 500), flatness=(0.0, 2.0, 5.0))
ONE_STEP = MbPAGrid(sizes=(25, 4), neighbors=(1, 3, 30, 900), rates=(0.0, 0.15, 1.0))
MORE_STEPS = MbPAGrid(sizes=(4, 25), neighbors=(2, 6), rates=(0.5, 0.0), steps=(1, 3, 4))
MBPAS = (ONE_STEP, MORE_STEPS)
POINTS = [point for grid in MBPAS for point in grid.points()]
CHOSEN = MbPASetting(25, 6, 0.5, 4)
READERS = ("hidden", "input", "dynamic")


def text(length: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(WORDS // 2, (length,), generator=torch.Generator().manual_seed(seed))


@cache
def model() -> LSTMModel:
    generator = torch.Generator().manual_seed(0)
    return LSTMModel(WORDS, hidden_size=8, embedding_size=5, generator=generator).double()


@cache
def statistics() -> dict[str, Tensor]:
    return gradient_statistics(model(), text(60, 9), batch=2)


def readings(reader: str, tokens: Any) -> list[Reading]:
    if reader != "dynamic":
        return list(read(model(), tokens, first=FIRST, key=reader, block=7))
    with DynamicEvaluation(model(), statistics(), rate=5e-3) as dynamic:
        return list(read_dynamically(model(), dynamic, tokens, first=FIRST, segment=5))


def keys(reader: str) -> Callable[..., Any]:
    def inputs(tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, state = model().hidden(tokens, state)
        return model().inputs(hidden), state

    return inputs if reader == "input" else model().hidden


def memory(size: int, width: int) -> EpisodicMemory:
    return EpisodicMemory(size, width, key_dtype=torch.float64, history=256)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=1e-10)


# Against the library's predictors


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("reader", ["hidden", "input"])
@pytest.mark.parametrize("length", [50, 600])  # within one block, and over several, with a window that goes round
def test_it_gives_what_the_predictors_give(reader: str, length: int) -> None:
    tokens = text(length)
    width, head = (8, model().decoder) if reader == "hidden" else (5, model().output)
    names = ("1.weight", "1.bias") if reader == "hidden" else ("weight", "bias")
    scores = score(read(model(), tokens, first=FIRST, key=reader), CACHES, MBPAS)

    def nats(output: Any, memory: EpisodicMemory | None) -> Tensor:
        return evaluate(keys(reader), output, memory, tokens, first=FIRST).nats.neg().exp()

    close(scores.model, nats(Parametric(head), None))
    for setting in (CacheSetting(25, 0.0), CacheSetting(4, 5.0), CacheSetting(500, 2.0)):
        one = memory(setting.size, width)
        expected = nats(neural_cache(one, classes=WORDS, flatness=setting.flatness), one)
        close(scores.cache[CACHES.points().index(setting)], expected)
    for setting in (*(MbPASetting(25, 3, 0.15), MbPASetting(4, 30, 1.0), MbPASetting(25, 900, 1.0)), CHOSEN):
        one = memory(setting.size, width)
        adaptation = LocalAdaptation(rules.sgd(setting.rate), steps=setting.steps, parameters=names)
        adapted = MbPA(head, one, neighbors=setting.neighbors, adaptation=adaptation)
        close(scores.mbpa[POINTS.index(setting)], nats(adapted, one))
    assert torch.equal(scores.tokens, tokens)


@pytest.mark.parametrize("reader", READERS)
def test_the_cache_is_the_textbook_sum(reader: str) -> None:
    tokens = text()
    scores, parts = score(readings(reader, tokens), CACHES, MBPAS), readings(reader, tokens)
    states = torch.cat([part.keys for part in parts])
    for number, (size, theta) in enumerate(CACHES.points()):
        for t in (0, 1, 7, 30, 49):
            window = range(max(0, t - size), t)
            votes = {s: float(torch.exp(theta * states[t] @ states[s])) for s in window}
            right = sum(vote for s, vote in votes.items() if tokens[s] == tokens[t])
            expected = right / sum(votes.values()) if votes else 1 / WORDS
            assert float(scores.cache[number, t]) == pytest.approx(expected, abs=1e-10)


def adapted(layer: nn.Linear, near: list[int], parts: Reading, t: int, setting: MbPASetting, bias: bool) -> Tensor:
    """Gradient descent on the weighted neighbors, on a copy of the softmax layer."""
    layer = deepcopy(layer).requires_grad_(True)
    for _ in range(setting.steps if near else 0):
        weights = torch.stack([1 / (1e-3 + (parts.keys[s] - parts.keys[t]).square().sum()) for s in near])
        losses = cross_entropy(layer(parts.inputs[near]), parts.targets[near], reduction="none")
        layer.zero_grad()
        (weights / weights.sum() @ losses).backward()
        with torch.no_grad():
            layer.weight -= setting.rate * layer.weight.grad
            if bias:
                layer.bias -= setting.rate * layer.bias.grad
    return layer(parts.inputs[t]).softmax(0)[parts.targets[t]].detach()


@pytest.mark.parametrize("reader", ["hidden", "input"])
@pytest.mark.parametrize("bias", [True, False])
def test_mbpa_is_autograd_on_a_copy(reader: str, bias: bool) -> None:
    listed = [part._replace(bias=bias) for part in readings(reader, text())]
    scores = score(listed, CACHES, MBPAS)
    parts = Reading(*(torch.cat(some) for some in zip(*(one[:4] for one in listed), strict=True)))
    for number, setting in enumerate(POINTS):
        for t in (0, 1, 2, 20, 49):
            far = {s: float((parts.keys[s] - parts.keys[t]).square().sum()) for s in range(max(0, t - setting.size), t)}
            near = sorted(far, key=far.__getitem__)[: setting.neighbors]
            close(scores.mbpa[number, t], adapted(model().output, near, parts, t, setting, bias))


def test_an_empty_memory_and_no_step_are_the_model() -> None:
    scores = score(readings("hidden", text()), CACHES, MBPAS)
    close(scores.mbpa[:, 0], scores.model[0].expand(len(POINTS)))
    still = [number for number, setting in enumerate(POINTS) if setting.rate == 0]
    close(scores.mbpa[still], scores.model.expand(len(still), -1))


# The rules


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("turn", [0, 3, 21, 49])
def test_scores_depend_on_the_words_before_alone(reader: str, turn: int) -> None:
    other = torch.cat([text()[:turn], text(50 - turn, turn + 1)])
    results = [score(readings(reader, tokens), CACHES, MBPAS) for tokens in (text(), other)]
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one[..., :turn], two[..., :turn], rtol=0, atol=1e-12)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("reader", READERS)
def test_what_all_next_words_get_is_one(reader: str) -> None:
    for turn in (0, 33):
        results = []
        for word in range(WORDS):
            tokens = torch.cat([text()[:turn], torch.tensor([word])])
            results.append(score(readings(reader, tokens), CACHES, MBPAS))
        for name in ("model", "cache", "mbpa"):
            total = sum(getattr(result, name)[..., turn] for result in results)
            close(total, torch.ones_like(total))


@pytest.mark.parametrize("reader", READERS)
def test_every_word_is_read_once_and_in_order(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words: list[int] = []
    original = LSTMModel.hidden

    def hidden(self: LSTMModel, tokens: Tensor, state: Any = None) -> Any:
        words.extend(tokens[0].tolist())
        return original(self, tokens, state)

    statistics()
    monkeypatch.setattr(LSTMModel, "hidden", hidden)
    parts = readings(reader, text())
    assert words == [FIRST, *text()[:-1].tolist()]
    assert torch.cat([part.targets for part in parts]).tolist() == text().tolist()


def test_a_segment_is_read_with_the_weights_before_it() -> None:
    """What dynamic evaluation by itself costs, and weights that move when the next segment is asked for."""
    with DynamicEvaluation(model(), statistics(), rate=5e-3) as dynamic:
        output = Parametric(model().decoder)
        result = evaluate(dynamic.hidden, output, None, text(), first=FIRST, block=5, after=dynamic.learn)
    close(score(readings("dynamic", text()), CACHES, MBPAS).model, result.nats.neg().exp())
    start = model().output.weight.detach().clone()
    with DynamicEvaluation(model(), statistics(), rate=5e-3) as dynamic:
        parts = read_dynamically(model(), dynamic, text())
        next(parts)
        assert torch.equal(model().output.weight, start)
        next(parts)
        assert not torch.equal(model().output.weight, start)


# Readings


@pytest.mark.parametrize("reader", ["hidden", "dynamic"])
def test_a_text_in_parts_is_the_whole(reader: str) -> None:
    results = [score(readings(reader, tokens), CACHES, MBPAS) for tokens in (text(), iter(text().split(3)))]
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("block", [1, 100, 1000])
def test_readings_of_any_length_are_the_same(block: int) -> None:
    tokens = text(700)
    grids = CacheGrid((300,), (2.0,)), MbPAGrid((300,), (5,), (1.0,))
    results = [score(read(model(), tokens, block=size), *grids) for size in (256, block)]
    for one, two in zip(*results, strict=True):
        close(one, two)


def test_reading_leaves_gradients_as_they_are(rng_untouched: Any) -> None:
    parts = read(model(), text(), block=7)
    with rng_untouched():
        assert not next(parts).logits.requires_grad
        assert torch.is_grad_enabled()
        with DynamicEvaluation(model(), statistics()) as dynamic:
            assert not next(read_dynamically(model(), dynamic, text())).logits.requires_grad
            assert torch.is_grad_enabled()


def test_one_tensor_serves_as_key_and_input() -> None:
    part = next(read(model(), text(), key="input"))
    assert part.keys is part.inputs
    assert part.keys.shape == (49, 5)
    assert next(read(model(), text())).keys.shape == (49, 8)


@pytest.mark.parametrize("count", [0, 1])
def test_texts_without_a_word_to_score(count: int) -> None:
    with pytest.raises(ShapeError, match="no word to score"):
        score(read(model(), text(count)), CACHES, MBPAS)


def test_parts_can_be_left_out() -> None:
    both = score(readings("input", text()), CACHES, MBPAS)
    assert torch.equal(score(readings("input", text()), CACHES, ()).cache, both.cache)
    assert torch.equal(score(readings("input", text()), (), MBPAS).mbpa, both.mbpa)
    alone = score(readings("input", text()), (), ())
    assert torch.equal(alone.model, both.model)
    assert (alone.cache.shape, alone.mbpa.shape) == ((0, 50), (0, 50))


def test_one_word() -> None:
    scores = score(read(model(), text(1), first=FIRST), CACHES, MBPAS)
    assert isinstance(scores, Scores)
    assert scores.mbpa.shape == (len(POINTS), 1)


@pytest.mark.parametrize(("tokens", "error"), [(text().double(), DtypeError), (text().view(2, 25), ShapeError)])
def test_what_is_no_row_of_words(tokens: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        next(read(model(), tokens))


def test_a_word_outside_the_vocabulary() -> None:
    tokens = torch.tensor([1, 2, WORDS])
    with pytest.raises(LabelError, match=f"word number {WORDS}"):
        next(read(model(), tokens))
    with DynamicEvaluation(model(), statistics()) as dynamic, pytest.raises(LabelError):
        next(read_dynamically(model(), dynamic, tokens))


# Settings


@pytest.mark.parametrize("key", ["inputs", "", "Hidden"])
def test_keys_are_of_two_kinds(key: str) -> None:
    with pytest.raises(SettingError, match="key must be one of 'hidden', 'input'"):
        read(model(), text(), key=key)
    with pytest.raises(SettingError, match="key must be one of"):
        read_dynamically(model(), DynamicEvaluation(model(), statistics()), text(), key=key)


def test_blocks_are_checked_at_once() -> None:
    with pytest.raises(SettingError, match="block must be a whole number"):
        read(model(), text(), block=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_table(dtype: torch.dtype) -> None:
    exact = score(readings("hidden", text()), CACHES, MBPAS)
    scores = score(readings("hidden", text()), CACHES, MBPAS, table_dtype=dtype)
    assert scores.mbpa.dtype == torch.float64
    torch.testing.assert_close(scores.mbpa, exact.mbpa, rtol=0.02, atol=0)
    with pytest.raises(DtypeError, match="table_dtype must be a floating dtype"):
        score(readings("hidden", text()), CACHES, MBPAS, table_dtype=torch.int8)


def test_a_layer_without_a_bias() -> None:
    lm = LSTMModel(WORDS, hidden_size=8, embedding_size=5, generator=torch.Generator().manual_seed(1)).double()
    lm.output.bias = None

    class Bare:
        output, decoder, inputs, hidden = lm.output, lm.decoder, lm.inputs, lm.hidden
        named_parameters = lm.named_parameters

    # The recurrence does not use the softmax layer's bias.
    parts = list(read(Bare(), text()))
    found = score(parts, CACHES, MBPAS)
    for number, setting in enumerate(POINTS):
        far = {
            s: float((parts[0].keys[s] - parts[0].keys[20]).square().sum())
            for s in range(max(0, 20 - setting.size), 20)
        }
        near = sorted(far, key=far.__getitem__)[: setting.neighbors]
        close(found.mbpa[number, 20], adapted(lm.output, near, parts[0], 20, setting, bias=False))


def test_a_model_that_says_nan() -> None:
    part = next(read(model(), text()))
    logits = part.logits.clone()
    logits[4, 2] = float("nan")
    with pytest.raises(NonFiniteError, match="prediction of word 4"):
        score([part._replace(logits=logits)], CACHES, MBPAS)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", ["sizes", "neighbors", "steps"])
@pytest.mark.parametrize("value", [(), (0,), (5, -1), (2.5,), (True,), [3], 7])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"{name} must be a tuple of one or more whole numbers above 0"):
        replace(ONE_STEP, **{name: value})
    if name == "sizes":
        with pytest.raises(SettingError, match="sizes must be"):
            replace(CACHES, sizes=value)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("value", [(), (-0.1,), (float("nan"),), (1.0, float("inf")), ("a",), 1.0])
def test_numbers_are_finite(value: Any) -> None:
    with pytest.raises(SettingError, match="rates must be"):
        replace(ONE_STEP, rates=value)
    with pytest.raises(SettingError, match="flatness must be"):
        replace(CACHES, flatness=value)


@pytest.mark.parametrize("values", [(3, 1), (2, 2)])
@pytest.mark.parametrize("name", ["neighbors", "steps"])
def test_they_ascend(name: str, values: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=f"{name} must ascend"):
        replace(ONE_STEP, **{name: values})


def test_points_are_in_the_order_of_the_scores() -> None:
    assert CACHES.points()[4] == (4, 2.0)
    assert ONE_STEP.points()[13] == (4, 1, 0.15, 1)
    assert MORE_STEPS.points()[4] == (4, 2, 0.0, 3)
