"""``MbPA``: what it predicts, how it explains itself, and what it refuses."""

import re

import pytest
import torch
from oracles import algorithm1
from torch import Tensor, nn

from recollect import (
    Categorical,
    EpisodicMemory,
    Explanation,
    Gaussian,
    LocalAdaptation,
    MbPA,
    NonParametric,
    Parametric,
    dot_product,
    gaussian,
    inverse_distance,
    rules,
)
from recollect.errors import DeviceError, DtypeError, HeadError, LabelError, NonFiniteError, SettingError, ShapeError
from recollect.kernels import Kernel
from recollect.memory import Context

KEY, CLASSES, ENTRIES = 5, 3, 14
DOUBLE = torch.float64
SGD = LocalAdaptation(rules.sgd(0.5), steps=3)


def remember(labels: Tensor | None = None) -> EpisodicMemory:
    memory = EpisodicMemory(ENTRIES, KEY, key_dtype=DOUBLE)
    memory.write(
        torch.randn(ENTRIES, KEY, dtype=DOUBLE), torch.randint(CLASSES, (ENTRIES,)) if labels is None else labels
    )
    return memory


def layer(adaptation: LocalAdaptation = SGD, head: nn.Module | None = None, **settings) -> MbPA:
    head = nn.Linear(KEY, CLASSES).double() if head is None else head.double()
    return MbPA(head, remember(), **{"neighbors": 4, "adaptation": adaptation, **settings})


def linear() -> nn.Linear:
    return nn.Linear(KEY, CLASSES)


