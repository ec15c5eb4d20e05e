"""Permuted streams: each permutation is drawn once, from the generator, whatever happens around it."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from recollect.data import Dataset, permuted
from recollect.errors import SettingError, ShapeError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(count: int, size: int = 12) -> Dataset:
    """Rows that tell where each number came from: entry (i, j) is i + j / 100."""
    return Dataset(torch.arange(count)[:, None] + torch.arange(size) / 100, torch.arange(count) % 3)


def origin(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which row and which column each entry came from."""
    rows = (inputs + 0.001).floor()
    return rows.long(), ((inputs - rows) * 100).round().long()


TRAIN, TEST = dataset(20), dataset(8)


def test_each_task_is_one_permutation_of_train_and_test() -> None:
    for task in permuted(TRAIN, TEST, tasks=3, examples=5, generator=generator()):
        rows, columns = origin(task.train.inputs)
        order = columns[0]
        assert order.sort().values.tolist() == list(range(12))
        assert (columns == order).all()
        assert (rows == rows[:, :1]).all()
        assert rows[:, 0].unique().numel() == 5
        assert torch.equal(task.train.labels, TRAIN.labels[rows[:, 0]])
        assert torch.equal(task.test.inputs, TEST.inputs[:, order])
        assert torch.equal(task.test.labels, TEST.labels)


def test_tasks_differ_in_permutation_and_in_examples() -> None:
    tasks = list(permuted(TRAIN, TEST, tasks=4, examples=5, generator=generator()))
    orders = {tuple(origin(task.train.inputs)[1][0].tolist()) for task in tasks}
    choices = {tuple(origin(task.train.inputs)[0][:, 0].tolist()) for task in tasks}
    assert len(orders) == len(choices) == 4


def assert_same(a: Dataset, b: Dataset) -> None:
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.labels, b.labels)


def test_a_task_is_the_same_however_many_are_asked_for() -> None:
    few = permuted(TRAIN, TEST, tasks=5, examples=6, generator=generator(3))
    many = permuted(TRAIN, TEST, tasks=20, examples=6, generator=generator(3))
    for a, b in zip(few, many, strict=False):
        assert_same(a.train, b.train)
        assert_same(a.test, b.test)


def test_other_uses_of_the_generator_on_the_way_change_nothing() -> None:
    shared = generator(3)
    quiet = permuted(TRAIN, TEST, tasks=4, generator=generator(3))
    busy = permuted(TRAIN, TEST, tasks=4, generator=shared)
    for a, b in zip(quiet, busy, strict=True):
        assert_same(a.train, b.train)
        torch.randperm(100, generator=shared)  # say, shuffling the task's batches


def test_two_streams_of_one_generator_differ() -> None:
    shared = generator(3)
    one, two = (next(permuted(TRAIN, TEST, tasks=1, generator=shared)) for _ in range(2))
    assert not torch.equal(one.test.inputs, two.test.inputs)


def test_all_examples_when_none_are_asked_for() -> None:
    task = next(permuted(TRAIN, TEST, tasks=1, generator=generator()))
    assert origin(task.train.inputs)[0][:, 0].sort().values.tolist() == list(range(20))


def test_neither_the_global_random_state_nor_the_data_are_touched(
    rng_untouched: Callable[[], AbstractContextManager[None]],
) -> None:
    train, test = dataset(20), dataset(8)
    with rng_untouched():
        for task in permuted(train, test, tasks=3, examples=5, generator=generator()):
            task.train.inputs.zero_()
            task.test.inputs.zero_()
    assert_same(train, TRAIN)
    assert_same(test, TEST)


def test_settings_are_checked_at_the_call() -> None:
    with pytest.raises(SettingError, match="tasks must be at least 1"):
        permuted(TRAIN, TEST, tasks=0, generator=generator())
    for examples in (0, 21):
        with pytest.raises(SettingError, match="from 1 to 20"):
            permuted(TRAIN, TEST, tasks=1, examples=examples, generator=generator())
    with pytest.raises(ShapeError, match="length 12, test inputs 5"):
        permuted(TRAIN, dataset(8, 5), tasks=1, generator=generator())
