"""The MANN against a loop over torch's own cells, its labels against spelling, its scores against counting."""

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn

from recollect.errors import DtypeError, LabelError, NonFiniteError, SettingError, ShapeError
from recollect.meta.access import LRUAccess, NTMAccess
from recollect.meta.hyper_lstm import HyperLSTMCell
from recollect.meta.labels import Labels, by_instance, instances, offset
from recollect.meta.mann import MANN, LSTMBaseline

Untouched = Callable[[], AbstractContextManager[None]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(controller: str = "lstm", *, kind: type = LRUAccess) -> MANN:
    access = kind(6, slots=5, width=3, reads=2, generator=generator())
    return MANN(4, 3, access=access, controller=controller, hidden=6, generator=generator()).double()


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def literal(mann: MANN, inputs: torch.Tensor) -> torch.Tensor:
    """Eq. (16), step by step, with torch's own controllers on (x_t, r_{t-1})."""
    batch = len(inputs)
    hidden = cell = torch.zeros(batch, 6).double()
    reads, memory, logits = torch.zeros(batch, 6).double(), mann.access.initial(batch), []
    for t in range(inputs.shape[1]):
        seen = torch.cat([inputs[:, t], reads], 1)
        if isinstance(mann.controller, nn.LSTMCell):
            hidden, cell = mann.controller(seen, (hidden, cell))
        else:
            hidden = torch.tanh(mann.controller(seen))
        read, memory = mann.access(hidden, memory)
        reads = torch.cat(read.unbind(1), 1)
        logits.append(mann.output(torch.cat([hidden, reads], 1)))
    return torch.stack(logits, 1)


@pytest.mark.parametrize("kind", [LRUAccess, NTMAccess])
@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_mann_is_the_loop(controller: str, kind: type) -> None:
    mann, inputs, pull = small(controller, kind=kind), randn(2, 8, 4), randn(2, 8, 3, seed=2)
    results = []
    for logits in (mann(inputs)[0], literal(mann, inputs)):
        gradients = torch.autograd.grad((logits * pull).sum(), [*mann.parameters()])
        results.append((logits, *gradients))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
        assert want.abs().max() > 1e-6


@pytest.mark.parametrize(
    "model", [small(), small("feedforward"), LSTMBaseline(4, 3, hidden=6, generator=generator()).double()]
)
def test_step_by_step_is_all_at_once(model: MANN | LSTMBaseline) -> None:
    inputs = randn(2, 7, 4)
    expected, _ = model(inputs)
    state, parts = None, []
    for part in inputs.split([1, 3, 1, 2], 1):
        logits, state = model(part, state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-12, atol=1e-12)


def test_baseline_is_torchs_lstm() -> None:
    model, inputs = LSTMBaseline(4, 3, hidden=6).double(), randn(2, 7, 4)
    torch.testing.assert_close(model(inputs)[0], model.output(model.lstm(inputs)[0]))


@pytest.mark.parametrize(("inputs", "outputs", "count"), [(405, 5, 648_369), (425, 25, 671_589)])
def test_the_papers_sizes(inputs: int, outputs: int, count: int) -> None:
    """Two biases in each gate, as in nn.LSTMCell; one key and one gate for each of the four heads."""
    assert size(MANN(inputs, outputs)) == count


def test_the_papers_lstm() -> None:
    assert size(LSTMBaseline(405, 5, hidden=200)) == 486_605


@pytest.mark.parametrize("inputs", [1, 10, 60])
@pytest.mark.parametrize("hidden", [1, 5, 40])
def test_the_baseline_is_the_nearest_in_size(inputs: int, hidden: int) -> None:
    mann = MANN(inputs, 2, access=LRUAccess(hidden, slots=5, width=7, reads=2), hidden=hidden)
    gaps = {units: abs(size(LSTMBaseline(inputs, 2, hidden=units)) - size(mann)) for units in range(1, 70)}
    baseline = LSTMBaseline.like(mann)
    assert abs(size(baseline) - size(mann)) == min(gaps.values())
    assert gaps[baseline.hidden] == min(gaps.values())


def test_forget_gates_start_open() -> None:
    for cell in (MANN(4, 3).controller, LSTMBaseline(4, 3).lstm):
        biases = [parameter for name, parameter in cell.named_parameters() if "bias" in name]
        forget = sum(bias.detach()[200:400] for bias in biases)
        assert torch.equal(forget, torch.ones(200))
        others = torch.cat([bias.detach()[part] for bias in biases for part in (slice(200), slice(400, None))])
        assert 0.065 < others.abs().max() <= 200**-0.5


@pytest.mark.parametrize("kind", [MANN, LSTMBaseline])
def test_weights_are_drawn_from_the_generator(kind: type, rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, same, other = (kind(4, 3, generator=generator(seed)) for seed in (0, 0, 1))
        one(torch.zeros(1, 2, 4))
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_works_without_gradients() -> None:
    mann, inputs = small(), randn(2, 5, 4)
    with torch.inference_mode():
        logits, _ = mann(inputs)
    torch.testing.assert_close(logits, mann(inputs)[0].detach())


@pytest.mark.parametrize("kind", [MANN, LSTMBaseline])
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (torch.zeros(2, 5, 3), ShapeError, r"shape \(episodes, steps, 4\).*got \(2, 5, 3\). Did you leave out the lab"),
        (torch.zeros(5, 4), ShapeError, r"got \(5, 4\)"),
        (torch.zeros(2, 0, 4), ShapeError, r"at least one step, got \(2, 0, 4\)"),
        (torch.zeros(2, 5, 4).double(), DtypeError, r"inputs are torch.float64, the weights torch.float32"),
        ([[0.0] * 4], DtypeError, "inputs must be a tensor, got list"),
        (torch.full((2, 5, 4), math.nan), NonFiniteError, "inputs hold NaN or infinite numbers"),
        (torch.full((2, 5, 4), -math.inf), NonFiniteError, "inputs hold NaN or infinite numbers"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_wrong_inputs(kind: type, inputs: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(4, 3)(inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"controller": "gru"}, "controller must be one of 'lstm', 'feedforward', got 'gru'"),
        ({"hidden": 0}, "hidden must be a whole number above 0, got 0"),
        ({"access": LRUAccess(100)}, "the access takes 100 numbers, but the controller has hidden=200 units"),
        ({"access": LRUAccess}, "access must be a cell such as LRUAccess"),
        ({"access": nn.Linear(3, 3)}, "access must be a cell such as LRUAccess"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        MANN(4, 3, **settings)


@pytest.mark.usefixtures("untyped")
def test_only_a_mann_has_a_baseline() -> None:
    for wrong in ("x", MANN, LSTMBaseline(4, 3)):
        with pytest.raises(SettingError, match=r"mann must be a MANN, such as MANN\(405, 5\), got"):
            LSTMBaseline.like(wrong)


@pytest.mark.usefixtures("untyped")
def test_wrong_numbers_of_episodes() -> None:
    for model in (small(), LRUAccess(6), NTMAccess(6), HyperLSTMCell(4, 6)):
        for wrong in (-1, 2.0, None):
            with pytest.raises(SettingError, match=f"batch must be a whole number of at least 0, got {wrong}"):
                model.initial(wrong)


@pytest.mark.parametrize("kind", [MANN, LSTMBaseline])
@pytest.mark.usefixtures("untyped")
def test_wrong_states(kind: type) -> None:
    model, inputs = kind(4, 3), torch.zeros(2, 5, 4)
    _, other = model(torch.zeros(3, 5, 4))
    with pytest.raises(ShapeError, match=r"state of 2 sequences must be .*Is it that of another batch"):
        model(inputs, other)
    for wrong in (torch.zeros(2, 200), [torch.zeros(2, 200)], 3, "state"):
        with pytest.raises(ShapeError, match=rf"must be a .* got something else \({type(wrong).__name__}\)"):
            model(inputs, wrong)
    _, wide = kind(4, 3).double()(inputs.double())
    with pytest.raises(DtypeError, match=r"the state must be torch\.float32 as the weights are, got torch\.float64"):
        model(inputs, wide)


@pytest.mark.parametrize("kind", [LRUAccess, NTMAccess])
def test_a_state_with_the_memory_of_another_batch(kind: type) -> None:
    mann = small(kind=kind)
    state = mann.initial(2)._replace(memory=mann.access.initial(3))
    with pytest.raises(ShapeError, match=r"state of 2 sequences must be an .*of another network"):
        mann(randn(2, 8, 4), state)


STRINGS = Labels(3, letters=2)
SPELLED = ["aa", "ab", "ac", "ba", "bb", "bc", "ca", "cb", "cc"]


def test_strings_are_spelled() -> None:
    codes = STRINGS.encode(torch.arange(9))
    for code, word in zip(codes, SPELLED, strict=True):
        assert code.tolist() == [float(letter == other) for letter in word for other in "abc"]
    assert (STRINGS.count, STRINGS.size) == (9, 6)
    assert (Labels(5, letters=5).count, Labels(5, letters=5).size) == (3125, 25)


def test_one_letter_is_one_hot() -> None:
    labels, y, logits = Labels(5), torch.tensor([[3, 0], [4, 4]]), randn(2, 2, 5)
    assert torch.equal(labels.encode(y), torch.eye(5)[y])
    torch.testing.assert_close(labels.log_prob(logits, y), torch.distributions.Categorical(logits=logits).log_prob(y))
    assert torch.equal(labels.predict(logits), logits.argmax(2))


def test_a_string_is_as_probable_as_its_letters_together() -> None:
    logits = randn(4, 6)
    chances = torch.stack([STRINGS.log_prob(logits, torch.full((4,), label)).exp() for label in range(9)], 1)
    torch.testing.assert_close(chances.sum(1), torch.ones(4).double())
    for row, chance in zip(logits, chances, strict=True):
        first, second = row[:3].softmax(0), row[3:].softmax(0)
        expected = [first["abc".index(word[0])] * second["abc".index(word[1])] for word in SPELLED]
        torch.testing.assert_close(chance, torch.stack(expected))
    assert torch.equal(STRINGS.predict(logits), chances.argmax(1))


@pytest.mark.parametrize("labels", [Labels(4), Labels(3, letters=4), Labels(5, letters=5)], ids=repr)
def test_every_label_is_its_own_prediction(labels: Labels) -> None:
    everything = torch.arange(labels.count)
    assert torch.equal(labels.predict(labels.encode(everything)), everything)


def test_drawn_labels_differ_within_an_episode(rng_untouched: Untouched) -> None:
    with rng_untouched():
        drawn = Labels(5).draw(200, 5, generator=generator())
        strings = Labels(5, letters=5).draw(200, 15, generator=generator())
        again = Labels(5, letters=5).draw(200, 15, generator=generator())
    assert {tuple(row) for row in drawn.tolist()} <= set(itertools.permutations(range(5)))
    assert len(drawn.unique(dim=0)) > 80  # of 120 orders
    assert all(len(set(row)) == 15 for row in strings.tolist())
    assert strings.min() < 20
    assert strings.max() > 3104
    assert torch.equal(strings, again)


def test_few_labels_are_drawn_as_ever() -> None:
    labels = Labels(5, letters=5)
    numbers = torch.rand(7, 3125, generator=generator())
    assert torch.equal(labels.draw(7, 15, generator=generator()), numbers.topk(15).indices)


@pytest.mark.parametrize("labels", [Labels(5, letters=12), Labels(2, letters=62)], ids=repr)
def test_the_number_of_labels_is_no_matter(labels: Labels, rng_untouched: Untouched) -> None:
    with rng_untouched():
        drawn = labels.draw(1000, 5, generator=generator())
    assert drawn.shape == (1000, 5)
    assert all(len(set(row)) == 5 for row in drawn.tolist())
    assert drawn.min() < labels.count // 100
    assert drawn.max() > labels.count - labels.count // 100
    assert torch.equal(drawn, labels.draw(1000, 5, generator=generator()))
    assert labels.draw(2, 1).shape == (2, 1)


def test_labels_drawn_twice_are_drawn_again() -> None:
    labels = Labels(5000)
    drawn = labels.draw(50, 2000, generator=generator())  # each episode draws hundreds twice
    assert all(len(set(row)) == 2000 for row in drawn.tolist())
    # Places and labels are alike: the mean of 50 draws at each place, and the count of each label.
    assert (drawn.double().mean(0) - 2499.5).abs().max() < 5 * 5000 / 12**0.5 / 50**0.5
    counts = drawn.flatten().bincount(minlength=5000).double()
    assert counts.var().item() == pytest.approx(50 * 0.4 * 0.6, rel=0.1)
    assert len(set(labels.draw(1, 4999, generator=generator())[0].tolist())) == 4999


@pytest.mark.usefixtures("untyped")
def test_wrong_labels() -> None:
    with pytest.raises(LabelError, match=r"from 0 to 8 \(2 letters of 3\), got 9"):
        STRINGS.encode(torch.tensor([0, 9]))
    with pytest.raises(LabelError, match="got -1"):
        STRINGS.log_prob(torch.zeros(2, 6), torch.tensor([0, -1]))
    with pytest.raises(DtypeError, match=r"labels must be whole numbers, got torch\.float32"):
        STRINGS.encode(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"2 \* 3 = 6 numbers in their last dimension, got shape \(2, 5\)"):
        STRINGS.predict(torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"logits for \(2, 7\) and labels of shape \(2, 6\)"):
        STRINGS.log_prob(torch.zeros(2, 7, 6), torch.zeros(2, 6).long())
    with pytest.raises(SettingError, match="10 classes need as many labels, but 2 letters of 3 make only 9"):
        STRINGS.draw(1, 10)
    with pytest.raises(SettingError, match="alphabet must be a whole number above 0, got 0"):
        Labels(0)
    with pytest.raises(SettingError, match=r"labels are int64, but 63 letters of 2 make 2\*\*63 or more. Use fewer"):
        Labels(2, letters=63)
    with pytest.raises(SettingError, match="labels are int64"):
        Labels(5, letters=10**9)


def test_labels_come_one_step_late() -> None:
    inputs, codes = torch.randn(2, 4, 3), torch.randn(2, 4, 5).double()
    seen = offset(inputs, codes)
    assert seen.dtype == inputs.dtype
    for b, t in itertools.product(range(2), range(4)):
        late = codes[b, t - 1].float() if t else torch.zeros(5)
        assert torch.equal(seen[b, t], torch.cat([inputs[b, t], late]))


def test_no_label_is_seen_before_it_is_predicted() -> None:
    labels, inputs, y = Labels(3), randn(1, 6, 1), torch.tensor([[0, 1, 2, 0, 1, 2]])
    mann, changed = small(), torch.tensor([[0, 1, 2, 1, 1, 2]])
    before, after = (mann(offset(inputs, labels.encode(labelled)))[0] for labelled in (y, changed))
    assert torch.equal(before[:, :4], after[:, :4])
    assert (before[:, 4:] != after[:, 4:]).any(2).all()


@pytest.mark.usefixtures("untyped")
def test_wrong_offsets() -> None:
    for codes in (torch.zeros(2, 3, 5), torch.zeros(2, 4), torch.zeros(1, 4, 5)):
        with pytest.raises(ShapeError, match="with one code for each input"):
            offset(torch.zeros(2, 4, 3), codes)
    with pytest.raises(DtypeError, match="codes must be a tensor, got list"):
        offset(torch.zeros(2, 4, 3), [[0.0]])


@pytest.mark.parametrize("classes", [1, 3, 6])
def test_accuracy_by_instance_is_counted(classes: int) -> None:
    """Classes are drawn independently, so some are shown often, others never."""
    labels = torch.randint(100, 100 + classes, (7, 20), generator=generator())
    predictions = torch.randint(100, 100 + classes, (7, 20), generator=generator(1))
    right, shown, numbers = {}, {}, []
    for guesses, truths in zip(predictions.tolist(), labels.tolist(), strict=True):
        for t, truth in enumerate(truths):
            number = truths[: t + 1].count(truth)
            numbers.append(number)
            shown[number] = shown.get(number, 0) + 1
            right[number] = right.get(number, 0) + (guesses[t] == truth)
    assert instances(labels).flatten().tolist() == numbers
    expected = [right[number] / shown[number] for number in range(1, max(numbers) + 1)]
    torch.testing.assert_close(by_instance(predictions, labels), torch.tensor(expected))


@pytest.mark.usefixtures("untyped")
def test_wrong_predictions() -> None:
    labels = torch.zeros(2, 4).long()
    with pytest.raises(DtypeError, match=r"predictions must be whole numbers, got torch\.float32"):
        by_instance(torch.zeros(2, 4), labels)
    with pytest.raises(ShapeError, match=r"got \(2, 4\) labels and \(2, 4, 5\) predictions. Use Labels.predict"):
        by_instance(torch.zeros(2, 4, 5).long(), labels)
    with pytest.raises(ShapeError, match=r"labels must have shape \(episodes, steps\), got \(4,\)"):
        instances(torch.zeros(4).long())
