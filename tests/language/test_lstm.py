"""``LSTMModel`` against the same network built from the layers of ``torch.nn``, each with weights of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from oracles.algorithm1 import mbpa_test
from oracles.bits import bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules
from recollect.errors import DeviceError, DtypeError, LabelError, SettingError, ShapeError
from recollect.language import lstm as module
from recollect.language.lstm import LSTMModel, State
from recollect.language.model import LanguageModel

Rng = Callable[[], AbstractContextManager[None]]
DOUBLE = torch.float64
WORDS, HIDDEN, EMBEDDING = 11, 7, 5
DROPOUTS: Any = {"input_dropout": 0.4, "state_dropout": 0.25, "output_dropout": 0.5}
BOTH = pytest.mark.parametrize("embedding", [EMBEDDING, HIDDEN], ids=["projection", "no projection"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(embedding: int = EMBEDDING, *, dtype: torch.dtype = DOUBLE, **dropouts: float) -> LSTMModel:
    lm = LSTMModel(WORDS, hidden_size=HIDDEN, embedding_size=embedding, generator=seeded(), **dropouts).to(dtype)
    with torch.no_grad():
        for bias in (lm.output.bias, lm.lstm.get_parameter("bias_hh_l0")):
            bias.normal_(generator=seeded(1))
    return lm


def text(batch: int = 3, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, WORDS, (batch, length + 1), generator=seeded(seed))
    return rows[:, :-1], rows[:, 1:]


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Untied(nn.Module):
    """The same network, literally: nothing is shared, and dropout masks are given."""

    def __init__(self, lm: LSTMModel) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(lm.output.weight.detach().clone(), freeze=False)
        self.lstm = nn.LSTM(lm.embedding_size, lm.hidden_size, dtype=DOUBLE)
        self.projection = nn.Linear(lm.hidden_size, lm.embedding_size, bias=False, dtype=DOUBLE)
        self.output = nn.Linear(lm.embedding_size, WORDS, dtype=DOUBLE)
        self.lstm.load_state_dict(lm.lstm.state_dict())
        self.output.load_state_dict(lm.output.state_dict())
        self.projects = lm.projection is not None
        if lm.projection is not None:
            self.projection.load_state_dict(lm.projection.state_dict())

    def loss(self, tokens: Tensor, targets: Tensor, masks: list[Tensor]) -> Tensor:
        """Words one by one, so that the state can be dropped: the mask of the state is one for all of them."""
        on_words, on_state, on_output, on_projected = masks
        hidden = cell = torch.zeros(1, len(tokens), HIDDEN, dtype=DOUBLE)
        logits = []
        for t, words in enumerate(tokens.mT):
            dropped = self.embedding(words) * on_words[t]
            outputs, (hidden, cell) = self.lstm(dropped.unsqueeze(0), (hidden * on_state, cell))
            outputs = outputs.squeeze(0) * on_output[t]
            if self.projects:
                outputs = self.projection(outputs) * on_projected[t]
            logits.append(self.output(outputs))
        return cross_entropy(torch.stack(logits, 1).flatten(0, 1), targets.flatten())


def ones(embedding: int, batch: int, length: int) -> list[Tensor]:
    shapes = ((length, batch, embedding), (batch, HIDDEN), (length, batch, HIDDEN), (length, batch, embedding))
    return [torch.ones(shape, dtype=DOUBLE) for shape in shapes]


# The loss and its gradient --------------------------------------------------------------------------------------------


@BOTH
def test_loss_is_the_cross_entropy_of_the_logits(embedding: int) -> None:
    lm = model(embedding, **DROPOUTS).eval()
    tokens, targets = text()
    logits, last = lm(tokens)
    loss, state = lm.loss(tokens, targets)
    close(loss, cross_entropy(logits.flatten(0, 1), targets.flatten()))
    close(tuple(state), tuple(last))
    close(lm.decoder(lm.hidden(tokens)[0]), logits)
    close(lm.output(lm.inputs(lm.hidden(tokens)[0])), logits)
    close(loss, Untied(lm).loss(tokens, targets, ones(embedding, *tokens.shape)))


@BOTH
def test_with_and_without_gradient_it_is_the_same(embedding: int) -> None:
    lm = model(embedding)
    tokens, targets = text()
    state = State(*torch.randn(2, 3, HIDDEN, generator=seeded(), dtype=DOUBLE))
    for function in (lm.hidden, lm, lambda tokens, state: lm.loss(tokens, targets, state)):
        one, after = function(tokens, state)
        with torch.no_grad():
            other, then = function(tokens, state)
        close((one.detach(), *after), (other, *then))


@BOTH
def test_the_tied_gradient_is_the_sum_of_both(embedding: int) -> None:
    lm = model(embedding)
    untied = Untied(lm)
    tokens, targets = text()
    lm.loss(tokens, targets)[0].backward()
    untied.loss(tokens, targets, ones(embedding, *tokens.shape)).backward()
    both = untied.embedding.weight.grad, untied.output.weight.grad
    assert both[0] is not None
    assert both[1] is not None
    close(lm.output.weight.grad, both[0] + both[1])
    close(lm.output.bias.grad, untied.output.bias.grad)
    for name, weight in lm.lstm.named_parameters():
        close(weight.grad, untied.lstm.get_parameter(name).grad)
    if lm.projection is not None:
        close(lm.projection.weight.grad, untied.projection.weight.grad)


def test_gradients_through_hidden_and_decoder_are_those_of_the_loss() -> None:
    lm = model()
    tokens, targets = text()
    weights = list(lm.parameters())
    ours = torch.autograd.grad(lm.loss(tokens, targets)[0], weights)
    theirs = torch.autograd.grad(cross_entropy(lm(tokens)[0].flatten(0, 1), targets.flatten()), weights)
    close(ours, theirs)


@pytest.mark.parametrize("cuts", [(2,), (1, 4), (1, 2, 3, 4, 5)])
def test_segment_by_segment(cuts: tuple[int, ...]) -> None:
    lm = model(**DROPOUTS).eval()
    tokens, targets = text()
    whole, last = lm.loss(tokens, targets)
    logits, _ = lm(tokens)
    states: list[State | None] = [None, None]
    total, parts = 0.0, []
    for start, end in zip((0, *cuts), (*cuts, 6), strict=True):
        part = slice(start, end)
        loss, states[0] = lm.loss(tokens[:, part], targets[:, part], states[0])
        some, states[1] = lm(tokens[:, part], states[1])
        total += loss.item() * (end - start) / 6
        parts.append(some)
    assert total == pytest.approx(whole.item(), rel=1e-12)
    close(torch.cat(parts, 1), logits)
    for state in states:
        assert state is not None
        close(tuple(state), tuple(last))


def test_texts_do_not_mix() -> None:
    lm = model()
    tokens, _ = text()
    for row, logits in zip(tokens, lm(tokens)[0], strict=True):
        close(lm(row.unsqueeze(0))[0][0], logits)


def test_the_past_alone_counts() -> None:
    lm = model()
    tokens, _ = text()
    other = tokens.clone()
    other[:, 3:] = (other[:, 3:] + 1) % WORDS
    before, after = lm(tokens)[0], lm(other)[0]
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3:] != after[:, 3:]).all()


def test_a_state_has_no_gradient_and_keeps_nothing_else_alive() -> None:
    lm = model()
    tokens, targets = text()
    for _, state in (lm.loss(tokens, targets), lm.hidden(tokens)):
        for part in state:
            assert not part.requires_grad
            assert part.untyped_storage().nbytes() == part.numel() * part.itemsize


def test_autocast_is_close_and_the_state_stays_as_wide_as_the_weights() -> None:
    lm = model(dtype=torch.float32)
    tokens, targets = text()
    exact, _ = lm.loss(tokens, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, state = lm.loss(tokens, targets)
        with torch.no_grad():
            _, narrow = lm.hidden(tokens)
        assert narrow.cell.dtype == torch.bfloat16
        again, after = lm.loss(tokens, targets, narrow)
    again.backward()
    assert {loss.dtype, again.dtype, *(part.dtype for part in (*state, *after))} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lm.parameters())
    assert loss.item() == pytest.approx(exact.item(), rel=0.01)


# Dropout --------------------------------------------------------------------------------------------------------------


@BOTH
def test_dropout_masks(embedding: int) -> None:
    """One for the state in all steps, a fresh one for each word and unit elsewhere, drawn in this order."""
    lm = model(embedding, **DROPOUTS)
    tokens, targets = text()
    loss, _ = lm.loss(tokens, targets, generator=(g := seeded(3)))
    draws = seeded(3)
    masks = ones(embedding, *tokens.shape)
    for mask, dropout in zip(masks[: 3 + (lm.projection is not None)], (0.4, 0.25, 0.5, 0.5), strict=False):
        mask.bernoulli_(1 - dropout, generator=draws).div_(1 - dropout)
    close(loss, Untied(lm).loss(tokens, targets, masks))
    assert torch.equal(g.get_state(), draws.get_state()), "more was drawn than the masks"


def test_dropout_leaves_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into the LSTM, its state, the projection and the softmax layer, were all ones there without it."""
    dropped = {}

    def linear(words: Tensor, weight: Tensor) -> Tensor:
        dropped["words"] = words
        return words.new_zeros(*words.shape[:2], len(weight))

    def unroll(gates: Tensor, hidden: Tensor, cell: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        dropped["state"] = mask
        return hidden.new_ones(*gates.shape[:2], hidden.shape[1]), cell

    def loss(inputs: Tensor, *_: Tensor) -> Tensor:
        dropped["inputs"] = inputs
        return inputs.new_zeros(())

    for name, function in (("linear", linear), ("unroll", unroll), ("linear_cross_entropy", loss)):
        monkeypatch.setattr(module, name, function)
    lm = LSTMModel(4, hidden_size=40, embedding_size=30, generator=seeded(), **DROPOUTS)
    assert lm.projection is not None
    lm.projection.register_forward_pre_hook(lambda _, given: dropped.update(outputs=given[0]))
    lm.projection.register_forward_hook(lambda _, given, outputs: outputs.new_ones(outputs.shape))
    nn.init.ones_(lm.output.weight)
    tokens = torch.zeros(64, 20, dtype=torch.int64)
    lm.loss(tokens, tokens, generator=seeded())
    for name, dropout in {"words": 0.4, "state": 0.25, "outputs": 0.5, "inputs": 0.5}.items():
        there = dropped[name].detach()
        count = there.numel()
        close(there.unique(), torch.tensor([0.0, 1 / (1 - dropout)]))
        assert abs(float(there.mean()) - 1) < 5 * (dropout / (1 - dropout) / count) ** 0.5
    words = dropped["words"]
    assert len(words.flatten(0, 1).unique(dim=0)) == words.shape[0] * words.shape[1], "two words share a mask"


def test_a_generator_makes_the_loss_reproducible() -> None:
    lm = model(**DROPOUTS)
    losses = [lm.loss(*text(), generator=seeded(seed))[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_no_dropout_outside_of_the_loss_in_training_mode() -> None:
    lm, plain = model(**DROPOUTS), model()
    tokens, targets = text()
    assert torch.equal(lm(tokens)[0], plain(tokens)[0])
    g = seeded()
    before = g.get_state()
    assert torch.equal(lm.eval().loss(tokens, targets, generator=g)[0], plain.loss(tokens, targets)[0])
    assert torch.equal(g.get_state(), before)


def test_the_global_random_state_stays(rng_untouched: Rng) -> None:
    with rng_untouched():
        lm = LSTMModel(WORDS, hidden_size=HIDDEN, embedding_size=EMBEDDING, generator=seeded(), **DROPOUTS)
        tokens, targets = text()
        lm.loss(tokens, targets, generator=seeded())[0].backward()
        lm.hidden(tokens)
        with torch.no_grad():
            lm(tokens)
        lm.eval().loss(tokens, targets)


# Initial weights and sizes --------------------------------------------------------------------------------------------


def test_initial_weights() -> None:
    lm = LSTMModel(400, hidden_size=300, embedding_size=200, generator=seeded())
    weights = {name.removesuffix("_l0"): weight.detach() for name, weight in lm.lstm.named_parameters()}
    for matrix in (lm.output.weight.detach(), weights["weight_ih"], weights["weight_hh"]):
        scaled = matrix * matrix.shape[1] ** 0.5
        assert float(scaled.var()) == pytest.approx(0.7737, rel=0.02), "a normal distribution cut off at two deviations"
        assert abs(float(scaled.mean())) < 0.01
        assert 1.99 < float(scaled.abs().max()) <= 2.0 + 1e-6
    assert lm.projection is not None
    torch.testing.assert_close(lm.projection.weight @ lm.projection.weight.mT, torch.eye(200), rtol=0, atol=1e-5)
    forget = torch.zeros(4, 300)
    forget[1] = 1.0
    assert torch.equal(weights["bias_ih"] + weights["bias_hh"], forget.flatten())
    assert not lm.output.bias.any()


def test_a_generator_makes_the_weights_reproducible() -> None:
    def weights(seed: int) -> Any:
        return bits(LSTMModel(9, hidden_size=4, embedding_size=3, generator=seeded(seed)).state_dict())

    assert weights(0) == weights(0) != weights(1)


@pytest.mark.parametrize(
    ("words", "hidden", "embedding", "published"), [(10_001, 1194, 268, 9_997_549), (33_279, 1853, 241, 24_028_231)]
)
def test_published_sizes(
    words: int, hidden: int, embedding: int, published: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published numbers have one bias for each gate and unit. ``nn.LSTM`` has two, which are only ever added."""
    monkeypatch.setattr(LSTMModel, "_initialize", lambda self, generator: None)  # it takes seconds
    lm = LSTMModel(words, hidden_size=hidden, embedding_size=embedding, generator=seeded())
    assert sum(p.numel() for p in lm.parameters()) == published + 4 * hidden
    assert (lm.vocabulary, lm.hidden_size, lm.embedding_size) == (words, hidden, embedding)


def test_the_matrix_is_one() -> None:
    lm = model()
    assert sorted(lm.state_dict()) == sorted(
        ["decoder.0.weight", "decoder.1.bias", "decoder.1.weight"]
        + [f"lstm.{kind}_{side}_l0" for kind in ("bias", "weight") for side in ("hh", "ih")]
    )
    assert isinstance(lm, LanguageModel)
    assert (lm.projection, lm.output) == (lm.decoder[0], lm.decoder[1])
    assert model(HIDDEN).projection is None


# MbPA -----------------------------------------------------------------------------------------------------------------


def test_its_decoder_adapts_and_stays_as_it_is() -> None:
    lm = model().eval()
    tokens, targets = text(length=20)
    with torch.no_grad():
        keys = lm.hidden(tokens)[0].flatten(0, 1)
    memory = EpisodicMemory(capacity=100, key_size=HIDDEN, key_dtype=DOUBLE)
    memory.write(keys, targets.flatten())
    adaptation = LocalAdaptation(rules.sgd(0.1), steps=1, parameters=("1",), keep_base=True)
    predictor = MbPA(lm.decoder, memory, neighbors=8, adaptation=adaptation)
    before = bits(lm.state_dict())
    queries = lm.hidden(text(1, 4, seed=5)[0])[0]
    predicted = predictor(queries)
    assert bits(lm.state_dict()) == before
    assert all(p.grad is None for p in lm.parameters())
    assert predicted.shape == (1, 4, WORDS)
    assert not torch.allclose(predicted, lm.decoder(queries).log_softmax(-1))
    for query, ours in zip(queries[0].detach(), predicted[0], strict=True):
        outputs = mbpa_test(
            *(lm.decoder, keys, targets.flatten(), query),
            neighbors=8,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=0.1),
            steps=1,
            adapts=lambda name: name.startswith("1."),
        )
        close(ours, outputs.log_softmax(-1))


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-1, WORDS, 10**9])
def test_words_that_are_not_in_the_vocabulary(wrong: int) -> None:
    lm = model()
    tokens, targets = text()
    bad = tokens.clone()
    bad[1, 2] = wrong
    words = rf"numbered from 0 to {WORDS - 1} in this model, got {wrong}\. Was the text read with another vocabulary"
    calls = (lm.hidden, lm, lambda bad: lm.loss(bad, targets), lambda bad: lm.loss(tokens, bad))
    for call in calls:
        with pytest.raises(LabelError, match=words):
            call(bad)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_words_may_be_narrow(dtype: torch.dtype) -> None:
    lm = model()
    tokens, targets = text()
    assert torch.equal(lm(tokens.to(dtype))[0], lm(tokens)[0])
    assert torch.equal(lm.loss(tokens.to(dtype), targets.to(dtype))[0], lm.loss(tokens, targets)[0])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        ([[1, 2]], DtypeError, "tokens must be a tensor, got list"),
        (torch.tensor([1, 2]), ShapeError, r"tokens must have shape \(texts, words\).*got \(2,\)"),
        (torch.zeros(2, 0, dtype=torch.int64), ShapeError, r"at least one word, got \(2, 0\)"),
        (torch.zeros(0, 2, dtype=torch.int64), ShapeError, r"at least one word, got \(0, 2\)"),
        (torch.tensor([[1.0, 2.0]]), DtypeError, "whole numbers, got torch.float32"),
        (torch.tensor([[True, False]]), DtypeError, "whole numbers, got torch.bool"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), DeviceError, "tokens are on meta, the model is on cpu"),
    ],
    ids=str,
)
def test_what_no_text_is(tokens: Any, error: type[Exception], words: str) -> None:
    lm = model()
    for call in (lm.hidden, lm, lambda tokens: lm.loss(tokens, tokens)):
        with pytest.raises(error, match=words):
            call(tokens)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("shape", [(3, 5), (1, 6), (6, 3)])
def test_each_word_needs_a_target(shape: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match=r"each word needs a target: got shapes \(3, 6\) and"):
        model().loss(text()[0], torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(("batch", "size"), [(1, HIDDEN), (4, HIDDEN), (3, HIDDEN + 1)])
def test_a_state_of_other_texts(batch: int, size: int) -> None:
    lm = model()
    tokens, targets = text()
    state = State(*torch.zeros(2, batch, size, dtype=DOUBLE))
    for call in (lm.hidden, lm, lambda tokens, state: lm.loss(tokens, targets, state)):
        with pytest.raises(ShapeError, match=rf"state of 3 texts .* shape \(3, {HIDDEN}\).*another batch"):
            call(tokens, state)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", ["vocabulary", "hidden_size", "embedding_size"])
@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3", None])
def test_sizes(name: str, value: Any) -> None:
    sizes: dict[str, Any] = {"vocabulary": 9, "hidden_size": 4, "embedding_size": 3, name: value}
    with pytest.raises(SettingError, match=f"{name} must be a whole number above 0, got {value!r}"):
        LSTMModel(**sizes)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", DROPOUTS)
@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, float("nan"), float("inf"), "0.5", None])
def test_dropouts(name: str, value: Any) -> None:
    settings: dict[str, Any] = {name: value}
    with pytest.raises(SettingError, match=f"{name} must be"):
        LSTMModel(9, hidden_size=4, embedding_size=3, **settings)
