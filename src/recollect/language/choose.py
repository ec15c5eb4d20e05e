"""Choosing settings of cache and MbPA by what a validation text cost, and the predictors that they stand for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.adaptation import LocalAdaptation, rules
from recollect.errors import SettingError, ShapeError, require_choice
from recollect.language.evaluate import BLOCK, Hidden
from recollect.language.grid import Scores
from recollect.language.model import LanguageModel
from recollect.language.reading import KEYS
from recollect.language.report import fit_weights
from recollect.language.settings import KERNEL, CacheSetting, MbPASetting
from recollect.mbpa import MbPA
from recollect.memory import EpisodicMemory
from recollect.predictors import Mixture, Parametric, neural_cache

_FEW = 6  # caches, the best by themselves, that are tried with every MbPA


class Choice(NamedTuple):
    """The best settings, and what they cost with the best weights, in nats per word."""

    cache: CacheSetting
    """Of a mixture of model and cache."""
    cache_loss: float
    mbpa: MbPASetting
    """Of a mixture of model and MbPA."""
    mbpa_loss: float
    both: tuple[CacheSetting, MbPASetting]
    """Of a mixture of all three."""
    weights: tuple[float, float, float]
    """That mixture's: of the model, the cache and MbPA."""
    loss: float


def choose(scores: Scores, caches: Sequence[CacheSetting], mbpas: Sequence[MbPASetting]) -> Choice:
    """Returns the settings whose mixtures made a text likeliest, each with its own best weights.

    The mixture of all three tries every MbPA with the caches that are best by themselves.

    Args:
        scores: From ``score``, on text that is not the one to be reported.
        caches: The settings in the order of ``scores.cache``.
        mbpas: The settings in the order of ``scores.mbpa``.

    Raises:
        SettingError: If there is no cache or no MbPA to choose among.
        ShapeError: If there are not as many settings as scores.

    Example:
        >>> from recollect.language import CacheGrid, LSTMModel, MbPAGrid, choose, read, score
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> caches, mbpas = CacheGrid((50,), (0.0, 1.0)), MbPAGrid((50,), (4,), (0.1, 1.0))
        >>> scores = score(read(lm, torch.tensor([1, 2, 3] * 20)), caches, mbpas)
        >>> choice = choose(scores, caches.points(), mbpas.points())
        >>> choice.loss < min(choice.cache_loss, choice.mbpa_loss)
        True
    """
    for name, settings, parts in (("caches", caches, scores.cache), ("mbpas", mbpas, scores.mbpa)):
        if len(settings) != len(parts):
            raise ShapeError(f"{len(parts)} {name} were scored, got {len(settings)} settings. Pass those of score().")
        if not settings:
            raise SettingError(f"there are no {name} to choose among. Pass some to score(), or call fit_weights.")
    with_cache, with_mbpa = fit_weights(scores.model, scores.cache), fit_weights(scores.model, scores.mbpa)
    first, second = int(with_cache.loss.argmin()), int(with_mbpa.loss.argmin())
    found = []
    for number in with_cache.loss.argsort()[:_FEW].tolist():
        fit = fit_weights(scores.model, scores.cache[number], scores.mbpa)
        third = int(fit.loss.argmin())
        weights = fit.weights[:, third].tolist()
        found.append((float(fit.loss[third]), (caches[number], mbpas[third]), (weights[0], weights[1], weights[2])))
    loss, both, weights = min(found, key=lambda one: one[0])
    return Choice(
        *(caches[first], float(with_cache.loss[first]), mbpas[second], float(with_mbpa.loss[second])),
        *(both, weights, loss),
    )


def keys_of(lm: LanguageModel, key: str) -> Hidden:
    """Returns what makes a model's keys: its hidden states, or what goes into its softmax layer.

    Args:
        lm: The model.
        key: ``"hidden"`` or ``"input"``.

    Raises:
        SettingError: If the key is neither.

    Example:
        >>> from recollect.language import LSTMModel, keys_of
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> keys, state = keys_of(lm, "input")(torch.tensor([[3, 1]]))
        >>> keys.shape
        torch.Size([1, 2, 4])
    """
    require_choice("key", key, KEYS)
    if key == "hidden":
        return lm.hidden

    def inputs(tokens: Int[Tensor, "b t"], state: Any = None) -> tuple[Float[Tensor, "b t d"], Any]:
        hidden, state = lm.hidden(tokens, state)
        return lm.inputs(hidden), state

    return inputs


def predictor(
    lm: LanguageModel, choice: Choice, *, key: str, history: int = BLOCK
) -> tuple[Mixture, list[EpisodicMemory]]:
    """Returns the mixture of model, cache and MbPA for ``evaluate``, and the memories that it reads.

    Args:
        lm: The model.
        choice: The settings.
        key: As in ``keys_of``, which makes the keys for it.
        history: The longest block that ``evaluate`` can then predict at once.

    Raises:
        SettingError: If the key is none of those.

    Example:
        >>> from recollect.language import CacheGrid, LSTMModel, MbPAGrid, choose, evaluate, predictor, read, score
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> caches, mbpas = CacheGrid((50,), (0.0, 1.0)), MbPAGrid((50,), (4,), (0.1, 1.0))
        >>> scores = score(read(lm, torch.tensor([1, 2, 3] * 20)), caches, mbpas)
        >>> choice = choose(scores, caches.points(), mbpas.points())
        >>> output, memories = predictor(lm, choice, key="hidden")
        >>> evaluate(lm.hidden, output, memories, torch.tensor([4, 5, 6] * 20)).perplexity < 10
        True
    """
    require_choice("key", key, KEYS)
    (size, flatness), (entries, neighbors, rate, steps) = choice.both
    layer = lm.output
    head = lm.decoder if key == "hidden" else layer
    names = tuple(name for name, p in head.named_parameters() if any(p is own for own in layer.parameters()))
    width = layer.in_features if key == "input" else _hidden_size(lm)
    settings = {"key_dtype": layer.weight.dtype, "history": history}
    memories = [EpisodicMemory(count, width, **settings).to(layer.weight.device) for count in (size, entries)]
    fast = layer.weight.dtype != torch.float16  # in which what is kept would be too coarse
    adaptation = LocalAdaptation(rules.sgd(rate), steps=steps, parameters=names, keep_base=fast)
    parts = (
        Parametric(head),
        neural_cache(memories[0], classes=layer.out_features, flatness=flatness),
        MbPA(head, memories[1], neighbors=neighbors, adaptation=adaptation, kernel=KERNEL),
    )
    return Mixture(*parts, weights=_summing_to_one(choice.weights)), memories


def _summing_to_one(weights: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(weight / sum(weights) for weight in weights)


def _hidden_size(lm: LanguageModel) -> int:
    with torch.no_grad():
        return lm.hidden(torch.zeros(1, 1, dtype=torch.long, device=lm.output.weight.device))[0].shape[-1]
