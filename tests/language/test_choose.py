"""Settings that a text chooses, and the predictors that they stand for."""

import pytest
import torch
from torch import Tensor

from recollect import Parametric
from recollect.errors import SettingError, ShapeError
from recollect.language import CacheGrid, MbPAGrid, evaluate, keys_of, predictor, read, score
from recollect.language.choose import choose
from recollect.language.lstm import LSTMModel

WORDS = 30
CACHES = CacheGrid(sizes=(10, 60), flatness=(0.0, 0.5, 2.0))
ONE_STEP = MbPAGrid(sizes=(20, 60), neighbors=(3, 8), rates=(0.1, 1.0))
MORE_STEPS = MbPAGrid(sizes=(60,), neighbors=(4,), rates=(0.1, 1.0), steps=(2, 3))
MBPAS = (ONE_STEP, MORE_STEPS)
POINTS = [*ONE_STEP.points(), *MORE_STEPS.points()]


def text(length: int, seed: int = 0) -> Tensor:
    """The same few words again and again, with others in between."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (length,), generator=generator)
    words[::2] = words[: length - length // 2] % 5
    return words


def model(dtype: torch.dtype = torch.float64) -> LSTMModel:
    generator = torch.Generator().manual_seed(0)
    return LSTMModel(WORDS, hidden_size=8, embedding_size=5, generator=generator).to(dtype).eval()


@pytest.mark.parametrize("key", ["hidden", "input"])
@pytest.mark.parametrize("mbpas", [ONE_STEP, MORE_STEPS], ids=["one step", "more steps"])
def test_the_predictor_costs_what_the_choice_says(key: str, mbpas: MbPAGrid) -> None:
    lm, tokens = model(), text(300)
    choice = choose(score(read(lm, tokens, key=key), CACHES, mbpas), CACHES.points(), mbpas.points())
    output, memories = predictor(lm, choice, key=key)
    found = evaluate(keys_of(lm, key), output, memories, tokens)
    assert found.loss == pytest.approx(choice.loss, abs=1e-9)
    assert found.loss < evaluate(lm.hidden, Parametric(lm.decoder), None, tokens).loss - 0.01


def test_the_choice_is_the_best_of_all_pairs() -> None:
    scores = score(read(model(), text(300)), CACHES, MBPAS)
    choice = choose(scores, CACHES.points(), POINTS)
    shares = torch.cartesian_prod(torch.arange(21), torch.arange(21)).double() / 20
    shares = shares[shares.sum(1) <= 1]

    def best(*parts: Tensor) -> float:
        """By a grid of weights, which Newton's method may only beat."""
        weights = shares if len(parts) == 2 else shares[shares[:, 1] == 0][:, :1]
        mixed = (1 - weights.sum(1, keepdim=True)) * scores.model + weights @ torch.stack(parts)
        return float(-mixed.log().mean(1).max())

    caches, mbpas = list(scores.cache), list(scores.mbpa)
    assert choice.cache_loss == pytest.approx(min(best(one) for one in caches), abs=2e-3)
    assert choice.mbpa_loss == pytest.approx(min(best(one) for one in mbpas), abs=2e-3)
    least = min(best(cache, mbpa) for cache in caches for mbpa in mbpas)
    assert least - 2e-3 < choice.loss < least + 1e-9
    own = CACHES.points().index(choice.both[0]), POINTS.index(choice.both[1])
    mixed = sum(w * p for w, p in zip(choice.weights, (scores.model, caches[own[0]], mbpas[own[1]]), strict=True))
    assert choice.loss == pytest.approx(float(-mixed.log().mean()), abs=1e-9)


def test_the_best_pair_need_not_have_the_best_cache() -> None:
    """A cache that knows what MbPA does not is better beside it than one that knows more of the same."""
    scores = score(read(model(), text(50)), CacheGrid((10,), (0.0, 1.0)), MbPAGrid((10,), (2,), (0.1,)))
    often, rarely = torch.tensor([0.9, 0.8, 0.7, 0.01, 0.01, 0.01]), torch.tensor([0.01, 0.01, 0.01, 0.9, 0.3, 0.01])
    given = scores._replace(
        model=torch.full((6,), 0.05).double(), cache=torch.stack([often, rarely]).double(), mbpa=often[None].double()
    )
    choice = choose(given, CacheGrid((10,), (0.0, 1.0)).points(), MbPAGrid((10,), (2,), (0.1,)).points())
    assert choice.cache.flatness == 0.0
    assert choice.both[0].flatness == 1.0


def test_settings_that_were_not_scored_are_refused() -> None:
    scores = score(read(model(), text(50)), CACHES, MBPAS)
    with pytest.raises(ShapeError, match="6 caches were scored, got 5 settings"):
        choose(scores, CACHES.points()[1:], POINTS)
    with pytest.raises(ShapeError, match="12 mbpas were scored, got 8 settings"):
        choose(scores, CACHES.points(), ONE_STEP.points())
    with pytest.raises(SettingError, match="there are no mbpas to choose among"):
        choose(score(read(model(), text(50)), CACHES, ()), CACHES.points(), [])
    with pytest.raises(SettingError, match="there are no caches to choose among"):
        choose(score(read(model(), text(50)), (), MBPAS), [], POINTS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_types(dtype: torch.dtype) -> None:
    """Their probabilities are not rounded to the half type: of 8 bits the loss would be off by hundredths."""
    lm, tokens = model(dtype), text(300)
    scores = score(read(lm, tokens), CACHES, ONE_STEP)
    assert scores.model.dtype == torch.float64
    with torch.no_grad():
        hidden, _ = lm.hidden(tokens[None, :-1])
        exact = lm.decoder(hidden[0]).double().softmax(1).gather(1, tokens[1:, None]).squeeze(1)
    torch.testing.assert_close(scores.model.double(), exact, rtol=1e-5, atol=0)
    output, memories = predictor(lm, choose(scores, CACHES.points(), ONE_STEP.points()), key="hidden")
    assert evaluate(lm.hidden, output, memories, tokens).perplexity < WORDS
