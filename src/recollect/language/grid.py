"""``score``: what every setting of cache and MbPA makes of a text, from one reading of it.

A mixture is scored from what each of its parts gives to the word that came, so that is all that is kept: one number
for each word and setting. Cache and MbPA do not change the model, so a block of words is one batch: all its queries
against all entries, each seeing the entries of its own window. ``window.py`` has the arithmetic.

Two things are done otherwise than by the predictors of this library. Distances come from products,
``|q|^2 + |h|^2 - 2 q.h``, so that of nearly equal keys in float32 they are off by some 1e-7 of ``|q|^2``; and of
equally near entries any may be the last that still counts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.errors import DtypeError, NonFiniteError
from recollect.language.collected import Collected
from recollect.language.evaluate import BLOCK, too_short
from recollect.language.reading import Reading, gathered
from recollect.language.settings import CacheGrid, MbPAGrid
from recollect.language.window import Window, score_cache, score_mbpa


class Scores(NamedTuple):
    """The probability that each part of a mixture gave to each word of a text."""

    tokens: Int[Tensor, " n"]
    """The words."""
    model: Float[Tensor, " n"]
    """By the model itself."""
    cache: Float[Tensor, "c n"]
    """By the cache in each of its settings: those of a grid's ``points()``, one grid after the other."""
    mbpa: Float[Tensor, "m n"]
    """By MbPA, likewise."""


def score(
    readings: Iterable[Reading],
    cache: CacheGrid | Sequence[CacheGrid],
    mbpa: MbPAGrid | Sequence[MbPAGrid],
    *,
    table_dtype: torch.dtype | None = None,
    watch: Callable[[int], None] = lambda words: None,
) -> Scores:
    """Returns what every setting gives to every word of a text that is being read.

    No word sees itself, nor what comes after it; the first words see an empty memory, which leaves MbPA with what the
    model says and the cache with the uniform distribution.

    Args:
        readings: From ``read`` or ``read_dynamically``.
        cache: Settings of the cache, in one grid, several, or none.
        mbpa: Settings of MbPA, likewise.
        table_dtype: In which to keep what the model said at each entry, entries x words of the vocabulary numbers;
            bfloat16 takes half the room and half the time, and moves the logits' change by some thousandths of it.
            That of the logits when None.
        watch: Called after each block with the number of its words.

    Raises:
        DtypeError: If ``table_dtype`` does not hold fractions.
        NonFiniteError: If the model's predictions are no numbers.
        ShapeError: If no word can be scored.

    Example:
        >>> from recollect.language import CacheGrid, LSTMModel, MbPAGrid, read, score
        >>> lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0))
        >>> cache = CacheGrid(sizes=(20, 50), flatness=(0.0, 1.0, 2.0))
        >>> mbpa = MbPAGrid(sizes=(50,), neighbors=(4, 8), rates=(0.1, 1.0))
        >>> scores = score(read(lm, torch.tensor([1, 2, 3] * 20)), cache, mbpa)
        >>> scores.model.shape, scores.cache.shape, scores.mbpa.shape
        (torch.Size([59]), torch.Size([6, 59]), torch.Size([4, 59]))
    """
    if table_dtype is not None and not table_dtype.is_floating_point:
        raise DtypeError(f"table_dtype must be a floating dtype, such as torch.bfloat16, or None, got {table_dtype}.")
    caches = (cache,) if isinstance(cache, CacheGrid) else tuple(cache)
    mbpas = (mbpa,) if isinstance(mbpa, MbPAGrid) else tuple(mbpa)
    done = 0
    window: Window | None = None
    found = Collected()
    for reading in gathered(readings):
        if window is None:
            rows = max([0, *(size for grid in (*caches, *mbpas) for size in grid.sizes)]) + BLOCK
            window = Window(reading, rows, table_dtype, keep_table=len(mbpas) > 0)
        with torch.no_grad():
            found.add(*_score(window, reading, done, caches, mbpas))
        done += len(reading.targets)
        watch(len(reading.targets))
    if not done:
        raise too_short()
    return Scores(*found.joined())


def _score(
    window: Window,
    reading: Reading,
    done: int,
    caches: tuple[CacheGrid, ...],
    mbpas: tuple[MbPAGrid, ...],
) -> tuple[Tensor, ...]:
    """Writes a block of words, and returns the fields of its ``Scores``."""
    times = torch.arange(done, done + len(reading.targets), device=reading.targets.device)
    gold = reading.targets.unsqueeze(1)
    logs = reading.logits.log_softmax(1).gather(1, gold).squeeze(1)
    chances = logs.double().exp()  # of one word in a million texts float32 would make a zero
    if not bool(chances.isfinite().all()):
        word = done + int((~chances.isfinite()).nonzero()[0])
        raise NonFiniteError(f"the model's prediction of word {word} of the text holds NaN or infinite numbers.")
    window.add(reading, times)
    nothing = logs.new_empty(0, len(logs))
    of_cache = torch.cat([nothing, *(score_cache(window, reading, times, grid) for grid in caches)])
    of_mbpa = torch.cat([nothing, *(score_mbpa(window, reading, times, grid) for grid in mbpas)])
    return reading.targets, chances, of_cache, of_mbpa
