"""Section 4.2 on made-up numbers and images: what is measured, what a stream does, and what settings are chosen by."""

import contextlib
import copy
import io
import itertools
import json
import math
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import micro_images
import pytest
import torch
from micro_images import CLASSES, MICRO, TEST, TRAIN
from oracles.algorithm1 import mbpa_test, nearest
from PIL import Image
from torch import Tensor, nn

from recollect import EpisodicMemory, MbPA, Mixture, NonParametric, Parametric, gaussian, inverse_distance
from recollect.cli import main
from recollect.data import Dataset, data_folder
from recollect.errors import DeviceError, SettingError
from recollect.experiments import plots
from recollect.experiments.incremental import follow as following
from recollect.experiments.incremental import measures, pretraining, study
from recollect.experiments.incremental.figure5 import unbalanced
from recollect.experiments.incremental.follow import Course, Line, follow
from recollect.experiments.incremental.measures import calibration_error, measure, milliseconds, predict
from recollect.experiments.incremental.models import Adapted, FineTuning, Mixed, Setting, Vote
from recollect.experiments.incremental.rows import Mean, area, of, series, top1
from recollect.experiments.incremental.scales import MODELS, SCALES, Scale
from recollect.experiments.incremental.stream import Stream
from recollect.experiments.incremental.study import Incremental, Study
from recollect.experiments.runner import Progress, Run, read_rows
from recollect.predictors import Predictor

Untouched = Callable[[], AbstractContextManager[None]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Measures -------------------------------------------------------------------------------------------------------------


def error_slowly(confidence: list[float], right: list[bool], bins: int) -> float:
    """Returns the calibration error by a loop over bins; a bin has its upper edge, and the first one both."""
    total = 0.0
    for place in range(bins):
        low, high = place / bins, (place + 1) / bins
        rows = [i for i, c in enumerate(confidence) if low < c <= high or (place == 0 and c == 0)]
        if rows:
            accuracy = sum(right[i] for i in rows) / len(rows)
            total += len(rows) / len(confidence) * abs(accuracy - sum(confidence[i] for i in rows) / len(rows))
    return total


@pytest.mark.parametrize(("count", "bins"), [(1, 15), (7, 15), (400, 15), (400, 4), (400, 1)])
def test_calibration_error(count: int, bins: int) -> None:
    confidence = torch.rand(count, generator=seeded(), dtype=torch.float64)
    right = torch.rand(count, generator=seeded(1)) < confidence
    wanted = error_slowly(confidence.tolist(), right.tolist(), bins)
    assert calibration_error(confidence, right, bins=bins) == pytest.approx(wanted, abs=1e-12)
    if bins == 15:
        assert calibration_error(confidence, right) == pytest.approx(wanted, abs=1e-12)


def test_edges_of_bins_belong_to_the_bin_below() -> None:
    confidence = torch.tensor([0.0, 0.25, 0.25, 0.375, 0.5, 0.75, 1.0, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, False, True, True, False])
    wanted = error_slowly(confidence.tolist(), right.tolist(), 4)
    assert calibration_error(confidence, right, bins=4) == pytest.approx(wanted, abs=1e-12)
    two = torch.tensor([0.9, 0.9], dtype=torch.float64)
    assert calibration_error(two, torch.tensor([True, False])) == pytest.approx(0.4)


def worth_slowly(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Returns accuracy, likelihood and calibration, image by image."""
    rows, confidence, right = log_probs.double().tolist(), [], []
    nll = 0.0
    for row, label in zip(rows, labels.tolist(), strict=True):
        best = max(range(len(row)), key=lambda place: row[place])
        confidence.append(math.exp(row[best]))
        right.append(best == label)
        nll -= math.log(max(math.exp(row[label]), 1e-6)) / len(rows)
    ece = 100 * error_slowly(confidence, right, 15)
    return {"top1": 100 * sum(right) / len(right), "nll": nll, "ece": ece}


def test_measure() -> None:
    log_probs = torch.randn(300, 7, generator=seeded(), dtype=torch.float64).log_softmax(1)
    labels = torch.randint(7, (300,), generator=seeded(1))
    wanted = worth_slowly(log_probs, labels)
    assert measure(log_probs, labels)._asdict() == pytest.approx(wanted, abs=1e-9)
    sure = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]])
    found = measure(sure, torch.tensor([0, 1]))
    assert found == pytest.approx((50.0, -math.log(1e-6) / 2, 50.0), abs=1e-4)


def test_predict_is_the_same_in_pieces() -> None:
    keys, sizes = torch.randn(25, 3, generator=seeded()), []
    model = Parametric(nn.Linear(3, 4))

    class Watched(nn.Module):
        likelihood = model.likelihood

        def forward(self, keys: Tensor, *, before: None = None) -> Tensor:
            sizes.append(len(keys))
            return model(keys)

    assert torch.equal(predict(Watched(), keys, rows=10), model(keys))
    assert sizes == [10, 10, 5]


def test_milliseconds_are_medians_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round counts for nothing, and one slow round does not matter."""
    clock, asked = [0.0], []
    takes = {"a": [0.1, 1.0, 50.0, 3.0, 2.0, 4.0], "b": [99.0, 7.0, 7.0, 7.0, 7.0, 7.0]}

    def timed(name: str) -> Predictor:
        class Timed(nn.Module):
            likelihood = Parametric(nn.Linear(1, 1)).likelihood

            def forward(self, keys: Tensor, *, before: None = None) -> Tensor:
                asked.append(name)
                clock[0] += takes[name][asked.count(name) - 1]
                return keys

        return Timed()

    monkeypatch.setattr(measures.time, "perf_counter", lambda: clock[0])
    found = milliseconds({"a": timed("a"), "b": timed("b")}, torch.zeros(10, 1))
    assert asked == ["a", "b"] * 6
    assert found == pytest.approx({"a": 1000 * 3.0 / 10, "b": 1000 * 7.0 / 10})


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.1, 1.0, 3.0])
def test_area_of_a_straight_line_is_exact(end: float) -> None:
    points = [(x, 5.0 + 7.0 * x) for x in (3.0, 0.0, 0.02, 0.1, 0.5, 1.0, 2.0)]
    assert area(points, end) == pytest.approx(5.0 + 7.0 * end / 2, abs=1e-12)
    assert area([*points, (end + 0.01, 1e9)], end) == pytest.approx(area(points, end), abs=1e-12)


