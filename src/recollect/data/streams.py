"""Streams of tasks made from one data set."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from recollect.data.datasets import Dataset


class Task(NamedTuple):
    """One task of a stream: what to train on and what to be judged by."""

    train: Dataset
    test: Dataset


def permuted(
    train: Dataset, test: Dataset, *, tasks: int, examples: int | None = None, generator: torch.Generator
) -> Iterator[Task]:
    """Yields tasks that each see the inputs through a permutation of their own.

    Each permutation, and each task's choice of training examples, is drawn once from the generator: the t-th task is
    the same however many tasks are asked for. All tasks share the labels and the test images.

    Paper: Section 4.1 (after Goodfellow et al., 2013).

    Args:
        train: Where training examples are drawn from.
        test: The test examples of every task.
        tasks: How many tasks.
        examples: Training examples for each task, drawn without replacement; all of them, shuffled, when None.
        generator: The source of permutations and choices.
    """
    for _ in range(tasks):
        order = torch.randperm(train.inputs.shape[1], generator=generator)
        rows = torch.randperm(len(train.labels), generator=generator)[:examples]
        yield Task(
            Dataset(train.inputs[rows][:, order], train.labels[rows]), Dataset(test.inputs[:, order], test.labels)
        )
