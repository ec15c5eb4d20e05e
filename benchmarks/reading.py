"""What one would write instead of recollect's reading of a text: a loop over its words."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, softmax

from recollect import EpisodicMemory


class Past(NamedTuple):
    """The keys of a text's words and the words that came, of which the last ``len(queries)`` are predicted."""

    keys: Tensor
    words: Tensor
    window: int
    """How many words a prediction looks back at."""

    def before(self, number: int, queries: int) -> slice:
        """Returns which entries the prediction of a word sees."""
        end = len(self.keys) - queries + number
        return slice(end - self.window, end)


def pointer(
    queries: Tensor, logits: Tensor, past: Past, history: Tensor, *, flatness: float, weight: float
) -> Iterator[Tensor]:
    """Yields one word's distribution after the other, by the steps of the published script for the neural cache.

    Args:
        queries: The hidden states.
        logits: The model's for them, made at once.
        past: The window is full from the first word on.
        history: The words of ``past`` as rows of zeros and a one.
        flatness: Theta.
        weight: The cache's.
    """
    for number, (query, chances) in enumerate(zip(queries, softmax(logits, dim=1), strict=True)):
        seen = past.before(number, len(queries))
        attention = softmax(flatness * torch.mv(past.keys[seen], query), dim=0).unsqueeze(1)
        cache = (attention.expand_as(history[seen]) * history[seen]).sum(0)
        yield weight * cache + (1 - weight) * chances


def added_up(queries: Tensor, logits: Tensor, past: Past, *, flatness: float, weight: float) -> Iterator[Tensor]:
    """Yields the same distributions, with the attention added up at each word's number."""
    for number, (query, chances) in enumerate(zip(queries, softmax(logits, dim=1), strict=True)):
        seen = past.before(number, len(queries))
        attention = softmax(flatness * torch.mv(past.keys[seen], query), dim=0)
        yield ((1 - weight) * chances).index_add_(0, past.words[seen], weight * attention)


class Neighbors(NamedTuple):
    """What a query finds in a memory, as inputs of the softmax layer."""

    query: Tensor
    keys: Tensor
    words: Tensor
    weights: Tensor


def neighbors(
    queries: Tensor, times: Tensor, memory: EpisodicMemory, *, count: int, projection: nn.Module
) -> Iterator[Neighbors]:
    """Yields what one query after the other finds."""
    for query, time in zip(queries.split(1), times.split(1), strict=True):
        with torch.no_grad():
            found = memory.read(query, count, before=time)
            near = Neighbors(projection(query), projection(found.keys[0]), found.values[0], found.weights[0])
        yield near


def copied(softmax_layer: nn.Linear, found: Iterator[Neighbors], *, rate: float) -> Iterator[Tensor]:
    """Yields the logits of one query after the other, from a copy of the softmax layer after one step of its own."""
    for near in found:
        adapted = copy.deepcopy(softmax_layer)
        optimizer = torch.optim.SGD(adapted.parameters(), lr=rate)
        losses = cross_entropy(adapted(near.keys), near.words, reduction="none")
        (near.weights * losses).sum().backward()
        optimizer.step()
        with torch.no_grad():
            logits = adapted(near.query)
        yield logits


def differentiated(softmax_layer: nn.Linear, found: Iterator[Neighbors], *, rate: float) -> Iterator[Tensor]:
    """Yields the same logits: those of the layer as it is, and of its gradient, which is never applied to a copy."""
    for near in found:
        losses = cross_entropy(softmax_layer(near.keys), near.words, reduction="none")
        change = torch.autograd.grad((near.weights * losses).sum(), list(softmax_layer.parameters()))
        with torch.no_grad():
            logits = softmax_layer(near.query) - rate * linear(near.query, *change)
        yield logits
