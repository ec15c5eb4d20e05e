"""Dynamic evaluation against a literal loop over plain autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from recollect import Parametric
from recollect.errors import LabelError, SettingError, ShapeError
from recollect.language.dynamic import DynamicEvaluation, gradient_statistics
from recollect.language.evaluate import evaluate
from recollect.language.lstm import LSTMModel

WORDS = 20


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(seed))


def model(hidden_size: int = 8, embedding_size: int = 5) -> LSTMModel:
    generator = torch.Generator().manual_seed(0)
    settings = {"hidden_size": hidden_size, "embedding_size": embedding_size}
    return LSTMModel(WORDS, **settings, output_dropout=0.5, generator=generator).double()


def weights(lm: LSTMModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.named_parameters()}


def literal_loss(lm: LSTMModel, words: Tensor, targets: Tensor, state: Any) -> tuple[Tensor, Any]:
    with torch.enable_grad():
        logits, state = lm.forward(words, state)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"), state


@pytest.mark.parametrize("sizes", [(8, 5), (8, 8)])
@pytest.mark.parametrize("batches", [None, 1, 3])
def test_statistics_are_the_literal_loop(sizes: tuple[int, int], batches: int | None) -> None:
    lm, tokens, batch, segment = model(*sizes), text(61), 3, 4
    before, found = weights(lm), gradient_statistics(model(*sizes), text(61), batch=3, segment=4, batches=batches)
    rows, squares, state, count = tokens[:60].view(batch, 20), [0.0] * len(before), None, 0
    for start in range(0, 19, segment):
        end = min(start + segment, 19)
        loss, state = literal_loss(lm, rows[:, start:end], rows[:, start + 1 : end + 1], state)
        gradients = torch.autograd.grad(loss.mean(), list(lm.parameters()))
        squares = [square + gradient**2 for square, gradient in zip(squares, gradients, strict=True)]
        count += 1
        if count == batches:
            break
    assert list(found) == list(before)
    for rms, square in zip(found.values(), squares, strict=True):
        torch.testing.assert_close(rms, (square / count) ** 0.5, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sizes", [(8, 5), (8, 8)])
@pytest.mark.parametrize(("rate", "decay"), [(1e-3, 2e-3), (5e-3, 0.0), (0.0, 0.1), (2e-3, 0.9)])
@pytest.mark.parametrize("segment", [1, 5])
def test_it_is_the_literal_loop(sizes: tuple[int, int], rate: float, decay: float, segment: int) -> None:
    epsilon, tokens = 1e-4, text(23)
    statistics = gradient_statistics(model(*sizes), text(60), batch=2)
    lm, losses, state = model(*sizes), [], None
    start = weights(lm)
    mean = sum(part.mean() for part in statistics.values()) / len(statistics)
    for begin in range(0, 22, segment):
        end = min(begin + segment, 22)
        loss, state = literal_loss(lm, tokens[None, begin:end], tokens[None, begin + 1 : end + 1], state)
        losses.append(loss.detach())
        gradients = torch.autograd.grad(loss.mean(), list(lm.parameters()))
        with torch.no_grad():
            for name, gradient in zip(start, gradients, strict=True):
                rms, weight = statistics[name], lm.get_parameter(name)
                pull = rms / mean if decay == 0 else (rms / mean).clamp(max=1 / decay)
                weight.add_(decay * pull * (start[name] - weight) - rate * gradient / (rms + epsilon))
    moved = model(*sizes)
    with DynamicEvaluation(moved, statistics, rate=rate, decay=decay, epsilon=epsilon) as dynamic:
        output = Parametric(moved.decoder)
        result = evaluate(dynamic.hidden, output, None, tokens, block=segment, after=dynamic.learn)
        for name, weight in moved.named_parameters():
            torch.testing.assert_close(weight, dict(lm.named_parameters())[name], rtol=0, atol=1e-10)
    torch.testing.assert_close(result.nats, torch.cat(losses), rtol=0, atol=1e-10)
    assert all(torch.equal(part, start[name]) for name, part in moved.named_parameters())


def test_a_segment_is_scored_with_the_weights_before_it() -> None:
    lm, tokens = model(), text(30)
    statistics = gradient_statistics(lm, text(60), batch=2)
    other = torch.cat([tokens[:16], text(14, seed=5)])
    results = []
    for words in (tokens, other):
        with DynamicEvaluation(lm, statistics, rate=1e-2) as dynamic:
            output = Parametric(lm.decoder)
            results.append(evaluate(dynamic.hidden, output, None, words, block=5, after=dynamic.learn).nats)
    plain = evaluate(lm.hidden, Parametric(lm.decoder), None, tokens).nats
    assert torch.equal(results[0][:15], results[1][:15])
    torch.testing.assert_close(results[0][:5], plain[:5])
    assert not torch.allclose(results[0][5:10], plain[5:10])


def test_the_weights_come_back_after_an_error() -> None:
    lm = model()
    before, statistics = weights(lm), gradient_statistics(lm, text(60), batch=2)
    dynamic = DynamicEvaluation(lm, statistics, rate=0.1)

    def fail() -> None:
        with dynamic:
            dynamic.hidden(text(5).unsqueeze(0))
            dynamic.learn(text(5, 1))
            assert not torch.equal(lm.output.weight, before["decoder.1.weight"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(part, before[name]) for name, part in lm.named_parameters())
    with pytest.raises(ShapeError, match="after no words"):
        dynamic.learn(text(5, 1))


def test_frozen_weights_stay() -> None:
    lm = model()
    lm.lstm.requires_grad_(False)
    statistics = gradient_statistics(lm, text(60), batch=2)
    assert set(statistics) == {"decoder.0.weight", "decoder.1.weight", "decoder.1.bias"}
    before = weights(lm)
    with DynamicEvaluation(lm, statistics, rate=0.1) as dynamic:
        dynamic.hidden(text(5).unsqueeze(0))
        dynamic.learn(text(5, 1))
        for name, weight in lm.named_parameters():
            assert torch.equal(weight, before[name]) is name.startswith("lstm")
    lm.requires_grad_(False)
    with pytest.raises(SettingError, match="all weights of this model are frozen"):
        gradient_statistics(lm, text(60), batch=2)


def test_nothing_else_is_touched(rng_untouched: Any) -> None:
    lm = model().train()
    before = weights(lm)
    with rng_untouched(), torch.no_grad():
        statistics = gradient_statistics(lm, text(60), batch=2)
        with DynamicEvaluation(lm, statistics, rate=0.1) as dynamic:
            output = Parametric(lm.decoder)
            evaluate(dynamic.hidden, output, None, text(11), block=5, after=dynamic.learn)
    assert lm.training
    assert all(p.grad is None for p in lm.parameters())
    assert all(torch.equal(part, before[name]) for name, part in lm.named_parameters())


@pytest.mark.parametrize("name", ["batch", "segment", "batches"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_numbers_of_the_statistics(name: str, value: int) -> None:
    with pytest.raises(SettingError, match=f"{name} must be a whole number above 0"):
        gradient_statistics(model(), text(60), **{"batch": 2, name: value})


def test_texts_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="too short"):
        gradient_statistics(model(), text(60))
    tokens = torch.cat([text(10), torch.tensor([WORDS])])  # this word is a target only
    with pytest.raises(LabelError, match=f"word number {WORDS}"):
        gradient_statistics(model(), tokens, batch=1)


def test_statistics_that_do_not_fit() -> None:
    lm = model()
    statistics = gradient_statistics(lm, text(60), batch=2)
    for wrong in ({}, {**statistics, "more": torch.ones(1)}, gradient_statistics(model(8, 8), text(60), batch=2)):
        with pytest.raises(SettingError, match="of another model"):
            DynamicEvaluation(lm, wrong)
    with pytest.raises(SettingError, match="all zero"):
        DynamicEvaluation(lm, {name: torch.zeros_like(part) for name, part in statistics.items()})
    for number in (float("nan"), float("inf"), -1.0):
        spoilt = {**statistics, "decoder.1.bias": torch.full((WORDS,), number).double()}
        with pytest.raises(SettingError, match=r"statistics of decoder\.1\.bias"):
            DynamicEvaluation(lm, spoilt)


@pytest.mark.parametrize(
    "setting", [{"rate": -1.0}, {"decay": -1e-3}, {"epsilon": 0.0}, {"epsilon": -1.0}, {"rate": float("nan")}]
)
def test_settings_that_are_refused(setting: dict[str, float]) -> None:
    lm = model()
    with pytest.raises(SettingError, match=f"{next(iter(setting))} must be a finite number"):
        DynamicEvaluation(lm, gradient_statistics(lm, text(60), batch=2), **setting)


def test_learning_needs_the_words_that_were_read() -> None:
    lm = model()
    dynamic = DynamicEvaluation(lm, gradient_statistics(lm, text(60), batch=2))
    with pytest.raises(ShapeError, match="got 3 after no words"):
        dynamic.learn(text(3))
    dynamic.hidden(text(4).unsqueeze(0))
    with pytest.raises(ShapeError, match=r"got 3 after words of shape \(1, 4\)"):
        dynamic.learn(text(3))
    dynamic.hidden(text(3).unsqueeze(0))
    with pytest.raises(LabelError, match=f"word number {WORDS}"):
        dynamic.learn(torch.tensor([1, 2, WORDS]))


def test_weights_that_a_text_does_not_pass_stay() -> None:
    """As those of an expert that was not asked, or of another head."""

    class Wider(LSTMModel):
        def __init__(self) -> None:
            super().__init__(WORDS, hidden_size=8, embedding_size=5, generator=torch.Generator().manual_seed(0))
            self.idle = torch.nn.Parameter(torch.ones(3))

    lm = Wider().double().eval()
    statistics = gradient_statistics(lm, text(60), batch=2)
    assert statistics["idle"].tolist() == [0, 0, 0]
    before = weights(lm)
    with DynamicEvaluation(lm, statistics, rate=1e-2) as dynamic:
        dynamic.hidden(text(5)[None])
        dynamic.learn(text(5, seed=1))
        moved = [name for name, p in lm.named_parameters() if not torch.equal(p, before[name])]
    assert set(moved) == set(before) - {"idle"}
