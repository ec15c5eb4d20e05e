"""``evaluate``: reads a text once, from its first word to its last; predicts, scores, and only then remembers.

Four rules make a score honest, and each is kept here for every predictor:

1. A distribution depends on the model and the words before it alone.
2. It covers the whole vocabulary and sums to one before the word that comes is looked at.
3. A word is scored before anything is learned from it.
4. There is one pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recollect.errors import (
    DtypeError,
    LabelError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_tensor,
    require_whole,
)
from recollect.language.collected import Collected
from recollect.memory import Memory, Static
from recollect.memory.protocol import KeepsHistory
from recollect.predictors import Predictor

BLOCK = 256
"""How many words are predicted at once."""
_TOLERANCE = 1e-3  # by how much the sum of a float32 distribution may miss one


@runtime_checkable
class Hidden(Protocol):
    """Maps words to one vector for each, such as ``LSTMModel.hidden``; the state is whatever it needs to go on."""

    def __call__(self, tokens: Int[Tensor, "b t"], state: Any = None) -> tuple[Float[Tensor, "b t d"], Any]: ...


class Evaluation(NamedTuple):
    """What every word of a text cost."""

    nats: Float[Tensor, " n"]
    """``-log p(word | all words before)``."""
    tokens: Int[Tensor, " n"]
    """The words that were scored."""
    seconds: float
    """How long it took."""

    @property
    def loss(self) -> float:
        """The mean in nats per word."""
        return float(self.nats.double().mean())

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return float(self.nats.double().mean().exp())

    @property
    def tokens_per_second(self) -> float:
        """Words per second."""
        return len(self.nats) / max(self.seconds, 1e-9)


def evaluate(
    hidden: Hidden,
    output: Predictor,
    memory: Memory | Sequence[Memory] | None,
    tokens: Int[Tensor, " n"] | Iterable[Tensor],
    *,
    first: int | None = None,
    block: int = BLOCK,
    after: Callable[[Int[Tensor, " t"]], None] = lambda words: None,
    watch: Callable[[int], None] = lambda words: None,
) -> Evaluation:
    """Scores a text with any predictor, whose memory learns each word once it has been scored.

    Paper: Section 4.3; the memory holds the (hidden state, next word) pairs seen during evaluation. The words are
    predicted a block at a time, each from what the memory held when its turn came (``before=``): the result is that
    of going word by word. What a memory overwrites must stay readable for as long: give it a ``history`` of a block
    (``EpisodicMemory(..., history=256)``). One with less of it is read in shorter blocks from the moment on when it
    is full, and one without word by word: slower, and the same result.

    Args:
        hidden: Makes the keys, such as ``lm.hidden``.
        output: Maps keys to log-probabilities over the vocabulary: ``Parametric``, ``MbPA``, ``neural_cache``, or a
            ``Mixture`` of them.
        memory: The memories to write to: all that ``output`` reads, each once and empty. What is static, such as a
            memory of the training text (``Static``, ``knn_lm``), is not named here. None: nothing is written.
        tokens: The text by word numbers, or its parts one after the other (a text too long for the RAM), cut anywhere.
        first: The word that the text is thought to come after, such as ``<eos>``: then its first word is scored too.
        block: The largest number of words that are predicted at once. Over more than 30,000 words, 128 can be faster:
            the C library reuses the space of a tensor of less than 32 MiB.
        after: Called with the words of each block after they have been scored and written, such as
            ``DynamicEvaluation.learn``.
        watch: Called after each block with the number of its words.

    Raises:
        SettingError: If a memory is not empty (nothing of it is lost), named twice, read by ``output`` but not named,
            or named and read as ``Static``; ``block`` is no positive whole number, ``first`` no word's number, or a
            distribution not normalized; ``hidden`` is a model, or ``output`` a head, instead of what is to be made of
            them.
        NonFiniteError: If the predictor gives NaN.
        ShapeError: If no word can be scored, a part is not one row of words, or ``hidden`` does not return one vector
            for each word.
        DtypeError: If the words are no whole numbers.
        LabelError: If a word lies outside the predictor's vocabulary.

    Example:
        >>> from recollect import EpisodicMemory, Mixture, Parametric, neural_cache
        >>> from recollect.language import LSTMModel, evaluate
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> memory = EpisodicMemory(capacity=100, key_size=8, history=256)
        >>> cache = neural_cache(memory, classes=10)
        >>> mixed = Mixture(Parametric(lm.decoder), cache, weights=(0.5, 0.5))
        >>> text = torch.tensor([1, 2, 3] * 20)
        >>> alone = evaluate(lm.hidden, Parametric(lm.decoder), None, text)
        >>> evaluate(lm.hidden, mixed, memory, text).perplexity < alone.perplexity
        True
    """
    blocks = pairs(tokens, block, first=first)
    _require_parts(hidden, output)
    memories = _empty(memory)
    _require_named(output, memories)
    for one in memories:
        one.clear()  # its write times count from 0
    started = time.perf_counter()
    state: Any = None
    found = Collected()
    done = 0
    for words, targets in blocks:
        with torch.no_grad():
            keys, state = hidden(words.unsqueeze(0), state)
        if keys.dim() != 3 or keys.shape[:2] != (1, len(words)):
            raise ShapeError(f"hidden must map words (1, {len(words)}) to (1, {len(words)}, d), got {keys.shape}.")
        found.add(_score(output, memories, keys[0].detach(), targets, done), targets)
        done += len(targets)
        after(targets)
        watch(len(targets))
    if not done:
        raise too_short()
    nats, scored = found.joined()
    return Evaluation(nats, scored, time.perf_counter() - started)


def pairs(
    tokens: Int[Tensor, " n"] | Iterable[Tensor], block: int, *, first: int | None = None
) -> Iterator[tuple[Int[Tensor, " t"], Int[Tensor, " t"]]]:
    """Yields ``block`` words of a text and the words after them, block by block; the last may be shorter.

    Where a text that comes in parts was cut does not matter: the blocks are those of the whole.

    Args:
        tokens: The text, or its parts; see ``evaluate``.
        block: How many words.
        first: The word before the text's first.

    Raises:
        SettingError, ShapeError, DtypeError: See ``evaluate``; settings are checked at once.
    """
    require_whole("block", block)
    if first is not None and (isinstance(first, bool) or not isinstance(first, int) or first < 0):
        raise SettingError(f"first must be the number of a word, such as vocabulary.end, or None, got {first!r}.")
    return _pairs((tokens,) if isinstance(tokens, Tensor) else tokens, block, first)


def _pairs(parts: Iterable[Tensor], block: int, first: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    held: Tensor | None = None
    for part in parts:
        words = _row(part)
        if held is None:
            held = words.new_full((0 if first is None else 1,), 0 if first is None else first)
        held = torch.cat([held, words])
        while len(held) > block:
            yield held[:block], held[1 : block + 1]
            held = held[block:]
    if held is not None and len(held) > 1:
        yield held[:-1], held[1:]


def _row(part: Tensor) -> Int[Tensor, " n"]:
    """Returns a part of a text as word numbers, or says why it is none."""
    require_tensor("tokens", part)
    if part.dim() != 1:
        raise ShapeError(
            f"a text is one row of word numbers, got shape {tuple(part.shape)}. One of several texts is text[i]."
        )
    if part.is_floating_point() or part.is_complex() or part.dtype == torch.bool:
        raise DtypeError(f"a text is made of whole numbers, got {part.dtype}. Use .long().")
    return part.long()


def too_short() -> ShapeError:
    """Returns the error for a text of which no word can be scored."""
    return ShapeError(
        "there is no word to score: a text needs two words, or one with first=, the word that it comes after. Was an "
        "iterator used a second time?"
    )


def check_words(targets: Int[Tensor, "*t"], vocabulary: int) -> None:
    """Refuses words that a distribution does not cover.

    Raises:
        LabelError: By the number of one of them.
    """
    low, high = (int(end) for end in targets.aminmax())
    if low < 0 or high >= vocabulary:
        raise LabelError(
            f"the text holds word number {low if low < 0 else high}, but the distribution is over {vocabulary} words, "
            f"0 to {vocabulary - 1}. Was the text read with another vocabulary?"
        )


def _empty(memory: Memory | Sequence[Memory] | None) -> tuple[Memory, ...]:
    """Returns the memories to write to, all of them empty."""
    memories = () if memory is None else (memory,) if isinstance(memory, Memory) else tuple(memory)
    for number, one in enumerate(memories):
        require("memory", one, Memory, "a memory, such as EpisodicMemory(capacity=1000, key_size=64), or several")
        if any(one is other for other in memories[:number]):
            raise SettingError("a memory is named twice, and would be written to twice. Name each once.")
        if len(one):
            raise SettingError(
                f"a text is scored with a memory that is empty at its beginning, but this one has {len(one)} entries. "
                "Call memory.clear() first, or if it is only read from, wrap it as Static(memory) where it is read and "
                "do not name it here."
            )
    return memories


def _require_parts(hidden: object, output: object) -> None:
    """Refuses the two usual slips: the model in place of its ``hidden``, and a head in place of a predictor."""
    if all(hasattr(hidden, name) for name in ("hidden", "inputs", "output")):
        raise SettingError("hidden must map words to hidden states, got a whole model. Pass its method: lm.hidden.")
    if not hasattr(output, "likelihood"):
        name = type(output).__name__
        raise SettingError(f"output must be a predictor, got {name}. Wrap a head as Parametric(head).")


def _require_named(output: Predictor, memories: tuple[Memory, ...]) -> None:
    """Refuses a predictor with a memory that nobody writes to: it would show a word its first entries, or none.

    And one with a ``Static`` memory that is written to: it would show a word itself.
    """
    parts = list(output.modules()) if isinstance(output, nn.Module) else []
    written = _inside(memories)
    static = _inside(part for part in parts if isinstance(part, Static))
    if written & static:
        raise SettingError(
            "output reads a named memory as Static, which hides nothing: a word would find itself. Name memories that "
            "are read as they are; read as Static (as knn_lm does) only what was filled beforehand."
        )
    for part in parts:
        if isinstance(part, Static) or id(part) in written:
            continue
        held = [one for one in (*part.children(), *vars(part).values()) if isinstance(one, Memory)]
        if any(not isinstance(one, Static) and all(one is not memory for memory in memories) for one in held):
            raise SettingError(
                "output reads a memory that is not named. Pass it as memory=, for each word to be written to it, or "
                "wrap it as Static(memory) where output reads it, if it was filled beforehand."
            )


def _inside(memories: Iterable[object]) -> set[int]:
    return {id(part) for one in memories if isinstance(one, nn.Module) for part in one.modules()}


def _score(
    output: Predictor, memories: tuple[Memory, ...], keys: Tensor, targets: Tensor, done: int
) -> Float[Tensor, " t"]:
    """Predicts and scores some words, and writes them."""
    losses = []
    start = 0
    while start < len(keys):
        count = min(len(keys) - start, *(_at_once(one, done + start) for one in memories), len(keys))
        part = slice(start, start + count)
        times = torch.arange(done + start, done + start + count, device=keys.device)
        if count > 1:  # each word's turn is in ``times``: none sees itself, nor what comes after it
            _write(memories, keys[part], targets[part])
        losses.append(_nats(output(keys[part], before=times).detach(), targets[part]))
        if count == 1:
            _write(memories, keys[part], targets[part])
        start += count
    return torch.cat(losses)


def _at_once(memory: Memory, done: int) -> int:
    """Returns how many words can be written before the first of them is predicted, and nothing it sees is lost."""
    history = memory.history if isinstance(memory, KeepsHistory) else 0
    return max(memory.capacity + history - done, history, 1)


def _write(memories: tuple[Memory, ...], keys: Tensor, targets: Tensor) -> None:
    for one in memories:
        one.write(keys, targets)


def _nats(chances: Tensor, targets: Tensor) -> Float[Tensor, " t"]:
    """Returns ``-log p`` of the words, once it is seen that the log-probabilities are a distribution."""
    if chances.dim() != 2 or len(chances) != len(targets):
        raise ShapeError(f"output must give log-probabilities ({len(targets)}, vocabulary), got {chances.shape}.")
    check_words(targets, chances.shape[1])
    total = chances.logsumexp(1)
    if bool(total.isnan().any()):
        raise NonFiniteError(
            "output gave NaN for a word. Has the model diverged? Under dynamic evaluation, lower its rate or its decay."
        )
    if not bool((total.abs() < _TOLERANCE).all()):
        worst = total[total.abs().argmax()]
        raise SettingError(
            f"a distribution over the words must sum to one before it is scored, but one sums to {float(worst.exp())}. "
            "Does output return logits instead of log-probabilities? Wrap a head as Parametric(head)."
        )
    return -chances.gather(1, targets.unsqueeze(1)).squeeze(1)
