"""MANN's tables: the episodes, the nearest drawing, intervals, and a run that is stopped."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from micro_drawings import use_marked_drawings, use_random_drawings
from stopping import rows_of_a_stopped_run
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recollect.errors import SettingError
from recollect.experiments.meta import drawings, mann, mann_report
from recollect.experiments.meta.drawings import TEST, TRAIN, VALID
from recollect.experiments.meta.mann import Batch, MannTable1, MannTable2, Scale, nearest, run
from recollect.experiments.runner import Run


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random drawings of a few pixels, and a run of seconds."""
    use_random_drawings(monkeypatch, 4)
    monkeypatch.setattr(mann, "_SIDE", 4)
    monkeypatch.setattr(mann, "_HIDDEN", 6)
    tiny = {"batch": 2, "every": 2, "valid": 3, "test": 4}
    lines = {"mann-table1": mann._TABLE1, "mann-table2": tuple((mann._STRINGS, m) for m in ("mann", "mann-ff", "knn"))}
    monkeypatch.setattr(mann, "SCALES", {name: {"smoke": Scale(4, some, **tiny)} for name, some in lines.items()})


def test_nearest_drawing() -> None:
    g = torch.Generator().manual_seed(1)
    batch = Batch(torch.rand(3, 6, 5, generator=g), torch.randint(9, (3, 6), generator=g))
    found = nearest(batch)
    for episode in range(3):
        assert found[episode, 0] == -1, "nothing came before"
        for step in range(1, 6):
            ways = [float((batch.inputs[episode, step] - batch.inputs[episode, b]).norm()) for b in range(step)]
            assert found[episode, step] == batch.labels[episode, ways.index(min(ways))]


@pytest.mark.parametrize(("name", "config"), [("mann-table1", MannTable1), ("mann-table2", MannTable2)])
def test_a_run(tmp_path: Path, name: str, config: type) -> None:
    table = run(config(out=tmp_path))
    assert table == (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    lines = mann.SCALES[name]["smoke"].lines
    assert [(row["task"], row["model"]) for row in rows if row["part"] == "test"] == list(lines)
    trained = [model for _, model in lines if model != "knn"]
    assert [(row["model"], row["batches"]) for row in rows if row["part"] == "learning"] == [
        (model, batches) for model in trained for batches in (2, 4)
    ]
    for row in rows:
        assert len(row["accuracy"]) == 10
        assert all(0 <= number <= 100 for number in row["accuracy"])
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "results.jsonl").read_bytes()
    assert run(config(out=tmp_path)) == table, "nothing is left to do"
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_stopped_run_gives_the_same_rows(tmp_path: Path) -> None:
    whole, stopped = rows_of_a_stopped_run(run, MannTable1, tmp_path)
    assert stopped == whole


def test_the_mean_over_episodes_and_its_interval(tmp_path: Path) -> None:
    study = mann._Study(Run(tmp_path, {}), mann.SCALES["mann-table1"]["smoke"])
    guesses = []

    def guess(batch: Batch) -> torch.Tensor:
        guesses.append((batch.labels + (torch.rand(batch.labels.shape) < 0.4)) % 5)
        assert batch.labels.shape == (4, 50)
        study.labels = batch.labels
        return guesses[-1]

    study._test("one-hot, 5 classes", "x", guess)
    (row,) = study._record.rows
    values = []
    for guessed, labels in zip(guesses[0].tolist(), study.labels.tolist(), strict=True):
        right: dict[int, list[float]] = {k: [] for k in range(10)}
        for step, label in enumerate(labels):
            right[labels[:step].count(label)].append(100.0 * (guessed[step] == label))
        assert all(len(found) == 5 for found in right.values())
        values.append([sum(found) / 5 for found in right.values()])
    for k in range(10):
        own = [value[k] for value in values]
        mean = sum(own) / 4
        assert row["accuracy"][k] == pytest.approx(mean, abs=0.01)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in own) / 3)
        assert row["interval"][k] == pytest.approx(1.96 * deviation / 2, abs=0.01)


def test_characters_of_the_test_are_in_no_training() -> None:
    parts = [set(part.tolist()) for part in drawings.drawings(4, seed=0).splits]
    assert [len(part) for part in parts] == [1100, 100, 423]
    assert len(set.union(*parts)) == 1623


