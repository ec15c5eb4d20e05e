"""New classes from a few images of each: what is taught, what learns it, and by which images settings are chosen."""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import micro_images
import pytest
import torch
from micro_images import CLASSES, MICRO, TEST, TRAIN
from oracles.bits import bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from recollect import EpisodicMemory, Parametric
from recollect.data import Dataset
from recollect.experiments import plots
from recollect.experiments.incremental import new_classes, study
from recollect.experiments.incremental.models import Adapted, Vote
from recollect.experiments.incremental.new_classes import NewClasses, Task, draw, run, teach
from recollect.experiments.incremental.shots import Learner, NearestMean, Retrained, Shots, shots
from recollect.experiments.incremental.study import Halves, Study
from recollect.experiments.runner import Progress, read_rows

Untouched = Callable[[], AbstractContextManager[None]]
OLD = CLASSES // 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up images and features, and nothing drawn; the folder of a run."""
    micro_images.use(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(study, "features", micro_images.untrained)
    monkeypatch.setattr(plots, "save", lambda picture, path: None)
    return tmp_path / "out"


# The learners ---------------------------------------------------------------------------------------------------------


def some(classes: int = 5, count: int = 6) -> Dataset:
    labels = torch.arange(classes).repeat(count)
    centers = 2 * torch.randn(classes, 4, generator=seeded())
    return Dataset(centers[labels] + torch.randn(len(labels), 4, generator=seeded(1)), labels)


def nearest_mean_slowly(held: Dataset, query: Tensor, classes: int, *, angle: bool) -> list[float]:
    """Returns the probability of each class from the distances to the means, in double precision."""

    def unit(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(v * v for v in vector)) if angle else 1.0
        return [v / length for v in vector]

    scores = []
    for label in range(classes):
        keys = [unit(key) for key, one in zip(held.inputs.tolist(), held.labels.tolist(), strict=True) if one == label]
        if not keys:
            scores.append(-math.inf)
            continue
        mean = unit([sum(values) / len(keys) for values in zip(*keys, strict=True)])
        scores.append(-sum((a - b) ** 2 for a, b in zip(mean, unit(query.tolist()), strict=True)))
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


@pytest.mark.parametrize("angle", [False, True])
@pytest.mark.parametrize("queries", [3, 40])
def test_nearest_mean(angle: bool, queries: int, rng_untouched: Untouched) -> None:
    held, asked = some(), 3 * torch.randn(queries, 4, generator=seeded(2))
    layer = nn.Linear(4, 5)
    with rng_untouched():
        predictor = NearestMean(angle=angle).predictor(layer, held)
        found = predictor(asked)
    wanted = [nearest_mean_slowly(held, query, 5, angle=angle) for query in asked]
    torch.testing.assert_close(found.exp(), torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    missing = held.take((held.labels != 2).nonzero().squeeze(1))
    found = NearestMean(angle=angle).predictor(layer, missing)(asked)
    assert (found[:, 2] == -torch.inf).all(), "a class of which nothing is known"
    wanted = [nearest_mean_slowly(missing, query, 5, angle=angle) for query in asked]
    torch.testing.assert_close(found.exp(), torch.tensor(wanted), rtol=1e-3, atol=1e-4)


def test_retrained_is_a_loop_and_leaves_the_head_as_it_is(rng_untouched: Untouched) -> None:
    held, layer = some(count=50), nn.Linear(4, 5)  # 250 images, two batches
    before = bits(layer.state_dict())
    with rng_untouched():
        one, other = (Retrained(0.05, 3).predictor(layer, held) for _ in range(2))
    assert bits(layer.state_dict()) == before
    assert all(parameter.grad is None for parameter in layer.parameters())
    slow, g = copy.deepcopy(layer), seeded()
    optimizer = torch.optim.Adam(slow.parameters(), lr=0.05)
    for _ in range(3):
        order = torch.randperm(250, generator=g)
        for rows in (order[:128], order[128:]):
            optimizer.zero_grad()
            cross_entropy(slow(held.inputs[rows]), held.labels[rows]).backward()
            optimizer.step()
    queries = torch.randn(9, 4, generator=seeded(2))
    assert torch.equal(one(queries), other(queries))
    assert torch.equal(one(queries), Parametric(slow)(queries))
    assert not torch.allclose(one(queries), Parametric(layer)(queries))


def test_all_combinations_are_tried() -> None:
    found = shots((1, 2), ((3, 4), (0.1, 0.2), (5,)), ((1e-3,), (7, 8)), ((1, 9), (None, 0.5)))
    assert found.images == (1, 2)
    assert found.grids == {
        "mbpa-sgd": tuple(Adapted("sgd", k, rate, 5) for k in (3, 4) for rate in (0.1, 0.2)),
        "fine-tuning": (Retrained(1e-3, 7), Retrained(1e-3, 8)),
        "nearest-mean": (NearestMean(angle=False), NearestMean(angle=True)),
        "vote": tuple(Vote(k, bandwidth) for k in (1, 9) for bandwidth in (None, 0.5)),
    }


# What is taught -------------------------------------------------------------------------------------------------------


def test_some_images_of_each_class_are_drawn(rng_untouched: Untouched) -> None:
    labels = torch.randint(4, (60,), generator=seeded())
    with rng_untouched():
        rows = draw(labels, 5, seeded(1))
    for label in range(4):
        assert len(rows[label].unique()) == 5
        assert (labels[rows[label]] == label).all()
    assert torch.equal(draw(labels, 5, seeded(1)), rows)
    assert not torch.equal(draw(labels, 5, seeded(2)), rows)
    assert torch.equal(draw(labels, 3, seeded(1)), rows[:, :3])
    everything = draw(labels, 1000, seeded(1))
    assert everything.shape == (4, int(labels.bincount().min()))
    assert torch.equal(everything[:, :5], rows)


def test_every_image_is_as_likely_to_be_drawn() -> None:
    labels, draws, g = torch.arange(3).repeat(10), 3000, seeded()
    counts = torch.stack([draw(labels, 2, g) for _ in range(draws)]).flatten().bincount(minlength=30)
    assert int(counts.sum()) == draws * 6
    assert (counts - draws / 5).abs().max() < 5 * (draws * 0.2 * 0.8) ** 0.5


@pytest.fixture
def halves(micro: Path) -> Halves:
    return Study(NewClasses(out=micro)).halves(1)


ADAPTED = Adapted("sgd", 4, 0.1, 2)
TAUGHT = Shots((1, 2, 5), kept=3, grids={})


def taught(halves: Halves, seed: int = 1) -> Task:
    return teach(halves, halves.test, TAUGHT, generator=seeded(seed))


def named(halves: Halves) -> list[int]:
    """Returns the old label of each new one: old classes first."""
    new = halves.new.tolist()
    return [label for label in range(CLASSES) if not new[label]] + [label for label in range(CLASSES) if new[label]]


def test_labels_stand_in_a_new_order_and_old_classes_predict_what_they_did(halves: Halves) -> None:
    before, task = halves.features.head(), taught(halves)
    order = named(halves)
    assert task.head.out_features == CLASSES
    for place, label in enumerate(order[:OLD]):
        assert torch.equal(task.head.weight[place], before.weight[label])
        assert torch.equal(task.head.bias[place], before.bias[label])
    for place in range(OLD, CLASSES):
        torch.testing.assert_close(task.head.weight[place], before.weight[order[:OLD]].mean(0))
    assert [order[label] for label in task.test.labels.tolist()] == halves.test.labels.tolist()
    assert torch.equal(task.test.inputs, halves.test.inputs)
    assert task.new.tolist() == [label >= OLD for label in task.test.labels.tolist()]
    own, old = task.head(halves.test.inputs)[:, :OLD], before(halves.test.inputs)[:, order[:OLD]]
    torch.testing.assert_close(own, old)


def test_images_are_counted_and_those_that_are_drawn(halves: Halves) -> None:
    task, order = taught(halves), named(halves)
    assert task.held.labels.bincount().tolist() == [3] * OLD, "of old classes, as many as are kept"
    assert task.taught.labels.tolist() == list(range(OLD, CLASSES)) * 5, "one of each after the other"
    drawn = draw(halves.train.labels, 5, seeded(1))
    for data in (task.held, task.taught):
        seen = dict.fromkeys(range(CLASSES), 0)
        for key, label in zip(data.inputs, data.labels.tolist(), strict=True):
            row = drawn[order[label], seen[label]]
            assert int(halves.train.labels[row]) == order[label]
            assert torch.equal(key, halves.train.inputs[row])
            seen[label] += 1
    other = taught(halves, 2)
    assert not torch.equal(other.taught.inputs, task.taught.inputs)
    assert not torch.equal(other.held.inputs, task.held.inputs)
    for same, its in (("labels", task.taught), ("inputs", task.test)):
        assert torch.equal(getattr(other.taught if same == "labels" else other.test, same), getattr(its, same))


class Spy:
    """Stands for a learner, and remembers what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: list[Dataset] = []
        monkeypatch.setattr(Retrained, "predictor", lambda _, head, held: self._look(head, held))
        monkeypatch.setattr(Vote, "predictor", lambda _, head, memory: self._look(head, self._content(memory)))

    def _content(self, memory: EpisodicMemory) -> Dataset:
        assert len(memory) == memory.capacity, "nothing is overwritten"
        order = memory.written.argsort()
        return Dataset(memory.keys[order], memory.values[order])

    def _look(self, head: nn.Linear, held: Dataset) -> Parametric:
        self.held.append(held)
        return Parametric(head)


def test_every_learner_has_the_same_images(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    task, spy = taught(halves), Spy(monkeypatch)
    for count in TAUGHT.images:
        for setting in (Retrained(0.1, 1), Vote(1, None)):
            new_classes._worth(task, setting, count)
        tuned, voted = spy.held[-2:]
        assert bits(tuple(tuned)) == bits(tuple(voted))
        assert tuned.labels.bincount().tolist() == [3] * OLD + [count] * (CLASSES - OLD)
        new = tuned.take(slice(3 * OLD, None))
        assert torch.equal(new.inputs, task.taught.inputs[: len(new.inputs)])


def test_worth(halves: Halves) -> None:
    task = taught(halves)
    assert isinstance(task, Task)
    found = new_classes._worth(task, NearestMean(angle=False), 5)
    held = Dataset(torch.cat([task.held.inputs, task.taught.inputs]), torch.cat([task.held.labels, task.taught.labels]))
    right: dict[str, list[bool]] = {"all": [], "old": [], "new": []}
    for query, label in zip(task.test.inputs, task.test.labels.tolist(), strict=True):
        chances = nearest_mean_slowly(held, query, CLASSES, angle=False)
        right["all"].append(chances.index(max(chances)) == label)
        right["new" if label >= OLD else "old"].append(right["all"][-1])
    for name, hits in right.items():
        assert found[name] == pytest.approx(100 * sum(hits) / len(hits), abs=1e-3)
    assert len(right["new"]) == len(right["old"]) == OLD * TEST
    assert found["seconds"] > 0 < found["milliseconds"]


@pytest.mark.parametrize("setting", [NearestMean(angle=False), Retrained(0.1, 1), Vote(1, None), ADAPTED])
@pytest.mark.parametrize("known", [True, False])
def test_seconds_last_until_an_image_of_a_new_class_is_recognized(
    halves: Halves, monkeypatch: pytest.MonkeyPatch, setting: Learner, known: bool
) -> None:
    """The median of five times; and what a first prediction alone does, does not count for those after it."""
    clock, asked, learnings = [100.0], list[Tensor](), []
    task = taught(halves)
    right = int((task.new & (task.test.labels == OLD + 1)).nonzero()[0]) if known else -1

    class Slow(nn.Module):
        likelihood = Parametric(nn.Linear(1, 1)).likelihood

        def forward(self, keys: Tensor, *, before: None = None) -> Tensor:
            clock[0] += 0.002 * len(keys)
            asked.append(keys)
            found = torch.zeros(len(keys), CLASSES)
            if known:  # all are taken for one new class, of which some are
                found[:, OLD + 1] = 1.0
            return found.log_softmax(1)

    def learned(*_: Any) -> Slow:
        learnings.append(len(learnings))
        clock[0] += 3.0 + (learnings[-1] - 2) ** 2  # of the last five: 4, 3, 4, 7, 12
        return Slow()

    monkeypatch.setattr(type(setting), "predictor", learned)
    monkeypatch.setattr(new_classes.time, "perf_counter", lambda: clock[0])
    found = new_classes._worth(task, setting, 2)
    assert found["milliseconds"] == pytest.approx(2.0)
    if known:
        assert found["seconds"] == pytest.approx(4.002)
        single = [keys for keys in asked if len(keys) == 1]
        assert len(single) == 6
        assert all(torch.equal(keys[0], task.test.inputs[right]) for keys in single[1:])
    else:
        assert found["new"] == 0.0
        assert found["seconds"] is None


# The run --------------------------------------------------------------------------------------------------------------


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in {"seconds", "milliseconds"}} for row in rows]


def harmonic(*scores: float) -> float:
    return 0.0 if 0 in scores else len(scores) / sum(1 / score for score in scores)


def test_settings_are_chosen_on_validation_images_of_the_first_split(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run(NewClasses(out=micro))
    assert "## From the first image of a new class" in table
    rows = without_times(read_rows(micro / "results.jsonl"))
    tried = [row for row in rows if row["part"] == "shots-tuning"]
    for name, grid in MICRO.shots.grids.items():
        means = [
            sum(harmonic(row["old"], row["new"]) for row in tried if row["model"] == name and row["place"] == place)
            for place in range(len(grid))
        ]
        chosen = [row["setting"] for row in rows if row["part"] == "shots" and row["model"] == name]
        assert chosen == [asdict(grid[means.index(max(means))])] * 4
    assert {(row["split"], row["shots"]) for row in rows if row["part"] == "shots"} == {
        (split, count) for split in (1, 2) for count in MICRO.shots.images
    }
    one = Study(NewClasses(out=micro)).halves(0)
    task = teach(one, one.valid.take(slice(None, None, 2)), MICRO.shots, generator=seeded(0))
    assert task.test.labels.bincount().tolist() == [TRAIN // 10 // MICRO.every] * CLASSES
    for row in tried:
        setting = MICRO.shots.grids[row["model"]][row["place"]]
        assert row["all"] == new_classes._worth(task, setting, row["shots"])["all"]

    read = study.tiny_imagenet

    def garbage(**watch: Any) -> Any:
        found = read(**watch)
        return found._replace(test=found.test._replace(labels=(found.test.labels + 2) % CLASSES))

    monkeypatch.setattr(study, "tiny_imagenet", garbage)
    run(NewClasses(out=tmp_path / "garbage"))
    others = without_times(read_rows(tmp_path / "garbage" / "results.jsonl"))
    assert [row["setting"] for row in others] == [row["setting"] for row in rows]
    changed = {row["part"] for row, other in zip(rows, others, strict=True) if row != other}
    assert changed == {"shots"}


def test_each_split_has_images_of_its_own_draw(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in each run, wherever it was stopped."""
    seeds = []

    def watched(*given: Any, generator: torch.Generator) -> Task:
        seeds.append(generator.initial_seed())
        fresh = torch.Generator().manual_seed(seeds[-1])
        assert torch.equal(generator.get_state(), fresh.get_state()), "nothing was drawn from it before"
        return teach(*given, generator=generator)

    monkeypatch.setattr(new_classes, "teach", watched)
    run(NewClasses(out=micro))
    assert seeds == [0, 1, 2]
    for row in read_rows(micro / "results.jsonl"):
        if row["part"] == "shots":
            halves = Study(NewClasses(out=micro)).halves(row["split"])
            task = teach(halves, halves.test, MICRO.shots, generator=seeded(row["split"]))
            setting = next(s for s in MICRO.shots.grids[row["model"]] if asdict(s) == row["setting"])
            assert row["all"] == new_classes._worth(task, setting, row["shots"])["all"]


def test_a_stopped_run_goes_on_and_a_finished_one_measures_nothing(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = run(NewClasses(out=micro))
    alone = without_times(read_rows(micro / "results.jsonl"))
    advance = Progress.advance
    for stop in (1, 7, 13, 10, 5):
        left = [stop]

        def stopping(self: Progress, amount: float, title: str | None = None, *, left: list[int] = left) -> None:
            advance(self, amount, title)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Progress, "advance", stopping)
            with pytest.raises(KeyboardInterrupt):
                run(NewClasses(out=tmp_path / "stopped"))
    run(NewClasses(out=tmp_path / "stopped"))
    assert without_times(read_rows(tmp_path / "stopped" / "results.jsonl")) == alone
    monkeypatch.setattr(new_classes, "teach", None)
    monkeypatch.delattr(study, "tiny_imagenet")
    assert run(NewClasses(out=micro)) == table


def test_ties_go_to_the_first_setting(micro: Path) -> None:
    one = Study(NewClasses(out=micro))
    for place, scores in enumerate(((10.1, 20.2, 30.3), (30.3, 20.2, 10.1))):
        for count, score in enumerate(scores):
            one.record.add(part="shots-tuning", model="vote", place=place, shots=count, old=score, new=score)
    assert new_classes._best(one, "vote") == 0
    one.record.add(part="shots-tuning", model="vote", place=0, shots=9, old=90.0, new=0.0)
    one.record.add(part="shots-tuning", model="vote", place=1, shots=9, old=1.0, new=1.0)
    assert new_classes._best(one, "vote") == 1, "what ignores new classes is worth nothing"


def test_nothing_right_at_all_is_worth_nothing(micro: Path) -> None:
    one = Study(NewClasses(out=micro))
    one.record.add(part="shots-tuning", model="vote", place=0, shots=1, old=0.0, new=0.0)
    one.record.add(part="shots-tuning", model="vote", place=1, shots=1, old=1.0, new=2.0)
    assert new_classes._best(one, "vote") == 1


def test_more_images_than_there_are(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reduced data set has fewer than are kept otherwise."""
    many = replace(MICRO.shots, kept=500)
    halves = Study(NewClasses(out=micro)).halves(1)
    task = teach(halves, halves.test, many, generator=seeded(1))
    assert task.held.labels.bincount().tolist() == [TRAIN * 9 // 10] * OLD
