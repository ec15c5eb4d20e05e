"""What the cost of every word adds up to: weights of a mixture, confidence intervals, gains by frequency."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.errors import LabelError, SettingError, ShapeError

_ITERATIONS = 16  # of two steps of EM and a leap; the loss of thousands of words is then right to some 1e-5


class Fitted(NamedTuple):
    """The best weights of a mixture, and what they cost."""

    weights: Float[Tensor, "p *s"]
    """One for each part, summing to one."""
    loss: Float[Tensor, "*s"]
    """Nats per word of the mixture."""


def fit_weights(*parts: Float[Tensor, "... n"]) -> Fitted:
    """Returns the weights of a mixture that make a text likeliest, by expectation maximization.

    The loss is convex in the weights, so these are the best of all weights and not of a grid of them. Where parts are
    nearly the same, as MbPA's and the model's are, the steps are small; so every two steps are followed by a leap in
    their direction where that is better (SQUAREM, Varadhan and Roland 2008).

    Args:
        parts: The probability that each part of the mixture gave to each word, for any settings ``*s`` of the parts
            side by side. Some part must have given each word more than zero.

    Raises:
        ShapeError: If there are no parts or no words.
        SettingError: If a word has no chance by any part, or a number is no probability.

    Example:
        >>> model, cache = torch.tensor([0.2, 0.2, 0.2]), torch.tensor([0.9, 0.0, 0.9])
        >>> fit_weights(model, cache).weights
        tensor([0.4286, 0.5714])
    """
    if not parts or parts[0].shape[-1:].numel() == 0 or parts[0].dim() == 0:
        raise ShapeError("a mixture is fitted to one part or more, each with a probability for every word; got none.")
    chances = torch.broadcast_tensors(*parts)
    if not all(bool((part >= 0).all()) for part in parts):
        raise SettingError("the parts must be probabilities, got a number that is negative or NaN. Are these nats?")
    weights = torch.full_like(torch.stack([part[..., 0] for part in chances]), 1 / len(chances))
    if not bool((mix(chances, list(weights)) > 0).all()):
        raise SettingError("a word has probability 0 by all parts, which no mixture can mend. Is the model among them?")
    reach = torch.full_like(weights[0], 4.0)
    for _ in range(_ITERATIONS):
        first = _step(chances, weights)
        second = _step(chances, first)
        leap = _leap(weights, first, second, reach)
        better = _loss(chances, leap) < _loss(chances, second)
        weights = torch.where(better, leap, second)
        reach = torch.where(better, 4 * reach, (reach / 4).clamp(min=2))
    return Fitted(weights, _loss(chances, weights))


def _step(chances: tuple[Tensor, ...], weights: Float[Tensor, "p *s"]) -> Float[Tensor, "p *s"]:
    mixed = mix(chances, list(weights))
    return torch.stack([(part / mixed).mean(-1) for part in chances]) * weights


def _leap(start: Tensor, first: Tensor, second: Tensor, reach: Tensor) -> Float[Tensor, "p *s"]:
    """Returns where ``reach`` steps at most that go on as these two did would lead; inside of the simplex."""
    pace = first - start
    bend = second - first - pace
    tiny = torch.finfo(pace.dtype).tiny
    length = (pace.square().sum(0) / bend.square().sum(0).clamp(min=tiny)).sqrt().clamp(min=1).minimum(reach)
    way = start + 2 * length * pace + length.square() * bend - second
    # As far as nine tenths of the way to where the first weight would be zero.
    room = torch.where(way < 0, second / -way.clamp(max=-tiny), torch.inf).amin(0)
    return second + way * (0.9 * room).clamp(max=1)


def _loss(chances: tuple[Tensor, ...], weights: Float[Tensor, "p *s"]) -> Float[Tensor, "*s"]:
    return -mix(chances, list(weights)).log().double().mean(-1)


def mix(parts: tuple[Float[Tensor, "... n"], ...], weights: list[Float[Tensor, "..."]]) -> Float[Tensor, "... n"]:
    """Returns the mixture's probabilities: each part times its weight, one for each setting."""
    mixed = weights[0].unsqueeze(-1) * parts[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        mixed = torch.addcmul(mixed, part, weight.unsqueeze(-1))
    return mixed


class Interval(NamedTuple):
    """A mean, and how far off it may be."""

    mean: float
    half_width: float
    """Of the 95 % confidence interval; infinite where there is only one group."""


def interval(values: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> Interval:
    """Returns the mean over words with a confidence interval that takes the words of a group as one observation.

    Neighboring words share their article's subject, so an interval over single words would be too narrow. The mean is
    a ratio of two sums over groups; its variance is that of the linearized ratio. The interval is the normal
    distribution's: of fewer than some 30 groups it is a little too narrow.

    Args:
        values: One number for each word, such as the nats that one predictor costs more than another.
        groups: To which article or block each word belongs.

    Raises:
        ShapeError: If there are no words, or not one group for each.

    Example:
        >>> interval(torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1]))
        Interval(mean=2.0, half_width=1.96)
    """
    if values.shape != groups.shape or len(values) == 0:
        raise ShapeError(f"each of at least one word needs a group, got {len(values)} words, {len(groups)} groups.")
    names, place = groups.unique(return_inverse=True)
    values = values.double()
    mean = values.mean()
    if len(names) == 1:
        return Interval(float(mean), float("inf"))
    sums = values.new_zeros(len(names)).index_add_(0, place, values - mean)
    error = (sums.square().sum() * len(names) / (len(names) - 1)).sqrt() / len(values)
    return Interval(float(mean), 1.96 * float(error))


def blocks(count: int, size: int = 1000) -> Int[Tensor, " n"]:
    """Returns groups for ``interval``: the words of a text in blocks of ``size``.

    Raises:
        SettingError: If a number is negative, or the size 0.

    Example:
        >>> blocks(5, size=2)
        tensor([0, 0, 1, 1, 2])
    """
    if count < 0 or size < 1:
        raise SettingError(f"a text of 0 words or more is cut into blocks of 1 or more, got {count} and {size}.")
    return torch.arange(count) // size


def articles(tokens: Int[Tensor, " n"], *, end: int, mark: int) -> Int[Tensor, " n"]:
    """Returns groups for ``interval``: which article of a WikiText file each word belongs to.

    An article begins with a line ``= title =``; a section has more marks: ``= = title = =``. What comes before the
    first title is group 0.

    Args:
        tokens: The text; it begins with a line's first word.
        end: The number of ``<eos>``.
        mark: The number of ``=``.

    Example:
        >>> articles(torch.tensor([0, 1, 7, 1, 0, 0, 5, 6, 0]), end=0, mark=1)  # a blank line, = 7 =, a blank line, 5 6
        tensor([0, 1, 1, 1, 1, 1, 1, 1, 1])
    """
    ends = (tokens == end).nonzero().squeeze(1)
    starts = torch.cat([ends.new_zeros(1), ends + 1])[: len(ends)]
    long = ends - starts >= 3
    starts, ends = starts[long], ends[long]
    title = (tokens[starts] == mark) & (tokens[starts + 1] != mark)
    title &= (tokens[ends - 1] == mark) & (tokens[ends - 2] != mark)
    begins = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
    begins[starts[title]] = 1
    return begins.cumsum(0)


class Bucket(NamedTuple):
    """The words of one range of training frequency, and what they gain."""

    words: int
    """How many different words it has."""
    occurrences: int
    """How often they occur in the text."""
    rarest: int
    """The smallest number of times that one of them occurs in the training text."""
    gain: float
    """The mean over its different words of the percentage by which their perplexity falls."""
    deviation: float
    """The standard deviation of that over its different words; 0 of one word."""
    nats: Interval
    """The mean gain over its occurrences, in nats."""


def gain_by_frequency(
    tokens: Int[Tensor, " n"],
    counts: Int[Tensor, " c"],
    before: Float[Tensor, " n"],
    after: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    buckets: int = 5,
) -> list[Bucket]:
    """Returns who gains, from the most frequent words to the rarest.

    Paper: Appendix C, Figure 8: "percent improvement, split by training word frequency into five equally sized
    buckets". The buckets hold equally many different words of the text; the paper does not say of what.

    Args:
        tokens: The words of the text.
        counts: How often each word of the vocabulary occurs in the training text.
        before: The nats that each word cost.
        after: The nats that it costs now.
        groups: To which article or block each word belongs.
        buckets: How many.

    Raises:
        SettingError: If the text has fewer different words than there are buckets.
        ShapeError: If not every word has a loss before and after, and a group.
        LabelError: If a word has no count.

    Example:
        >>> tokens, counts = torch.tensor([0, 0, 0, 1]), torch.tensor([900, 2])
        >>> before, after = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.5])
        >>> frequent, rare = gain_by_frequency(tokens, counts, before, after, torch.arange(4), buckets=2)
        >>> frequent.nats.mean, rare.nats.mean, round(rare.gain)
        (0.0, 0.5, 39)
    """
    if not tokens.shape == before.shape == after.shape == groups.shape:
        sizes = [tuple(part.shape) for part in (tokens, before, after, groups)]
        raise ShapeError(f"each word needs a loss before, one after, and a group, got shapes {sizes}.")
    size = len(counts)
    occurs = tokens.bincount(minlength=size)
    if len(occurs) > size:
        raise LabelError(f"the text holds word number {len(occurs) - 1}, but there are counts of {size} words only.")
    words = occurs.nonzero().squeeze(1)
    words = words[counts[words].argsort(descending=True, stable=True)]
    if not 1 <= buckets <= len(words):
        raise SettingError(f"{len(words)} different words cannot be put into {buckets} buckets of one or more.")
    gains = (before - after).double()
    sums = gains.new_zeros(size).index_add_(0, tokens, gains)
    percent = 100 * (1 - (-sums / occurs).exp())
    return [_bucket(some, tokens, counts, percent, gains, groups) for some in words.tensor_split(buckets)]


def _bucket(
    words: Int[Tensor, " w"], tokens: Tensor, counts: Tensor, percent: Tensor, gains: Tensor, groups: Tensor
) -> Bucket:
    inside = torch.isin(tokens, words)
    return Bucket(
        words=len(words),
        occurrences=int(inside.sum()),
        rarest=int(counts[words].min()),
        gain=float(percent[words].mean()),
        deviation=float(percent[words].std()) if len(words) > 1 else 0.0,
        nats=interval(gains[inside], groups[inside]),
    )
