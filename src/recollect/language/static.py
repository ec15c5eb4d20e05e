"""A memory of a text that was read before, and with it the kNN language model.

Source: Khandelwal et al. 2020 (kNN-LM). The memory holds the training text and stays as it is while another is read::

    train = EpisodicMemory(capacity=len(tokens), key_size=lm.hidden_size)
    remember(lm.hidden, train, tokens)
    output = Mixture(Parametric(lm.decoder), knn_lm(train, classes=lm.vocabulary), weights=(0.75, 0.25))
    evaluate(lm.hidden, output, None, other)

``MbPA(lm.decoder, Static(train), ...)`` adapts to the same memory.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from recollect.errors import ShapeError, require, require_number, require_whole
from recollect.kernels import gaussian
from recollect.language.evaluate import BLOCK, Hidden, pairs
from recollect.memory import Memory, Static
from recollect.predictors import NonParametric


def remember(
    hidden: Hidden,
    memory: Memory,
    tokens: Int[Tensor, " n"] | Iterable[Tensor],
    *,
    first: int | None = None,
    block: int = BLOCK,
    watch: Callable[[int], None] = lambda words: None,
) -> int:
    """Writes every word of a text to a memory, under what a model made of the words before it.

    What the memory holds already stays, as far as there is room.

    Args:
        hidden: Makes the keys, such as ``lm.hidden``.
        memory: What to write to. An entry for each word but the first, so ``capacity=len(tokens)`` is enough.
        tokens: The text by word numbers, or its parts one after the other; see ``evaluate``.
        first: The word that the text is thought to come after, such as ``<eos>``: then its first word is written too.
        block: The number of words that are read at once.
        watch: Called after each block with the number of its words.

    Returns:
        How many words were written.

    Raises:
        SettingError: If ``block`` is no positive whole number.
        ShapeError: If ``hidden`` does not return one vector for each word.

    Example:
        >>> from recollect import EpisodicMemory
        >>> from recollect.language.lstm import LSTMModel
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> memory = EpisodicMemory(capacity=100, key_size=8)
        >>> remember(lm.hidden, memory, torch.tensor([3, 1, 4, 1, 5]))
        4
        >>> memory.values[:4].tolist()
        [1, 4, 1, 5]
    """
    require_whole("block", block)
    require("memory", memory, Memory, "a memory, such as EpisodicMemory(capacity=1000, key_size=64)")
    state: Any = None
    done = 0
    for words, targets in pairs(tokens, block, first=first):
        with torch.no_grad():
            keys, state = hidden(words.unsqueeze(0), state)
        if keys.dim() != 3 or keys.shape[:2] != (1, len(words)):
            raise ShapeError(f"hidden must map words (1, {len(words)}) to (1, {len(words)}, d), got {keys.shape}.")
        memory.write(keys[0], targets)
        done += len(targets)
        watch(len(targets))
    return done


def knn_lm(memory: Memory, *, classes: int, neighbors: int = 1024, temperature: float = 1.0) -> NonParametric:
    """Returns the nearest-neighbor part of kNN-LM: a vote of the entries near the query, whenever they were written.

    Source: Khandelwal et al. 2020, with squared Euclidean distances::

        p(w) ~ sum_{k: v_k = w} exp(-||h_k - q||^2 / temperature)

    over the K nearest entries. This is the ``gaussian`` kernel with ``temperature = 2 bandwidth^2``.

    Args:
        memory: Such as ``remember`` has filled.
        classes: The size of the vocabulary.
        neighbors: How many entries vote, K. (The paper: 1024.)
        temperature: In units of squared distance. (The paper's code: 1, for its model's keys; others need others.)

    Raises:
        SettingError: If a number is out of its range.

    Example:
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=10, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([0, 1]))
        >>> knn_lm(memory, classes=3)(torch.tensor([1.0, 0.0])).exp()  # 1 / (1 + exp(-2)) of them
        tensor([0.8808, 0.1192, 0.0000])
    """
    require_number("temperature", temperature, above=0.0)
    kernel = gaussian(bandwidth=math.sqrt(temperature / 2))
    return NonParametric(Static(memory), classes=classes, neighbors=neighbors, kernel=kernel)
