"""Streams of tasks made from one data set."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recollect.data.datasets import Dataset
from recollect.errors import SettingError, ShapeError


class Task(NamedTuple):
    """One task of a stream: what to train on and what to be judged by."""

    train: Dataset
    test: Dataset


def permuted(
    train: Dataset, test: Dataset, *, tasks: int, examples: int | None = None, generator: torch.Generator
) -> Iterator[Task]:
    """Returns tasks that each see the inputs through a permutation of their own.

    Everything random is drawn at the call, task after task: the t-th task is the same however many tasks are asked
    for, and whatever the generator is used for while they are worked through. All tasks share the labels and the test
    images. The data of a task are made when it is reached.

    Paper: Section 4.1 (after Goodfellow et al., 2013).

    Args:
        train: Where training examples are drawn from, ``(n, d)``.
        test: The test examples of every task, ``(m, d)``.
        tasks: How many tasks.
        examples: Training examples for each task, drawn without replacement; all of them, shuffled, when None.
        generator: The source of permutations and choices.

    Raises:
        SettingError: If ``tasks`` or ``examples`` is below 1, or there are fewer examples than asked for.
        ShapeError: If training and test inputs differ in their length.

    Example:
        >>> import torch
        >>> data = Dataset(torch.eye(4), torch.arange(4))
        >>> first, second = permuted(data, data, tasks=2, examples=3, generator=torch.Generator().manual_seed(0))
        >>> first.train.inputs.shape, torch.equal(first.test.labels, second.test.labels)
        (torch.Size([3, 4]), True)
    """
    size, total = train.inputs.shape[1], len(train.labels)
    if tasks < 1:
        raise SettingError(f"tasks must be at least 1, got {tasks}.")
    if examples is not None and not 1 <= examples <= total:
        raise SettingError(f"examples must be from 1 to {total}, the number of training examples, got {examples}.")
    if test.inputs.shape[1] != size:
        raise ShapeError(f"training inputs have length {size}, test inputs {test.inputs.shape[1]}.")
    draws = []
    for _ in range(tasks):
        order = torch.randperm(size, generator=generator)
        draws.append((order, torch.randperm(total, generator=generator)[:examples].clone()))
    return (
        Task(Dataset(train.inputs[rows][:, order], train.labels[rows]), Dataset(test.inputs[:, order], test.labels))
        for order, rows in draws
    )
