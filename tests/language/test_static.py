"""A memory of a text that was read before: kNN-LM against its formula."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect import (
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    Mixture,
    NonParametric,
    Parametric,
    load,
    neural_cache,
    rules,
    save,
)
from recollect.errors import SettingError, ShapeError
from recollect.language.evaluate import evaluate
from recollect.language.lstm import LSTMModel
from recollect.language.static import knn_lm, remember
from recollect.memory import Static

WORDS = 12


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def lm() -> LSTMModel:
    generator = torch.Generator().manual_seed(0)
    return LSTMModel(WORDS, hidden_size=6, embedding_size=5, generator=generator).double()


def filled(lm: LSTMModel, tokens: Tensor, **settings: Any) -> EpisodicMemory:
    memory = EpisodicMemory(capacity=len(tokens), key_size=lm.hidden_size, key_dtype=torch.float64)
    remember(lm.hidden, memory, tokens, **settings)
    return memory


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("first", [None, 3])
def test_remembering_is_going_word_by_word(lm: LSTMModel, block: int, first: int | None) -> None:
    tokens = text(20)
    read = tokens.tolist() if first is None else [first, *tokens.tolist()]
    keys, values, state = [], [], None
    for word, following in itertools.pairwise(read):
        hidden, state = lm.hidden(torch.tensor([[word]]), state)
        keys.append(hidden[0, 0])
        values.append(following)
    calls: list[int] = []
    memory = EpisodicMemory(capacity=50, key_size=lm.hidden_size, key_dtype=torch.float64)
    assert remember(lm.hidden, memory, tokens, first=first, block=block, watch=calls.append) == len(values)
    assert len(memory) == len(values) == sum(calls)
    torch.testing.assert_close(memory.keys[: len(keys)], torch.stack(keys))
    assert memory.values[: len(values)].tolist() == values
    assert memory.written[: len(values)].tolist() == list(range(len(values)))


def test_a_text_in_parts_is_the_same_text(lm: LSTMModel) -> None:
    tokens = text(30)
    whole, parts = filled(lm, tokens), EpisodicMemory(capacity=30, key_size=6, key_dtype=torch.float64)
    remember(lm.hidden, parts, tokens.split(7))
    assert torch.equal(whole.values, parts.values)
    torch.testing.assert_close(whole.keys, parts.keys)


def test_knn_lm_is_its_formula(lm: LSTMModel) -> None:
    train, test = text(40), text(15, seed=1)
    memory, neighbors, temperature, share = filled(lm, train), 9, 0.05, 0.25
    knn = knn_lm(memory, classes=WORDS, neighbors=neighbors, temperature=temperature)
    result = evaluate(lm.hidden, Mixture(Parametric(lm.decoder), knn, weights=(1 - share, share)), None, test, block=4)
    queries = lm.hidden(test[None, :-1])[0][0].detach()
    entries = list(zip(lm.hidden(train[None, :-1])[0][0].detach(), train[1:].tolist(), strict=True))
    for query, word, nats in zip(queries, test[1:].tolist(), result.nats, strict=True):
        near = sorted((float((key - query).square().sum()), value) for key, value in entries)[:neighbors]
        weights = [torch.tensor(-distance / temperature).exp() for distance, _ in near]
        votes = sum(weight for weight, (_, value) in zip(weights, near, strict=True) if value == word)
        model = lm.decoder(query).softmax(0)[word]
        expected = -torch.log((1 - share) * model + share * votes / sum(weights))
        torch.testing.assert_close(nats, expected.double(), rtol=1e-5, atol=1e-6)


def test_every_word_sees_all_of_a_static_memory(lm: LSTMModel) -> None:
    memory = filled(lm, text(40))
    adaptation = LocalAdaptation(rules.sgd(0.5), steps=1)
    adapted = MbPA(lm.decoder, Static(memory), neighbors=5, adaptation=adaptation)
    result = evaluate(lm.hidden, adapted, None, text(15, seed=1))
    queries = lm.hidden(text(15, seed=1)[None, :-1])[0][0]
    direct = MbPA(lm.decoder, memory, neighbors=5, adaptation=adaptation)(queries)
    torch.testing.assert_close(result.nats, -direct.gather(1, result.tokens[:, None]).squeeze(1))


@pytest.mark.parametrize("form", ["bare", "mixed", "beside another", "also static"])
def test_a_memory_that_is_read_but_not_named_is_refused(lm: LSTMModel, form: str) -> None:
    """Of a filled memory the first word would silently see nothing, the second one entry, and so on."""
    memory, other = filled(lm, text(40)), EpisodicMemory(capacity=40, key_size=6, key_dtype=torch.float64)
    cache = NonParametric(memory, classes=WORDS, neighbors=5)
    first = knn_lm(memory, classes=WORDS) if form == "also static" else Parametric(lm.decoder)
    output = cache if form == "bare" else Mixture(first, cache, weights=(0.5, 0.5))
    with pytest.raises(SettingError, match="reads a memory that is not named"):
        evaluate(lm.hidden, output, other if form == "beside another" else None, text(15))
    assert len(memory) == 39


@pytest.mark.parametrize("kind", ["knn", "cache", "mbpa"])
def test_a_static_memory_that_is_written_to_is_refused(lm: LSTMModel, kind: str) -> None:
    """A block is written before it is read, so each word would find itself."""
    memory = EpisodicMemory(capacity=40, key_size=6, key_dtype=torch.float64, history=256)
    output = {
        "knn": knn_lm(memory, classes=WORDS, neighbors=8),
        "cache": neural_cache(Static(memory), classes=WORDS, flatness=1.0),
        "mbpa": MbPA(lm.decoder, Static(memory), neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.5), steps=1)),
    }[kind]
    mixed = Mixture(Parametric(lm.decoder), output, weights=(0.5, 0.5))
    with pytest.raises(SettingError, match="a word would find itself"):
        evaluate(lm.hidden, mixed, memory, text(15))
    with pytest.raises(SettingError, match="a word would find itself"):
        evaluate(lm.hidden, Mixture(mixed, neural_cache(memory, classes=WORDS), weights=(0.5, 0.5)), memory, text(15))


def test_a_named_memory_stays_as_it_is_when_another_is_refused(lm: LSTMModel) -> None:
    """Entries that were forgotten leave write times behind, which ``evaluate`` clears; not before all is checked."""
    named, unnamed = (EpisodicMemory(capacity=5, key_size=6, key_dtype=torch.float64) for _ in range(2))
    named.forget(named.write(torch.zeros(3, 6).double(), torch.zeros(3).long()))
    with pytest.raises(SettingError, match="reads a memory that is not named"):
        evaluate(lm.hidden, NonParametric(unnamed, classes=WORDS, neighbors=5), named, text(15))
    slots = named.write(torch.zeros(1, 6).double(), torch.zeros(1).long())
    assert named.written[slots].tolist() == [3]


def test_a_mixture_with_knn_lm_is_saved_and_loaded(lm: LSTMModel, tmp_path: Path) -> None:
    train, test = text(40), text(15, seed=1)
    knn = knn_lm(filled(lm, train), classes=WORDS, neighbors=9)
    output = Mixture(Parametric(torch.nn.Linear(6, WORDS).double()), knn, weights=(0.7, 0.3))
    save(output, tmp_path / "knn")
    found = load(tmp_path / "knn")
    expected, nats = (evaluate(lm.hidden, one, None, test).nats for one in (output, found))
    assert torch.equal(nats, expected)


def test_static_is_the_memory_to_read_and_refuses_to_be_written(lm: LSTMModel) -> None:
    memory = filled(lm, text(10))
    static = Static(memory)
    assert (len(static), static.capacity) == (9, 10)
    assert static
    with pytest.raises(SettingError, match="only read from"):
        static.write(torch.zeros(1, 6), torch.tensor([0]))
    with pytest.raises(SettingError, match="only read from"):
        static.clear()
    static.forget(0)
    assert len(memory) == 8
    empty = Static(EpisodicMemory(capacity=10, key_size=6))
    with pytest.raises(SettingError, match="only read from"):  # what the text teaches would be seen before its time
        evaluate(lm.hidden, Parametric(lm.decoder), empty, text(5))


def test_bad_settings_are_refused(lm: LSTMModel, untyped: None) -> None:
    memory = EpisodicMemory(capacity=10, key_size=6)
    with pytest.raises(SettingError, match="block must be a whole number above 0, got 0"):
        remember(lm.hidden, memory, text(5), block=0)
    with pytest.raises(SettingError, match="memory must be a memory"):
        remember(lm.hidden, None, text(5))
    with pytest.raises(ShapeError, match="hidden must map words"):
        remember(lambda tokens, state=None: (torch.zeros(1, 1, 6), state), memory, text(5))
    with pytest.raises(SettingError, match="temperature must be a finite number above 0"):
        knn_lm(memory, classes=3, temperature=0.0)
    with pytest.raises(SettingError, match="memory must be a memory"):
        Static(EpisodicMemory)
