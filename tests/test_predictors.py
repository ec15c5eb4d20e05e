"""The predictors beside MbPA, each against its formula written out with loops."""

import math

import pytest
import torch
from torch import Tensor, nn

from recollect import (
    EpisodicMemory,
    Gaussian,
    LocalAdaptation,
    MbPA,
    Mixture,
    NonParametric,
    Parametric,
    gaussian,
    inverse_distance,
    neural_cache,
    rules,
)
from recollect.errors import DtypeError, EmptyMemoryError, HeadError, LabelError, SettingError, ShapeError

KEY, CLASSES, ENTRIES = 4, 3, 9
DOUBLE = torch.float64


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def remember(count: int = ENTRIES) -> EpisodicMemory:
    memory = EpisodicMemory(20, KEY, key_dtype=DOUBLE)
    memory.write(torch.randn(count, KEY, dtype=DOUBLE), torch.arange(count) % (CLASSES - 1))  # none of the last class
    return memory


def remember_targets(outputs: int = 2) -> EpisodicMemory:
    memory = EpisodicMemory(20, KEY, value_shape=(outputs,), value_dtype=DOUBLE, key_dtype=DOUBLE)
    memory.write(torch.randn(ENTRIES, KEY, dtype=DOUBLE), torch.randn(ENTRIES, outputs, dtype=DOUBLE))
    return memory


def queries(count: int = 5) -> Tensor:
    return torch.randn(count, KEY, dtype=DOUBLE)


# Parametric


def test_parametric_is_the_head_in_evaluation_mode() -> None:
    head = nn.Sequential(nn.Linear(KEY, 5), nn.Dropout(0.9), nn.Linear(5, CLASSES)).double()
    keys = queries()
    predicted = Parametric(head)(keys)
    assert head.training
    close(predicted, head.eval()(keys).detach().log_softmax(-1))


def test_parametric_regression_is_the_output() -> None:
    head, keys = nn.Linear(KEY, 2).double(), queries()
    close(Parametric(head, likelihood=Gaussian())(keys), head(keys).detach())


def test_a_prediction_is_not_the_keys_themselves() -> None:
    keys = queries()
    kept = keys.clone()
    Parametric(nn.Identity(), likelihood=Gaussian())(keys).zero_()
    assert torch.equal(keys, kept)


def test_parametric_flattens_leading_dimensions_for_the_head() -> None:
    head = nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 3, 2), nn.Flatten()).double()
    keys = queries(6)
    close(Parametric(head)(keys.view(2, 3, KEY)), head(keys).detach().log_softmax(-1).view(2, 3, 3))
    assert Parametric(head)(keys[0]).shape == (3,)


def test_parametric_needs_no_parameters_but_single_keys() -> None:
    keys = torch.randn(5, KEY)
    assert torch.equal(Parametric(nn.Identity())(keys), keys.log_softmax(-1))
    with pytest.raises(HeadError, match="LSTM"):
        Parametric(nn.LSTM(KEY, CLASSES))


# NonParametric


@pytest.mark.parametrize("neighbors", [1, 4, ENTRIES, 100, None])
@pytest.mark.parametrize("kernel", [inverse_distance(0.3), gaussian(0.8)], ids=str)
def test_nonparametric_is_the_weighted_vote(kernel, neighbors: int | None) -> None:
    memory, keys = remember(), queries()
    predicted = NonParametric(memory, classes=CLASSES, neighbors=neighbors, kernel=kernel)(keys)
    for key, row in zip(keys, predicted, strict=True):
        distances = [float((stored - key).square().sum()) for stored in memory.keys[:ENTRIES]]
        nearest = sorted(range(ENTRIES), key=lambda slot: distances[slot])[:neighbors]
        votes = [0.0] * CLASSES
        for slot in nearest:
            if isinstance(kernel, inverse_distance):
                votes[int(memory.values[slot])] += 1 / (kernel.epsilon + distances[slot])
            else:
                votes[int(memory.values[slot])] += math.exp(-distances[slot] / (2 * kernel.bandwidth**2))
        close(row.exp(), torch.tensor(votes, dtype=DOUBLE) / sum(votes))
        assert row[-1] == -math.inf


@pytest.mark.parametrize("neighbors", [1, 4, None])
def test_nonparametric_regression_is_the_weighted_mean(neighbors: int | None) -> None:
    memory, keys = remember_targets(), queries()
    predicted = NonParametric(memory, neighbors=neighbors, kernel=inverse_distance(0.3), likelihood=Gaussian())(keys)
    for key, row in zip(keys, predicted, strict=True):
        distances = [float((stored - key).square().sum()) for stored in memory.keys[:ENTRIES]]
        nearest = sorted(range(ENTRIES), key=lambda slot: distances[slot])[:neighbors]
        weights = [1 / (0.3 + distances[slot]) for slot in nearest]
        mean = sum(w * memory.values[slot] for w, slot in zip(weights, nearest, strict=True)) / sum(weights)
        close(row, mean)


