"""The last words of a text, and what cache and MbPA make of them for a block of words at once.

For MbPA the softmax layer never moves. One step of gradient descent changes the logits by::

    z'(q) = z(q) + rate * sum_k w_k (h_k . q + 1) (onehot(v_k) - p_k)

with p_k what the model said at entry k: linear in the rate, and up to the weights' sum a running sum over neighbors. So
rates cost one softmax each, and numbers of neighbors share their sum. Of more steps each neighbor has coefficients
``a_k``, one for each word of the vocabulary (see ``adaptation/factored.py``)::

    a_k <- a_k + rate * w_k (onehot(v_k) - softmax(log p_k + sum_j a_j (h_j . h_k + 1)))
    z'(q) = z(q) + sum_k a_k (h_k . q + 1)

and numbers of steps share their beginning. Each step adds what it changes to both sums at once.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from recollect.language.reading import Reading
from recollect.language.settings import KERNEL, CacheGrid, MbPAGrid

_WIDTH = 512  # columns of one block of the table of predictions: one block of a few thousand rows stays in the cache
_AT_ONCE = 2**21  # bytes of coefficients that move at once: they should stay in the cache


class Window:
    """The last words of a text, each in the row ``time % rows``.

    Args:
        like: The first reading.
        rows: How many words it holds; those of the block that is being scored among them.
        table_dtype: In which to keep what the model said at each word; that of the logits when None.
        keep_table: Whether to keep it: only MbPA asks.
    """

    def __init__(self, like: Reading, rows: int, table_dtype: torch.dtype | None, *, keep_table: bool) -> None:
        def room(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
            return values.new_zeros(rows, *values.shape[1:], dtype=dtype)

        self.keys = room(like.keys)
        self.inputs = self.keys if like.inputs is like.keys else room(like.inputs)
        self.values = room(like.targets)
        self.times = torch.full((rows,), -1, device=like.targets.device)
        columns = like.logits.split(_WIDTH, 1) if keep_table else ()
        self.table = [room(part, table_dtype) for part in columns]

    def add(self, reading: Reading, times: Int[Tensor, " t"]) -> None:
        """Writes a block of words, over the oldest ones."""
        rows = times % len(self.times)
        self.keys[rows], self.values[rows], self.times[rows] = reading.keys, reading.targets, times
        if self.inputs is not self.keys:
            self.inputs[rows] = reading.inputs
        if self.table:
            chances = reading.logits.softmax(1)
            for part, columns in zip(self.table, chances.split(_WIDTH, 1), strict=True):
                part[rows] = columns.to(part.dtype)

    def seen(self, times: Int[Tensor, " t"], size: int) -> Tensor:
        """Which rows hold one of the last ``size`` words at each of these times, ``(t, rows)``."""
        age = times.unsqueeze(1) - self.times
        return (age > 0) & (age <= size) & (self.times >= 0)

    def logs(self, rows: Int[Tensor, "t k"], dtype: torch.dtype) -> Float[Tensor, "t k c"]:
        """Returns the log-probabilities that the model gave at some words; none is infinite."""
        parts = [part[rows] for part in self.table]
        return torch.cat(parts, -1).to(dtype).clamp_(min=torch.finfo(dtype).tiny).log_()


def score_cache(window: Window, reading: Reading, times: Int[Tensor, " t"], grid: CacheGrid) -> Float[Tensor, "m t"]:
    """Returns the probability that the cache gives to each word of a block, by each of ``grid.points()``."""
    out = []
    products = reading.keys @ window.keys.mT
    right = window.values == reading.targets.unsqueeze(1)
    for size in grid.sizes:
        hidden = ~window.seen(times, size)
        inside = products.masked_fill(hidden, -torch.inf)
        inside -= inside.amax(1, keepdim=True)
        for flatness in grid.flatness:
            weights = (inside * flatness).exp_() if flatness else (~hidden).to(inside.dtype)
            share = (weights * right).sum(1) / weights.sum(1)
            out.append(torch.where(hidden.all(1), 1 / reading.logits.shape[1], share))
    return torch.stack(out)


def score_mbpa(window: Window, reading: Reading, times: Int[Tensor, " t"], grid: MbPAGrid) -> Float[Tensor, "m t"]:
    """Returns the probability that MbPA gives to each word of a block, by each of ``grid.points()``."""
    keys = window.keys
    products = reading.keys @ keys.mT
    distances = reading.keys.square().sum(1, keepdim=True) + keys.square().sum(1) - 2 * products
    reach = products if window.inputs is keys else reading.inputs @ window.inputs.mT
    out = []
    for size in grid.sizes:
        near = distances.clamp(min=0).masked_fill_(~window.seen(times, size), torch.inf)
        near, rows = near.topk(min(grid.neighbors[-1], near.shape[1]), largest=False)
        weights = _weights(near)
        cross = reach.gather(1, rows) + int(reading.bias)
        if grid.steps == (1,):
            out.append(_one_step(window, reading, grid, rows, weights, cross))
        else:
            out.append(_steps(window, reading, grid, rows, weights, cross))
    return torch.cat(out)


def _weights(near: Float[Tensor, "t k"]) -> Float[Tensor, "t k"]:
    """Returns the neighbors' weights, the nearest's being one (of far ones alone nothing would be left otherwise)."""
    logs = KERNEL.log_weights(None, None, near)
    return (logs - logs[:, :1]).exp_().masked_fill_(near == torch.inf, 0)


def _one_step(
    window: Window, reading: Reading, grid: MbPAGrid, rows: Tensor, weights: Tensor, cross: Tensor
) -> Float[Tensor, "m t"]:
    shares = weights * cross
    change, total, past = torch.zeros_like(reading.logits), torch.zeros_like(weights[:, :1]), 0
    out = []
    for count in grid.neighbors:
        part = slice(past, count)
        _add(change, window, rows[:, part], shares[:, part])
        total, past = total + weights[:, part].sum(1, keepdim=True), count
        scale = torch.where(total > 0, 1 / total, 0)
        out += (_gold(torch.addcmul(reading.logits, change, scale, value=rate), reading.targets) for rate in grid.rates)
    return torch.stack(out)


def _add(change: Tensor, window: Window, rows: Int[Tensor, "t k"], shares: Float[Tensor, "t k"]) -> None:
    """Adds ``sum_k share_k (onehot(v_k) - p_k)`` of some entries to each query's change."""
    if rows.shape[1] == 0:
        return
    change.scatter_add_(1, window.values[rows], shares)
    for columns, part in zip(change.split(_WIDTH, 1), window.table, strict=True):
        columns.sub_(embedding_bag(rows, part, per_sample_weights=shares.to(part.dtype), mode="sum"))


