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
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from recollect.errors import SettingError, ShapeError, require, require_number
from recollect.kernels import Kernel, gaussian, inverse_distance
from recollect.language.evaluate import Hidden, pairs
from recollect.memory import Context, Memory
from recollect.predictors import NonParametric

_BLOCK = 256  # words that are read at once


def remember(
    hidden: Hidden,
    memory: Memory,
    tokens: Int[Tensor, " n"] | Iterable[Tensor],
    *,
    first: int | None = None,
    block: int = _BLOCK,
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
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise SettingError(f"block must be a whole number above 0, got {block!r}.")
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


class Static(nn.Module):
    """A memory whose entries are older than anything that is read: ``before=`` hides none of them.

    ``evaluate`` shows each word what a memory knew when the word's turn came, counted in entries since the text's
    beginning. Of a memory that was filled before, it would show the first entries only; of this one it shows all.

    Args:
        memory: The memory, filled. It is shared, not copied.

    Raises:
        SettingError: If it is no memory.

    Example:
        >>> from recollect import EpisodicMemory
        >>> memory = EpisodicMemory(capacity=10, key_size=2)
        >>> slots = memory.write(torch.eye(2), torch.tensor([7, 8]))
        >>> Static(memory).read(torch.tensor([0.0, 1.0]), neighbors=1, before=0).values
        tensor([8])
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        require("memory", memory, Memory, "a memory, such as EpisodicMemory(capacity=1000, key_size=64)")
        self.memory = memory

    @property
    def capacity(self) -> int:
        """The largest number of entries."""
        return self.memory.capacity

    def __len__(self) -> int:
        return len(self.memory)

    def __bool__(self) -> bool:
        return True  # an empty memory is still a memory

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context:
        """Retrieves the nearest of all entries; ``before`` is accepted and has no effect."""
        return self.memory.read(queries, neighbors, kernel=kernel)

    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries, at once and for good."""
        self.memory.forget(slots)

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Refuses: what is written while a text is read would be seen before its time.

        Raises:
            SettingError: Always.
        """
        raise SettingError("a static memory is only read from. Write to the memory that it was made of, beforehand.")

    def clear(self) -> None:
        """Refuses, as ``write`` does.

        Raises:
            SettingError: Always.
        """
        raise SettingError("a static memory is only read from. Clear the memory that it was made of, beforehand.")


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
