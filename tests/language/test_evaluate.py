"""``evaluate``: blocks give what going word by word gives, and the rules of honest scoring hold for every predictor."""

import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, Mixture, Parametric, neural_cache, rules
from recollect.errors import DtypeError, LabelError, NonFiniteError, SettingError, ShapeError
from recollect.language.evaluate import Evaluation, evaluate, pairs
from recollect.language.lstm import LSTMModel
from recollect.likelihoods import Categorical, Likelihood
from recollect.memory import Static
from recollect.predictors import NonParametric, Predictor

WORDS, LENGTH, FIRST = 20, 40, 3
NAMES = ("parametric", "cache", "mbpa", "mixture")


def text(length: int = LENGTH, seed: int = 0) -> Tensor:
    """Few of the words, so that some come again soon."""
    return torch.randint(WORDS // 2, (length,), generator=torch.Generator().manual_seed(seed))


@cache
def model() -> LSTMModel:
    generator = torch.Generator().manual_seed(0)
    return LSTMModel(WORDS, hidden_size=8, embedding_size=5, generator=generator).double()


class Setup(NamedTuple):
    output: Predictor
    memories: tuple[EpisodicMemory, ...]


def setup(name: str, capacity: int = 200, history: int = 0, other: int | None = None) -> Setup:
    """A predictor and the memories it reads; in a mixture the second memory has another size."""

    def memory(size: int) -> EpisodicMemory:
        return EpisodicMemory(size, model().hidden_size, key_dtype=torch.float64, history=history)

    def adapted(memory: EpisodicMemory) -> MbPA:
        return MbPA(model().decoder, memory, neighbors=6, adaptation=LocalAdaptation(rules.sgd(0.5), steps=1))

    parametric, one, two = Parametric(model().decoder), memory(capacity), memory(other or max(1, capacity // 2))
    if name == "mixture":
        parts = parametric, neural_cache(one, classes=WORDS, flatness=3.0), adapted(two)
        return Setup(Mixture(*parts, weights=(0.5, 0.2, 0.3)), (one, two))
    if name == "parametric":
        return Setup(parametric, ())
    return Setup(neural_cache(one, classes=WORDS, flatness=3.0) if name == "cache" else adapted(one), (one,))


def scored(name: str, tokens: Any, *, sizes: dict[str, Any] | None = None, **options: Any) -> Evaluation:
    output, memories = setup(name, **(sizes or {}))
    return evaluate(model().hidden, output, memories, tokens, **options)


@torch.no_grad()
def literally(output: Predictor, memories: tuple[EpisodicMemory, ...], tokens: Tensor, first: int | None) -> Tensor:
    """Read the word, predict, score, write; then the next word."""
    state, losses = None, []
    for word, following in itertools.pairwise(([] if first is None else [first]) + tokens.tolist()):
        hidden, state = model().hidden(torch.tensor([[word]]), state)
        losses.append(-output(hidden[0, 0])[following])
        for memory in memories:
            memory.write(hidden[0], torch.tensor([following]))
    return torch.stack(losses)


@cache
def expected(name: str, capacity: int, other: int | None = None, length: int = LENGTH) -> Tensor:
    return literally(*setup(name, capacity, other=other), text(length), FIRST)


# Batched is word by word


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capacity", [9, 200])  # the ring goes round, and it does not
@pytest.mark.parametrize(("history", "block"), [(0, 7), (0, 64), (5, 7), (5, 64), (256, 1), (256, 7), (256, 256)])
def test_a_block_is_going_word_by_word(name: str, capacity: int, history: int, block: int) -> None:
    sizes = {"capacity": capacity, "history": history}
    result = scored(name, text(), sizes=sizes, first=FIRST, block=block)
    torch.testing.assert_close(result.nats, expected(name, capacity), rtol=0, atol=1e-10)
    assert torch.equal(result.tokens, text())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("seed", range(6))
def test_memories_of_any_two_sizes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    capacity, other, history, block = (int(torch.randint(1, 30, (), generator=generator)) for _ in range(4))
    sizes = {"capacity": capacity, "other": other, "history": history // 3}
    result = scored("mixture", text(30), sizes=sizes, first=FIRST, block=block)
    torch.testing.assert_close(result.nats, expected("mixture", capacity, other, 30), rtol=0, atol=1e-10)


def test_one_memory_wraps_and_the_other_limits_the_block() -> None:
    """One has a history and is full soon; the other has none and is full later, within the same block."""
    lengths = []
    for histories in ((0, 0), (4, 0)):
        one, two = (
            EpisodicMemory(size, 8, key_dtype=torch.float64, history=history)
            for size, history in zip((6, 20), histories, strict=True)
        )
        parts = (neural_cache(memory, classes=WORDS, flatness=3.0) for memory in (one, two))
        output = Mixture(Parametric(model().decoder), *parts, weights=(0.5, 0.2, 0.3))
        lengths.append(evaluate(model().hidden, output, (one, two), text(), block=64).nats)
    torch.testing.assert_close(lengths[0], lengths[1], rtol=0, atol=1e-10)


def test_the_cache_is_the_textbook_sum() -> None:
    size, theta, tokens = 15, 3.0, text()
    result = scored("cache", tokens, sizes={"capacity": size, "history": 256}, first=FIRST)
    read = torch.cat([torch.tensor([FIRST]), tokens])
    hidden = model().hidden(read[None, :-1])[0][0].detach()
    for t, word in enumerate(tokens.tolist()):
        window = range(max(0, t - size), t)
        votes = [float(torch.exp(theta * hidden[t] @ hidden[i])) for i in window]
        right = sum(vote for vote, i in zip(votes, window, strict=True) if int(read[i + 1]) == word)
        chance = right / sum(votes) if votes else 1 / WORDS
        torch.testing.assert_close(result.nats[t].neg().exp(), torch.tensor(chance).double(), rtol=1e-6, atol=1e-12)


# The four rules


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block", [7, 256])
def test_a_loss_depends_on_the_words_before_alone(name: str, block: int) -> None:
    sizes = {"capacity": 20, "history": 9}
    whole = scored(name, text(), sizes=sizes, first=FIRST, block=block).nats
    for turn in (0, 1, 7, 18, 21, LENGTH - 1):
        other = torch.cat([text()[:turn], text(LENGTH - turn, turn + 1)])
        nats = scored(name, other, sizes=sizes, first=FIRST, block=block).nats
        torch.testing.assert_close(nats[:turn], whole[:turn], rtol=0, atol=1e-12)
        assert torch.equal(text(), other) or not torch.equal(nats[turn:], whole[turn:])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("turn", [0, 30])
def test_what_all_next_words_get_is_one(name: str, turn: int) -> None:
    chances = []
    for word in range(WORDS):
        tokens = torch.cat([text()[:turn], torch.tensor([word]), text()[turn + 1 :]])
        chances.append(scored(name, tokens, sizes={"capacity": 20, "history": 9}, first=FIRST).nats[turn].neg().exp())
    torch.testing.assert_close(sum(chances), torch.tensor(1.0).double())


class Crooked:
    """A predictor whose numbers are the model's, but for a change."""

    likelihood: Likelihood = Categorical()

    def __init__(self, change: float) -> None:
        self._change = change

    def __call__(self, keys: Tensor, *, before: Any = None) -> Tensor:
        return model().decoder(keys).log_softmax(-1) + self._change


@pytest.mark.parametrize("change", [0.002, -0.01, 5.0, float("inf"), -float("inf")])
def test_a_distribution_that_does_not_sum_to_one_is_refused(change: float) -> None:
    with pytest.raises(SettingError, match="must sum to one before it is scored"):
        evaluate(model().hidden, Crooked(change), None, text())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decoder_of_a_half_type(name: str, dtype: torch.dtype) -> None:
    """Rounded to bfloat16 the log-probabilities of so many words would sum to 1.008 and more, and be refused."""
    words, lm = 2000, model()
    head, memory = nn.Linear(8, words).to(dtype), EpisodicMemory(30, 8, key_dtype=torch.float64, history=7)
    parts = {
        "parametric": Parametric(head),
        "cache": neural_cache(memory, classes=words),
        "mbpa": MbPA(head, memory, neighbors=6, adaptation=LocalAdaptation(rules.sgd(0.5), steps=1)),
    }
    output = parts.get(name) or Mixture(*parts.values(), weights=(0.5, 0.2, 0.3))
    nats = evaluate(lm.hidden, output, () if name == "parametric" else memory, text(), block=7).nats
    memory.clear()
    head.double()
    exact = evaluate(lm.hidden, output, () if name == "parametric" else memory, text(), block=7).nats
    torch.testing.assert_close(nats.double(), exact.double(), rtol=0.02, atol=0.02)


def test_logits_are_refused() -> None:
    class Logits(Crooked):
        def __call__(self, keys: Tensor, *, before: Any = None) -> Tensor:
            return model().decoder(keys)

    with pytest.raises(SettingError, match=r"Parametric\(head\)"):
        evaluate(model().hidden, Logits(0.0), None, text())


def test_one_number_for_each_word_is_no_distribution() -> None:
    class Gold(Crooked):
        def __call__(self, keys: Tensor, *, before: Any = None) -> Tensor:
            return torch.zeros(len(keys))

    with pytest.raises(ShapeError, match="vocabulary"):
        evaluate(model().hidden, Gold(0.0), None, text())


@pytest.mark.parametrize(("history", "block"), [(0, 7), (4, 7), (256, 64)])
def test_a_word_is_seen_after_it_was_scored(history: int, block: int) -> None:
    memory = EpisodicMemory(10, 8, key_dtype=torch.float64, history=history)
    turns: list[int] = []

    class Watching(Crooked):
        def __call__(self, keys: Tensor, *, before: Any = None) -> Tensor:
            slots = memory.read(keys, None, before=before).slots
            for turn, row in zip(before.tolist(), slots, strict=True):
                seen = memory.written[row[row >= 0]].sort().values.tolist()
                assert seen == list(range(max(0, turn - 10), turn))
                turns.append(turn)
            return super().__call__(keys)

    evaluate(model().hidden, Watching(0.0), memory, text(), block=block)
    assert turns == list(range(LENGTH - 1))
    assert int(memory.step) == LENGTH - 1


@pytest.mark.parametrize("block", [1, 7, 39, 40, 256])
@pytest.mark.parametrize("first", [None, 0, FIRST])
def test_every_word_is_read_once_and_in_order(block: int, first: int | None) -> None:
    read: list[int] = []
    states: list[Any] = []
    heard: list[int] = []
    blocks: list[int] = []

    def hidden(tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        assert state is (states[-1] if states else None)
        read.extend(tokens[0].tolist())
        outputs, state = model().hidden(tokens, state)
        states.append(state)
        return outputs, state

    output, memories = setup("cache", 30)
    options = {"after": lambda words: heard.extend(words.tolist()), "watch": blocks.append}
    evaluate(hidden, output, memories, text(), first=first, block=block, **options)
    whole = ([] if first is None else [first]) + text().tolist()
    assert read == whole[:-1]
    assert heard == whole[1:]
    assert sum(blocks) == len(heard)
    assert set(blocks[:-1]) <= {block}


def test_learning_comes_after_scoring_and_writing() -> None:
    output, memories = setup("cache", 30, history=7)
    calls: list[int] = []
    evaluate(model().hidden, output, memories, text(), block=7, after=lambda words: calls.append(int(memories[0].step)))
    assert calls == [*range(7, 39, 7), 39]


# Memories


@pytest.mark.parametrize("history", [0, 7])
def test_a_memory_that_is_not_empty_is_refused_and_kept(history: int) -> None:
    output, (memory, other) = setup("mixture", 8, history)
    evaluate(model().hidden, output, (memory, other), text(30))
    before = {name: part.clone() for name, part in memory.state_dict().items()}
    for named in ((memory,), (EpisodicMemory(5, 8), memory), [memory, EpisodicMemory(5, 8)]):
        with pytest.raises(SettingError, match=r"8 entries\. Call memory.clear\(\) first"):
            evaluate(model().hidden, output, named, text())
    assert all(torch.equal(part, before[name]) for name, part in memory.state_dict().items())


def test_a_cleared_memory_is_as_good_as_new() -> None:
    output, memories = setup("mixture", 8)
    results = []
    for _ in range(2):
        results.append(evaluate(model().hidden, output, memories, text(30)).nats)
        for memory in memories:
            memory.clear()
    assert torch.equal(*results)


def test_a_forgotten_past_does_not_count() -> None:
    """Write times start from 0 even where the memory is empty because all of it was forgotten."""
    output, (memory,) = setup("mbpa", 50)
    memory.forget(memory.write(torch.randn(4, 8).double(), torch.zeros(4).long()))
    fresh = scored("mbpa", text(30), sizes={"capacity": 50})
    assert torch.equal(evaluate(model().hidden, output, memory, text(30)).nats, fresh.nats)


def test_naming_a_memory_twice_is_refused() -> None:
    output, (memory,) = setup("cache")
    with pytest.raises(SettingError, match="named twice"):
        evaluate(model().hidden, output, [memory, memory], text())


@pytest.mark.usefixtures("untyped")
def test_what_is_no_memory_is_refused() -> None:
    output, _ = setup("parametric")
    with pytest.raises(SettingError, match="memory must be a memory"):
        evaluate(model().hidden, output, [3], text())


def test_static_memories_are_not_written_to() -> None:
    memory = EpisodicMemory(5, 8)
    with pytest.raises(SettingError, match="only read from"):
        evaluate(model().hidden, Parametric(model().decoder), Static(memory), text())


def test_a_memory_of_another_kind_goes_word_by_word_once_it_is_full() -> None:
    """Nothing is known of how it forgets, so nothing is overwritten before it has been read."""

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = EpisodicMemory(10, 8, key_dtype=torch.float64)

        @property
        def capacity(self) -> int:
            return 10

        def __len__(self) -> int:
            return len(self.inner)

        def read(self, *arguments: Any, **named: Any) -> Any:
            return self.inner.read(*arguments, **named)

        def write(self, *arguments: Any) -> Any:
            return self.inner.write(*arguments)

        def forget(self, slots: Any) -> None:
            self.inner.forget(slots)

        def clear(self) -> None:
            self.inner.clear()

    memory = Foreign()
    cache = neural_cache(memory, classes=WORDS, flatness=3.0)
    result = evaluate(model().hidden, cache, memory, text(), first=FIRST)
    torch.testing.assert_close(result.nats, literally(*setup("cache", 10), text(), FIRST), rtol=0, atol=1e-10)


# Texts


@pytest.mark.parametrize("block", [1, 7, 256])
@pytest.mark.parametrize("cuts", [(), (1,), (0, 1, 1, 2, 30), (7, 14, 39)])
@pytest.mark.parametrize("first", [None, FIRST])
def test_a_text_in_parts_is_the_whole(block: int, cuts: tuple[int, ...], first: int | None) -> None:
    whole = list(pairs(text(), block, first=first))
    parts = list(pairs(iter(text().tensor_split(cuts)), block, first=first))
    assert len(whole) == len(parts)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.usefixtures("untyped")
def test_a_text_in_parts_costs_what_the_whole_costs() -> None:
    results = [scored("mixture", tokens, block=7).nats for tokens in (text(), iter(text().split(9)))]
    assert torch.equal(*results)


def test_parts_are_asked_for_when_they_are_needed() -> None:
    asked: list[int] = []

    def parts() -> Iterator[Tensor]:
        for number in range(3):
            asked.append(number)
            yield text(10, number)

    blocks = pairs(parts(), 4)
    assert asked == []
    next(blocks)
    assert asked == [0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_narrow_numbers_are_words_too(dtype: torch.dtype) -> None:
    assert torch.equal(scored("mixture", text().to(dtype)).nats, scored("mixture", text()).nats)
    assert scored("mixture", text().to(dtype)).tokens.dtype == torch.long
    assert next(pairs(text().to(torch.uint8), 4, first=300))[0][0] == 300


def test_a_first_word_has_the_first_word_scored() -> None:
    with_first, without = scored("cache", text()[1:], first=int(text()[0])), scored("cache", text())
    assert torch.equal(with_first.nats, without.nats)
    assert torch.equal(with_first.tokens, without.tokens)


def test_one_word() -> None:
    assert len(scored("mixture", text(1), first=FIRST).nats) == 1
    with pytest.raises(ShapeError, match="first="):
        scored("mixture", text(1))


@pytest.mark.parametrize("tokens", [text(0), [], [text(0), text(0)], iter(())])
@pytest.mark.parametrize("first", [None, FIRST])
def test_an_empty_text_is_refused(tokens: Any, first: int | None) -> None:
    with pytest.raises(ShapeError, match="no word to score"):
        scored("mixture", tokens, first=first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_what_are_no_whole_numbers_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(DtypeError, match=r"whole numbers, got torch\.\w+\. Use \.long\(\)"):
        scored("cache", text().to(dtype))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("tokens", [text().view(2, 20), torch.tensor(3), [text(), text().view(2, 20)]])
def test_what_is_no_row_is_refused(tokens: Any) -> None:
    with pytest.raises(ShapeError, match="one row of word numbers"):
        scored("cache", tokens)


@pytest.mark.usefixtures("untyped")
def test_a_list_of_numbers_is_refused() -> None:
    with pytest.raises(DtypeError, match=r"tokens must be a tensor, got int\. Use torch\.as_tensor"):
        scored("cache", [3, 1, 4])


@pytest.mark.parametrize("word", [-1, WORDS])
def test_a_word_outside_the_vocabulary_is_refused(word: int) -> None:
    tokens = torch.cat([text(5), torch.tensor([word])])  # the last word is scored only
    with pytest.raises(LabelError, match=f"word number {word}, but the distribution is over {WORDS} words"):
        scored("parametric", tokens)
    with pytest.raises(LabelError):
        scored("mixture", tokens.flip(0))


@pytest.mark.parametrize("block", [0, -1, True])
@pytest.mark.parametrize("tokens", [text(), iter([])])
def test_a_block_of_no_words_is_refused(block: int, tokens: Any) -> None:
    with pytest.raises(SettingError, match="block must be a whole number above 0"):
        scored("parametric", tokens, block=block)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("first", [-1, 0.5, True, "<eos>"])
def test_a_first_word_is_a_number(first: Any) -> None:
    with pytest.raises(SettingError, match="first must be the number of a word"):
        scored("parametric", text(), first=first)


def test_keys_must_be_one_vector_for_each_word() -> None:
    def hidden(tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return model().hidden(tokens, state)[0][:, :-1], None

    with pytest.raises(ShapeError, match=r"hidden must map words \(1, 39\) to \(1, 39, d\)"):
        evaluate(hidden, Parametric(model().decoder), None, text())


# The result


@pytest.mark.usefixtures("untyped")
def test_the_usual_slips_are_named() -> None:
    output = Parametric(model().decoder)
    with pytest.raises(SettingError, match=r"got a whole model. Pass its method: lm.hidden"):
        evaluate(model(), output, None, text())
    with pytest.raises(SettingError, match=r"must be a predictor, got Sequential. Wrap a head as Parametric\(head\)"):
        evaluate(model().hidden, model().decoder, None, text())


def test_a_model_that_has_diverged_is_named() -> None:
    output, words = Parametric(nn.Linear(8, WORDS).double()), text()
    with torch.no_grad():
        output.head.bias[3] = torch.nan
    with pytest.raises(NonFiniteError, match=r"NaN for a word. Has the model diverged"):
        evaluate(model().hidden, output, None, words)


def test_what_an_evaluation_says() -> None:
    result = Evaluation(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 1, 2]), 1.5)
    assert result.loss == 3.0
    assert result.perplexity == pytest.approx(20.0855369)
    assert result.tokens_per_second == 2.0


def test_a_word_without_a_chance_costs_infinitely_much() -> None:
    memory = EpisodicMemory(30, 8, key_dtype=torch.float64)
    vote = NonParametric(memory, classes=WORDS, neighbors=1)
    assert evaluate(model().hidden, vote, memory, torch.arange(10)).perplexity == float("inf")


def test_nothing_else_is_touched(rng_untouched: Any) -> None:
    before = {name: part.clone() for name, part in model().state_dict().items()}
    with rng_untouched():
        result = scored("mixture", text(), block=7)
    assert not result.nats.requires_grad
    assert torch.is_grad_enabled()
    assert all(torch.equal(part, before[name]) for name, part in model().state_dict().items())
