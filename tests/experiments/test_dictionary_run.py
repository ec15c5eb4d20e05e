"""The comparison of embeddings: its streams, what each model trains, and a run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recollect.data import Dataset
from recollect.experiments import dictionary
from recollect.experiments.dictionary import Data, Dictionary, Scale, Settings, run
from recollect.experiments.runner import Progress, Run

TINY = Scale(
    data="digits",
    examples=50,
    valid=40,
    test=40,
    batch=5,
    hidden=8,
    key=4,
    neighbors=3,
    steps=1,
    rates=(1e-2,),
    rows=(0.0, 1e-2),
    local_rates=(0.1,),
    seeds=(0, 1),
)
SETTINGS = Settings(rate=1e-2, rows=1e-2, local=0.1)


@pytest.mark.parametrize("stream", ["new classes", "shuffled"])
def test_a_stream_shows_each_example_once(stream: str) -> None:
    data = dictionary._data(TINY)
    g = torch.Generator().manual_seed(0)
    parts = list(dictionary._parts(TINY, data.train, data.test, stream, g))
    inputs = torch.cat([part.inputs for part, _ in parts])
    assert [len(part.labels) for part, _ in parts] == [10] * 5
    assert len(inputs.unique(dim=0)) == 50
    for number, (part, judged) in enumerate(parts):
        classes = range(2 * number, 2 * number + 2) if stream == "new classes" else range(10)
        assert set(part.labels.tolist()) <= set(classes)
        seen = classes.stop
        assert torch.equal(judged.labels.sort().values, data.test.labels[data.test.labels < seen].sort().values)
    held = torch.cat([data.valid.inputs, data.test.inputs])
    assert not (inputs.unsqueeze(1) == held).all(-1).any()


@pytest.mark.parametrize("model", dictionary._MODELS)
def test_what_a_batch_trains(model: str) -> None:
    data, g = dictionary._data(TINY), torch.Generator().manual_seed(0)
    through = model.startswith("dictionary")
    make = dictionary._through_memory if through else dictionary._beside_memory
    learner = make(TINY, model, SETTINGS, 64, g)
    first, second, third = (data.train.take(slice(10 * i, 10 * i + 10)) for i in range(3))
    learner.learn(first)
    learner.learn(second)
    before = {name: tensor.detach().clone() for name, tensor in learner.predictor.named_parameters()}
    weights = [tensor.detach().clone() for tensor in learner.embedding.parameters()]
    learner.learn(third)
    moved = any(not torch.equal(a, b) for a, b in zip(weights, learner.embedding.parameters(), strict=True))
    assert moved == (model != "vote, untrained embedding")
    for name, tensor in learner.predictor.named_parameters():
        known = slice(20 if name.startswith("memory.") else None)  # the third batch has filled the rows behind
        assert not torch.equal(tensor[known], before[name][known]), name
    assert through == any(name.startswith("memory.") for name in before)


def test_a_label_without_neighbors_has_a_finite_loss() -> None:
    predictions = torch.tensor([[0.0, -torch.inf]]).requires_grad_()
    loss = dictionary._loss(predictions, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(-torch.tensor(0.001).log().item())  # a tenth of a hundredth
    assert predictions.grad is not None
    assert predictions.grad.isfinite().all()


def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "SCALES", {"smoke": TINY})
    table = run(Dictionary(out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len([row for row in rows if row["part"] == "test"]) == 2 * 6 * 2
    assert len([row for row in rows if row["part"] == "valid"]) == 2 * (2 * 2 + 4)
    assert all(len(row["accuracy"]) == 5 for row in rows if row["part"] == "test")
    assert all(0 <= accuracy <= 100 for row in rows if row["part"] == "test" for accuracy in row["accuracy"])
    assert len(table.splitlines()) == 4 + 2 + 6
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    kept = (tmp_path / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text("".join(kept.splitlines(keepends=True)[:-3]))
    assert run(Dictionary(out=tmp_path)) == table
    assert (tmp_path / "results.jsonl").read_text() == kept


def _with_strange_test_labels() -> Data:
    """Test examples with labels that nothing predicts: accuracy is 0 on them, and only on them."""
    data = dictionary._data(TINY)
    return data._replace(test=Dataset(data.test.inputs, torch.full_like(data.test.labels, 99)))


def test_settings_are_chosen_on_validation_data(tmp_path: Path) -> None:
    data, record, scale = _with_strange_test_labels(), Run(tmp_path, {}), replace(TINY, rates=(1e-3, 1e-2))
    with Progress(1, "") as progress:
        best = dictionary._choose(record, scale, data, "shuffled", "vote", progress)
    wanted = {
        settings: dictionary._accuracies(scale, data.train, data.valid, "shuffled", "vote", settings, 2)[-1]
        for settings in dictionary._grid(scale, "vote")
    }
    assert [row["accuracy"] for row in record.rows] == list(wanted.values())
    assert wanted[best] == max(wanted.values()) > 0


def test_test_data_are_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dictionary, "_STREAMS", {"shuffled": "All classes, shuffled"})
    monkeypatch.setattr(dictionary, "SCALES", {"smoke": replace(TINY, rows=(1e-2,))})
    data = _with_strange_test_labels()
    monkeypatch.setattr(dictionary, "_data", lambda scale: data)
    run(Dictionary(out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["accuracy"] for row in rows if row["part"] == "test"] == [[0.0] * 5] * 6 * 2


def test_the_interval_is_that_of_students_t(tmp_path: Path) -> None:
    record = Run(tmp_path, {})
    for seed, value in enumerate((1.0, 2.0, 6.0)):
        record.add(part="test", stream="s", model="vote", seed=seed, rate=0.003, accuracy=[value])
    mean, error = dictionary._summary(record, "s", "vote")
    assert mean == [3.0]
    assert error[0] == pytest.approx(7**0.5 / 3**0.5)
    wanted = f"3.0 +- {4.303 * error[0]:.1f} (0.003)"
    assert dictionary._cell(record, replace(TINY, seeds=(0, 1, 2)), "s", "vote") == wanted
