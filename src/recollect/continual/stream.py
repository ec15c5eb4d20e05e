"""The one loop: a network learns one task after another and is judged on all that it has seen.

learner = Learner(network, optimizer, penalty=EWC(network, 100.0))
results = run(learner, tasks)["network"]
results.average, results.backward_transfer, results.forgetting
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from recollect import checkpoint as checkpoints
from recollect.continual.examples import Examples, batches
from recollect.continual.learner import Learner
from recollect.continual.modes import evaluation
from recollect.continual.outputs import Outputs, output_mask
from recollect.errors import FormatError, SettingError, ShapeError

Predictor = Callable[[Tensor], Tensor]
Task = tuple[Examples, Examples] | tuple[Examples, Examples, Outputs | None]  # to learn, to be judged by, its outputs

_ROWS = 1000  # test examples at once


class Accuracies(NamedTuple):
    """The accuracy matrix of a stream of T tasks and what is read from it, all from 0 to 1.

    ``matrix[i, j]`` is R of Lopez-Paz & Ranzato, 2017 (arXiv 1706.08840): the accuracy on task j after learning tasks
    0 to i. What lies above its first superdiagonal was not measured and is NaN. ``initial[j]`` is the untrained
    network's accuracy on task j. Means are over the tasks that can count: T for the average, T - 1 for transfer and
    forgetting (the code of GEM divides by T, so its transfers are (T - 1) / T of these), which are NaN for one task.

    Example:
        >>> import torch
        >>> results = Accuracies(torch.tensor([[0.75, 0.5], [0.5, 1.0]]), torch.tensor([0.25, 0.25]))
        >>> results.average, results.backward_transfer, results.forward_transfer, results.forgetting
        (0.75, -0.25, 0.25, 0.25)
    """

    matrix: Float[Tensor, "t t"]
    initial: Float[Tensor, " t"]

    @property
    def average(self) -> float:
        """ACC: the mean over all tasks after the last one."""
        return float(self.matrix[-1].mean())

    @property
    def averages(self) -> list[float]:
        """The mean over the tasks learned so far, after each task."""
        return [float(row[: number + 1].mean()) for number, row in enumerate(self.matrix)]

    @property
    def backward_transfer(self) -> float:
        """BWT: how accuracies have changed since a task was learned, ``mean_j (R[T-1, j] - R[j, j])`` for j < T - 1."""
        return float((self.matrix[-1] - self.matrix.diagonal())[:-1].mean())

    @property
    def forward_transfer(self) -> float:
        """FWT: what earlier tasks did for a task not yet learned, ``mean_j (R[j-1, j] - initial[j])`` for j > 0."""
        return float((self.matrix.diagonal(1) - self.initial[1:]).mean())

    @property
    def forgetting(self) -> float:
        """The mean over j < T - 1 of the best accuracy on task j since it was learned, less what is left of it.

        Source: Chaudhry et al., 2018 (arXiv 1801.10112), whose best may also be from before it was learned.
        """
        if len(self.matrix) == 1:
            return math.nan
        seen = self.matrix.tril()[:-1]
        return float((seen.amax(0) - self.matrix[-1])[:-1].mean())


def run(
    learner: Learner,
    tasks: Iterable[Task],
    *,
    predictors: Mapping[str, Predictor] | None = None,
    examples: int | Mapping[str, int] | None = None,
    checkpoint: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    after: Callable[[int], None] | None = None,
) -> dict[str, Accuracies]:
    """Learns tasks in sequence, and after each judges predictors by all tasks so far and by the next.

    With a checkpoint, all that has been learned and measured is kept after each task: the same call, with a learner
    made alike and the same tasks, goes on there after a ``kill -9`` and ends as if it had not been stopped. The global
    random state on the CPU, which dropout and loaders draw from, is then set to what it was; that of other devices and
    of a loader's own generator is not kept.

    Args:
        learner: What learns; fresh, or stopped.
        tasks: ``(train, test)`` or ``(train, test, outputs)``, such as ``recollect.data.Task``. Where outputs are
            given, an answer is sought among these alone: the task's identity is known. Tasks are taken one by one;
            the test examples of those seen are kept.
        predictors: Functions from inputs to scores ``(b, c)``, by name; the learner's network alone, as ``"network"``,
            where None is given. A module is put into evaluation mode.
        examples: How many test examples of each task count, the first ones: for all predictors, or for each by name.
            None: all.
        checkpoint: The file. It stays when all tasks are learned.
        settings: What the checkpoint must have been made with, beside the learner's own settings.
        after: Called with the number of tasks learned, after each.

    Returns:
        The accuracies of each predictor.

    Raises:
        SettingError: If there is no task or fewer than have been learned, the learner has learned tasks that no
            checkpoint tells of, or ``examples`` names no predictor.
        FormatError: If the checkpoint is damaged or was made with other settings, companions or predictors.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 2)
        >>> data = (torch.eye(2), torch.tensor([0, 1]))
        >>> results = run(Learner(net, torch.optim.SGD(net.parameters(), lr=1.0), epochs=20), [(data, data)])
        >>> results["network"].average
        1.0
    """
    predictors = {"network": learner.network} if predictors is None else dict(predictors)
    limits = _limits(predictors, examples)
    made_with = {"learner": learner.settings(), "examples": limits, "settings": dict(settings or {})}
    judge = _Judge(learner.network, predictors, limits)
    saved = None if checkpoint is None else checkpoints.read(Path(checkpoint), run=made_with)
    if saved is not None:
        learner.load_state_dict(saved["learner"])
        judge.load_state_dict(saved["judge"])
    elif learner.learned:
        raise SettingError("the learner has learned already. Make a new one, or name the checkpoint of its run.")
    done = learner.learned
    number = 0
    for number, task in enumerate(tasks, 1):
        train, test, *rest = task
        judge.meet(test, rest[0] if rest else None, new=number > done)
        if saved is not None and number == done:
            torch.set_rng_state(saved["random"])  # dropout and loaders draw from it
        if number <= done:
            continue
        learner.learn(train, outputs=rest[0] if rest else None)
        judge.measure()
        if checkpoint is not None:
            state = {"learner": learner.state_dict(), "judge": judge.state_dict(), "random": torch.get_rng_state()}
            checkpoints.write(Path(checkpoint), state, run=made_with)
        if after is not None:
            after(number)
    if number == 0 or number < done:
        raise SettingError(
            f"there are {number} tasks, and {done} have been learned. Pass all of them, and no used-up iterator."
        )
    return judge.results()


def _limits(predictors: Mapping[str, Predictor], examples: int | Mapping[str, int] | None) -> dict[str, int | None]:
    if not isinstance(examples, Mapping):
        return dict.fromkeys(predictors, examples)
    unknown = sorted(examples.keys() - predictors.keys())
    if unknown:
        raise SettingError(f"examples names {unknown}, but the predictors are {sorted(predictors)}.")
    return {name: examples.get(name) for name in predictors}


class _Judge:
    """Keeps the test examples of the tasks so far and the accuracies on them."""

    def __init__(self, network: nn.Module, predictors: dict[str, Predictor], limits: dict[str, int | None]) -> None:
        self._network = network
        self._predictors = predictors
        self._untrained = copy.deepcopy(network)
        self._limits = limits
        self._tests: list[tuple[Examples, Outputs | None]] = []
        self._cells: dict[str, list[list[float]]] = {name: [] for name in predictors}
        self._ahead: dict[str, list[float]] = {name: [] for name in predictors}
        self._initial: dict[str, list[float]] = {name: [] for name in predictors}

    def meet(self, test: Examples, outputs: Outputs | None, *, new: bool) -> None:
        """Takes in a task; a new one is judged before it is learned."""
        self._tests.append((test, outputs))
        if new:
            for name in self._predictors:
                self._initial[name].append(self._accuracy(self._untrained, name, test, outputs))
                self._ahead[name].append(self._accuracy(self._predictors[name], name, test, outputs))

    def measure(self) -> None:
        """Judges all predictors by all tasks met."""
        for name, predictor in self._predictors.items():
            self._cells[name].append([self._accuracy(predictor, name, *test) for test in self._tests])

    def _accuracy(self, predictor: Predictor, name: str, test: Examples, outputs: Outputs | None) -> float:
        with evaluation(self._network):  # which a function may call
            return accuracy(predictor, test, outputs=outputs, examples=self._limits[name])

    def results(self) -> dict[str, Accuracies]:
        """Returns the matrices."""
        size = len(self._tests)
        found = {}
        for name, rows in self._cells.items():
            matrix = torch.full((size, size), torch.nan)
            for number, row in enumerate(rows):
                matrix[number, : number + 1] = torch.tensor(row)
            matrix.diagonal(1).copy_(torch.tensor(self._ahead[name][1:]))
            found[name] = Accuracies(matrix, torch.tensor(self._initial[name]))
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "untrained": self._untrained.state_dict(),
            "cells": self._cells,
            "ahead": self._ahead,
            "initial": self._initial,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["cells"].keys() != self._predictors.keys():
            raise FormatError(
                f"the checkpoint has results of {sorted(state['cells'])}, asked for are {sorted(self._predictors)}. "
                "Name the same predictors, or another checkpoint."
            )
        self._untrained.load_state_dict(state["untrained"])
        self._cells, self._ahead, self._initial = state["cells"], state["ahead"], state["initial"]


def accuracy(
    predictor: Predictor, test: Examples, *, outputs: Outputs | None = None, examples: int | None = None
) -> float:
    """Returns the share of test examples whose label has the highest score.

    Args:
        predictor: From inputs to scores ``(b, c)``. A module is put into evaluation mode.
        test: Inputs and labels.
        outputs: Where an answer is sought; everywhere if None.
        examples: How many test examples count, the first ones; all if None.

    Raises:
        SettingError: If there are no examples or no labels, or ``examples`` is below 1.
        ShapeError: If a label is not one number.

    Example:
        >>> import torch
        >>> accuracy(lambda x: x, (torch.eye(2), torch.tensor([0, 0])))
        0.5
    """
    if examples is not None and examples < 1:
        raise SettingError(f"examples must be at least 1, or None for all, got {examples}.")
    right = total = 0
    with evaluation(predictor) if isinstance(predictor, nn.Module) else nullcontext(), torch.no_grad():
        for inputs, labels in batches(test, _ROWS):
            if labels is None:
                raise SettingError("test examples need labels: pass pairs (inputs, labels).")
            if labels.dim() != 1:
                raise ShapeError(f"labels must have shape (b,), one number for each input, got {tuple(labels.shape)}.")
            room = len(inputs) if examples is None else min(len(inputs), examples - total)
            scores = predictor(inputs[:room])
            places = torch.arange(scores.shape[1], device=scores.device)
            if outputs is not None:
                places = places[output_mask(outputs, scores.shape[1]).to(scores.device)]
            answers = places[scores[:, places].argmax(1)]
            right += int((answers == labels[:room].to(answers.device)).sum())
            total += room
            if total == examples:
                break
    return right / total
