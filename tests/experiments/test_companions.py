"""The comparison of all companions: what it records, how it chooses, and that a stopped run goes on."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from recollect.continual import Accuracies
from recollect.data import Dataset, Task
from recollect.errors import SettingError
from recollect.experiments import continual, continual_methods, continual_report
from recollect.experiments.continual_methods import METHODS, STREAMS, Contender, Setting, joint, methods_on
from recollect.experiments.runner import Run

ROOT = Path(__file__).parents[2]
TINY = continual.Continual(
    streams=("split-task",), methods=("ewc", "mbpa"), tasks=2, examples=60, test=40, adapted=20, seeds=2
)


def noise(part: str = "train") -> Dataset:
    """Stands for MNIST: as many images of each digit, each near a pattern of its own."""
    generator = torch.Generator().manual_seed({"train": 0, "test": 1}[part])
    labels = torch.arange(10).repeat(40)
    patterns = torch.rand(10, 784, generator=torch.Generator().manual_seed(2))
    return Dataset(patterns[labels] + 0.1 * torch.rand(400, 784, generator=generator), labels)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continual, "mnist", noise)
    monkeypatch.setattr(continual, "split", lambda: (noise(), noise("test")))
    grids = {name: dataclasses.replace(about, grid=about.grid[:2]) for name, about in METHODS.items()}
    monkeypatch.setattr(continual_methods, "METHODS", grids)


def test_all_that_was_chosen_is_tuned_and_tested_and_nothing_is_done_twice(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, out=tmp_path)
    table = continual.run(config)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    tuned = {(row["method"], row["strength"]) for row in rows if row["part"] == "validation"}
    assert tuned == {("ewc", 1.0), ("ewc", 10.0), ("mbpa", 0.01), ("mbpa", 0.03)}
    tested = {(row["method"], row["seed"]) for row in rows if row["part"] == "test"}
    assert tested == {(name, seed) for name in ("naive", "ewc", "mbpa") for seed in (0, 1)}
    assert all([len(row) for row in r["matrix"]] == [2, 2] for r in rows if r["part"] == "test")
    assert "| EWC |" in table
    assert "How the strengths were chosen" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {"figure.png", "matrices-split-task.png"}
    assert not list((tmp_path / "checkpoints").iterdir())
    assert continual.run(config) == table
    assert (tmp_path / "results.jsonl").read_text().count("\n") == len(rows)


def test_a_run_stopped_anywhere_ends_like_one_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dataclasses.replace(TINY, out=tmp_path / "whole", seeds=1)
    continual.run(whole)
    stopped = dataclasses.replace(whole, out=tmp_path / "stopped")
    add, learn = Run.add, continual.learn

    def stop_before(self: Run, **row: object) -> None:
        if len(self.rows) == 3:
            raise KeyboardInterrupt
        add(self, **row)

    def stop_in_the_middle(*args: object, **settings: object) -> object:
        def after(number: int) -> None:
            raise KeyboardInterrupt

        return learn(*args, **settings, after=after if "checkpoint" in settings else None)

    for name, stop in (("add", stop_before), ("learn", stop_in_the_middle)):
        with monkeypatch.context() as patch:
            patch.setattr(Run if name == "add" else continual, name, stop)
            with pytest.raises(KeyboardInterrupt):
                continual.run(stopped)
    continual.run(stopped)
    files = [(tmp_path / name / "results.jsonl").read_text() for name in ("whole", "stopped")]
    assert files[0] == files[1]


def test_the_weaker_of_equally_good_strengths_is_chosen(tmp_path: Path) -> None:
    record = Run(tmp_path, {})
    for strength, accuracy in ((10.0, 0.8), (1.0, 0.9), (3.0, 0.9)):
        row = {"stream": "permuted", "part": "validation", "method": "ewc", "strength": strength}
        record.add(**row, accuracy=accuracy)
    record.add(stream="rotated", part="validation", method="ewc", strength=99.0, accuracy=1.0)
    work = continual._Work(record, "permuted", {"ewc"}, seeds=1, tasks=1, examples=1, test=1, adapted=1)
    assert work.best("ewc") == 1.0
    old = {"stream": "permuted", "part": "test", "method": "ewc", "seed": 0, "matrix": [[0.5]], "initial": [0.1]}
    record.add(**old, strength=3.0)  # from before the grid had its best point
    assert continual_report._accuracies(record, "permuted", "ewc", 1) == []
    assert work.best("naive") == 0.0


def of(data: Dataset, first: int) -> Dataset:
    """The examples of two digits."""
    return data.take((data.labels // 2 == first // 2).nonzero()[:, 0])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "joint"])
def test_every_method_learns_every_kind_of_task(method: str) -> None:
    data = noise().take(slice(0, 40))
    first, second = (Task(of(data, n), data, torch.tensor([n, n + 1])) for n in (0, 2))
    contender = Contender(method, 0.1, Setting(8, 1, 2, 4, 0))
    for task in (first, second):
        contender.learner.learn(task.train, outputs=task.outputs)
    scores = contender.predictor(method, 0.1)(data.inputs)
    assert scores.shape == (40, 10)
    assert not bool(scores.isnan().any())
    stored = len(contender.memory)
    assert stored == (
        0 if METHODS[method].title in {"EWC", "SI", "LwF", "GEM"} or "MAS" in METHODS[method].title else 8
    )


def test_joint_training_knows_the_outputs_of_each_task() -> None:
    data = noise()
    tasks = [Task(of(data, n), of(data, n), torch.tensor([n, n + 1])) for n in (0, 2)]
    network = joint(tasks, Setting(16, 30, 2, 4, 0))
    for task in tasks:
        scores = network(task.test.inputs)[:, task.outputs]
        assert torch.equal(task.outputs[scores.argmax(1)], task.test.labels)


def test_rows_hold_what_was_measured_and_nothing_else() -> None:
    matrix = torch.tensor([[0.5, 0.25, torch.nan], [0.5, 0.75, 0.125], [0.25, 0.5, 1.0]])
    row = continual_report.to_row(Accuracies(matrix, torch.tensor([0.125, 0.25, 0.5])))
    assert row["matrix"] == [[0.5, 0.25], [0.5, 0.75, 0.125], [0.25, 0.5, 1.0]]
    again = continual_report._from_row(json.loads(json.dumps(row)))
    assert torch.equal(again.matrix.nan_to_num(9), matrix.nan_to_num(9))
    assert again.forgetting == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streams": ("permutted",)}, "--streams must be some of permuted"),
        ({"methods": ("ewcc",)}, "--methods must be some of naive"),
        ({"methods": ()}, "got none"),
        ({"tasks": 0}, "--tasks must be above 0"),
    ],
)
def test_bad_settings_are_named_by_their_flag(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=message):
        continual.run(dataclasses.replace(TINY, out=tmp_path, **change))


def test_averages_of_importances_are_compared_on_permuted_mnist_alone() -> None:
    assert {"mas-average", "mas-last"} <= set(methods_on("permuted"))
    assert not {"mas-average", "mas-last"} & set(methods_on("rotated"))


def test_the_page_shows_the_tables_of_the_recorded_run() -> None:
    table = (ROOT / "results" / "continual" / "table.md").read_text()
    assert table in (ROOT / "docs" / "continual.md").read_text()
    assert all(about.title in table for about in STREAMS.values())


def test_the_page_on_mas_shows_what_was_recorded() -> None:
    page = (ROOT / "docs" / "mas.md").read_text()
    rows = [json.loads(line) for line in (ROOT / "results" / "continual" / "results.jsonl").read_text().splitlines()]
    table = (ROOT / "results" / "continual" / "table.md").read_text()
    for method, name in (("mas", "sum"), ("mas-average", "average"), ("mas-last", "last")):
        grid = [r for r in rows if r["stream"] == "permuted" and r["part"] == "validation" and r["method"] == method]
        line = next(line for line in page.splitlines() if line.startswith(f'| `"{name}"` |') and line.count("|") > 6)
        shown = [cell.strip(" *") for cell in line.split("|")[2:-1]]
        accuracies = [f"{100 * row['accuracy']:.1f}" for row in sorted(grid, key=lambda row: row["strength"])]
        assert [cell for cell in shown if cell] == accuracies
        result = next(line for line in page.splitlines() if line.startswith(f'| `"{name}"` |'))
        _, strength, accuracy, forgetting, _ = (cell.strip() for cell in result.split("|")[1:])
        row = next(line for line in table.splitlines() if line.startswith(f"| {METHODS[method].title} |"))
        assert [strength, accuracy, forgetting] == [row.split("|")[n].strip() for n in (2, 4, 7)]
