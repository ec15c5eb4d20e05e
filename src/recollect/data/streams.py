"""Streams of tasks made from one data set.

All of them draw everything random at the call, task after task: the examples of the t-th task are the same however
many tasks are asked for, and whatever the generator is used for while they are worked through. The data of a task are
made when it is reached, and training and test data that came in are left as they are.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from recollect.data.datasets import Dataset
from recollect.errors import DtypeError, SettingError, ShapeError, require_number

Scenario = Literal["task", "domain", "class"]


class Task(NamedTuple):
    """One task of a stream: what to train on and what to be judged by.

    ``outputs`` are the labels that the task has, in rising order, where a learner is told which task it is in
    (task-incremental): it may leave all other outputs out of account. None where it is not told.
    """

    train: Dataset
    test: Dataset
    outputs: Int[Tensor, " c"] | None = None


def permuted(
    train: Dataset, test: Dataset, *, tasks: int, examples: int | None = None, generator: torch.Generator
) -> Iterator[Task]:
    """Returns tasks that each see the inputs through a permutation of their own.

    All tasks share the labels and the test images.

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
    _check(train, test, tasks=tasks, examples=examples, most=total)
    draws = []
    for _ in range(tasks):
        order = torch.randperm(size, generator=generator)
        draws.append((order, _choice(total, examples, generator)))
    return (
        Task(Dataset(train.inputs[rows][:, order], train.labels[rows]), Dataset(test.inputs[:, order], test.labels))
        for order, rows in draws
    )


def rotated(
    train: Dataset,
    test: Dataset,
    *,
    tasks: int,
    examples: int | None = None,
    largest: float = 180.0,
    generator: torch.Generator,
) -> Iterator[Task]:
    """Returns tasks that each see the images turned by an angle of their own.

    Task t of T, counted from 0, turns them counterclockwise by ``largest * t / (T - 1)`` degrees: the first task has
    the images as they are, the last one has them turned by ``largest``. A single task has them as they are. All tasks
    share the labels and the test images. Pixels are interpolated bilinearly; what comes from outside an image is 0.

    Paper: Lopez-Paz & Ranzato (2017), *Gradient Episodic Memory for Continual Learning*, arXiv:1706.08840, Section 4.1.

    Differs from the paper: it says only that the angles are fixed and between 0 and 180 degrees. Its published code
    draws one at random from each of T equal parts of the range; here they are evenly spaced.

    Args:
        train: Where training examples are drawn from, ``(n, side * side)``: square images, row after row.
        test: The test examples of every task, ``(m, side * side)``.
        tasks: How many tasks.
        examples: Training examples for each task, drawn without replacement; all of them, shuffled, when None.
        largest: The last task's angle in degrees; below 0 it turns clockwise. The default is the paper's.
        generator: The source of choices.

    Raises:
        SettingError: If ``tasks`` or ``examples`` is below 1, there are fewer examples than asked for, or ``largest``
            is no finite number.
        ShapeError: If training and test inputs differ in their length, or are no square images.
        DtypeError: If inputs are not floating-point numbers.

    Example:
        >>> import torch
        >>> image = Dataset(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([0]))
        >>> *_, last = rotated(image, image, tasks=3, generator=torch.Generator().manual_seed(0))
        >>> last.test.inputs.round(decimals=3)
        tensor([[4., 3., 2., 1.]])
    """
    size, total = train.inputs.shape[1], len(train.labels)
    _check(train, test, tasks=tasks, examples=examples, most=total)
    require_number("largest", largest)
    if math.isqrt(size) ** 2 != size:
        raise ShapeError(f"inputs must be square images of side * side pixels, row after row, got length {size}.")
    for inputs in (train.inputs, test.inputs):
        if not inputs.is_floating_point():
            raise DtypeError(f"inputs must be floating-point numbers to be interpolated, got {inputs.dtype}.")
    draws = [(largest * t / max(tasks - 1, 1), _choice(total, examples, generator)) for t in range(tasks)]
    return (
        Task(
            Dataset(_turn(train.inputs[rows], angle), train.labels[rows]),
            Dataset(_turn(test.inputs, angle), test.labels),
        )
        for angle, rows in draws
    )