def normed() -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(KEY), mlp())


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(KEY, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# Predictions


@pytest.mark.parametrize("rule", [rules.sgd(0.3), rules.sgd(0.3, momentum=0.5), rules.rmsprop(0.03), rules.adam(0.03)])
@pytest.mark.parametrize("head", [linear, mlp])
def test_neighbors_become_more_likely(rule: rules.Rule, head) -> None:
    """The sign of Eq. (4): the step goes up the neighbors' log-likelihood, not down as printed."""
    model = layer(LocalAdaptation(rule, steps=1), head())
    keys = torch.randn(20, KEY, dtype=DOUBLE)
    context = model.memory.read(keys, 4)

    def fit(outputs: Tensor) -> Tensor:
        """The weighted log-likelihood of each query's neighbors if all of them had these outputs."""
        likelihoods = outputs.unsqueeze(1).expand(-1, 4, -1).gather(2, context.values.unsqueeze(-1)).squeeze(-1)
        return (context.weights * likelihoods).sum(1)

    assert (fit(model(keys)) - fit(Parametric(model.head)(keys))).mean() > 0.01


@pytest.mark.parametrize("adaptation", [SGD, LocalAdaptation(rules.adam(0.3), steps=5)])
def test_correction_is_used_at_once_and_gone_when_forgotten(adaptation: LocalAdaptation) -> None:
    model = MbPA(nn.Linear(KEY, CLASSES), EpisodicMemory(9, KEY), neighbors=3, adaptation=adaptation)
    nn.init.zeros_(model.head.weight)
    key = torch.ones(KEY)
    wrong = int(model(key).argmin())
    before = model(key)
    slots = model.memory.write(key, torch.tensor(wrong))
    assert int(model(key).argmax()) == wrong
    model.memory.forget(slots)
    assert torch.equal(model(key), before)


@pytest.mark.parametrize("kernel", [inverse_distance(0.1), inverse_distance(10.0)])
def test_kernel_weighs_the_neighbors(kernel: inverse_distance) -> None:
    model = layer(kernel=kernel)
    query = torch.randn(KEY, dtype=DOUBLE)
    expected = algorithm1.mbpa_test(
        model.head,
        model.memory.keys,
        model.memory.values,
        query,
        neighbors=4,
        epsilon=kernel.epsilon,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        steps=3,
    )
    close(model(query), expected.log_softmax(-1))


@pytest.mark.parametrize(
    "head", [lambda: nn.Linear(KEY, CLASSES), mlp, lambda: nn.Sequential(nn.LayerNorm(KEY), mlp())]
)
def test_more_neighbors_than_entries(head) -> None:
    model = layer(head=head(), neighbors=100)
    exact = MbPA(model.head, model.memory, neighbors=ENTRIES, adaptation=SGD)
    keys = torch.randn(6, KEY, dtype=DOUBLE)
    close(model(keys), exact(keys))


def test_replaces_the_output_layer_of_a_network() -> None:
    features, head = nn.Sequential(nn.Linear(8, KEY), nn.ReLU()), nn.Linear(KEY, CLASSES)
    memory = EpisodicMemory(10, KEY)
    model = nn.Sequential(features, MbPA(head, memory, neighbors=3, adaptation=SGD))
    inputs = torch.randn(4, 8)
    assert torch.equal(model(inputs), head(features(inputs)).log_softmax(-1))
    memory.write(features(inputs), torch.tensor([0, 1, 2, 0]))
    assert not torch.allclose(model(inputs), head(features(inputs)).log_softmax(-1))
    assert set(model.state_dict()) >= {"0.0.weight", "1.head.weight", "1.memory.keys", "1.memory.values"}


def test_probabilities_are_normalized() -> None:
    close(layer()(torch.randn(6, KEY, dtype=DOUBLE)).exp().sum(-1), torch.ones(6, dtype=DOUBLE))


class Projection(nn.Module):
    """A frozen projection and a decoder, of which only the decoder adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(KEY, 4)
        self.decoder = nn.Linear(4, CLASSES)

    def forward(self, keys: Tensor) -> Tensor:
        return self.decoder(self.projection(keys).tanh())


def test_head_behind_a_frozen_projection() -> None:
    """Which engine serves it does not matter: the same as a Sequential and as a module of its own."""
    head = Projection()
    model = layer(LocalAdaptation(rules.sgd(0.5), steps=3, parameters=("decoder",)), head)
    flat = nn.Sequential(head.projection, nn.Tanh(), head.decoder)
    adaptation = LocalAdaptation(rules.sgd(0.5), steps=3, parameters=("2",))
    keys = torch.randn(6, KEY, dtype=DOUBLE)
    close(model(keys), MbPA(flat, model.memory, neighbors=4, adaptation=adaptation)(keys))


class Plain:
    """A memory with nothing but what every memory has."""

    def __init__(self, memory: EpisodicMemory) -> None:
        self._memory = memory
        self.capacity, self.read = memory.capacity, memory.read
        self.write, self.forget, self.clear = memory.write, memory.forget, memory.clear

    def __len__(self) -> int:
        return len(self._memory)


@pytest.mark.parametrize("keep_base", [False, True])
@pytest.mark.parametrize("kernel", [inverse_distance(), dot_product(0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_memory_and_one_of_any_size_predict_the_same(
    kernel: Kernel, keep_base: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, head = remember().to(dtype), linear().to(dtype)
    adaptation = LocalAdaptation(rules.sgd(0.5), steps=1, keep_base=keep_base)
    settings = {"neighbors": 3, "adaptation": adaptation, "kernel": kernel}
    queries, before = torch.randn(6, KEY, dtype=dtype), torch.arange(6)
    found = MbPA(head, memory, **settings)(queries, before=before)
    torch.testing.assert_close(found, MbPA(head, Plain(memory), **settings)(queries, before=before))
    monkeypatch.setattr("recollect.mbpa._SMALL", 0)
    torch.testing.assert_close(found, MbPA(head, memory, **settings)(queries, before=before))


class Shift:
    """An adaptation of one's own: adds one to every output."""

    def bind(self, head, likelihood):
        def adapt(queries: Tensor, context: Context) -> Tensor:
            return head({}, queries) + context.weights.sum(-1, keepdim=True)

        return adapt


def test_adaptation_of_ones_own() -> None:
    model = MbPA(
        nn.Linear(KEY, 1).double(),
        EpisodicMemory(9, KEY, value_shape=(1,), value_dtype=DOUBLE, key_dtype=DOUBLE),
        neighbors=3,
        adaptation=Shift(),
        likelihood=Gaussian(),
    )
    keys = torch.randn(6, KEY, dtype=DOUBLE)
    model.memory.write(keys, torch.zeros(6, 1, dtype=DOUBLE))
    close(model(keys), model.head(keys).detach() + 1)
    assert not model.explain(keys[0]).exact


def test_adaptation_cannot_be_exchanged() -> None:
    model = layer()
    assert model.adaptation is SGD
    with pytest.raises(AttributeError):
        model.adaptation = LocalAdaptation(rules.sgd(9.0), steps=9)


# Explanations


EXACT = {
    "one step": LocalAdaptation(rules.sgd(0.5), steps=1),
    "steps": LocalAdaptation(rules.sgd(0.5), steps=6),
    "momentum and prior": LocalAdaptation(rules.sgd(0.3, momentum=0.7), steps=5, prior=0.3),
    "weight": LocalAdaptation(rules.sgd(0.3), steps=5, parameters=("weight",)),
    "bias": LocalAdaptation(rules.sgd(0.3), steps=5, prior=0.1, parameters=("bias",)),
}


@pytest.mark.parametrize("kind", EXACT)
def test_contributions_sum_to_the_change_of_the_logits(kind: str) -> None:
    model, key = layer(EXACT[kind]), torch.randn(KEY, dtype=DOUBLE)
    explanation = model.explain(key)
    assert explanation.exact
    assert explanation.contributions.shape == (4, CLASSES)
    logits = model.head(key).detach() + explanation.contributions.sum(0)
    close(logits.log_softmax(-1), model(key))
    close(explanation.after, model(key))
    close(explanation.before, Parametric(model.head)(key))


def test_contributions_of_one_step_by_hand() -> None:
    """Memory k adds rate * w_k * (onehot(v_k) - softmax(W h_k + b)) * (h_k . q + 1)."""
    model, key = layer(EXACT["one step"]), torch.randn(KEY, dtype=DOUBLE)
    context = model.memory.read(key, 4)
    residual = nn.functional.one_hot(context.values, CLASSES) - model.head(context.keys).detach().softmax(-1)
    by_hand = 0.5 * context.weights[:, None] * residual * (context.keys @ key + 1)[:, None]
    close(model.explain(key).contributions, by_hand)


def test_contributions_of_a_regression_sum_to_the_change() -> None:
    memory = EpisodicMemory(ENTRIES, KEY, value_shape=(2,), value_dtype=DOUBLE, key_dtype=DOUBLE)
    memory.write(torch.randn(ENTRIES, KEY, dtype=DOUBLE), torch.randn(ENTRIES, 2, dtype=DOUBLE))
    head, key = nn.Sequential(nn.Tanh(), nn.Linear(KEY, 2)).double(), torch.randn(KEY, dtype=DOUBLE)
    model = MbPA(head, memory, neighbors=4, adaptation=SGD, likelihood=Gaussian())
    explanation = model.explain(key)
    assert explanation.exact
    close(explanation.before + explanation.contributions.sum(0), model(key))


@pytest.mark.parametrize(
    ("head", "adaptation"),
    [
        (mlp, EXACT["momentum and prior"]),
        (mlp, LocalAdaptation(rules.adam(0.1), steps=3)),
        (linear, LocalAdaptation(rules.rmsprop(0.1), steps=3)),
        (lambda: nn.Sequential(nn.Linear(KEY, CLASSES), nn.Softplus()), SGD),
    ],
)
def test_other_contributions_are_what_leaving_out_one_memory_changes(head, adaptation: LocalAdaptation) -> None:
    model, key = layer(adaptation, head(), neighbors=4, likelihood=Identity()), torch.randn(KEY, dtype=DOUBLE)
    explanation = model.explain(key)
    assert not explanation.exact
    context = model.memory.read(key.unsqueeze(0), 4)
    for place in range(4):
        weights = context.weights.clone()
        weights[0, place] = 0  # the others keep their weights
        without = model._adapter(key.unsqueeze(0), context._replace(weights=weights))[0].detach()
        close(explanation.contributions[place], model(key) - without)


class Identity(Categorical):
    """Labels whose prediction is the logits themselves."""

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs


def test_explanation_tells_what_was_read() -> None:
    model, key = layer(), torch.randn(KEY, dtype=DOUBLE)
    explanation, context = model.explain(key), model.memory.read(key, 4)
    for name in ("values", "weights", "distances", "slots"):
        assert torch.equal(getattr(explanation, name), getattr(context, name))


@pytest.mark.parametrize(
    "head", [lambda: nn.Linear(KEY, CLASSES), mlp, lambda: nn.Sequential(nn.LayerNorm(KEY), mlp())]
)
def test_explanation_of_an_empty_memory(head) -> None:
    model, key = layer(head=head()), torch.randn(KEY, dtype=DOUBLE)
    nothing = model.explain(key, before=0)
    model.memory.clear()
    for explanation in (model.explain(key), nothing):
        assert isinstance(explanation, Explanation)
        assert explanation.contributions.shape == (0, CLASSES)
        assert len(explanation.slots) == 0
        assert torch.equal(explanation.before, explanation.after)
        assert torch.equal(explanation.after, Parametric(model.head)(key))


def test_explanation_leaves_out_what_before_hides() -> None:
    model, key = layer(), torch.randn(KEY, dtype=DOUBLE)
    explanation = model.explain(key, before=2)
    assert explanation.contributions.shape == (2, CLASSES)
    assert sorted(explanation.slots.tolist()) == [0, 1]
    close(explanation.after, model(key, before=2))
    logits = model.head(key).detach() + explanation.contributions.sum(0)
    close(logits.log_softmax(-1), explanation.after)


# Errors


@pytest.mark.parametrize("neighbors", [0, -1, True, 1.5, None])
@pytest.mark.usefixtures("untyped")
def test_neighbors_must_be_a_positive_whole_number(neighbors) -> None:
    with pytest.raises(SettingError, match=f"neighbors.*{neighbors}"):
        layer(neighbors=neighbors)


@pytest.mark.parametrize(
    ("head", "parameters", "message"),
    [
        (nn.Sequential(nn.Linear(KEY, 4), nn.GRUCell(4, CLASSES)), None, "'1' is a GRUCell"),
        (nn.Sequential(nn.BatchNorm1d(KEY, track_running_stats=False)), None, "'0' is a BatchNorm1d"),
        (nn.Sequential(nn.LazyLinear(CLASSES)), None, "'0' has no shape yet"),
        (nn.Tanh(), None, "no parameters"),
        (nn.Linear(KEY, CLASSES), ("wieght",), "'wieght'"),
    ],
)
def test_heads_are_checked_at_construction(head: nn.Module, parameters, message: str) -> None:
    with pytest.raises(HeadError, match=message):
        MbPA(head, remember(), neighbors=3, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1, parameters=parameters))


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (torch.zeros(3, KEY + 1), ShapeError, rf"\(\*, {KEY}\).*\(3, {KEY + 1}\)"),
        (torch.zeros(3, 4, KEY + 1), ShapeError, rf"\(\*, {KEY}\)"),
        (torch.zeros(3, 5, 5).mT[:, :4, :4], ShapeError, rf"\(\*, {KEY}\)"),
        (torch.zeros(()), ShapeError, r"\(\*, key_size\).*single number"),
        (torch.zeros(3, KEY, device="meta"), DeviceError, "on meta.*on cpu"),
        (torch.tensor([[0.0] * KEY, [0.0, 0.0, float("nan"), 0.0, 0.0]]), NonFiniteError, "row 1"),
        (torch.full((2, KEY), float("-inf")), NonFiniteError, "row 0"),
    ],
)
@pytest.mark.parametrize("entries", [0, ENTRIES])
@pytest.mark.usefixtures("untyped")
def test_keys_that_do_not_fit_are_refused(keys: Tensor, error: type, message: str, entries: int) -> None:
    model = layer()
    if entries == 0:
        model.memory.clear()
    for predictor in (model, NonParametric(model.memory, classes=CLASSES, neighbors=3)):
        with pytest.raises(error, match=message):
            predictor(keys)


