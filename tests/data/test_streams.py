"""Streams of tasks: everything random is drawn once, from the generator, whatever happens around it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy import ndimage

from recollect.data import Dataset, Task, permuted, rotated, split
from recollect.errors import DtypeError, SettingError, ShapeError

Stream = Callable[..., Iterator[Task]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(count: int, size: int = 16) -> Dataset:
    """Rows that tell where each number came from: entry (i, j) is i + j / 100."""
    return Dataset(torch.arange(count)[:, None] + torch.arange(size) / 100, torch.arange(count) % 4)


def origin(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which row and which column each entry came from."""
    rows = (inputs + 0.001).floor()
    return rows.long(), ((inputs - rows) * 100).round().long()


TRAIN, TEST = dataset(20), dataset(8)

# Streams of two tasks whose inputs are those of the data in some order, so that `origin` can tell it.
STREAMS = {
    "permuted": partial(permuted, tasks=2),
    "rotated": partial(rotated, tasks=2, largest=0.0),
    "split": split,
}
every_stream = pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
counted_stream = pytest.mark.parametrize(
    "stream", [permuted, partial(rotated, largest=0.0)], ids=["permuted", "rotated"]
)


def assert_same(a: Dataset, b: Dataset) -> None:
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.labels, b.labels)


def chosen(task: Task) -> tuple[int, ...]:
    """Returns which rows the training examples of a task came from."""
    return tuple(origin(task.train.inputs)[0][:, 0].tolist())


def test_each_task_is_one_permutation_of_train_and_test() -> None:
    for task in permuted(TRAIN, TEST, tasks=3, examples=5, generator=generator()):
        rows, columns = origin(task.train.inputs)
        order = columns[0]
        assert order.sort().values.tolist() == list(range(16))
        assert (columns == order).all()
        assert (rows == rows[:, :1]).all()
        assert rows[:, 0].unique().numel() == 5
        assert torch.equal(task.train.labels, TRAIN.labels[rows[:, 0]])
        assert torch.equal(task.test.inputs, TEST.inputs[:, order])
        assert torch.equal(task.test.labels, TEST.labels)
        assert task.outputs is None


def test_tasks_differ_in_permutation() -> None:
    tasks = permuted(TRAIN, TEST, tasks=4, examples=5, generator=generator())
    assert len({tuple(origin(task.train.inputs)[1][0].tolist()) for task in tasks}) == 4


@counted_stream
def test_tasks_differ_in_examples(stream: Stream) -> None:
    assert len({chosen(task) for task in stream(TRAIN, TEST, tasks=4, examples=5, generator=generator())}) == 4


@counted_stream
def test_a_task_is_the_same_however_many_are_asked_for(stream: Stream) -> None:
    few = list(stream(TRAIN, TEST, tasks=5, examples=6, generator=generator(3)))
    many = list(stream(TRAIN, TEST, tasks=20, examples=6, generator=generator(3)))
    assert (len(few), len(many)) == (5, 20)
    for a, b in zip(few, many, strict=False):
        assert_same(a.train, b.train)
        assert_same(a.test, b.test)


@every_stream
def test_other_uses_of_the_generator_on_the_way_change_nothing(stream: Stream) -> None:
    shared = generator(3)
    quiet = stream(TRAIN, TEST, generator=generator(3))
    busy = stream(TRAIN, TEST, generator=shared)
    for a, b in zip(quiet, busy, strict=True):
        assert_same(a.train, b.train)
        torch.randperm(100, generator=shared)  # say, shuffling the task's batches


@every_stream
def test_two_streams_of_one_generator_differ(stream: Stream) -> None:
    shared = generator(3)
    one, two = (next(stream(TRAIN, TEST, generator=shared)) for _ in range(2))
    assert not torch.equal(one.train.inputs, two.train.inputs)


@every_stream
def test_the_data_of_a_task_are_made_when_it_is_reached(stream: Stream) -> None:
    train, test = dataset(20), dataset(8)
    tasks = stream(train, test, generator=generator())
    assert next(tasks).train.inputs.any()
    train.inputs.zero_()
    test.inputs.zero_()
    later = next(tasks)
    assert not later.train.inputs.any()
    assert not later.test.inputs.any()


@counted_stream
def test_all_examples_when_none_are_asked_for(stream: Stream) -> None:
    rows = chosen(next(stream(TRAIN, TEST, tasks=1, generator=generator())))
    assert sorted(rows) == list(range(20)) != list(rows)


