"""Characters by HyperLSTM: the texts, the networks, bits per character, and a run that is stopped."""

import json
import math
from pathlib import Path

import pytest
import torch
from stopping import rows_of_a_stopped_run
from torch import Tensor, nn

from recollect.data import Corpus
from recollect.experiments.meta import hyperlstm
from recollect.experiments.meta.character_models import LSTM, CharacterModel, bits_per_character, rows
from recollect.experiments.meta.hyperlstm import PAPER, SCALES, HyperLstmRun, Line, Scale, characters, run
from recollect.language.lstm import State

KINDS = ("lstm", "ln-lstm", "hyperlstm", "ln-hyperlstm")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    texts = (" the cat sat \n on <unk> mats \n" * 20, " the mat \n\n" * 9, " a cat on a mat \n" * 5)
    for name, text in zip(Corpus._fields, texts, strict=True):
        (tmp_path / name).write_text(text)
    return Corpus(*(tmp_path / name for name in Corpus._fields))


@pytest.fixture
def tiny(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> Scale:
    """A text of a few words, and a run of seconds."""
    monkeypatch.setattr(hyperlstm, "penn_treebank", lambda: corpus)
    lines = (Line("ln-hyperlstm", 5, 5), Line("lstm", 6, 4))
    sizes = {"hyper": 3, "embedding": 2, "batch": 3, "length": 70, "every": 2, "look": 30, "rows": 4}
    scale = Scale(lines, dropout=0.3, last_rate=0.0, **sizes)
    monkeypatch.setattr(hyperlstm, "SCALES", {"smoke": scale})
    return scale


def made(kind: str, *, symbols: int = 7, units: int = 5, dropout: float = 0.0) -> CharacterModel:
    g = torch.Generator().manual_seed(0)
    sizes = {"hyper": 3, "embedding": 2}
    model = CharacterModel(kind, symbols, units, **sizes, dropout=dropout, generator=g).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=g))
    return model


def text(length: int) -> Tensor:
    return torch.randint(7, (length,), generator=torch.Generator().manual_seed(1))


def test_characters(corpus: Corpus) -> None:
    found = characters(corpus)
    symbols = "\n <>acehkmnostu"
    assert found.symbols == len(symbols)
    assert "".join(symbols[number] for number in found.train) == "the cat sat\non <unk> mats\n" * 20
    assert "".join(symbols[number] for number in found.valid) == "the mat\n\n" * 9
    assert "".join(symbols[number] for number in characters(corpus, 9).test) == "a cat on "
    assert characters(corpus, 9).symbols == len(symbols)


@pytest.mark.parametrize(("kind", "millions"), [("lstm", "4.25"), ("hyperlstm", "4.91")])
def test_the_sizes_of_the_paper(kind: str, millions: str) -> None:
    g = torch.Generator().manual_seed(0)
    scale = SCALES["paper"]
    sizes = {"hyper": scale.hyper, "embedding": scale.embedding}
    model = CharacterModel(kind, 50, 1000, **sizes, dropout=scale.dropout, generator=g)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"{size / 1e6:.2f}" == millions
    assert {line.kind for line in scale.lines} == PAPER.keys()
    assert {(line.units, scale.batch, scale.length, scale.rate, scale.clip) for line in scale.lines} == {
        (1000, 128, 100, 1e-3, 1.0)
    }


def by_hand(lstm: LSTM, inputs: Tensor, masks: Tensor) -> list[Tensor]:
    """The outputs for one sequence, a gate at a time."""
    weight_ih, weight_hh, bias, _ = lstm.plain.all_weights[0]
    size = len(bias) // 4
    hidden = cell = torch.zeros(size, dtype=torch.float64)

    def normed(values: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return (values - values.mean()) / (values.var(correction=0) + 1e-3).sqrt() * scale + shift

    outputs = []
    for x, mask in zip(inputs, masks, strict=True):
        gates = []
        for number in range(4):
            part = slice(number * size, (number + 1) * size)
            gate = weight_ih[part] @ x + weight_hh[part] @ hidden
            gates.append(gate + bias[part] if lstm.scale is None else normed(gate, lstm.scale[number], bias[part]))
        enter, forget, new, leave = gates
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new) * mask
        norm = lstm.cell_norm
        shown = normed(cell, norm.weight, norm.bias) if isinstance(norm, nn.LayerNorm) else cell
        hidden = torch.sigmoid(leave) * torch.tanh(shown)
        outputs.append(hidden)
    return outputs