@pytest.mark.parametrize(("bad", "what"), [(torch.nan, "holds NaN or infinity"), (1e200, "is so large that")])
def test_row_of_a_bad_query_counts_from_the_start_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, bad: float, what: str
) -> None:
    monkeypatch.setattr("recollect.predictors._BUDGET", 1)  # a chunk for every query
    keys = torch.zeros(7, KEY, dtype=DOUBLE)
    keys[5, 2] = bad
    with pytest.raises(NonFiniteError, match=f"row 5 {what}"):
        layer()(keys)


@pytest.mark.parametrize("shape", [(2,), (3, 1), (3, 2, 1), (2, 3)])
@pytest.mark.usefixtures("untyped")
def test_before_must_fit_the_keys(shape: tuple[int, ...]) -> None:
    model, keys = layer(), torch.randn(3, 2, KEY, dtype=DOUBLE)
    for predictor in (model, Parametric(model.head), NonParametric(model.memory, classes=CLASSES, neighbors=3)):
        with pytest.raises(ShapeError, match=re.escape(f"(3, 2), got {shape}")):
            predictor(keys, before=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, KEY), (), (2, 1, KEY)])
@pytest.mark.usefixtures("untyped")
def test_explain_takes_one_key(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=re.escape(f"got {shape}")):
        layer().explain(torch.zeros(shape, dtype=DOUBLE))