@every_stream
def test_neither_the_global_random_state_nor_the_data_are_touched(
    rng_untouched: Callable[[], AbstractContextManager[None]], stream: Stream
) -> None:
    train, test = dataset(20), dataset(8)
    with rng_untouched():
        for task in stream(train, test, examples=5, generator=generator()):
            task.train.inputs.zero_()
            task.test.inputs.zero_()
    assert_same(train, TRAIN)
    assert_same(test, TEST)


@counted_stream
def test_settings_are_checked_at_the_call(stream: Stream) -> None:
    with pytest.raises(SettingError, match="tasks must be at least 1"):
        stream(TRAIN, TEST, tasks=0, generator=generator())
    for examples in (0, 21):
        with pytest.raises(SettingError, match=f"from 1 to 20.*got {examples}"):
            stream(TRAIN, TEST, tasks=1, examples=examples, generator=generator())
    with pytest.raises(ShapeError, match=r"length 16, test inputs 4\. They must be of one length"):
        stream(TRAIN, dataset(8, 4), tasks=1, generator=generator())


def images(count: int, side: int) -> Dataset:
    return Dataset(torch.rand(count, side * side, generator=generator(1)), torch.arange(count))


def turned(side: int, *, tasks: int, largest: float) -> list[torch.Tensor]:
    """Returns the test images of each task, as squares."""
    data = images(3, side)
    stream = rotated(data, data, tasks=tasks, largest=largest, generator=generator())
    return [task.test.inputs.view(3, side, side) for task in stream]