@pytest.mark.parametrize("kind", ["lstm", "ln-lstm"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_lstm_step_by_step(kind: str, dropout: float) -> None:
    lstm = made(kind, dropout=dropout).lstm
    assert isinstance(lstm, LSTM)
    inputs = torch.randn(2, 6, 7, dtype=torch.float64)
    outputs, state = lstm(inputs, lstm.initial(2), generator=torch.Generator().manual_seed(5))
    masks = torch.ones(6, 2, 5, dtype=torch.float64)
    if dropout:
        masks.bernoulli_(1 - dropout, generator=torch.Generator().manual_seed(5)).div_(1 - dropout)
        assert len(masks.unique()) == 2
    for row in range(2):
        torch.testing.assert_close(outputs[row], torch.stack(by_hand(lstm, inputs[row], masks[:, row])))
    torch.testing.assert_close(state.hidden, outputs[:, -1])
    lstm.eval()
    outputs, _ = lstm(inputs, lstm.initial(2))
    first, between = lstm(inputs[:, :4], lstm.initial(2))
    second, _ = lstm(inputs[:, 4:], between)
    torch.testing.assert_close(torch.cat([first, second], 1), outputs)
    assert isinstance(between, State)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "length"), [(1, 100), (3, 4), (4, 1)])
def test_bits_per_character_by_a_literal_loop(kind: str, count: int, length: int) -> None:
    model, some = made(kind, dropout=0.5), text(30)
    found = bits_per_character(model, some, count=count, length=length)
    assert model.training
    model.eval()
    size = math.ceil(29 / count)
    bits = []
    for start in range(0, 29, size):
        state = model.initial(1)
        for place in range(start, min(start + size, 29)):
            logits, state = model(some[place].view(1, 1), state)
            bits.append(-math.log2(logits[0, 0].detach().softmax(0)[some[place + 1]]))
    assert len(bits) == 29
    assert found == pytest.approx(sum(bits) / 29, abs=1e-9)


def test_rows_hold_each_character_once() -> None:
    some = text(24)
    cut = rows(some, 5)
    assert cut.characters.shape == (5, 5)
    assert cut.counted.sum() == 23
    assert torch.equal(cut.targets.flatten()[:23], some[1:])
    assert torch.equal(cut.characters.flatten()[:23], some[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_goes_back_into_the_batch_before(kind: str) -> None:
    model = made(kind)
    _, state = model(text(6).view(2, 3), model.initial(2))
    assert not any(part.requires_grad for part in state)
    model(text(6).view(2, 3), state)[0].sum().backward()


def test_a_batch_of_training(tiny: Scale, tmp_path: Path) -> None:
    """The texts go on from batch to batch with their states, and begin again after 3 x 2 x 70 characters of 519."""
    run(HyperLstmRun(out=tmp_path / "run"))
    row = next(row for row in read(tmp_path / "run") if row["part"] == "test" and row["line"]["kind"] == "lstm")
    study = hyperlstm._Study(hyperlstm.Run(tmp_path / "other", {}), tiny)
    texts = study._texts
    g = torch.Generator().manual_seed(0)
    model = study._model(tiny.lines[1], g)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    side, targets, _ = rows(texts.train, 3)
    state = model.initial(3)
    for number in range(4):
        start = 70 * (number % 2)
        if start == 0:
            state = model.initial(3)
        logits, state = model(side[:, start : start + 70], state, generator=g)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, start : start + 70].flatten())
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * number / 4)) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert norm < 1, "clipping would change nothing here"
        optimizer.step()
    assert row["valid"] == pytest.approx(bits_per_character(model, texts.valid, count=4), abs=1e-4)
    assert row["test"] == pytest.approx(bits_per_character(model, texts.test, count=4), abs=1e-4)


def read(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_run(tiny: Scale, tmp_path: Path) -> None:
    table = run(HyperLstmRun(out=tmp_path / "run"))
    assert table == (tmp_path / "run" / "table.md").read_text()
    found = [(row["part"], row["line"]["kind"], row.get("batches")) for row in read(tmp_path / "run")]
    assert found == [
        (part, kind, batches)
        for kind in ("ln-hyperlstm", "lstm")
        for part, batches in (("learning", 2), ("learning", 4), ("test", None))
    ]
    assert "| layer-norm HyperLSTM | 5 |" in table
    assert "| 1.250 |" in table
    assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert run(HyperLstmRun(out=tmp_path / "run")) == table
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


def test_a_stopped_run_gives_the_same_rows(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the time, which is measured."""
    monkeypatch.setattr("recollect.experiments.meta.training._SECONDS", -1.0)  # every batch is saved
    texts = rows_of_a_stopped_run(run, HyperLstmRun, tmp_path)
    whole, stopped = ([json.loads(line) for line in found.splitlines()] for found in texts)
    for row in (*whole, *stopped):
        assert row.pop("seconds", 1.0) > 0
    assert stopped == whole