@pytest.mark.parametrize("labels", [torch.full((ENTRIES,), CLASSES), torch.full((ENTRIES,), -1)])
@pytest.mark.parametrize("rule", [rules.sgd(0.1), rules.adam(0.1)])
def test_labels_out_of_range_are_refused(labels: Tensor, rule: rules.Rule) -> None:
    model = MbPA(
        nn.Linear(KEY, CLASSES).double(), remember(labels), neighbors=3, adaptation=LocalAdaptation(rule, steps=1)
    )
    key = torch.zeros(KEY, dtype=DOUBLE)
    for predict in (model, model.explain):
        with pytest.raises(LabelError, match=f"{int(labels[0])}.*{CLASSES} classes"):
            predict(key)


@pytest.mark.parametrize(
    ("likelihood", "value", "error", "message"),
    [
        (Categorical(), torch.zeros(()), DtypeError, "whole numbers"),
        (Categorical(), torch.zeros(1, dtype=torch.long), ShapeError, r"value_shape=\(\)"),
        (Gaussian(), torch.zeros((), dtype=torch.long), DtypeError, "floating-point"),
        (Gaussian(), torch.zeros(CLASSES, dtype=torch.long), DtypeError, "floating-point"),
        (Gaussian(), torch.zeros(()), ShapeError, rf"{CLASSES} outputs"),
        (Gaussian(), torch.zeros(CLASSES - 1), ShapeError, rf"{CLASSES} outputs"),
    ],
)
def test_values_that_do_not_fit_are_refused(likelihood, value: Tensor, error: type, message: str) -> None:
    memory = EpisodicMemory(9, KEY, value_shape=tuple(value.shape), value_dtype=value.dtype)
    model = MbPA(nn.Linear(KEY, CLASSES), memory, neighbors=3, adaptation=SGD, likelihood=likelihood)
    model(torch.zeros(2, KEY))  # an empty memory has no values
    memory.write(torch.zeros(KEY), value)
    with pytest.raises(error, match=message):
        model(torch.zeros(2, KEY))