@pytest.mark.parametrize("neighbors", [3, None])
def test_query_without_neighbors(neighbors: int | None) -> None:
    memory = remember()
    vote = NonParametric(memory, classes=CLASSES, neighbors=neighbors)
    uniform = torch.full((2, CLASSES), -math.log(CLASSES), dtype=DOUBLE)
    close(vote(queries(2), before=0), uniform)
    mixed = vote(queries(2), before=torch.tensor([0, 1]))
    close(mixed[0], uniform[0])
    assert mixed[1].exp().tolist() == [1.0, 0.0, 0.0]
    memory.clear()
    close(vote(queries(2)), uniform)
    mean = NonParametric(remember_targets(), neighbors=neighbors, likelihood=Gaussian())
    with pytest.raises(EmptyMemoryError, match="Write to the memory first"):
        mean(queries(2), before=torch.tensor([5, 0]))
    mean.memory.clear()
    with pytest.raises(EmptyMemoryError):
        mean(queries(2))


@pytest.mark.parametrize("classes", [None, 0, -1])
def test_vote_needs_the_number_of_classes(classes: int | None) -> None:
    with pytest.raises(SettingError, match=f"classes={classes}"):
        NonParametric(remember(), classes=classes, neighbors=3)


@pytest.mark.parametrize("neighbors", [0, -3, True, 2.5])
@pytest.mark.usefixtures("untyped")
def test_neighbors_must_be_a_positive_whole_number(neighbors) -> None:
    with pytest.raises(SettingError, match="neighbors"):
        NonParametric(remember(), classes=3, neighbors=neighbors)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LabelError, match=r"from 0 to 1.*1 classes"):
        NonParametric(remember(), classes=1, neighbors=None)(queries())
    with pytest.raises(DtypeError, match="whole numbers"):
        NonParametric(remember_targets(), classes=3, neighbors=3)(queries())
    with pytest.raises(DtypeError, match="floating-point"):
        NonParametric(remember(), neighbors=3, likelihood=Gaussian())(queries())
    numbers = EpisodicMemory(9, KEY, value_dtype=torch.float32)
    numbers.write(torch.randn(4, KEY), torch.randn(4))
    with pytest.raises(ShapeError, match=r"value_shape=\(1,\)"):
        NonParametric(numbers, neighbors=4, likelihood=Gaussian())(torch.randn(4, KEY))


# The neural cache


@pytest.mark.parametrize("flatness", [0.0, 0.3, 2.0, -1.0])
def test_neural_cache_is_the_textbook_sum(flatness: float) -> None:
    """Grave et al. (2016): p(w | q) is proportional to the sum over i of 1[w = x_i] exp(flatness * q . h_i)."""
    memory, keys = remember(), queries()
    predicted = neural_cache(memory, classes=CLASSES, flatness=flatness)(keys).exp()
    for key, row in zip(keys, predicted, strict=True):
        total = 0.0
        scores = [0.0] * CLASSES
        for word in range(CLASSES):
            for stored, value in zip(memory.keys[:ENTRIES], memory.values[:ENTRIES], strict=True):
                if int(value) == word:
                    term = math.exp(flatness * float(stored @ key))
                    scores[word] += term
                    total += term
        close(row, torch.tensor(scores, dtype=DOUBLE) / total)


def test_neural_cache_reads_only_the_past() -> None:
    memory, keys = remember(), queries(ENTRIES)
    cache = neural_cache(memory, classes=CLASSES, flatness=0.7)
    predicted = cache(keys, before=torch.arange(ENTRIES))
    for time, key in enumerate(keys):
        past = EpisodicMemory(20, KEY, key_dtype=DOUBLE)
        past.write(memory.keys[:time], memory.values[:time])
        close(predicted[time], neural_cache(past, classes=CLASSES, flatness=0.7)(key))


# Mixture


def test_mixture_is_the_weighted_sum_of_probabilities() -> None:
    memory, keys = remember(), queries()
    head = nn.Linear(KEY, CLASSES).double()
    components = (
        Parametric(head),
        MbPA(head, memory, neighbors=3, adaptation=LocalAdaptation(rules.sgd(0.5), steps=2)),
        neural_cache(memory, classes=CLASSES),
    )
    mixture = Mixture(*components, weights=(0.5, 0.2, 0.3))
    expected = sum(w * part(keys).exp() for w, part in zip((0.5, 0.2, 0.3), components, strict=True))
    close(mixture(keys).exp(), expected)
    close(mixture(keys).exp().sum(-1), torch.ones(5, dtype=DOUBLE))
    close(mixture(keys, before=2), torch.stack([mixture(key, before=2) for key in keys]))
    close(Mixture(*components, weights=(0.0, 0.0, 1.0))(keys).exp(), components[2](keys).exp())


