"""How a model reads a text: block after block of keys, inputs of the softmax layer, logits, and the words that came."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.errors import require_choice
from recollect.language.dynamic import DynamicEvaluation
from recollect.language.evaluate import BLOCK, check_words, pairs
from recollect.language.model import LanguageModel

KEYS = ("hidden", "input")


class Reading(NamedTuple):
    """Some words of a text as a model read them."""

    keys: Float[Tensor, "t h"]
    """What neighbors are searched by."""
    inputs: Float[Tensor, "t d"]
    """What goes into the softmax layer; the same tensor where that is what neighbors are searched by."""
    logits: Float[Tensor, "t c"]
    """What comes out of it."""
    targets: Int[Tensor, " t"]
    """The words that came."""
    bias: bool = True
    """Whether the softmax layer has a bias, which adapts with it."""


def read(
    lm: LanguageModel,
    tokens: Int[Tensor, " n"] | Iterable[Tensor],
    *,
    first: int | None = None,
    key: str = "hidden",
    block: int = BLOCK,
) -> Iterator[Reading]:
    """Reads a text with a model that stays as it is.

    Args:
        lm: The model.
        tokens: The text; see ``evaluate``.
        first: See ``evaluate``.
        key: What neighbors are searched by: the ``"hidden"`` state or the softmax layer's ``"input"``.
        block: The number of words at a time.

    Raises:
        SettingError: If a setting is none of those; at once.
        ShapeError, DtypeError, LabelError: If the text is no row of words of the vocabulary; when it comes to that.

    Example:
        >>> from recollect.language import LSTMModel, read
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> reading = next(read(lm, torch.tensor([3, 1, 4, 1, 5]), key="input"))
        >>> reading.keys.shape, reading.logits.shape, reading.targets
        (torch.Size([4, 4]), torch.Size([4, 10]), tensor([1, 4, 1, 5]))
    """
    require_choice("key", key, KEYS)
    return _read(lm, pairs(tokens, block, first=first), key)


def _read(lm: LanguageModel, blocks: Iterator[tuple[Tensor, Tensor]], key: str) -> Iterator[Reading]:
    state: Any = None
    for words, targets in blocks:
        with torch.no_grad():
            hidden, state = lm.hidden(words.unsqueeze(0), state)
        yield _reading(lm, hidden[0], targets, key)


def read_dynamically(
    lm: LanguageModel,
    dynamic: DynamicEvaluation,
    tokens: Int[Tensor, " n"] | Iterable[Tensor],
    *,
    first: int | None = None,
    key: str = "hidden",
    segment: int = 5,
) -> Iterator[Reading]:
    """Reads a text with a model that learns from each segment when the next one is asked for.

    Cache and memory hold hidden states and predictions as they were at the time; nothing is computed anew when the
    weights move.

    Args:
        lm: The model.
        dynamic: Moves the weights of this model.
        tokens: The text; see ``evaluate``.
        first: See ``evaluate``.
        key: See ``read``.
        segment: How many words are read before the weights move.

    Raises:
        SettingError, ShapeError, DtypeError, LabelError: See ``read``.

    Example:
        >>> from recollect.language import DynamicEvaluation, LSTMModel, gradient_statistics, read_dynamically
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> text = torch.tensor([1, 2, 3] * 20)
        >>> with DynamicEvaluation(lm, gradient_statistics(lm, text, batch=2), rate=1e-2) as dynamic:
        ...     readings = list(read_dynamically(lm, dynamic, text, segment=5))
        >>> [len(reading.targets) for reading in readings[-2:]]
        [5, 4]
    """
    require_choice("key", key, KEYS)
    return _read_dynamically(lm, dynamic, pairs(tokens, segment, first=first), key)


def _read_dynamically(
    lm: LanguageModel, dynamic: DynamicEvaluation, segments: Iterator[tuple[Tensor, Tensor]], key: str
) -> Iterator[Reading]:
    state: Any = None
    for words, targets in segments:
        hidden, state = dynamic.hidden(words.unsqueeze(0), state)
        yield _reading(lm, hidden[0], targets, key)
        dynamic.learn(targets)


@torch.no_grad()
def _reading(lm: LanguageModel, hidden: Tensor, targets: Tensor, key: str) -> Reading:
    inputs = lm.inputs(hidden)
    logits = lm.output(inputs)
    check_words(targets, logits.shape[1])
    # Probabilities of half types would be too coarse for weights of mixtures to be fitted to them.
    wide = torch.promote_types(logits.dtype, torch.float32)
    same = key == "hidden" and hidden is not inputs
    inputs, logits = inputs.to(wide), logits.to(wide)
    return Reading(hidden.to(wide) if same else inputs, inputs, logits, targets, lm.output.bias is not None)


def gathered(readings: Iterable[Reading]) -> Iterator[Reading]:
    """Puts short readings together and cuts long ones, so that each is a batch of some size and fits the window."""
    held: list[Reading] = []
    for reading in readings:
        for some in _cut(reading):
            if held and sum(len(one.targets) for one in held) + len(some.targets) > BLOCK:
                yield _joined(held)
                held = []
            held.append(some)
    if held:
        yield _joined(held)


def _cut(reading: Reading) -> Iterator[Reading]:
    if len(reading.targets) <= BLOCK:
        yield reading
        return
    for keys, inputs, logits, targets in zip(*(part.split(BLOCK) for part in reading[:4]), strict=True):
        yield Reading(keys, keys if reading.inputs is reading.keys else inputs, logits, targets, reading.bias)


def _joined(readings: list[Reading]) -> Reading:
    if len(readings) == 1:
        return readings[0]
    same = all(one.inputs is one.keys for one in readings)
    keys, logits, targets = (
        torch.cat(parts) for parts in zip(*((one.keys, one.logits, one.targets) for one in readings), strict=True)
    )
    inputs = keys if same else torch.cat([one.inputs for one in readings])
    return Reading(keys, inputs, logits, targets, readings[0].bias)
