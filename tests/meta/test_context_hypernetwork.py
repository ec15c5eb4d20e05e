"""The context hypernetwork: held to heads that are written out, to gradient descent, and to MbPA's laws."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from recollect import (
    Categorical,
    Context,
    EpisodicMemory,
    Gaussian,
    LocalAdaptation,
    MbPA,
    Parametric,
    load,
    rules,
    save,
)
from recollect.adaptation import Adaptation
from recollect.errors import DtypeError, HeadError, LabelError, SettingError, ShapeError
from recollect.meta.context_hypernetwork import ContextHypernetwork

Untouched = Callable[[], AbstractContextManager[None]]
KEY, CLASSES, ENTRIES, QUERIES, NEAR, HIDDEN = 4, 3, 12, 5, 6, 7
DOUBLE = torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def linear(classes: int = CLASSES, *, bias: bool = True) -> nn.Linear:
    head = nn.utils.skip_init(nn.Linear, KEY, classes, bias=bias, dtype=DOUBLE)
    for seed, parameter in enumerate(head.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=seed))
    return head


def fresh(rate: float = 0.0) -> ContextHypernetwork:
    return ContextHypernetwork(KEY, hidden_size=HIDDEN, rate=rate, generator=seeded()).double()


def trained() -> ContextHypernetwork:
    """As if training had moved every parameter."""
    hyper = fresh()
    for seed, parameter in enumerate(hyper.parameters()):
        parameter.data.copy_(draw(*parameter.shape, seed=10 + seed))
    return hyper


def filled(classes: int = CLASSES) -> EpisodicMemory:
    memory = EpisodicMemory(ENTRIES + 5, KEY, key_dtype=DOUBLE)
    memory.write(draw(ENTRIES, KEY, seed=20), torch.randint(classes, (ENTRIES,), generator=seeded(21)))
    return memory


def queries() -> Tensor:
    return draw(QUERIES, KEY, seed=22)


def context(memory: EpisodicMemory | None = None, neighbors: int = NEAR) -> Context:
    return (filled() if memory is None else memory).read(queries(), neighbors)


def model(hyper: ContextHypernetwork, head: nn.Linear | None = None, memory: EpisodicMemory | None = None) -> MbPA:
    head, memory = linear() if head is None else head, filled() if memory is None else memory
    return MbPA(head, memory, neighbors=NEAR, adaptation=hyper)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def head_of(hyper: ContextHypernetwork, head: nn.Linear, near: Context, row: int) -> tuple[Tensor, Tensor]:
    """W_x and b_x of one query, neighbor by neighbor and number by number."""
    p = {name: value.tolist() for name, value in hyper.state_dict().items()}
    weight, bias = head.weight.detach().clone(), torch.zeros(head.out_features, dtype=DOUBLE)
    if head.bias is not None:
        bias = head.bias.detach().clone()
    old_weight, old_bias = weight.tolist(), bias.tolist()
    for h, v, w in zip(near.keys[row].tolist(), near.values[row].tolist(), near.weights[row].tolist(), strict=True):
        z = [sum(a * b for a, b in zip(line, h, strict=True)) + c for line, c in zip(old_weight, old_bias, strict=True)]
        total = sum(math.exp(x) for x in z)
        r = [(1.0 if c == v else 0.0) - math.exp(x) / total for c, x in enumerate(z)]
        seen = [*h, w, r[v]]
        a, c = p["reader.weight"], p["reader.bias"]
        e = [math.tanh(sum(x * y for x, y in zip(a[i], seen, strict=True)) + c[i]) for i in range(HIDDEN)]
        m = [h[j] + sum(p["key.weight"][j][i] * e[i] for i in range(HIDDEN)) for j in range(KEY)]
        s = sum(p["strength.weight"][0][i] * e[i] for i in range(HIDDEN)) + p["strength.bias"][0]
        for label in range(head.out_features):
            for j in range(KEY):
                weight[label, j] += w * s * r[label] * m[j]
            if head.bias is not None:
                bias[label] += w * s * r[label]
    return weight, bias


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_the_written_out_head(bias: bool) -> None:
    hyper, head, near = trained(), linear(bias=bias), context()
    outputs = hyper.adapted(head, queries(), near)
    for row in range(QUERIES):
        weight, shift = head_of(hyper, head, near, row)
        close(outputs[row].detach(), weight @ queries()[row] + shift)
    assert float((outputs - head(queries())).detach().abs().min()) > 1e-3, "it does change something"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rate", [0.25, 1.0])
def test_at_first_it_is_one_step_of_gradient_descent(bias: bool, rate: float) -> None:
    head, memory = linear(bias=bias), filled()
    step = MbPA(head, memory, neighbors=NEAR, adaptation=LocalAdaptation(rules.sgd(rate), steps=1))
    close(model(fresh(rate), head, memory)(queries()), step(queries()))
    assert float((step(queries()) - Parametric(head)(queries())).abs().max()) > 0.1


def test_at_first_nothing_changes() -> None:
    head, memory = linear(), filled()
    assert torch.equal(model(fresh(), head, memory)(queries()), Parametric(head)(queries()))
    assert torch.equal(fresh().adapted(head, queries(), context(memory)), head(queries()))


def test_without_neighbors_nothing_changes() -> None:
    head, empty = linear(), EpisodicMemory(10, KEY, key_dtype=DOUBLE)
    expected = Parametric(head)(queries())
    assert torch.equal(model(trained(), head, empty)(queries()), expected)
    assert torch.equal(model(trained(), head).forward(queries(), before=0), expected)
    none = context(empty)
    assert none.slots.shape == (QUERIES, 0)
    assert torch.equal(trained().adapted(head, queries(), none), head(queries()))


def test_neighbors_of_weight_zero_add_nothing() -> None:
    hyper, head, near = trained(), linear(), context()
    weights = near.weights.clone()
    weights[:, 2:] = 0
    two = Context(*(part[:, :2] for part in near))
    close(hyper.adapted(head, queries(), near._replace(weights=weights)), hyper.adapted(head, queries(), two))
    nothing = near._replace(weights=torch.zeros_like(weights))
    assert torch.equal(hyper.adapted(head, queries(), nothing), head(queries()))


def test_the_order_of_the_neighbors_means_nothing() -> None:
    hyper, head, near = trained(), linear(), context()
    order = torch.randperm(NEAR, generator=seeded(3))
    assert order.tolist() != list(range(NEAR))
    shuffled = Context(*(part[:, order] for part in near))
    close(hyper.adapted(head, queries(), shuffled), hyper.adapted(head, queries(), near))


def test_the_names_of_the_classes_mean_nothing() -> None:
    hyper, head, near = trained(), linear(), context()
    order = torch.tensor([2, 0, 1])
    renamed = linear()
    with torch.no_grad():
        renamed.weight[order], renamed.bias[order] = head.weight, head.bias
    outputs = hyper.adapted(renamed, queries(), near._replace(values=order[near.values]))
    close(outputs[:, order], hyper.adapted(head, queries(), near))


def test_one_serves_any_number_of_classes_and_neighbors() -> None:
    hyper = trained()
    for classes, neighbors in ((2, 1), (50, ENTRIES)):
        head, memory = linear(classes), filled(classes)
        outputs = MbPA(head, memory, neighbors=neighbors, adaptation=hyper)(queries())
        close(outputs, hyper.adapted(head, queries(), context(memory, neighbors)).log_softmax(-1).detach())
    count = sum(parameter.numel() for parameter in ContextHypernetwork(64).parameters())
    assert count == (64 + 2 + 1) * 32 + 32 * 64 + 32 + 1


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_network_head_queries_and_neighbors(bias: bool) -> None:
    hyper, head, near = trained(), linear(bias=bias), context()
    names = [f"0.{name}" for name, _ in hyper.named_parameters()], [f"1.{name}" for name, _ in head.named_parameters()]

    class Both(nn.ModuleList):
        def forward(self, x: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
            return hyper.adapted(head, x, near._replace(keys=keys, weights=weights))

    both = Both([hyper, head])

    def outputs(*values: Tensor) -> Tensor:
        parameters = dict(zip(names[0] + names[1], values, strict=False))
        return functional_call(both, parameters, values[len(parameters) :])

    asked = (part.clone().requires_grad_() for part in (queries(), near.keys, near.weights))
    assert torch.autograd.gradcheck(outputs, (*both.parameters(), *asked), fast_mode=True)


def test_it_learns_what_the_head_does_not_know() -> None:
    """Each episode gives its classes new names; the head knows nothing, the memory everything."""
    hyper = ContextHypernetwork(KEY, generator=seeded())
    head = nn.Linear(KEY, CLASSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.Adam(hyper.parameters(), lr=0.03)
    g, losses = seeded(5), []
    means = torch.randn(CLASSES, KEY, generator=g)

    def episode() -> Tensor:
        names = torch.randperm(CLASSES, generator=g)
        kinds = torch.randint(CLASSES, (2, 30), generator=g)
        keys = means[kinds] + 0.3 * torch.randn(2, 30, KEY, generator=g)
        memory = EpisodicMemory(30, KEY)
        memory.write(keys[0], names[kinds[0]])
        outputs = hyper.adapted(head, keys[1], memory.read(keys[1], 10))
        return nn.functional.cross_entropy(outputs, names[kinds[1]])

    for _ in range(60):
        loss = episode()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(CLASSES))
    assert max(losses[-5:]) < 0.5 * losses[0]
    assert bool(hyper.key.weight.any())
    assert bool(hyper.strength.weight.any())


def test_a_batch_is_its_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model(trained())
    outputs = layer(queries())
    close(torch.stack([layer(query) for query in queries()]), outputs)
    monkeypatch.setattr("recollect.meta.context_hypernetwork._BUDGET", 1)  # a chunk for every query
    close(layer(queries()), outputs)
    monkeypatch.undo()
    assert layer(queries()[:0]).shape == (0, CLASSES)


def test_a_prediction_changes_nothing(rng_untouched: Untouched) -> None:
    layer = model(trained())
    before = copy.deepcopy(layer.state_dict())
    assert any(name.startswith("memory.") for name in before)
    with rng_untouched():
        outputs = layer(queries())
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not outputs.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(layer(queries()), outputs)
    assert torch.equal(layer.eval()(queries()), outputs)


def test_training_it_or_the_head_changes_the_predictions() -> None:
    hyper, head, memory = trained(), linear(), filled()
    layer = model(hyper, head, memory)
    before = layer(queries())
    hyper.strength.bias.data += 1
    middle = layer(queries())
    head.bias.data += torch.arange(3.0)
    assert not torch.equal(middle, before)
    assert not torch.equal(layer(queries()), middle)
    close(layer(queries()), hyper.adapted(head, queries(), context(memory)).log_softmax(-1).detach())


def test_copies_and_state_dicts() -> None:
    hyper = trained()
    layer, other = model(hyper), model(fresh(), linear(), EpisodicMemory(ENTRIES + 5, KEY, key_dtype=DOUBLE))
    expected = layer(queries())
    twin = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    hyper.strength.bias.data += 1
    assert not torch.equal(layer(queries()), expected)
    assert torch.equal(twin(queries()), expected)
    assert torch.equal(other(queries()), expected)
    assert {id(p) for p in hyper.parameters()} < {id(p) for p in layer.parameters()}


def test_saving_and_loading(tmp_path: Path) -> None:
    layer = model(trained())
    save(layer, tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"adaptation": fresh()})
    assert torch.equal(loaded(queries()), layer(queries()))


def test_explanations_leave_one_memory_out() -> None:
    hyper, head, memory = trained(), linear(), filled()
    explanation = model(hyper, head, memory).explain(queries()[0])
    change = hyper.adapted(head, queries(), context(memory))[0] - head(queries()[0])
    assert not explanation.exact
    close(explanation.contributions.sum(0), change.detach())


def test_each_query_sees_its_own_past() -> None:
    """Where ``before`` leaves places that nothing fills."""
    hyper, head, keys, labels = trained(), linear(), draw(4, KEY, seed=30), torch.tensor([0, 1, 2, 0])
    past = torch.tensor([2, 4, 1, 0, 3])
    memory = EpisodicMemory(10, KEY, key_dtype=DOUBLE)
    memory.write(keys, labels)
    assert bool((memory.read(queries(), NEAR, before=past).slots < 0).any())
    outputs = model(hyper, head, memory).forward(queries(), before=past)
    for row, count in enumerate(past.tolist()):
        small = EpisodicMemory(10, KEY, key_dtype=DOUBLE)
        small.write(keys[:count], labels[:count])
        close(outputs[row], model(hyper, head, small)(queries()[row]))


def test_initial_values(rng_untouched: Untouched) -> None:
    with rng_untouched():
        one, same, other = (ContextHypernetwork(62, rate=0.5, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.reader.weight, same.reader.weight)
    assert not torch.equal(one.reader.weight, other.reader.weight)
    assert 0.12 < float(one.reader.weight.detach().abs().max()) <= 1 / 8
    assert bool(one.reader.bias.any())
    assert not one.key.weight.any()
    assert not one.strength.weight.any()
    assert one.strength.bias.tolist() == [0.5]
    assert isinstance(one, Adaptation)


def test_heads_that_are_not_one_linear_layer(untyped: None) -> None:
    hooked = linear()
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    for head in (nn.Sequential(linear()), nn.Sequential(linear(), nn.ReLU()), hooked, parametrized()):
        with pytest.raises(HeadError, match=r"change of a torch\.nn\.Linear without hooks or parametrizations"):
            MbPA(head, filled(), neighbors=NEAR, adaptation=trained())
        with pytest.raises(HeadError, match="Take the last layer alone as the head"):
            trained().adapted(head, queries(), context())


def parametrized() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(linear())


def test_heads_of_other_keys() -> None:
    with pytest.raises(HeadError, match=r"head's keys have length 6, this ContextHypernetwork's 4\. Use .*\(6\)"):
        MbPA(nn.Linear(6, 2), EpisodicMemory(5, 6), neighbors=2, adaptation=trained())


def test_other_likelihoods() -> None:
    memory = EpisodicMemory(5, KEY, value_shape=(2,), value_dtype=DOUBLE)
    with pytest.raises(SettingError, match=r"needs likelihood=Categorical\(\), got Gaussian"):
        MbPA(linear(2), memory, neighbors=2, adaptation=trained(), likelihood=Gaussian())
    assert isinstance(MbPA(linear(), filled(), neighbors=2, adaptation=trained()).likelihood, Categorical)


def test_labels_that_the_head_does_not_have() -> None:
    memory = filled()
    memory.write(queries(), torch.full((QUERIES,), 7))
    with pytest.raises(LabelError, match="there are 3 classes"):
        model(trained(), memory=memory)(queries())
    with pytest.raises(LabelError, match="there are 3 classes"):
        trained().adapted(linear(), queries(), context(memory))
    with pytest.raises(DtypeError, match="labels that are whole numbers"):
        trained().adapted(linear(), queries(), context()._replace(values=torch.zeros(QUERIES, NEAR)))


def test_dtypes_that_do_not_agree() -> None:
    with pytest.raises(DtypeError, match=r"ContextHypernetwork is torch.float64, the head torch.float32\. Use .to"):
        MbPA(nn.Linear(KEY, CLASSES), filled(), neighbors=2, adaptation=trained())(queries())
    with pytest.raises(DtypeError, match=r"queries must be torch.float64 as the head, got torch.float32"):
        trained().adapted(linear(), queries().float(), context())
    near = context()
    with pytest.raises(DtypeError, match=r"weights must be torch.float64 as the head"):
        trained().adapted(linear(), queries(), near._replace(weights=near.weights.float()))


def test_contexts_of_other_queries(untyped: None) -> None:
    near = context()
    with pytest.raises(ShapeError, match=r"queries must have shape \(b, 4\).*got \(5, 3\) and \(5, 6, 4\)"):
        trained().adapted(linear(), queries()[:, :3], near)
    with pytest.raises(ShapeError, match=r"got \(2, 4\) and \(5, 6, 4\)"):
        trained().adapted(linear(), queries()[:2], near)
    with pytest.raises(ShapeError, match=r"got \(4,\) and \(5, 6, 4\)"):
        trained().adapted(linear(), queries()[0], near)


@pytest.mark.parametrize("settings", [{"key_size": 0}, {"hidden_size": 2.0}, {"rate": float("nan")}, {"rate": "1"}])
def test_settings(untyped: None, settings: dict[str, object]) -> None:
    (name,) = settings
    with pytest.raises(SettingError, match=f"{name} must be a"):
        ContextHypernetwork(**({"key_size": KEY} | settings))


def test_a_class_is_no_adaptation(untyped: None) -> None:
    with pytest.raises(SettingError, match="adaptation must be"):
        MbPA(linear(), filled(), neighbors=2, adaptation=ContextHypernetwork)


def test_adapted_needs_queries_and_their_context(untyped: None) -> None:
    with pytest.raises(
        SettingError, match=r"context must be what memory\.read\(queries, neighbors\) returns, got None"
    ):
        trained().adapted(linear(), queries(), None)
    with pytest.raises(DtypeError, match="queries must be a tensor, got list"):
        trained().adapted(linear(), [[0.0] * KEY], context())