def test_mixture_of_tiny_probabilities_does_not_underflow() -> None:
    head = nn.Linear(KEY, 2).double()
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.0, -2000.0]))
    mixture = Mixture(Parametric(head), Parametric(head), weights=(0.5, 0.5))
    close(mixture(queries(1))[0], torch.tensor([0.0, -2000.0], dtype=DOUBLE))


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("room", [1, 8 * CLASSES, 2**20])  # bytes
def test_mixture_does_not_depend_on_how_much_is_mixed_at_once(
    monkeypatch: pytest.MonkeyPatch, room: int, count: int
) -> None:
    memory, keys = remember(), queries(2 * count).view(2, count, KEY)
    parts = [Parametric(nn.Linear(KEY, CLASSES).double()), neural_cache(memory, classes=CLASSES)]
    monkeypatch.setattr("recollect.predictors._MIXED", room)
    expected = 0.3 * parts[0](keys).exp() + 0.7 * parts[1](keys).exp()
    close(Mixture(*parts, weights=(0.3, 0.7))(keys).exp(), expected)


def test_what_no_component_expects_has_no_chance() -> None:
    cache = neural_cache(remember(), classes=CLASSES)
    mixed = Mixture(cache, cache, weights=(0.5, 0.5))(queries())
    assert mixed[:, -1].tolist() == [-math.inf] * 5
    close(mixed.exp().sum(-1), torch.ones(5, dtype=DOUBLE))


def test_mixture_takes_the_wider_dtype() -> None:
    keys, single, double = torch.randn(5, KEY), nn.Linear(KEY, CLASSES), nn.Linear(KEY, CLASSES).double()
    for heads in ((single, double), (double, single)):
        mixed = Mixture(*(Parametric(head) for head in heads), weights=(0.5, 0.5))(keys)
        assert mixed.dtype == DOUBLE
        expected = single(keys).softmax(-1).double() / 2 + double(keys.double()).softmax(-1) / 2
        torch.testing.assert_close(mixed.exp(), expected.detach(), rtol=1e-6, atol=1e-6)


def test_mixture_of_regressions_is_the_weighted_mean() -> None:
    memory, keys = remember_targets(), queries()
    one = Parametric(nn.Linear(KEY, 2).double(), likelihood=Gaussian())
    other = NonParametric(memory, neighbors=3, likelihood=Gaussian())
    close(Mixture(one, other, weights=(0.25, 0.75))(keys), 0.25 * one(keys) + 0.75 * other(keys))


def test_mixture_of_mixtures() -> None:
    a, b, c = (Parametric(nn.Linear(KEY, CLASSES).double()) for _ in range(3))
    keys = queries()
    nested = Mixture(Mixture(a, b, weights=(0.5, 0.5)), c, weights=(0.4, 0.6))
    close(nested(keys), Mixture(a, b, c, weights=(0.2, 0.2, 0.6))(keys))
    assert len(list(nested.parameters())) == 6


@pytest.mark.parametrize(
    "weights", [(0.5,), (0.5, 0.25, 0.25), (0.5, 0.6), (0.4, 0.5), (1.5, -0.5), (float("nan"), 0.5), ()]
)
def test_weights_must_be_a_distribution(weights: tuple[float, ...]) -> None:
    parts = [Parametric(nn.Linear(KEY, CLASSES)) for _ in range(2)]
    with pytest.raises(SettingError, match="weight"):
        Mixture(*parts, weights=weights)


def test_components_must_agree() -> None:
    labels, means = Parametric(nn.Linear(KEY, 3)), Parametric(nn.Linear(KEY, 3), likelihood=Gaussian())
    with pytest.raises(SettingError, match=r"labels.*means"):
        Mixture(labels, means, weights=(0.5, 0.5))
    with pytest.raises(ShapeError, match=r"\[\(3,\), \(2,\)\]"):
        Mixture(labels, Parametric(nn.Linear(KEY, 2)), weights=(0.5, 0.5))(torch.zeros(KEY))


@pytest.mark.usefixtures("untyped")
def test_component_must_be_a_predictor() -> None:
    with pytest.raises(SettingError, match=r"Linear is no predictor: wrap a head as Parametric\(head\)"):
        Mixture(Parametric(nn.Linear(KEY, 3)), nn.Linear(KEY, 3), weights=(0.5, 0.5))