@pytest.mark.parametrize("side", [1, 4, 5, 28])
def test_quarter_turns_are_those_of_rot90(side: int) -> None:
    squares = images(3, side).inputs.view(3, side, side)
    for quarters, result in enumerate(turned(side, tasks=5, largest=360.0)):
        torch.testing.assert_close(result, torch.rot90(squares, quarters, (1, 2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", [5, 8, 28])
@pytest.mark.parametrize("largest", [180.0, -70.0, 400.0])
def test_angles_are_evenly_spaced_and_turn_as_scipy_does(side: int, largest: float) -> None:
    squares = images(3, side).inputs.view(3, side, side).double().numpy()
    for t, result in enumerate(turned(side, tasks=6, largest=largest)):
        expected = ndimage.rotate(
            squares, largest * t / 5, axes=(2, 1), reshape=False, order=1, mode="grid-constant", cval=0.0
        )
        torch.testing.assert_close(result.double(), torch.from_numpy(expected), rtol=0, atol=2e-5)


def test_the_first_task_has_the_images_as_they_are() -> None:
    for tasks in (1, 4):
        assert torch.equal(turned(28, tasks=tasks, largest=180.0)[0].flatten(1), images(3, 28).inputs)


def test_training_examples_are_turned_with_their_labels_as_the_test_images_are() -> None:
    data = images(30, 6)
    for task in rotated(data, data, tasks=4, examples=7, generator=generator()):
        assert task.train.labels.unique().numel() == 7
        assert torch.equal(task.train.inputs, task.test.inputs[task.train.labels])  # labels are row numbers here
        assert torch.equal(task.test.labels, data.labels)
        assert task.outputs is None


def test_rotation_keeps_dtype_and_takes_any_layout() -> None:
    data = images(3, 4)
    double = Dataset(data.inputs.double().t().contiguous().t(), data.labels)
    *_, task = rotated(double, double, tasks=3, largest=90.0, generator=generator())
    assert task.test.inputs.dtype == torch.float64
    squares = double.inputs.reshape(3, 4, 4)
    torch.testing.assert_close(task.test.inputs.view(3, 4, 4), squares.rot90(1, (1, 2)), rtol=0, atol=1e-14)


@pytest.mark.usefixtures("untyped")
def test_rotation_needs_square_images_of_floating_point_numbers_and_a_finite_angle() -> None:
    data = dataset(8, 12)
    with pytest.raises(ShapeError, match=r"square images of side \* side pixels.*got length 12"):
        rotated(data, data, tasks=2, generator=generator())
    bytes_ = Dataset(torch.zeros(8, 16, dtype=torch.uint8), TEST.labels)
    for pair in ((bytes_, TEST), (TEST, bytes_)):
        with pytest.raises(DtypeError, match=r"floating-point numbers.*got torch\.uint8"):
            rotated(*pair, tasks=2, generator=generator())
    for largest in (float("nan"), float("inf"), "180"):
        with pytest.raises(SettingError, match="largest must be a finite number"):
            rotated(TRAIN, TEST, tasks=2, largest=largest, generator=generator())


def labeled(labels: list[int]) -> Dataset:
    return Dataset(dataset(len(labels)).inputs, torch.tensor(labels))


# Labels out of order, with gaps between them, and unequally many: 12 and 40, 7 and 30, 3 and 5 in rising pairs.
SPLIT_TRAIN = labeled([40, 3, 7, 5, 12, 3, 30, 40, 5, 5, 3, 7, 12, 7, 7])
SPLIT_TEST = labeled([3, 40, 5, 7, 12, 30, 3, 30])
PAIRS = [[3, 5], [7, 12], [30, 40]]


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_split_is_a_partition_by_label_in_rising_order(scenario: str) -> None:
    tasks = list(split(SPLIT_TRAIN, SPLIT_TEST, scenario=scenario, generator=generator()))
    assert len(tasks) == len(PAIRS)
    for task, pair in zip(tasks, PAIRS, strict=True):
        for part, whole in ((task.train, SPLIT_TRAIN), (task.test, SPLIT_TEST)):
            rows = origin(part.inputs)[0][:, 0]
            assert sorted(rows.tolist()) == [i for i, label in enumerate(whole.labels.tolist()) if label in pair]
            original = whole.labels[rows].tolist()
            assert part.labels.tolist() == ([pair.index(i) for i in original] if scenario == "domain" else original)
        test_rows = origin(task.test.inputs)[0][:, 0].tolist()
        assert test_rows == sorted(test_rows)
        assert (None if task.outputs is None else task.outputs.tolist()) == (pair if scenario == "task" else None)


@pytest.mark.parametrize("classes_per_task", [1, 3, 6])
def test_split_has_as_many_classes_for_each_task_as_asked_for(classes_per_task: int) -> None:
    tasks = list(split(SPLIT_TRAIN, SPLIT_TEST, classes_per_task=classes_per_task, generator=generator()))
    groups = [set(task.train.labels.tolist()) for task in tasks]
    assert [len(group) for group in groups] == [classes_per_task] * (6 // classes_per_task)
    assert all(max(a) < min(b) for a, b in pairwise(groups))
    assert groups == [set(task.test.labels.tolist()) for task in tasks]


def test_split_shuffles_training_examples_alike_in_every_scenario() -> None:
    train = Dataset(torch.arange(400.0)[:, None], torch.arange(400) % 4)
    streams = [split(train, train, scenario=s, generator=generator()) for s in ("task", "domain", "class")]
    for tasks in zip(*streams, strict=True):
        assert all(torch.equal(task.train.inputs, tasks[0].train.inputs) for task in tasks)
        rows = tasks[0].train.inputs[:, 0].tolist()
        assert rows != sorted(rows)
        assert 30 < (tasks[0].train.labels[:100] % 2).sum() < 70  # both labels come all the time


def test_split_draws_as_many_examples_as_asked_for_without_replacement() -> None:
    for task in split(SPLIT_TRAIN, SPLIT_TEST, examples=3, generator=generator()):
        assert len(set(chosen(task))) == len(task.train.labels) == 3


@pytest.mark.usefixtures("untyped")
def test_settings_of_a_split_are_checked_at_the_call() -> None:
    for classes_per_task in (0, -2, 4, 7):
        with pytest.raises(SettingError, match=f"divide the number of different labels, 6, got {classes_per_task}"):
            split(SPLIT_TRAIN, SPLIT_TEST, classes_per_task=classes_per_task, generator=generator())
    empty = TRAIN.take(slice(0))
    with pytest.raises(SettingError, match="different labels, 0, got 2"):
        split(empty, empty, generator=generator())
    for examples in (0, 4):
        with pytest.raises(SettingError, match=f"from 1 to 3, what there is for every task, got {examples}"):
            split(SPLIT_TRAIN, SPLIT_TEST, examples=examples, generator=generator())
    with pytest.raises(SettingError, match=r"scenario must be one of \['task', 'domain', 'class'\], got 'tasks'"):
        split(TRAIN, TEST, scenario="tasks", generator=generator())
    with pytest.raises(SettingError, match=r"same labels, got \[0, 1, 2, 3\] and \[0, 1\]\. Leave out"):
        split(TRAIN, TEST.take(slice(2)), generator=generator())
    with pytest.raises(ShapeError, match="length 16, test inputs 4"):
        split(TRAIN, dataset(8, 4), generator=generator())