def _gold(logits: Float[Tensor, "t c"], targets: Int[Tensor, " t"]) -> Float[Tensor, " t"]:
    return (logits.gather(1, targets.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)).exp()


def _steps(
    window: Window, reading: Reading, grid: MbPAGrid, rows: Tensor, weights: Tensor, cross: Tensor
) -> Float[Tensor, "m t"]:
    out = reading.logits.new_empty(len(grid.neighbors), len(grid.rates), len(grid.steps), len(rows))
    size = reading.logits.element_size() * reading.logits.shape[1]
    for i, count in enumerate(grid.neighbors):
        at_once = max(1, _AT_ONCE // (size * count))
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            some = reading._replace(logits=reading.logits[part], targets=reading.targets[part])
            near, share = rows[part, :count], weights[part, :count]
            share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
            logs = window.logs(near, reading.logits.dtype)
            for j, rate in enumerate(grid.rates):
                out[i, j, :, part] = _descend(window, some, grid, near, rate * share, logs, cross[part, :count])
    return out.flatten(0, 2)


def _descend(
    window: Window,
    reading: Reading,
    grid: MbPAGrid,
    rows: Int[Tensor, "t k"],
    rates: Float[Tensor, "t k"],
    logs: Float[Tensor, "t k c"],
    cross: Float[Tensor, "t k"],
) -> Float[Tensor, "s t"]:
    """Takes the steps of a few queries, and returns what their words got after each of ``grid.steps``.

    What moves are the logits at the neighbors and at the query, not the coefficients: fewer passes over memory.
    """
    inputs, pull = window.inputs[rows], rates.unsqueeze(1)
    gram, reach = (inputs @ inputs.mT + int(reading.bias)) * pull, cross.unsqueeze(1) * pull
    values = window.values[rows].unsqueeze(1)
    here, near, out = reading.logits.unsqueeze(1).clone(), logs.clone(), []
    chances = torch.empty_like(logs)
    for step in range(1, grid.steps[-1] + 1):
        torch.softmax(near, -1, out=chances)
        here.baddbmm_(reach, chances, alpha=-1).scatter_add_(-1, values, reach)
        if step in grid.steps:
            out.append(_gold(here.squeeze(1), reading.targets))
        if step < grid.steps[-1]:
            near.baddbmm_(gram, chances, alpha=-1).scatter_add_(-1, values.expand_as(gram), gram)
    return torch.stack(out)