def test_area_is_that_of_trapezoids() -> None:
    xs = [0.0, 0.1, 0.25, 1.0, 4.0]
    ys = torch.rand(5, generator=seeded(), dtype=torch.float64).tolist()
    fine, total = 40_000, 0.0
    for step in range(fine):  # the middle of each narrow strip
        x = (step + 0.5) / fine
        left = max(i for i in range(4) if xs[i] <= x)
        share = (x - xs[left]) / (xs[left + 1] - xs[left])
        total += (ys[left] * (1 - share) + ys[left + 1] * share) / fine
    assert area(zip(xs, ys, strict=True), 1.0) == pytest.approx(total, abs=1e-6)


def test_mean_of_splits() -> None:
    values = [3.0, 5.0, 10.0, 2.5]
    mean = sum(values) / 4
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / 3) / math.sqrt(4)
    assert Mean.of(values) == pytest.approx((mean, error))
    assert Mean.of([4.25]) == (4.25, 0.0)
    assert str(Mean(12.34, 0.56)) == "12.3 +- 0.6"


def test_rows_are_picked_by_part_and_key_and_a_series_rises() -> None:
    rows = [
        {"part": part, "split": split, "epochs": epochs, "new": {"top1": 10.0 * split + epochs}}
        for epochs in (3.0, 0.1)
        for split in (1, 2)
        for part in ("a", "b")
    ]
    assert of(rows, "a", split=2) == [row for row in rows if row["part"] == "a" and row["split"] == 2]
    found = series(of(rows, "b"), "epochs", top1("new"))
    assert list(found) == [0.1, 3.0]
    assert found == {0.1: Mean.of([10.1, 20.1]), 3.0: Mean.of([13.0, 23.0])}


# The stream -----------------------------------------------------------------------------------------------------------

COUNT, SIZE, BATCH, OUTPUTS = 50, 3, 16, 5
SGD, ADAM = FineTuning("sgd", 0.1), FineTuning("adam", 0.01)


def stream(tuning: FineTuning = SGD, *, capacity: int | None = None, seed: int = 0, **change: Tensor) -> Stream:
    keys, labels = torch.randn(COUNT, SIZE, generator=seeded(1)), torch.arange(COUNT) % OUTPUTS
    parts = {"keys": keys, "labels": labels} | change
    return Stream(**parts, head=head(), tuning=tuning, capacity=capacity, batch=BATCH, seed=seed)


def head() -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(SIZE, OUTPUTS)


class Slowly(NamedTuple):
    """What a stream should be after some images."""

    head: nn.Linear
    held: list[int]
    """The images of the memory, the oldest first."""


def slowly(tuning: FineTuning, seen: int, *, capacity: int = COUNT, seed: int = 0) -> Slowly:
    """Returns the head and the memory after ``seen`` images: a loop in which batches may cross epochs."""
    keys, labels = torch.randn(COUNT, SIZE, generator=seeded(1)), torch.arange(COUNT) % OUTPUTS
    layer, held, g, count = head(), deque[int](maxlen=capacity), seeded(seed), 0
    if tuning.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=tuning.rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(layer.parameters(), lr=tuning.rate)
    rows: list[int] = []
    while count < seen:
        for image in torch.randperm(COUNT, generator=g).tolist():
            rows.append(image)
            if len(rows) == BATCH and count < seen:
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(keys[rows]), labels[rows]).backward()
                optimizer.step()
                held.extend(rows)
                count += len(rows)
                rows = []
    assert count == seen, "a batch is seen whole or not at all"
    return Slowly(layer, list(held))


def seen_by(one: Stream) -> int:
    return int(one.memory.step)


def rows_in_order(one: Stream) -> list[int]:
    """Returns the image of each slot that holds one, the oldest first."""
    slots = one.memory.written.argsort(stable=True)
    return one.rows[slots[one.memory.written[slots] >= 0]].tolist()


@pytest.mark.parametrize("tuning", [SGD, ADAM])
@pytest.mark.parametrize("capacity", [None, 1, 7, 16, 30])
@pytest.mark.parametrize("epochs", [0.0, 0.3, 1.0, 2.6])
def test_a_stream_is_a_loop(tuning: FineTuning, capacity: int | None, epochs: float, rng_untouched: Untouched) -> None:
    one = stream(tuning, capacity=capacity)
    with rng_untouched():
        one.advance(epochs)
    wanted = slowly(tuning, seen_by(one), capacity=capacity or COUNT)
    for got, parameter in zip(one.head.parameters(), wanted.head.parameters(), strict=True):
        assert torch.equal(got, parameter)
    assert rows_in_order(one) == wanted.held
    assert one.memory.capacity == (capacity or COUNT)
    filled = one.rows >= 0
    assert int(filled.sum()) == len(one.memory) == len(wanted.held)
    keys, labels = torch.randn(COUNT, SIZE, generator=seeded(1)), torch.arange(COUNT) % OUTPUTS
    assert torch.equal(one.memory.keys[filled], keys[one.rows[filled]])
    assert torch.equal(one.memory.values[filled], labels[one.rows[filled]])


