"""What the words' costs add up to, each number against a literal computation."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from recollect.errors import DtypeError, LabelError, NonFiniteError, SettingError, ShapeError
from recollect.language.report import articles, blocks, fit_weights, gain_by_frequency, interval, mix

END, MARK = 0, 1


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def simplex(parts: int, steps: int = 100) -> Tensor:
    axes = torch.cartesian_prod(*[torch.arange(steps + 1)] * (parts - 1)).view(-1, parts - 1)
    axes = axes[axes.sum(1) <= steps]
    return torch.cat([axes, steps - axes.sum(1, keepdim=True)], 1).double() / steps


@pytest.mark.parametrize("case", ["apart", "alike", "worse", "zeros", "noise"])
def test_no_weights_of_a_fine_grid_are_better(case: str) -> None:
    model, cache = 0.01 + drawn(300) * 0.3, drawn(300, seed=1) ** 4
    third = {
        "apart": drawn(300, seed=2) ** 6,
        "alike": model * (0.1 * (drawn(300, seed=3) - 0.5)).exp(),
        "worse": model * 0.9,
        "zeros": torch.zeros(300).double(),
        "noise": model * (drawn(300, seed=4) * 0.6 - 0.2).exp(),
    }[case]
    fitted = fit_weights(model, cache, third)
    best = -(simplex(3) @ torch.stack([model, cache, third])).log().mean(1).amin()
    assert float(fitted.loss - best) < 1e-7
    assert float(fitted.weights.sum()) == pytest.approx(1)
    assert bool((fitted.weights >= 0).all())
    found = -(fitted.weights @ torch.stack([model, cache, third])).log().mean()
    torch.testing.assert_close(found, fitted.loss)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.05, 0.5])
def test_weights_are_those_of_expectation_maximization(seed: int, spread: float) -> None:
    """Of two parts that are nearly the same, expectation maximization needs thousands of steps."""
    generator = torch.Generator().manual_seed(seed)
    model, cache = 0.01 + drawn(500, seed=seed) * 0.1, drawn(500, seed=seed + 9) ** 4
    parts = torch.stack([model, model * (spread * torch.randn(500, generator=generator)).exp(), cache])
    weights = torch.full((3,), 1 / 3).double()
    for _ in range(5000):
        weights = weights * (parts / (weights @ parts)).mean(1)
    fitted = fit_weights(*parts)
    slowly = -(weights @ parts).log().mean()
    assert -1e-4 < float(fitted.loss - slowly) < 1e-7
    mixed = fitted.weights @ parts
    assert float((parts / mixed).mean(1).max()) < 1 + 2e-7  # no other weights are better by more than that


@pytest.mark.parametrize("floor", [1e-14, 1e-20, 1e-37])
def test_one_word_that_only_a_worse_part_explains(floor: float) -> None:
    model, other = drawn(400) * 0.5 + 0.4, drawn(400, seed=1) * 0.2
    model[7], other[7] = floor, 0.9
    shares = torch.logspace(-8, 0, 4001).double()[:, None]
    best = -((1 - shares) * model + shares * other).log().mean(1).amax()
    fitted = fit_weights(model, other)
    assert float(fitted.loss - best) < 1e-7
    assert float(fitted.weights[1]) > 1e-3


def test_parts_that_are_the_same_share() -> None:
    model = (drawn(50) + 0.1) / 2
    torch.testing.assert_close(fit_weights(model, model, model).loss, -model.log().mean())
    halves = fit_weights(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))  # each word has one part only
    assert halves.weights.tolist() == [0.5, 0.5]
    half = fit_weights(model.bfloat16(), ((drawn(50, seed=1) + 0.1) / 2).bfloat16())
    assert half.weights.dtype == torch.float32
    assert float(half.weights.sum()) == pytest.approx(1)


def test_settings_side_by_side_are_fitted_one_by_one() -> None:
    model, many = 0.01 + drawn(200) * 0.9, drawn(3, 4, 200, seed=1) ** 4
    together = fit_weights(model, many, many.flip(0))
    assert together.weights.shape == (3, 3, 4)
    for i in range(3):
        for j in range(4):
            alone = fit_weights(model, many[i, j], many[2 - i, j])
            torch.testing.assert_close(together.weights[:, i, j], alone.weights)
            torch.testing.assert_close(together.loss[i, j], alone.loss)


def test_one_part_has_all_the_weight_and_zeros_have_none() -> None:
    assert fit_weights(drawn(50)).weights.tolist() == [1.0]
    fitted = fit_weights(drawn(50), torch.zeros(50).double())
    torch.testing.assert_close(fitted.weights, torch.tensor([1.0, 0.0]).double())


def test_a_mixture_of_parts() -> None:
    model, cache = torch.tensor([0.5, 0.2]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    mixed = mix((model, cache), [torch.tensor(0.75), torch.tensor(0.25)])
    torch.testing.assert_close(mixed, torch.tensor([[0.375, 0.4], [0.625, 0.4]]))


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_fitted() -> None:
    with pytest.raises(ShapeError, match="got none"):
        fit_weights()
    with pytest.raises(ShapeError, match="got none"):
        fit_weights(torch.zeros(0))
    with pytest.raises(SettingError, match="probability 0 by all parts"):
        fit_weights(torch.tensor([0.5, 0.0]), torch.tensor([0.1, 0.0]))
    with pytest.raises(ShapeError, match=r"of the same words, got \[3, 4\]"):
        fit_weights(torch.ones(3), torch.ones(4))
    with pytest.raises(DtypeError, match="part 1 must be a tensor"):
        fit_weights(torch.ones(3), [1.0, 1.0, 1.0])
    with pytest.raises(SettingError, match="Are these nats"):
        fit_weights(torch.tensor([0.5, 0.1]), torch.tensor([0.1, 3.0]))
    with pytest.raises(SettingError, match="Are these nats"):
        fit_weights(torch.tensor([0.5, 0.1]), torch.tensor([0.1, float("nan")]))


def test_words_by_themselves_have_the_plain_standard_error() -> None:
    values = drawn(40)
    found = interval(values, torch.arange(40))
    assert found.mean == pytest.approx(statistics.mean(values.tolist()))
    assert found.half_width == pytest.approx(1.96 * statistics.stdev(values.tolist()) / math.sqrt(40))


def test_words_of_a_group_are_one_observation() -> None:
    values, groups = drawn(60), torch.randint(7, (60,), generator=torch.Generator().manual_seed(1)) * 3
    mean, square = statistics.mean(values.tolist()), 0.0
    names = set(groups.tolist())
    for name in names:
        square += sum(v - mean for v, g in zip(values.tolist(), groups.tolist(), strict=True) if g == name) ** 2
    found = interval(values, groups)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(1.96 * math.sqrt(square * len(names) / (len(names) - 1)) / 60)


@pytest.mark.usefixtures("untyped")
def test_intervals_of_little() -> None:
    assert interval(torch.ones(5), torch.zeros(5).long()) == (1.0, math.inf)
    for count in (0, 3):
        with pytest.raises(ShapeError, match="needs a number and a group"):
            interval(torch.ones(count), torch.zeros(0).long())


@pytest.mark.usefixtures("untyped")
def test_intervals_of_what_does_not_fit() -> None:
    words, groups = torch.ones(3), torch.zeros(3).long()
    with pytest.raises(ShapeError, match=r"got shapes \(3, 2\) and \(3, 2\)"):
        interval(torch.ones(3, 2), torch.zeros(3, 2).long())
    with pytest.raises(DtypeError, match="values must be a tensor, got list"):
        interval([1.0, 2.0, 3.0], groups)
    with pytest.raises(DtypeError, match=r"groups must be whole numbers.*float32"):
        interval(words, torch.tensor([0.0, 0.5, 1.0]))
    with pytest.raises(NonFiniteError, match="1 of the 3 values"):
        interval(torch.tensor([1.0, math.nan, 2.0]), groups)


@pytest.mark.usefixtures("untyped")
def test_blocks() -> None:
    assert blocks(7, size=3).tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert blocks(0).tolist() == []
    for count, size, message in ((-1, 3, "count must be"), (3, 0, "size must be"), (3, 2.5, "size must be a whole")):
        with pytest.raises(SettingError, match=message):
            blocks(count, size)


def encoded(lines: list[str]) -> Tensor:
    names = {"<eos>": END, "=": MARK}
    words = [word for line in lines for word in (*line.split(), "<eos>")]
    return torch.tensor([names.setdefault(word, len(names)) for word in words])


@pytest.mark.parametrize("lead", [[], [""], ["words of before", ""]])
def test_an_article_begins_with_its_title(lead: list[str]) -> None:
    first = ["= a title =", "", "some words = here", "= = a section = =", "= = = deeper = = =", "="]
    second = [
        "",
        "= b =",
        "",
        "= =",
        "",
        "= no title",
        "no title =",
        "",
        "= = a section =",
        "",
        "= a section = =",
        "",
        "more",
        "= a formula =",
        "",
        "= 2 =",
        "more",
    ]
    whole = encoded([*lead, *first, *second])
    lengths = [len(encoded(part)) for part in (lead, [*first, second[0]], second[1:]) if part]
    expected = [number for number, length in zip(range(int(not lead), 3), lengths, strict=True) for _ in range(length)]
    assert articles(whole, end=END, mark=MARK).tolist() == expected


@pytest.mark.parametrize("tokens", [[], [5, 6], [1, 5, 1], [0], [5, 0, 6]])
def test_texts_without_a_title_are_one_group(tokens: list[int]) -> None:
    found = articles(torch.tensor(tokens, dtype=torch.long), end=END, mark=MARK)
    assert found.tolist() == [0] * len(tokens)


@pytest.mark.parametrize("buckets", [1, 3, 5])
def test_gains_by_frequency(buckets: int) -> None:
    tokens = torch.randint(11, (80,), generator=torch.Generator().manual_seed(0)) + 2
    counts = torch.tensor([99, 98, 5, 5, 70, 1, 0, 22, 3, 3, 3, 40, 8])  # equally frequent words: the first first
    before, after, groups = drawn(80) * 5, drawn(80, seed=1) * 5, torch.arange(80) // 9
    words = sorted(set(tokens.tolist()), key=lambda word: (-int(counts[word]), word))
    found = gain_by_frequency(tokens, counts, before, after, groups, buckets=buckets)
    sizes = [len(words) // buckets + (i < len(words) % buckets) for i in range(buckets)]
    assert [bucket.words for bucket in found] == sizes
    for bucket, size in zip(found, sizes, strict=True):
        some, words = words[:size], words[size:]
        places = [i for i, word in enumerate(tokens.tolist()) if word in some]
        gains = [float(before[i] - after[i]) for i in places]
        was, now = (math.exp(statistics.mean(float(nats[i]) for i in places)) for nats in (before, after))
        assert bucket.occurrences == len(places)
        assert bucket.rarest == min(int(counts[word]) for word in some)
        assert bucket.nats == interval((before - after)[places], groups[places])
        assert bucket.deviation == pytest.approx(statistics.stdev(gains))
        assert bucket.percent == pytest.approx(100 * (was - now) / was)
    assert not words


def test_weights_of_no_settings() -> None:
    fit = fit_weights(torch.rand(5) + 0.1, torch.empty(0, 5))
    assert fit.weights.shape == (2, 0)
    assert fit.loss.shape == (0,)


def test_a_bucket_of_one_word() -> None:
    (bucket,) = gain_by_frequency(
        *(torch.tensor([3]), torch.ones(5).long(), torch.ones(1), torch.zeros(1), torch.arange(1)), buckets=1
    )
    assert bucket.deviation == 0
    worse = gain_by_frequency(
        *(torch.tensor([3]), torch.ones(5).long(), torch.zeros(1), torch.full((1,), 800.0), torch.arange(1)), buckets=1
    )
    assert worse[0].percent == -math.inf  # as far as a float goes
    assert bucket.percent == pytest.approx(100 * (1 - math.exp(-1)))


@pytest.mark.usefixtures("untyped")
def test_gains_of_what_does_not_fit() -> None:
    tokens, counts, nats, groups = torch.tensor([3, 1, 3]), torch.ones(5).long(), torch.ones(3), torch.arange(3)
    with pytest.raises(SettingError, match="2 different words cannot be put into 5 buckets"):
        gain_by_frequency(tokens, counts, nats, nats, groups)
    with pytest.raises(ShapeError, match="each word needs a loss before"):
        gain_by_frequency(tokens, counts, nats, nats[:2], groups)
    with pytest.raises(LabelError, match="word number 3, but there are counts of 2"):
        gain_by_frequency(tokens, counts[:2], nats, nats, groups, buckets=1)
