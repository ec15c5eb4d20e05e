"""The permuted-pixels experiment: what it measures, and that a killed run ends like one that was left alone."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from recollect.data import Dataset, Task, permuted
from recollect.errors import FormatError, SettingError
from recollect.experiments import demo, figure3, figure3_tuning, permuted_report
from recollect.experiments import permuted as shared
from recollect.experiments.runner import Progress, Run

TINY = dataclasses.replace(
    demo._SETTINGS, tasks=3, examples=200, memory=(10, 20), final=40, point=40, hidden=16, epochs=1, steps=2
)
WHOLE = dataclasses.replace(TINY, ewc=10.0, mas=0.1, replay=True, combined=(20,), combined_final=30)


def tiny_tasks(seed: int = 0) -> Iterator[Task]:
    train, test = demo.split(demo.digits(), 0)
    return permuted(train, test, tasks=3, examples=200, generator=torch.Generator().manual_seed(seed))


def run_tiny(folder: Path, settings: shared.Settings = TINY) -> Run:
    run = Run(folder, dataclasses.asdict(settings))
    with Progress(shared.work(settings), "tiny") as progress:
        shared.run_seed(run, settings, 0, tiny_tasks, progress)
    return run


def test_every_curve_is_measured_on_every_task_seen_so_far(tmp_path: Path) -> None:
    run = run_tiny(tmp_path)
    names = ["mlp", "vote-10", "mbpa-10", "vote-20", "mbpa-20", "random-20"]
    cells = {(r["curve"], r["trained"], r["task"]) for r in run.rows}
    assert cells == {(name, n, j) for name in names for n in (1, 2, 3) for j in range(1, n + 1)}
    totals = {(r["trained"], r["total"]) for r in run.rows}
    assert totals == {(1, 40), (2, 20), (3, 40)}
    curves = permuted_report.curves(run.rows, [0])
    last = [r for r in run.rows if r["trained"] == 3 and r["curve"] == "mlp"]
    assert curves["mlp"][0][-1] == pytest.approx(100 * sum(r["correct"] for r in last) / 120)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_companions_have_networks_of_their_own_beside_the_same_memories(tmp_path: Path) -> None:
    run = run_tiny(tmp_path, WHOLE)
    alone = run_tiny(tmp_path / "alone").rows
    names = {"ewc", "mas", "replay-10", "replay-20", "mbpa+ewc-20", "mbpa+mas-20", "mbpa+replay-20"}
    assert {r["curve"] for r in run.rows} == names | {r["curve"] for r in alone}
    assert [r for r in run.rows if r["curve"] not in names] == alone
    assert {r["total"] for r in run.rows if "+" in r["curve"] and r["trained"] == 3} == {30}
    learners = {name: shared.Learner(WHOLE, 0, 64, companion=name) for name in WHOLE.companions()}
    for number, task in enumerate(tiny_tasks(), 1):
        for learner in learners.values():
            learner.learn(number, task.train)
    weights = [learner.network[0].weight for learner in learners.values()]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    memories = [learner.memories[20].keys for learner in learners.values()]
    assert all(torch.equal(memories[0], keys) for keys in memories)


def test_the_report_shows_companions_in_a_panel_of_their_own(tmp_path: Path) -> None:
    table = permuted_report.report(run_tiny(tmp_path, WHOLE), [0], WHOLE, "tiny", {"ewc": 50.0})
    assert "| MbPA + replay, 20 per task |" in table
    assert "| EWC | 50.0 |" in table
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_finished_run_trains_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run_tiny(tmp_path).rows
    monkeypatch.setattr(shared, "Learner", None)
    assert run_tiny(tmp_path).rows == rows


def test_a_run_killed_again_and_again_ends_like_one_left_alone(tmp_path: Path) -> None:
    alone = run_tiny(tmp_path / "alone", WHOLE)
    folder = tmp_path / "killed"
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]); import torch; torch.set_num_threads(1);"
        "from test_permuted import WHOLE, run_tiny; run_tiny(Path(sys.argv[1]), WHOLE)"
    )
    command = [sys.executable, "-c", script, str(folder), str(Path(__file__).parent)]
    rows, kills = folder / "results.jsonl", 0
    for target in (3, 40, 70):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if rows.exists() and rows.read_bytes().count(b"\n") >= target:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            time.sleep(0.002)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert kills > 0
    assert [json.loads(line) for line in rows.read_text().splitlines()] == alone.rows


@pytest.mark.parametrize("companion", WHOLE.companions())
def test_the_checkpoint_restores_all_that_learning_depends_on(tmp_path: Path, companion: str) -> None:
    tasks = list(tiny_tasks())
    whole = shared.Learner(WHOLE, 0, 64, companion=companion)
    for number, task in enumerate(tasks, 1):
        whole.learn(number, task.train)
    path = tmp_path / "seed.safetensors"
    first = shared.Learner(WHOLE, 0, 64, path, companion)
    first.learn(1, tasks[0].train)
    second = shared.Learner(WHOLE, 0, 64, path, companion)
    assert second.trained == 1
    for number, task in enumerate(tasks, 1):
        second.learn(number, task.train)
    assert all(torch.equal(a, b) for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True))
    assert torch.equal(whole.memories[20].keys, second.memories[20].keys)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "seed.safetensors"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(FormatError, match="Delete it"):
        shared.Learner(TINY, 0, 64, path)


def test_the_control_reads_at_random_and_weighs_all_alike() -> None:
    learner = shared.Learner(TINY, 0, 64)
    memory = learner.memories[20]
    memory.write(torch.rand(30, 64), torch.randint(10, (30,)))
    control = dict(learner.predictors())["random-20"]
    context = control.memory.read(torch.rand(5, 64), 8, kernel=control.kernel)
    assert torch.allclose(context.weights, torch.full((5, 8), 1 / 8))
    assert len(context.slots.unique()) > 8
    assert int(context.slots.max()) < 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": 0}, "--tasks"),
        ({"rate": -1.0}, "--rate"),
        ({"memory": (100, 50)}, "rising"),
        ({"memory": (20_000,)}, "rising"),
        ({"combined": (30,)}, "--combined"),
        ({"ewc": -1.0}, "--ewc"),
        ({"bandwidth": (1.0, 2.0, 3.0)}, "--bandwidth"),
        ({"seeds": 0}, "--seeds"),
    ],
)
def test_bad_settings_are_named_by_their_flag(change: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        dataclasses.replace(figure3.Figure3(), **change).settings()


def numbered(part: str) -> Dataset:
    """Stands for MNIST: each image is its own number."""
    count = {"train": 60_000, "test": 10_000}[part]
    return Dataset(torch.arange(float(count)).unsqueeze(1), torch.arange(count) % 10)


def test_validation_images_are_no_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure3, "mnist", numbered)
    train, validation = figure3.split()
    assert (len(train.labels), len(validation.labels)) == (50_000, 10_000)
    assert len(torch.cat([train.inputs, validation.inputs]).unique()) == 60_000


def test_each_task_is_tuned_by_images_of_its_own() -> None:
    rows = figure3_tuning.query_rows(figure3_tuning.Figure3Tuning(queries=400), 10_000)
    assert [len(part) for part in rows] == [20] * 20
    assert len(torch.cat(rows).unique()) == 400


def test_a_network_of_other_settings_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "seed.safetensors"
    train, _ = demo.split(demo.digits(), 0)
    shared.Learner(TINY, 0, 64, path).learn(1, train)
    for settings, seed in ((dataclasses.replace(TINY, epochs=2), 0), (TINY, 1)):
        with pytest.raises(FormatError, match="other settings"):
            shared.Learner(settings, seed, 64, path)


def test_a_later_network_is_not_measured_for_an_earlier_task(tmp_path: Path) -> None:
    train, _ = demo.split(demo.digits(), 0)
    learner = shared.Learner(TINY, 0, 64, tmp_path / "checkpoints" / "seed-0-alone.safetensors")
    learner.learn(1, train)
    learner.learn(2, train)
    with pytest.raises(FormatError, match="lacks results of task 1"):
        run_tiny(tmp_path)


def test_more_test_images_than_there_are_are_refused(tmp_path: Path) -> None:
    settings = dataclasses.replace(TINY, final=501)
    run = Run(tmp_path, {})
    with Progress(1.0, "tiny") as progress, pytest.raises(SettingError, match="500"):
        shared.run_seed(run, settings, 0, tiny_tasks, progress)


def test_the_page_shows_the_table_of_the_recorded_run() -> None:
    root = Path(__file__).parents[2]
    table = (root / "results" / "figure3" / "table.md").read_text()
    assert table in (root / "docs" / "figure3.md").read_text()
    readme = (root / "README.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert sum(row in readme for row in rows) >= 10