def test_an_epoch_is_all_images_once_in_an_order_of_its_own() -> None:
    one = stream(capacity=2 * COUNT)
    one.advance(2.6)
    order = rows_in_order(one)
    assert len(order) == 2 * COUNT, "the third epoch has begun"
    whole = stream(capacity=1000)
    whole.advance(2.6)
    order = rows_in_order(whole)
    epochs = order[:COUNT], order[COUNT : 2 * COUNT]
    assert [sorted(rows) for rows in epochs] == [list(range(COUNT))] * 2
    assert epochs[0] != epochs[1]
    other = stream(capacity=1000, seed=1)
    other.advance(2.6)
    assert rows_in_order(other) != order


def test_pieces_are_the_same_as_the_whole() -> None:
    whole, pieces = stream(capacity=20), stream(capacity=20)
    whole.advance(2.6)
    for epochs in (0.0, 0.3, 0.3, 0.31, 1.0, 2.2, 2.6):
        pieces.advance(epochs)
    assert torch.equal(pieces.head.weight, whole.head.weight)
    assert torch.equal(pieces.rows, whole.rows)
    assert seen_by(pieces) == seen_by(whole)


def test_the_nearest_whole_step() -> None:
    """Of three batches an epoch, each full."""
    keys, labels = torch.randn(48, SIZE, generator=seeded()), torch.arange(48) % OUTPUTS
    for epochs, steps in ((0.0, 0), (0.1, 0), (0.2, 1), (0.45, 1), (0.6, 2), (1.0, 3), (1.4, 4), (20.0, 60)):
        one = stream(keys=keys, labels=labels)
        one.advance(epochs)
        assert seen_by(one) == steps * BATCH


def test_a_stream_never_strays_from_its_epochs() -> None:
    """Although no epoch is a whole number of batches."""
    one = stream()
    for epochs in (0.5, 1.0, 2.0, 5.0, 20.0):
        one.advance(epochs)
        assert abs(seen_by(one) - epochs * COUNT) <= BATCH / 2


def test_a_stream_does_not_go_back() -> None:
    one = stream()
    one.advance(1.0)
    before = one.head.weight.clone()
    one.advance(1.0)
    assert torch.equal(one.head.weight, before)
    with pytest.raises(SettingError, match=r"0\.3 epochs of this stream are over"):
        one.advance(0.3)


# The models -----------------------------------------------------------------------------------------------------------


def test_fine_tuning() -> None:
    layer = head()
    sgd, adam = SGD.optimize(layer), ADAM.optimize(layer)
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.1, 0.9)
    assert isinstance(adam, torch.optim.Adam)
    assert adam.defaults["lr"] == 0.01
    assert [p for group in sgd.param_groups for p in group["params"]] == list(layer.parameters())
    predictor = SGD.predictor(layer, EpisodicMemory(5, SIZE))
    assert isinstance(predictor, Parametric)
    keys = torch.randn(4, SIZE, generator=seeded())
    torch.testing.assert_close(predictor(keys), layer(keys).log_softmax(1).detach())


def vote_slowly(keys: Tensor, labels: Tensor, query: Tensor, neighbors: int, bandwidth: float | None) -> Tensor:
    """Returns the probabilities of a weighted vote, neighbor by neighbor."""
    votes = torch.zeros(OUTPUTS, dtype=torch.float64)
    for row in nearest(keys, query, neighbors):
        distance = float(((keys[row] - query) ** 2).sum())
        weight = 1 / (1e-3 + distance) if bandwidth is None else math.exp(-distance / (2 * bandwidth**2))
        votes[labels[row]] += weight
    return votes / votes.sum()


def held() -> tuple[nn.Linear, EpisodicMemory, Tensor, Tensor, Tensor]:
    one = stream()
    one.advance(1.0)
    slots = one.memory.written.argsort()[-len(one.memory) :]  # empty slots come first
    queries = torch.randn(6, SIZE, generator=seeded(7))
    return one.head, one.memory, one.memory.keys[slots].double(), one.memory.values[slots], queries


@pytest.mark.parametrize("bandwidth", [None, 0.7])
def test_vote_and_mixture(bandwidth: float | None) -> None:
    layer, memory, keys, labels, queries = held()
    vote, mixed = Vote(4, bandwidth).predictor(layer, memory), Mixed(4, bandwidth, 0.3).predictor(layer, memory)
    assert isinstance(vote, NonParametric)
    assert (vote.neighbors, vote.classes) == (4, OUTPUTS)
    assert vote.kernel == (inverse_distance(epsilon=1e-3) if bandwidth is None else gaussian(0.7))
    assert isinstance(mixed, Mixture)
    assert mixed.weights == pytest.approx((0.3, 0.7))
    for query, voted, both in zip(queries, vote(queries), mixed(queries), strict=True):
        wanted = vote_slowly(keys, labels, query.double(), 4, bandwidth)
        torch.testing.assert_close(voted.exp().double(), wanted, rtol=1e-4, atol=1e-5)
        own = layer(query).softmax(0).double().detach()
        torch.testing.assert_close(both.exp().double(), 0.3 * own + 0.7 * wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["sgd", "rmsprop"])