def split(
    train: Dataset,
    test: Dataset,
    *,
    classes_per_task: int = 2,
    scenario: Scenario = "class",
    examples: int | None = None,
    generator: torch.Generator,
) -> Iterator[Task]:
    """Returns tasks that each have some of the classes: the labels in rising order, group after group.

    What is asked of the learner depends on the scenario:

    - ``"class"``: which class it is of all, with no hint. Labels stay as they are.
    - ``"task"``: which class it is of the task's. Labels stay as they are, and ``Task.outputs`` has the task's.
    - ``"domain"``: which place the class has in its group. Labels are 0 to ``classes_per_task - 1`` in every task.

    Paper: Zenke et al. (2017), *Continual Learning Through Synaptic Intelligence*, arXiv:1703.04200, Section 5.1
    (split MNIST); the scenarios are those of van de Ven & Tolias (2019), *Three scenarios for continual learning*,
    arXiv:1904.07734, Table 2.

    Args:
        train: Where training examples are drawn from, ``(n, d)``.
        test: The test examples, ``(m, d)``; a task has those of its labels, in their order.
        classes_per_task: How many labels a task has. The default is both papers'.
        scenario: One of the three; by default the one that gives no hint.
        examples: Training examples for each task, drawn without replacement; all of its labels, shuffled, when None.
        generator: The source of choices.

    Raises:
        SettingError: If ``classes_per_task`` does not divide the number of labels, training and test examples have
            not the same labels, ``scenario`` is none of the three, ``examples`` is below 1, or a task has fewer.
        ShapeError: If training and test inputs differ in their length.

    Example:
        >>> import torch
        >>> data = Dataset(torch.eye(4), torch.arange(4))
        >>> _, second = split(data, data, scenario="task", generator=torch.Generator().manual_seed(0))
        >>> second.outputs, second.test.labels
        (tensor([2, 3]), tensor([2, 3]))
    """
    if scenario not in get_args(Scenario):
        raise SettingError(f"scenario must be one of {list(get_args(Scenario))}, got {scenario!r}.")
    classes, counts = train.labels.unique(return_counts=True)
    found = test.labels.unique()
    if not torch.equal(classes, found):
        raise SettingError(
            f"training and test examples must have the same labels, got {classes.tolist()} and {found.tolist()}. "
            "Leave out the examples of labels that only one of them has."
        )
    if classes_per_task < 1 or len(classes) == 0 or len(classes) % classes_per_task:
        raise SettingError(
            f"classes_per_task must divide the number of different labels, {len(classes)}, got {classes_per_task}."
        )
    groups = classes.split(classes_per_task)
    totals = counts.view(-1, classes_per_task).sum(1).tolist()
    _check(train, test, tasks=len(groups), examples=examples, most=min(totals))
    draws = [(group, _choice(total, examples, generator)) for group, total in zip(groups, totals, strict=True)]

    def part(data: Dataset, group: Tensor, chosen: Tensor | slice) -> Dataset:
        inputs, labels = data.take(torch.isin(data.labels, group).nonzero()[:, 0][chosen])
        return Dataset(inputs, torch.searchsorted(group, labels) if scenario == "domain" else labels)

    return (
        Task(part(train, group, rows), part(test, group, slice(None)), group if scenario == "task" else None)
        for group, rows in draws
    )


def _check(train: Dataset, test: Dataset, *, tasks: int, examples: int | None, most: int) -> None:
    if tasks < 1:
        raise SettingError(f"tasks must be at least 1, got {tasks}.")
    if examples is not None and not 1 <= examples <= most:
        raise SettingError(f"examples must be from 1 to {most}, what there is for every task, got {examples}.")
    if test.inputs.shape[1] != train.inputs.shape[1]:
        raise ShapeError(
            f"training inputs have length {train.inputs.shape[1]}, test inputs {test.inputs.shape[1]}. They must be "
            "of one length."
        )


def _choice(total: int, examples: int | None, generator: torch.Generator) -> Int[Tensor, " n"]:
    return torch.randperm(total, generator=generator)[:examples].clone()


def _turn(inputs: Float[Tensor, "n d"], angle: float) -> Float[Tensor, "n d"]:
    """Turns square images counterclockwise about their center, by an angle in degrees."""
    if angle == 0:
        return inputs.clone()
    side = math.isqrt(inputs.shape[1])
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    back = torch.tensor([[[cos, -sin, 0], [sin, cos, 0]]], dtype=inputs.dtype, device=inputs.device)
    grid = affine_grid(back, [1, 1, side, side], align_corners=False)
    images = inputs.unflatten(1, (side, side))[None]  # as channels of one image: all of them share the grid
    return grid_sample(images, grid, align_corners=False)[0].flatten(1)
