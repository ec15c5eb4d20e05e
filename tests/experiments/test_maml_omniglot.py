"""MAML on Omniglot: the networks, the tasks, and a run that is stopped."""

import json
from pathlib import Path

import pytest
import torch
from micro_drawings import use_marked_drawings, use_random_drawings
from stopping import rows_of_a_stopped_run
from torch import nn

from recollect.experiments.meta import maml_omniglot
from recollect.experiments.meta.drawings import TEST, TRAIN, VALID
from recollect.experiments.meta.maml_omniglot import PAPER, SCALES, Line, MamlOmniglot, Scale, network, run
from recollect.experiments.runner import Run
from recollect.meta import MAML


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Scale:
    """Random drawings of a few pixels, and a run of seconds."""
    use_random_drawings(monkeypatch, 6)
    monkeypatch.setattr(maml_omniglot, "_SIDE", 6)
    lines = (Line("linear", 4, tasks=2), Line("convolutions", 4, tasks=2, first_order=True))
    scale = Scale(lines, every=2, valid=3, test=5)
    monkeypatch.setattr(maml_omniglot, "SCALES", {"smoke": scale})
    return scale


@pytest.mark.parametrize(("name", "parameters"), [("convolutions", 112_261), ("linear", 247_621)])
def test_the_networks_of_the_paper(name: str, parameters: int) -> None:
    net = network(name, 5, generator=torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 5)
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(norms) == 4
    again = network(name, 5, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_the_settings_of_the_paper() -> None:
    lines = {(line.network, line.ways, line.shots): line for line in SCALES["paper"].lines}
    assert PAPER.keys() <= lines.keys()
    assert {(line.ways, line.tasks, line.steps, line.rate) for line in lines.values()} == {
        (5, 32, 1, 0.4),
        (20, 16, 5, 0.1),
    }
    assert {line.iterations for line in lines.values()} == {60_000}
    assert SCALES["paper"].last_outer == SCALES["paper"].outer, "the paper's rate does not fall"


def test_a_run(tiny: Scale, tmp_path: Path) -> None:
    table = run(MamlOmniglot(out=tmp_path))
    assert table == (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["part"], row["line"]["network"], row.get("iterations")) for row in rows] == [
        (part, name, iterations)
        for name in ("linear", "convolutions")
        for part, iterations in (("learning", 2), ("learning", 4), ("test", None))
    ]
    assert all(0 <= row["accuracy"] <= 100 for row in rows)
    assert "| 5 ways, 1 shot, no convolutions |" in table
    assert "| 89.7 +- 1.1 |" in table
    assert "98.7" not in table, "the paper has no number for first order here"
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(MamlOmniglot(out=tmp_path)) == table
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_stopped_run_gives_the_same_rows(tiny: Scale, tmp_path: Path) -> None:
    whole, stopped = rows_of_a_stopped_run(run, MamlOmniglot, tmp_path)
    assert stopped == whole


def test_the_accuracy_of_each_task(tiny: Scale, tmp_path: Path) -> None:
    study, line = maml_omniglot._Study(Run(tmp_path, {}), tiny), Line("linear", shots=2, test_steps=2)
    net = network("linear", 5, generator=torch.Generator().manual_seed(0))
    maml = MAML(net, rule=maml_omniglot.rules.sgd(0.4))
    found = study._right(maml, line, 2, 7)
    some = study._draw(line, 2, 7, generator=torch.Generator().manual_seed(2))
    assert set(some.classes.flatten().tolist()) <= set(study._data.splits[2].tolist())
    assert some.queries.shape == (7, 10, 1, 6, 6)
    drawn = study._data.pixels[some.classes[0, 0]] / 255
    assert (drawn == some.support[0, 0]).flatten(1).all(1).any(), "what is judged is not turned"
    for task in range(7):
        outputs = maml(some.support[[task]], some.support_labels[[task]], some.queries[[task]], steps=2)[0]
        right = [int(row.argmax()) == int(label) for row, label in zip(outputs, some.query_labels[task], strict=True)]
        assert found[task] == pytest.approx(sum(right) / 10)


def test_only_the_test_sees_its_characters(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_marked_drawings(monkeypatch, maml_omniglot, "episodes", 6)
    study = maml_omniglot._Study(Run(tmp_path, {}), tiny)
    study.measure(tiny.lines[0])
    assert log.splits == [*[TRAIN, TRAIN, VALID, "learning"] * 2, TEST, "test"]


def test_turned_characters_are_for_training_alone(tiny: Scale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_marked_drawings(monkeypatch, maml_omniglot, "episodes", 6)
    study = maml_omniglot._Study(Run(tmp_path, {}), tiny)
    study.measure(tiny.lines[0])
    assert set(log.turned) == {(TRAIN, True), (VALID, False), (TEST, False)}