def test_adapted_is_algorithm_1(rule: str) -> None:
    layer, memory, keys, labels, queries = held()
    model = Adapted(rule, 5, 0.05, 3).predictor(layer, memory)
    assert isinstance(model, MbPA)
    make = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.05),
    }[rule]
    double = copy.deepcopy(layer).double()
    settings: dict[str, Any] = {"neighbors": 5, "optimizer": make, "steps": 3}
    for query, found in zip(queries.double(), model(queries), strict=True):
        wanted = mbpa_test(double, keys, labels, query, **settings).log_softmax(0)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert Adapted(rule, 5, 0.05, 3, 0.7).predictor(layer, memory).kernel == gaussian(0.7)


# Following ------------------------------------------------------------------------------------------------------------

MARKS, POINTS, EVERY = (0.6, 1.3), (0.0, 0.6, 1.0, 1.3), 3
IMAGES = Dataset(torch.randn(30, SIZE, generator=seeded(3)), torch.arange(OUTPUTS).repeat_interleave(6))
GROUPS = {"old": torch.arange(OUTPUTS) < 2, "new": torch.arange(OUTPUTS) >= 2}
SETTINGS: dict[str, Setting] = {
    "parametric": SGD,
    "vote": Vote(3, None),
    "mbpa": Adapted("sgd", 4, 0.5, 2),
    "rmsprop": Adapted("rmsprop", 4, 0.01, 2),
}
LINES = [Line({"part": "x", "model": name}, setting) for name, setting in SETTINGS.items()]


def course(**change: Tensor) -> Course:
    return Course(stream(**change), IMAGES, GROUPS, MARKS, EVERY)


def followed(
    folder: Path,
    *,
    begin: Callable[[], Course] = course,
    points: Sequence[float] = POINTS,
    lines: Sequence[Line] = LINES,
    stop: int = 0,
) -> list[dict[str, Any]]:
    """Follows the stream and returns the rows; stops before a measurement if there is one of that number."""
    with pytest.MonkeyPatch.context() as patch, Progress(1.0, "x") as progress:
        count = itertools.count(1)

        def watched(predictor: Predictor, keys: Tensor) -> Tensor:
            if next(count) == stop:
                raise KeyboardInterrupt
            return predict(predictor, keys)

        patch.setattr(following, "predict", watched)
        follow(Run(folder, {}), lines, points, begin, progress)
    return read_rows(folder / "results.jsonl")


def test_rows_are_what_models_of_the_head_and_memory_of_each_point_are_worth(tmp_path: Path) -> None:
    rows = followed(tmp_path)
    keys, labels = torch.randn(COUNT, SIZE, generator=seeded(1)), torch.arange(COUNT) % OUTPUTS
    assert [(row["epochs"], row["model"]) for row in rows] == list(itertools.product(POINTS, SETTINGS))
    for row in rows:
        seen = {0.0: 0, 0.6: 32, 1.0: 48, 1.3: 64}[row["epochs"]]
        if row["epochs"] >= 1.0:  # the last batch of an epoch is smaller
            seen = seen_by_advance(row["epochs"])
        layer, rows_held = slowly(SGD, seen)
        memory = EpisodicMemory(COUNT, SIZE)
        memory.write(keys[rows_held], labels[rows_held])
        at_mark = row["epochs"] in MARKS
        images = [i for i in range(30) if at_mark or i % EVERY == 0]
        assert row["images"] == len(images)
        log_probs = SETTINGS[row["model"]].predictor(layer, memory)(IMAGES.inputs[images])
        for group in ("all", "old", "new"):
            some = [
                place
                for place, image in enumerate(images)
                if group == "all" or (int(IMAGES.labels[image]) < 2) == (group == "old")
            ]
            wanted = worth_slowly(log_probs[some], IMAGES.labels[images][some])
            assert row[group] == pytest.approx(wanted, abs=1e-3)
            assert all(value == round(value, 4) for value in row[group].values())
        assert row["setting"] == asdict(SETTINGS[row["model"]])


def seen_by_advance(epochs: float) -> int:
    one = stream()
    one.advance(epochs)
    return seen_by(one)


def test_nothing_is_measured_twice(tmp_path: Path) -> None:
    def never() -> Course:
        raise AssertionError("the stream is not needed")

    rows = followed(tmp_path)
    assert followed(tmp_path, begin=never, stop=1) == rows
    more = [*LINES, Line({"part": "x", "model": "another"}, Vote(1, None))]
    found = followed(tmp_path, lines=more, stop=len(POINTS) + 1)
    assert found[: len(rows)] == rows
    assert {row["model"] for row in found[len(rows) :]} == {"another"}
    assert len(found) == len(rows) + len(POINTS)


def test_a_stopped_run_goes_on_and_ends_like_one_left_alone(tmp_path: Path) -> None:
    alone = followed(tmp_path / "alone")
    for stop in range(1, len(alone) + 1):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            followed(folder, stop=stop)
        assert len(read_rows(folder / "results.jsonl")) == stop - 1
        assert followed(folder) == alone
    for cut in (1, 100):  # a kill while a line is written
        file = tmp_path / "1" / "results.jsonl"
        file.write_bytes(file.read_bytes()[:-cut])
        assert followed(tmp_path / "1") == alone


def test_a_stop_between_measurements_goes_on_as_well(tmp_path: Path) -> None:
    class Stopping:
        def __init__(self, stop: int) -> None:
            self.left = stop

        def advance(self, amount: float) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    alone = followed(tmp_path / "alone")
    for stop in (1, 4, 7):
        folder = tmp_path / str(stop)
        with pytest.MonkeyPatch.context() as patch, Progress(1.0, "x") as progress:
            patch.setattr(progress, "advance", Stopping(stop).advance)
            with pytest.raises(KeyboardInterrupt):
                follow(Run(folder, {}), LINES, POINTS, course, progress)
        assert followed(folder) == alone