@pytest.mark.parametrize("model", ["mann", "knn"])
def test_only_the_test_sees_its_characters(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_marked_drawings(monkeypatch, mann, "sequences", 4)
    study = mann._Study(Run(tmp_path, {}), mann.SCALES["mann-table1"]["smoke"])
    study.measure(mann._ONE_HOT, model)
    learning = [TRAIN, TRAIN, VALID, "learning"] * 2 if model == "mann" else []
    assert log.splits == [*learning, TEST, "test"]


def test_turned_characters_are_for_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = use_marked_drawings(monkeypatch, mann, "sequences", 4)
    study = mann._Study(Run(tmp_path, {}), mann.SCALES["mann-table1"]["smoke"])
    study.measure(mann._ONE_HOT, "mann")
    assert set(log.turned) == {(TRAIN, True), (VALID, False), (TEST, False)}


def test_gradients_are_clipped_at_the_norm_of_the_settings(tmp_path: Path) -> None:
    norms = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        norms.append(float(torch.cat([weights.grad.flatten() for weights in group["params"]]).norm()))

    tiny = mann.SCALES["mann-table1"]["smoke"]
    hook = register_optimizer_step_pre_hook(look)
    try:
        for clip in (0.01, 1e9):
            study = mann._Study(Run(tmp_path / str(clip), {}), dataclasses.replace(tiny, batches=2, clip=clip))
            study.measure(mann._ONE_HOT, "mann")
    finally:
        hook.remove()
    assert norms[:2] == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(norms[2:]) > 0.1, "a gradient below the limit stays as it is"


def test_the_numbers_of_the_paper() -> None:
    assert mann_report.PAPER["one-hot, 5 classes", "mann"][1::4] == (82.8, 98.1)
    assert mann_report.PAPER["strings, 5 classes", "mann"][1::4] == (69.5, 93.1)
    assert {task for task, _ in mann_report.PAPER} == set(mann.TASKS)
    assert all(len(numbers) == 6 for numbers in mann_report.PAPER.values())


def test_the_table(tmp_path: Path) -> None:
    record = Run(tmp_path, {})
    numbers = [10.0 * k for k in range(1, 11)]
    row = {"task": "one-hot, 5 classes", "model": "mann", "accuracy": numbers, "interval": [1.0] * 10}
    record.rows.append({"part": "learning", "batches": 1000, "loss": 1.0, **row})
    record.rows.append({"part": "test", "parameters": 1234, **row})
    lines = mann_report.report(record, "mann-table1").splitlines()
    assert lines[-3:] == [
        "| one-hot, 5 classes | MANN (LSTM controller, LRUA) | 1,234 | ours | 10.0 +- 1.0 | 20.0 +- 1.0 | "
        "30.0 +- 1.0 | 40.0 +- 1.0 | 50.0 +- 1.0 | 100.0 +- 1.0 |",
        "|  |  |  | paper | 36.4 | 82.8 | 91.0 | 92.6 | 94.9 | 98.1 |",
        "| one-hot, 5 classes | human |  | paper | 34.5 | 57.3 | 70.1 | 71.8 | 81.4 | 92.4 |",
    ]


@pytest.mark.parametrize("both", [False, True])
def test_the_paper_has_one_mann(tmp_path: Path, both: bool) -> None:
    record = Run(tmp_path, {})
    row = {"part": "test", "task": "strings, 5 classes", "accuracy": [1.0] * 10, "interval": [1.0] * 10}
    record.rows += [{**row, "model": model} for model in ("mann", "mann-separate")[not both :]]
    record.rows.append({**record.rows[0], "part": "learning", "batches": 1000, "loss": 1.0})
    lines = [line for line in mann_report.report(record, "mann-table2").splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[3] for line in lines] == (["ours", "paper", "ours"] if both else ["ours", "paper"])


def test_another_scale_in_the_same_folder(tmp_path: Path) -> None:
    run(MannTable1(out=tmp_path))
    tiny = mann.SCALES["mann-table1"]["smoke"]
    mann.SCALES["mann-table1"]["small"] = dataclasses.replace(tiny, batches=6)
    with pytest.raises(SettingError, match="scale=smoke there, small asked"):
        run(MannTable1(scale="small", out=tmp_path))
