"""What the cost of every word adds up to: weights of a mixture, confidence intervals, gains by frequency."""

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.errors import (
    DtypeError,
    LabelError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require_tensor,
    require_whole,
)

_GAP = 1e-7  # nats per word: how much better the best weights may be at most
_ITERATIONS = 300  # of Newton's method, which takes about ten; far more where a part is at first all but ruled out
_HALVINGS = 30


class Fitted(NamedTuple):
    """The best weights of a mixture, and what they cost."""

    weights: Float[Tensor, "p *s"]
    """One for each part, summing to one."""
    loss: Float[Tensor, "*s"]
    """Nats per word of the mixture."""


def fit_weights(*parts: Float[Tensor, "... n"]) -> Fitted:
    """Returns the weights of a mixture that make a text likeliest.

    The loss is convex in the weights, so these are the best of all weights and not of a grid of them: no other
    weights are better by more than 1e-7 nats (a warning says where 1e-6 are not reached), since ``loss - best <= log
    max_i mean(p_i / mixture)``. Expectation maximization, which one would use for this, hardly moves where parts are
    nearly the same, as MbPA's and the model's are; this is Newton's method on the simplex (Kim et al. 2020, mixsqp),
    which goes through all 2^p choices of parts.

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
    for number, part in enumerate(parts):
        require_tensor(f"part {number}", part)
    if not parts or any(part.dim() == 0 or part.shape[-1] == 0 for part in parts):
        raise ShapeError("a mixture is fitted to one part or more, each with a probability for every word; got none.")
    if len({part.shape[-1] for part in parts}) > 1:
        raise ShapeError(f"all parts must be of the same words, got {[part.shape[-1] for part in parts]} of them.")
    chances = torch.broadcast_tensors(*parts)
    if not all(bool(((part >= 0) & (part < 1.01)).all()) for part in parts):  # half types round
        raise SettingError("the parts must be probabilities, got a number below 0, above 1 or NaN. Are these nats?")
    wide = tuple(part.double() for part in chances)
    weights = torch.full_like(torch.stack([part[..., 0] for part in wide]), 1 / len(wide))
    loss = _loss(wide, weights)
    if not bool(loss.isfinite().all()):
        raise SettingError("a word has probability 0 by all parts, which no mixture can mend. Is the model among them?")
    pull = weights
    for _ in range(_ITERATIONS):
        mixed = mix(wide, list(weights))
        ratios = [part / mixed for part in wide]
        pull = torch.stack([ratio.mean(-1) for ratio in ratios])
        moving = pull.amax(0) > 1 + _GAP
        if not bool(moving.any()):
            break
        bend = torch.stack([torch.stack([(one * other).mean(-1) for other in ratios]) for one in ratios])
        weights, loss = _towards(_goal(weights, pull, bend), wide, weights, loss, moving.double())
    else:
        missing = float(pull.amax().log())
        if not missing <= 10 * _GAP:  # a little more is rounding
            warnings.warn(f"other weights may be better by {missing:.2g} nats.", stacklevel=2)
    return Fitted(weights.to(torch.promote_types(chances[0].dtype, torch.float32)), loss)


def _goal(weights: Float[Tensor, "p *s"], pull: Tensor, bend: Float[Tensor, "p p *s"]) -> Float[Tensor, "p *s"]:
    """Returns where the second-order approximation of ``loss + sum of weights`` is least, no weight being negative.

    Its minimum has the sum one by itself. It lies where some weights are zero and the others solve a linear system;
    all such choices are tried.
    """
    count = len(weights)
    a = bend.movedim((0, 1), (-2, -1))
    # By its own scale each, as a part that alone explains some word bends the loss by far the most.
    scale = a.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=1e-30)
    a = a / (scale.unsqueeze(-1) * scale.unsqueeze(-2)) + 1e-10 * torch.eye(count, dtype=a.dtype, device=a.device)
    now, slope = weights.movedim(0, -1) * scale, (pull.movedim(0, -1) - 1) / scale
    b = (a @ now.unsqueeze(-1)).squeeze(-1) + slope
    goal, least = now, torch.full_like(now[..., 0], torch.inf)
    for number in range(1, 2**count):
        kept = torch.tensor([number >> part & 1 for part in range(count)], dtype=a.dtype, device=a.device)
        found = torch.linalg.solve(a * torch.outer(kept, kept) + torch.diag(1 - kept), b * kept)
        way = found - now
        value = (way * ((a @ way.unsqueeze(-1)).squeeze(-1) / 2 - slope)).sum(-1)
        better = (found >= 0).all(-1) & (value < least)
        goal, least = torch.where(better.unsqueeze(-1), found, goal), torch.where(better, value, least)
    return (goal / scale).movedim(-1, 0)


def _towards(
    goal: Tensor, chances: tuple[Tensor, ...], weights: Float[Tensor, "p *s"], loss: Tensor, share: Tensor
) -> tuple[Float[Tensor, "p *s"], Float[Tensor, "*s"]]:
    """Goes the share of the way to the goal, or half of that, and so on, where it is better; returns the loss there."""
    best = weights
    for _ in range(_HALVINGS):
        tried = weights + share * (goal - weights)
        tried = tried / tried.sum(0)
        found = _loss(chances, tried)
        better = found < loss
        best, loss = torch.where(better, tried, best), torch.where(better, found, loss)
        share = torch.where(better, 0.0, share / 2)
        if not bool((share > 0).any()):
            break
    return best, loss


def _loss(chances: tuple[Tensor, ...], weights: Float[Tensor, "p *s"]) -> Float[Tensor, "*s"]:
    return -mix(chances, list(weights)).log().mean(-1)


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
        groups: To which article or block each word belongs; on any device.

    Raises:
        ShapeError: If there are no words, or not one group for each.
        DtypeError: If these are no tensors, or the groups no whole numbers.
        NonFiniteError: If a value is NaN or infinite.

    Example:
        >>> interval(torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1]))
        Interval(mean=2.0, half_width=1.96)
    """
    for name, part in (("values", values), ("groups", groups)):
        require_tensor(name, part)
    if values.dim() != 1 or values.shape != groups.shape or len(values) == 0:
        raise ShapeError(
            "each of at least one word needs a number and a group, got shapes "
            f"{tuple(values.shape)} and {tuple(groups.shape)}."
        )
    if groups.is_floating_point():
        raise DtypeError(f"groups must be whole numbers, one for each word, got {groups.dtype}.")
    if not bool(values.isfinite().all()):
        raise NonFiniteError(f"{int((~values.isfinite()).sum())} of the {len(values)} values are NaN or infinite.")
    names, place = groups.to(values.device).unique(return_inverse=True)
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
        SettingError: If a number is negative or not whole, or the size 0.

    Example:
        >>> blocks(5, size=2)
        tensor([0, 0, 1, 1, 2])
    """
    require_whole("count", count, low=0)
    require_whole("size", size)
    return torch.arange(count) // size


def articles(tokens: Int[Tensor, " n"], *, end: int, mark: int) -> Int[Tensor, " n"]:
    """Returns groups for ``interval``: which article of a WikiText file each word belongs to.

    An article begins with a line ``= title =`` between blank lines; a section has more marks: ``= = title = =``. What
    comes before the first title is group 0.

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
    length = torch.nn.functional.pad(ends - starts, (1, 1))  # as if blank lines were around the text
    long = length[1:-1] >= 3
    long &= (length[:-2] == 0) & (length[2:] == 0)  # a formula may begin and end with the mark, within its paragraph
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
    nats: Interval
    """The mean gain over its occurrences."""
    deviation: float
    """The standard deviation of that gain from one occurrence to the next, in nats; 0 of one."""
    percent: float
    """By how much its perplexity falls: the mean gain in other words."""


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
    buckets", with its standard deviation; of what, the paper does not say. Here buckets hold equally many different
    words of the text, and each occurrence counts alike: in a mean of percentages over words, a single one that the
    text has once and that becomes a hundred times less likely would hide all others.

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
        NonFiniteError: If a word gains what is no finite number.

    Example:
        >>> tokens, counts = torch.tensor([0, 0, 0, 1]), torch.tensor([900, 2])
        >>> before, after = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 0.5])
        >>> frequent, rare = gain_by_frequency(tokens, counts, before, after, torch.arange(4), buckets=2)
        >>> frequent.nats.mean, rare.nats.mean, round(rare.percent)
        (0.0, 0.5, 39)
    """
    tokens, counts, groups = (part.to(before.device) for part in (tokens, counts, groups))
    if not tokens.shape == before.shape == after.shape == groups.shape:
        sizes = [tuple(part.shape) for part in (tokens, before, after, groups)]
        raise ShapeError(f"each word needs a loss before, one after, and a group, got shapes {sizes}.")
    require_whole("buckets", buckets)
    size = len(counts)
    occurs = tokens.bincount(minlength=size)
    if len(occurs) > size:
        raise LabelError(f"the text holds word number {len(occurs) - 1}, but there are counts of {size} words only.")
    words = occurs.nonzero().squeeze(1)
    words = words[counts[words].argsort(descending=True, stable=True)]
    if not 1 <= buckets <= len(words):
        raise SettingError(f"{len(words)} different words cannot be put into {buckets} buckets of one or more.")
    gains = (before - after).double()
    return [_bucket(some, tokens, counts, gains, groups) for some in words.tensor_split(buckets)]


def _bucket(words: Int[Tensor, " w"], tokens: Tensor, counts: Tensor, gains: Tensor, groups: Tensor) -> Bucket:
    inside = torch.isin(tokens, words)
    nats = interval(gains[inside], groups[inside])
    return Bucket(
        words=len(words),
        occurrences=int(inside.sum()),
        rarest=int(counts[words].min()),
        nats=nats,
        deviation=float(gains[inside].std()) if int(inside.sum()) > 1 else 0.0,
        percent=-100 * float(torch.expm1(torch.tensor(-nats.mean, dtype=torch.float64))),  # a float would overflow
    )