def test_predictions_never_see_later_images(tmp_path: Path) -> None:
    whole = stream()
    whole.advance(0.6)
    later = torch.ones(COUNT, dtype=torch.bool)
    later[rows_in_order(whole)] = False
    assert 0 < int(later.sum()) < COUNT
    keys, labels = torch.randn(COUNT, SIZE, generator=seeded(1)), torch.arange(COUNT) % OUTPUTS
    keys[later], labels[later] = 9.0, 0
    rows = followed(tmp_path / "one")
    others = followed(tmp_path / "other", begin=lambda: course(keys=keys, labels=labels))
    for row, other in zip(rows, others, strict=True):
        assert (row == other) == (row["epochs"] <= 0.6)


# The study ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Made-up images and features; the folder of a run."""
    micro_images.use(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(study, "features", micro_images.untrained)
    return tmp_path / "out"


def test_choices_are_best_on_validation_images_of_the_first_split(micro: Path) -> None:
    one = Study(Incremental(out=micro))
    choices = one.choices()
    rows = read_rows(micro / "results.jsonl")
    assert {row["part"] for row in rows} == {"tuning"}
    assert {row["images"] for row in rows} == {CLASSES * TRAIN // 10 // MICRO.every}
    for model, chosen in choices.items():
        tried = MICRO.grids.of(model)
        means = []
        for place, setting in enumerate(tried):
            found = [row for row in rows if row["model"] == model and row["place"] == place]
            assert [row["epochs"] for row in found] == list(MICRO.marks)
            assert all(row["setting"] == asdict(setting) for row in found)
            means.append(sum(row["all"]["top1"] for row in found) / len(found))
        assert chosen == tried[means.index(max(means))]
    assert Study(Incremental(out=micro)).choices() == choices


@pytest.mark.parametrize("name", ["figure4.png", "explanation.png", "mine.png"])
def test_pictures_of_no_run_are_refused_and_left(micro: Path, name: str) -> None:
    micro.mkdir()
    (micro / name).write_bytes(b"mine")
    with pytest.raises(SettingError, match=rf"{name} is there, but it is of no run.*--out"):
        Study(Incremental(out=micro))
    assert [path.name for path in micro.iterdir()] == [name]
    (micro / name).unlink()
    Study(Incremental(out=micro))
    (micro / name).write_bytes(b"of the run")
    Study(Incremental(out=micro))


def test_a_wrong_device_is_refused_at_once(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(study, "tiny_imagenet")
    monkeypatch.delattr(study, "features")
    with pytest.raises(DeviceError, match="'abacus'"):
        Study(Incremental(out=micro, device="abacus"))
    assert not micro.exists()


def made_up(folder: Path, scores: dict[str, tuple[Sequence[float], ...]], scale: Scale = MICRO) -> Study:
    """Returns a study whose settings have these accuracies at the marks; models that are not named have 0."""
    one = Study(Incremental(out=folder))
    for model in MODELS:
        for place, setting in enumerate(scale.grids.of(model)):
            for mark, score in zip(scale.marks, scores.get(model, ((0.0,) * 9,) * 9)[place], strict=False):
                worth = {"top1": score, "nll": 1.0, "ece": 1.0}
                key = {"part": "tuning", "model": model, "place": place, "epochs": mark}
                one.record.add(**key, setting=asdict(setting), all=worth, images=10)
    return one


def test_ties_go_to_the_first_and_the_mean_over_marks_decides(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(study, "tiny_imagenet")  # nothing is measured
    scores: dict[str, tuple[Sequence[float], ...]] = {
        "parametric": ((10.0, 50.0), (40.0, 21.0)),
        "non-parametric": ((10.0, 30.0), (30.0, 10.0)),
        "mbpa-sgd": ((90.0, 0.0), (50.0, 50.0)),
    }
    choices = made_up(micro, scores).choices()
    assert [MICRO.grids.of(model).index(chosen) for model, chosen in choices.items()] == [1, 0, 0, 0, 1]


def test_the_order_of_a_sum_decides_no_tie(micro: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(study, "tiny_imagenet")
    scale = replace(MICRO, marks=(0.1, 1.0, 3.0))
    monkeypatch.setitem(SCALES, "smoke", scale)
    low, high = (10.1, 20.2, 30.3), (30.3, 20.2, 10.1)
    assert sum(low) != sum(high)
    for name, pair in (("one", (low, high)), ("other", (high, low))):
        assert made_up(micro / name, {"mbpa-sgd": pair}, scale).choices().sgd == scale.grids.sgd[0]


def test_neither_test_images_nor_other_splits_count_for_a_choice(
    micro: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Study(Incremental(out=micro))
    choices = first.choices()
    read = study.tiny_imagenet

    def garbage(**watch: Any) -> Any:
        found = read(**watch)
        test = found.test._replace(labels=(found.test.labels + 2) % CLASSES, pixels=found.test.pixels.flip(0))
        return found._replace(test=test)

    def only_first(images: Any, recipe: Any, *, seed: int, device: str) -> pretraining.Features:
        assert seed == 0
        return micro_images.untrained(images, recipe, seed=seed, device=device)

    monkeypatch.setattr(study, "tiny_imagenet", garbage)
    monkeypatch.setattr(study, "features", only_first)
    other = Study(Incremental(out=tmp_path / "garbage"))
    assert other.choices() == choices
    assert other.record.rows == first.record.rows


def test_validation_images_choose_and_test_images_judge(micro: Path) -> None:
    one = Study(Incremental(out=micro))
    assert one.splits == range(1, 3)
    labels, images = one.data.train.labels, one.data
    for number in range(3):
        halves = one.halves(number)
        found = micro_images.untrained(images, None, seed=number, device="cpu")
        parts = pretraining.split(labels, CLASSES, seed=number)
        assert torch.equal(halves.new, parts.new)
        assert torch.equal(halves.train.inputs, found.train[parts.train])
        assert torch.equal(halves.valid.inputs, found.train[parts.valid])
        assert torch.equal(halves.valid.labels, labels[parts.valid])
        assert torch.equal(halves.test.inputs, found.test)
        assert torch.equal(halves.test.labels, images.test.labels)
        run = one.course(number, SGD)
        assert run.stream.memory.capacity == len(parts.train)
        assert torch.equal(run.stream.head.weight, found.weight)
        run.stream.advance(1.0)
        taught = {tuple(key) for key in run.stream.memory.keys.tolist()}
        judged = {tuple(key) for key in run.images.inputs.tolist()}
        assert not taught & judged
        assert taught <= {tuple(key) for key in halves.train.inputs.tolist()}
        assert {name: part.tolist() for name, part in run.groups.items()} == {
            "old": (~parts.new).tolist(),
            "new": parts.new.tolist(),
        }
        if number == 0:
            assert torch.equal(run.images.inputs, halves.valid.inputs[:: MICRO.every])
            assert run.every == 1
            assert run.images.labels.bincount().tolist() == [TRAIN // 10 // MICRO.every] * CLASSES
        else:
            assert torch.equal(run.images.inputs, halves.test.inputs)
            assert run.every == MICRO.every
        assert run.marks == MICRO.marks
    rows = torch.tensor([3, 5, 100])
    some = one.course(1, SGD, capacity=2, rows=rows, groups=GROUPS)
    assert some.groups is GROUPS
    assert some.stream.memory.capacity == 2
    some.stream.advance(0.0)
    assert len(some.stream.rows) == 2


def test_another_split_has_another_order_and_the_head_of_its_network(micro: Path) -> None:
    one = Study(Incremental(out=micro))
    orders = []
    for number in (1, 2, 1):
        run = one.course(number, SGD)
        run.stream.advance(0.5)
        orders.append(rows_in_order(run.stream))
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("name", list(SCALES))
def test_a_scale_tries_as_many_settings_of_each_model(name: str) -> None:
    scale = SCALES[name]
    assert len({len(scale.grids.of(model)) for model in MODELS}) == 1
    assert len({len(grid) for name, grid in scale.shots.grids.items() if name != "nearest-mean"}) == 1
    assert set(scale.marks) <= set(scale.points)
    for points in (scale.points, scale.long_points, scale.sweep, scale.shots.images, scale.marks):
        assert list(points) == sorted(set(points))
    assert scale.points[0] == 0.0
    assert scale.splits >= 3
    for model in MODELS:
        assert len(set(scale.grids.of(model))) == len(scale.grids.of(model))


@pytest.mark.parametrize("name", [name for name in SCALES if name != "smoke"])
def test_who_reads_the_memory_may_choose_of_the_same_kernels_and_neighbors(name: str) -> None:
    """The vote, which costs least, of more neighbors."""
    grids = SCALES[name].grids
    mixture, rmsprop, sgd, vote = (
        {(setting.neighbors, setting.bandwidth) for setting in grids.of(model)}
        for model in ("mixture", "mbpa-rmsprop", "mbpa-sgd", "non-parametric")
    )
    assert mixture == rmsprop == sgd <= vote
    assert len({bandwidth for _, bandwidth in vote}) > 1


# Figure 5 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "kept"), [(450, 45), (54, 6), (10, 1), (1, 1)])
def test_rare_classes_have_a_tenth_of_the_images(count: int, kept: int) -> None:
    labels = torch.arange(8).repeat_interleave(count)[torch.randperm(8 * count, generator=seeded())]
    rare = torch.tensor([False, True, False, False, True, False, True, True])
    rows = unbalanced(Dataset(torch.zeros(len(labels), 1), labels), rare)
    assert len(rows.unique()) == len(rows)
    assert labels[rows].bincount(minlength=8).tolist() == [kept if one else count for one in rare.tolist()]


def test_every_other_new_class_is_rare(micro: Path) -> None:
    from recollect.experiments.incremental.figure5 import _course

    one = Study(Incremental(out=micro))
    for number in one.splits:
        halves, run = one.halves(number), _course(one, number, SGD)
        new = [label for label in range(CLASSES) if halves.new[label]]
        rare = set(new[1::2])
        for name, wanted in (("rare", rare), ("full", set(new) - rare), ("old", set(range(CLASSES)) - set(new))):
            assert {label for label in range(CLASSES) if run.groups[name][label]} == wanted
        run.stream.advance(1.0)
        whole = halves.train.labels.bincount().tolist()
        counts = [math.ceil(whole[label] / 10) if label in rare else whole[label] for label in range(CLASSES)]
        assert run.stream.memory.capacity == sum(counts)
        run.stream.advance(32.0)  # a whole number of batches of 128, so the memory holds one epoch
        assert run.stream.memory.values.bincount().tolist() == counts
        assert torch.equal(run.images.labels, halves.test.labels), "as many of every class"
        assert list(run.marks) == [MICRO.long_points[-1]]


# All of it ------------------------------------------------------------------------------------------------------------

COMMANDS = ("table1", "figure5", "figure6", "figure7", "new-classes")
PICTURES = ("figure4.png", "figure5.png", "figure6.png", "figure7.png", "new-classes.png")


class Ran(NamedTuple):
    """A folder in which all has been run."""

    out: Path
    cache: Path
    printed: dict[str, str]
    trainings: int


def command(*arguments: str) -> tuple[int, str, str]:
    """Runs ``recollect`` and returns its status, what it printed, and its complaints."""
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        status = main(list(arguments))
    return status, printed.getvalue(), complaint.getvalue()


def without_files(printed: str) -> str:
    """Leaves out the last line, which names the files that are there by now."""
    return printed.partition("\nWritten to ")[0]


def everything(out: Path) -> dict[str, str]:
    printed = {}
    for name in COMMANDS:
        status, printed[name], complaint = command("reproduce", name, "--out", str(out))
        assert status == 0, complaint
    status, printed["explain"], complaint = command("explain", "--out", str(out), "--epochs", "0.5")
    assert status == 0, complaint
    return printed


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Saves the time that pictures take."""
    patch.setattr(plots, "panels", lambda parts, path, **how: None)
    patch.setattr(plots, "save", lambda picture, path: None)


needs_images = pytest.mark.skipif(
    data_folder() is None or not list((data_folder() / "tiny-imagenet").glob("tiny-imagenet-200*")),
    reason="Tiny-ImageNet is not at hand: set RECOLLECT_DATA to the folder that holds tiny-imagenet/",
)


@needs_images  # before the tests below, whose made-up images stay until the end of the module
def test_table1_runs_at_its_smallest(tmp_path: Path) -> None:
    status, printed, complaint = command("reproduce", "table1", "--scale", "smoke", "--out", str(tmp_path))
    assert status == 0, complaint
    assert "## Table 1: new and old classes" in printed
    assert printed.startswith((tmp_path / "table.md").read_text())
    with Image.open(tmp_path / "figure4.png") as picture:
        assert min(picture.size) > 500
    rows = read_rows(tmp_path / "results.jsonl")
    assert {row["images"] for row in of(rows, "curve", epochs=1.0)} == {200 * 10}
    for split in (1, 2):
        found = {row["model"]: row["all"]["top1"] for row in of(rows, "curve", epochs=0.0, split=split)}
        assert found.pop("non-parametric") == 0.5, "an empty memory says one class of all images"
        assert len(set(found.values())) == 1, "and changes no prediction of the others"
    assert len(of(rows, "cost")) == len(MODELS)
    assert TEST == 10


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """All tables and figures; for the tests below, which leave the folder as it is."""
    folder = tmp_path_factory.mktemp("micro")
    with pytest.MonkeyPatch.context() as patch:
        micro_images.use(patch, folder / "cache")
        seeds = []
        trained, save = pretraining.trained, plots.save

        def counted(*given: Any, **settings: Any) -> Any:
            seeds.append(settings["seed"])
            return trained(*given, **settings)

        patch.setattr(pretraining, "trained", counted)
        patch.setattr(plots, "save", lambda canvas, path: None if path.exists() else save(canvas, path))  # each once
        printed = everything(folder / "out")
        assert seeds == [0, 1, 2]
        yield Ran(folder / "out", folder / "cache", printed, len(seeds))


def test_one_folder_holds_every_row_of_all_tables_and_figures(whole: Ran) -> None:
    counts = Counter(row["part"] for row in read_rows(whole.out / "results.jsonl"))
    splits, models, sweep = 2, len(MODELS), len(MICRO.sweep)
    assert counts == {
        "tuning": 2 * models * len(MICRO.marks),
        "curve": splits * models * len(MICRO.points),
        "cost": models,
        "unbalanced": splits * models * len(MICRO.long_points),
        "size": splits * len(MICRO.capacities) * sweep,
        "rate": splits * len(MICRO.rates) * 3 * sweep,
        "neighbors": splits * len(MICRO.neighbors) * sweep,
        "shots-tuning": 2 * 4 * len(MICRO.shots.images),
        "shots": splits * 4 * len(MICRO.shots.images),
    }
    for name in (*PICTURES, "explanation-epochs-0.5.png"):
        with Image.open(whole.out / name) as picture:
            picture.verify()
            assert min(picture.size) > 500
    table = (whole.out / "table.md").read_text()
    assert whole.printed["new-classes"].startswith(table)
    titles = [line for line in table.splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles)) == 12
    assert without_files(whole.printed["table1"]).strip() in table


def test_rows_are_of_the_settings_that_they_name(whole: Ran) -> None:
    """Each is measured again, by a stream of its own."""
    rows, own = read_rows(whole.out / "results.jsonl"), Study(Incremental(out=whole.out))
    choices = own.choices()
    settings = dict(choices.items())
    assert {row["rate"] for row in of(rows, "rate")} == {rate * choices.parametric.rate for rate in MICRO.rates}
    for number, epochs in itertools.product(own.splits, MICRO.sweep):
        halves = own.halves(number)
        chosen, sgd = choices.parametric, choices.sgd
        cases: list[tuple[dict[str, Any], FineTuning, int | None, Setting]] = [
            *(({"part": "curve", "model": model}, chosen, None, setting) for model, setting in settings.items()),
            *(({"part": "size", "capacity": size}, chosen, size, sgd) for size in MICRO.capacities),
            *(
                ({"part": "neighbors", "neighbors": count}, chosen, None, replace(sgd, neighbors=count))
                for count in MICRO.neighbors
            ),
        ]
        for rate, model in itertools.product(MICRO.rates, ("parametric", "mixture", "mbpa-sgd")):
            fine = replace(chosen, rate=rate * chosen.rate)
            setting = fine if model == "parametric" else settings[model]
            cases.append(({"part": "rate", "rate": fine.rate, "model": model}, fine, None, setting))
        for key, fine, capacity, setting in cases:
            (row,) = of(rows, **key, split=number, epochs=epochs)
            start = halves.features.head()
            one = Stream(halves.train.inputs, halves.train.labels, start, fine, capacity=capacity, seed=number)
            one.advance(epochs)
            images = halves.test if key["part"] == "curve" else halves.test.take(slice(None, None, MICRO.every))
            assert row["images"] == len(images.labels)
            log_probs = setting.predictor(one.head, one.memory)(images.inputs)
            new = halves.new[images.labels]
            for group, some in (("all", slice(None)), ("new", new), ("old", ~new)):
                wanted = worth_slowly(log_probs[some], images.labels[some])
                assert row[group] == pytest.approx(wanted, abs=1e-3)
            assert row["setting"] == asdict(setting)


def test_a_second_time_nothing_is_computed(whole: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (whole.out / "results.jsonl").read_bytes()
    monkeypatch.delattr(pretraining, "trained")
    monkeypatch.delattr(following, "predict")
    monkeypatch.setattr(Run, "add", None)
    undrawn(monkeypatch)
    again = everything(whole.out)
    assert (whole.out / "results.jsonl").read_bytes() == rows
    for name in ("new-classes", "explain"):
        assert without_files(again[name]) == without_files(whole.printed[name])
    monkeypatch.delattr(study, "tiny_imagenet")  # nor are the images needed
    assert command("reproduce", "figure4", "--out", str(whole.out))[0] == 0


def test_another_folder_has_the_same_rows_from_the_same_features(
    whole: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(pretraining, "trained")
    undrawn(monkeypatch)
    assert command("reproduce", "figure4", "--out", str(tmp_path))[0] == 0
    names = {"tuning", "curve"}
    found, before = (
        [row for row in read_rows(folder / "results.jsonl") if row["part"] in names] for folder in (tmp_path, whole.out)
    )
    assert found == before
    assert len(list((whole.cache / "incremental").glob("features-*"))) == whole.trainings


def test_another_scale_needs_another_folder(whole: Ran) -> None:
    before = {path: path.read_bytes() for path in whole.out.iterdir()}
    for name in ("table1", "figure5", "new-classes"):
        status, _, complaint = command("reproduce", name, "--scale", "small", "--out", str(whole.out))
        assert status == 2
        assert "holds a run with other settings" in complaint
        assert "--out" in complaint
        assert len(complaint.splitlines()) == 1
        assert "(scale=smoke there, small asked)" in complaint, "and none of the many that a scale stands for"
    assert command("explain", "--scale", "small", "--out", str(whole.out))[0] == 2
    assert {path: path.read_bytes() for path in whole.out.iterdir()} == before


def test_the_config_names_all_that_determines_the_results(whole: Ran) -> None:
    settings = json.loads((whole.out / "config.json").read_text())["settings"]
    assert settings == json.loads(json.dumps({"scale": "smoke", **asdict(MICRO)}))


def test_a_stopped_table_ends_like_one_left_alone(whole: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undrawn(monkeypatch)
    add = Run.add
    for stop in (1, 15, 30, 10):
        count = itertools.count(1)

        def stopping(record: Run, *, count: Iterator[int] = count, stop: int = stop, **row: Any) -> None:
            if next(count) == stop:
                raise KeyboardInterrupt
            add(record, **row)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "add", stopping)
            status, _, complaint = command("reproduce", "table1", "--out", str(tmp_path))
        assert (status, "stopped" in complaint) == (130, True)
    status, printed, _ = command("reproduce", "table1", "--out", str(tmp_path))
    assert status == 0
    rows, before = (read_rows(folder / "results.jsonl") for folder in (tmp_path, whole.out))
    for part in ("tuning", "curve"):
        assert of(rows, part) == of(before, part)

    def numbers(table: str) -> list[str]:
        """Leaves out the milliseconds, the second column of one table."""
        before, title, cost = without_files(table).partition("## Cost beside the gain")
        own, line, rest = cost.partition("## Settings")
        assert title, line
        return [before, *(re.sub(r"^(\|[^|]*\|)[^|]*\|", r"\1", one) for one in own.splitlines()), rest]

    assert numbers(printed) == numbers(whole.printed["table1"])


@pytest.mark.parametrize("left", range(1, len(MODELS)))
def test_costs_of_which_some_are_lost_are_all_taken_anew(
    whole: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """Those of one table are measured side by side."""
    undrawn(monkeypatch)
    rows = read_rows(whole.out / "results.jsonl")
    cost = of(rows, "cost")
    old = [row | {"milliseconds": 1e6} for row in cost[:left]]
    kept = of(rows, "tuning") + of(rows, "curve") + old
    (tmp_path / "config.json").write_bytes((whole.out / "config.json").read_bytes())
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    status, printed, complaint = command("reproduce", "table1", "--out", str(tmp_path))
    assert status == 0, complaint
    found = of(read_rows(tmp_path / "results.jsonl"), "cost")
    assert [row["model"] for row in found] == [*MODELS[:left], *MODELS]
    assert found[:left] == old
    own = found[left:]
    assert max(row["milliseconds"] for row in own) < 1e6
    assert {row["entries"] for row in own} == {row["entries"] for row in cost}
    assert "e+06" not in printed
    monkeypatch.delattr(study, "tiny_imagenet")
    assert command("reproduce", "table1", "--out", str(tmp_path))[0] == 0
    assert of(read_rows(tmp_path / "results.jsonl"), "cost") == found