@pytest.mark.usefixtures("untyped")
def test_outputs_must_be_rows() -> None:
    model = layer(head=nn.Sequential(nn.Linear(KEY, 1), nn.Flatten(0)), likelihood=Gaussian())
    with pytest.raises(ShapeError, match=r"\(b, c\)"):
        model(torch.zeros(2, KEY, dtype=DOUBLE))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adaptation": rules.sgd(0.1)}, "adaptation must be an adaptation, such as LocalAdaptation"),
        ({"memory": None}, "memory must be a memory"),
        ({"kernel": gaussian}, "kernel must be a kernel"),
        ({"kernel": "gaussian"}, "kernel must be a kernel"),
        ({"likelihood": Gaussian}, "likelihood must be a likelihood"),
        ({"head": lambda keys: keys}, "head must be a torch.nn.Module"),
    ],
)
def test_the_wrong_kind_of_part_is_refused_in_the_constructor(change: dict, message: str) -> None:
    memory = EpisodicMemory(capacity=10, key_size=4)
    adaptation = LocalAdaptation(rules.sgd(0.1), steps=1)
    parts = {"head": torch.nn.Linear(4, 3), "memory": memory, "neighbors": 2, "adaptation": adaptation, **change}
    with pytest.raises(SettingError, match=message):
        MbPA(parts.pop("head"), parts.pop("memory"), **parts)


@pytest.mark.usefixtures("untyped")
def test_lists_are_refused_by_name() -> None:
    memory = EpisodicMemory(capacity=10, key_size=4)
    model = MbPA(torch.nn.Linear(4, 3), memory, neighbors=2, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    for call in (lambda: model([1.0] * 4), lambda: model.explain([1.0] * 4), lambda: memory.read([1.0] * 4, 2)):
        with pytest.raises(DtypeError, match="must be a tensor, got list"):
            call()
    with pytest.raises(DtypeError, match="values must be a tensor, got int"):
        memory.write(torch.ones(1, 4), 1)


@pytest.mark.parametrize("rule", [rules.sgd(0.01), rules.rmsprop(0.01), rules.adam(0.01)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads_stay_finite(rule, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = EpisodicMemory(capacity=100, key_size=4)
    memory.write(torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator))
    head = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3)).to(dtype)
    model = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rule, steps=3))
    assert bool(model(torch.randn(20, 4, generator=generator)).isfinite().all())


def test_a_head_that_decides_by_its_input_is_refused_with_a_reason() -> None:
    class Deciding(torch.nn.Linear):
        def forward(self, keys):
            return super().forward(keys if keys.sum() > 0 else -keys)

    memory = EpisodicMemory(capacity=10, key_size=4)
    memory.write(torch.ones(2, 4), torch.tensor([0, 1]))
    model = MbPA(Deciding(4, 3), memory, neighbors=2, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    with pytest.raises(HeadError, match="decides by the values"):
        model(torch.ones(3, 4))


def test_a_head_of_another_key_size_is_refused_with_the_sizes() -> None:
    memory = EpisodicMemory(capacity=10, key_size=4)
    memory.write(torch.ones(2, 4), torch.tensor([0, 1]))
    model = MbPA(torch.nn.Linear(7, 3), memory, neighbors=2, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    with pytest.raises(ShapeError, match=r"\(1, 4\)"):
        model(torch.ones(3, 4))
