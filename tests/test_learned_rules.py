"""A learned rule is a part of the MbPA layer that it drives: its state, its moves, its copies and its saves."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, load, rules, save, snapshot
from recollect.errors import FormatError, SettingError
from recollect.meta import MAML, LSTMOptimizer, MetaLSTM, MetaSGD, Policy

SIZE, CLASSES, STEPS = 4, 3, 3
NUMBERS = (SIZE + 1) * CLASSES  # of the head

RULES: dict[str, Callable[[], nn.Module]] = {
    "meta-lstm": lambda: MetaLSTM(hidden=7, p=5.0),
    "lstm": lambda: LSTMOptimizer(sizes=(6, 5), p=4.0, scale=0.3),
    "lstm on raw gradients": lambda: LSTMOptimizer(sizes=(6,), p=None),
    "policy": lambda: Policy(NUMBERS, history=3, hidden=8, current=True),
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the waiting for the disk, which takes more time than all the rest."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def layer(rule: nn.Module, *, seed: int = 0) -> MbPA:
    """A layer with a full memory, and a rule that moves."""
    g = torch.Generator().manual_seed(seed)
    head, memory = nn.Linear(SIZE, CLASSES), EpisodicMemory(capacity=30, key_size=SIZE)
    memory.write(torch.randn(30, SIZE, generator=g), torch.randint(CLASSES, (30,), generator=g))
    for parameter in (*head.parameters(), *rule.parameters()):
        parameter.data.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    assert isinstance(rule, rules.Rule)
    return MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rule, steps=STEPS))


def queries(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, SIZE, generator=torch.Generator().manual_seed(9)).to(dtype)


@pytest.mark.parametrize("name", RULES)
def test_the_state_holds_the_rule(name: str) -> None:
    one, other = layer(RULES[name]()), layer(RULES[name](), seed=1)
    assert not torch.equal(one(queries()), other(queries()))
    state = one.state_dict()
    assert {f"rule.{key}" for key in RULES[name]().state_dict()} <= state.keys()
    other.load_state_dict(state)
    assert torch.equal(one(queries()), other(queries()))


def test_a_rule_that_is_not_learned_adds_nothing() -> None:
    head, memory = nn.Linear(SIZE, CLASSES), EpisodicMemory(capacity=3, key_size=SIZE)
    model = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    assert model.rule is None
    assert list(model.parameters()) == list(head.parameters())
    assert not any("rule" in key for key in model.state_dict())


@pytest.mark.parametrize("name", RULES)
def test_the_rule_moves_along(name: str) -> None:
    model = layer(rule := RULES[name]())
    before = model(queries())
    model.to(torch.float64)
    assert {p.dtype for p in (*model.parameters(), *rule.parameters())} == {torch.float64}
    after = model(queries(torch.float64))
    assert after.dtype == torch.float64
    torch.testing.assert_close(after, before.double(), rtol=1e-3, atol=1e-4)
    model.half()
    assert {p.dtype for p in (*model.parameters(), *rule.parameters())} == {torch.float16}
    assert model(queries(torch.float16)).isfinite().all()


def test_an_optimizer_of_the_layer_reaches_the_rule() -> None:
    model = layer(MetaLSTM())
    head, before = model.head, model(queries())
    assert isinstance(model.rule, MetaLSTM)
    assert list(model.parameters()) == [*head.parameters(), *model.rule.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert isinstance(head, nn.Linear)
    support = torch.randn(1, 5, SIZE)
    maml = MAML(head, rule=model.rule, steps=2, first_order=True)  # trains head and rule
    maml(support, torch.arange(5).unsqueeze(0) % CLASSES, support)[..., 0].sum().backward()
    head.zero_grad()
    optimizer.step()
    assert not torch.equal(model(queries()), before), "the layer predicts with the rule that was trained"


def test_copies_have_a_rule_of_their_own() -> None:
    model = layer(MetaLSTM())
    before, twin = model(queries()), copy.deepcopy(model)
    assert isinstance(twin.adaptation, LocalAdaptation)
    assert twin.adaptation.rule is twin.rule
    assert model.rule is not None
    for parameter in model.rule.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(queries()), before)
    assert not torch.equal(model(queries()), before)
    assert twin.rule is not None
    for parameter in twin.rule.parameters():
        parameter.data.zero_()
    assert torch.equal(twin(queries()), model(queries()))


@pytest.mark.parametrize("name", RULES)
def test_a_saved_layer_predicts_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Identity(), layer(RULES[name]()))
    model[1].rule.eval().requires_grad_(False)
    random_state = torch.get_rng_state()
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert isinstance(loaded, nn.Sequential)
    assert repr(loaded) == repr(model)
    assert torch.equal(loaded(queries()), model(queries()))
    assert torch.equal(loaded(queries()[:1]), model(queries()[:1]))
    rule = loaded[1].rule
    assert rule is loaded[1].adaptation.rule
    assert not any(part.training for part in rule.modules())
    assert not any(p.requires_grad for p in rule.parameters())
    assert loaded[1].head.weight.requires_grad
    save(loaded, tmp_path / "b")
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_saved_by_itself(name: str, tmp_path: Path) -> None:
    rule = RULES[name]()
    save(rule, tmp_path / "rule")
    loaded = load(tmp_path / "rule")
    assert {k: v for k, v in vars(loaded).items() if not k.startswith("_")} == {
        k: v for k, v in vars(rule).items() if not k.startswith("_")
    }
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), rule.parameters(), strict=True))


def test_two_layers_share_a_rule_again(tmp_path: Path) -> None:
    rule = MetaLSTM()
    model = nn.Sequential(layer(rule), layer(rule))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, nn.Sequential)
    assert loaded[0].rule is loaded[1].rule
    assert loaded[1].adaptation.rule is loaded[1].rule


class Net(nn.Module):
    """A network that recollect cannot build, with a layer inside."""

    def __init__(self, rule: nn.Module) -> None:
        super().__init__()
        self.layer = layer(rule)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_network_of_ones_own_gets_the_rule_that_others_share(tmp_path: Path) -> None:
    rule = MetaLSTM()
    model = nn.Sequential(layer(rule), Net(rule))
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"1": Net(MetaLSTM())})
    assert isinstance(loaded, nn.Sequential)
    assert loaded[1].layer.rule is loaded[0].rule
    assert torch.equal(loaded[1](queries()), model[1](queries()))
    for parameter in loaded[0].rule.parameters():
        parameter.data.zero_()
    assert not torch.equal(loaded[1](queries()), model[1](queries()))


def test_a_rule_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    head = nn.Linear(SIZE, CLASSES)
    model = layer(MetaSGD(head, 0.3))
    save(model, tmp_path / "model")
    with pytest.raises(SettingError, match=r"'rule' is a MetaSGD.*modules=\{'rule': "):
        load(tmp_path / "model")
    loaded = load(tmp_path / "model", modules={"rule": (mine := MetaSGD(head, 0.0))})
    assert isinstance(loaded, MbPA)
    assert loaded.rule is mine
    assert torch.equal(loaded(queries()), model(queries()))


@pytest.mark.parametrize("change", ["hook", "size"])
def test_a_rule_that_was_changed_is_asked_for(change: str, tmp_path: Path) -> None:
    rule = LSTMOptimizer(sizes=(6,))
    if change == "hook":
        rule.output.register_forward_hook(lambda module, inputs, outputs: 2 * outputs)
    else:
        rule.output = nn.Linear(6, 1, bias=False)
    save(rule, tmp_path / "rule")
    with pytest.raises(SettingError, match="'' is a LSTMOptimizer"):
        load(tmp_path / "rule")


def test_a_save_without_its_rule_is_refused(tmp_path: Path) -> None:
    save(layer(MetaLSTM()), tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    assert config["model"]["settings"]["adaptation"]["settings"]["rule"] == {"module": "rule"}
    del config["model"]["modules"]["rule"]
    config.pop("sha256")
    path.write_text(json.dumps(config | {"sha256": snapshot._seal(config)}))
    with pytest.raises(FormatError, match="the module at '' cannot be restored: 'rule'"):
        load(tmp_path / "model")
