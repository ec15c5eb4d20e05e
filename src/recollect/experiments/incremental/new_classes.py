"""From the first image of a new class to its recognition: accuracy over images of each, and the time it takes.

A network that knows half of the classes has a memory of a few images of each. Its last layer gets outputs for the other
half (``recollect.grow``), and 1, 2, 5, 10 or 20 images of each new class are written to the memory. Beside MbPA, which
needs nothing else, stand the k-NN vote and the nearest class mean, and fine-tuning of the last layer on the memory.
"""

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from recollect import EpisodicMemory, grow
from recollect.data import Dataset
from recollect.experiments.incremental.measures import measure, milliseconds, predict
from recollect.experiments.incremental.models import Adapted, Vote
from recollect.experiments.incremental.report import report
from recollect.experiments.incremental.shots import Learner, Shots
from recollect.experiments.incremental.study import TUNING, Halves, Incremental, Study
from recollect.experiments.runner import Progress
from recollect.predictors import Predictor

_QUERIES = 500  # of a batch whose time is taken
_ROUNDS = 5  # of the time until a first recognition


@dataclass(frozen=True)
class NewClasses(Incremental):
    """New classes from 1, 2, 5, 10 and 20 images: MbPA, fine-tuning, nearest class mean, k-NN vote; and the time."""


class Task(NamedTuple):
    """One split with its labels in a new order: the old classes, then the new ones."""

    head: nn.Linear
    """With outputs for the new classes."""
    held: Dataset
    """What the memory held before."""
    taught: Dataset
    """Images of the new classes, one of each after the other."""
    test: Dataset
    new: Bool[Tensor, " m"]
    """Which test images are of new classes."""


def run(config: NewClasses) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError, SettingError: See ``table1.run``.
    """
    study = Study(config)
    _tune(study)
    shots = study.scale.shots
    choices = {name: grid[_best(study, name)] for name, grid in shots.grids.items()}
    with Progress(len(study.splits) * len(shots.images) * len(choices), "images of each new class") as progress:
        for number in study.splits:
            lines = [({"part": "shots", "split": number, "model": m}, setting) for m, setting in choices.items()]
            _measure(study, number, lines, progress)
    return report(study.record, study.scale.marks, study.splits)


def _tune(study: Study) -> None:
    lines = [
        ({"part": "shots-tuning", "model": name, "place": place}, setting)
        for name, grid in study.scale.shots.grids.items()
        for place, setting in enumerate(grid)
    ]
    with Progress(len(lines) * len(study.scale.shots.images), "choosing settings for new classes") as progress:
        _measure(study, TUNING, lines, progress)


def _best(study: Study, model: str) -> int:
    """Returns the place of the setting with the largest mean over harmonic means of old and new accuracy.

    The mean over all classes would choose what ignores new classes as long as there are few images of them.
    """
    found: list[list[float]] = [[] for _ in study.scale.shots.grids[model]]
    for row in study.record.rows:
        if row["part"] == "shots-tuning" and row["model"] == model:
            both = row["old"] + row["new"]
            found[row["place"]].append(2 * row["old"] * row["new"] / both if both else 0.0)
    means = [statistics.fmean(scores) for scores in found]
    return means.index(max(means))


def _measure(study: Study, number: int, lines: Sequence[tuple[dict[str, Any], Learner]], progress: Progress) -> None:
    """Adds a row for each line and number of images, where the record has none."""
    task = None
    for shots, (key, setting) in itertools.product(study.scale.shots.images, lines):
        if study.record.find(**key, shots=shots) is not None:
            progress.skip(1)
            continue
        if task is None:
            halves = study.halves(number)
            test = halves.valid.take(slice(None, None, study.scale.every)) if number == TUNING else halves.test
            task = teach(halves, test, study.scale.shots, generator=torch.Generator().manual_seed(number))
        study.record.add(**key, shots=shots, setting=asdict(setting), **_worth(task, setting, shots))
        progress.advance(1)


def _worth(task: Task, setting: Learner, shots: int) -> dict[str, float | None]:
    """Returns accuracies in percent, the seconds until a first recognition, and the milliseconds of any prediction.

    The seconds are those from having the keys of the new images to the prediction of a test image of a new class that
    is right, the first one there is: a median of several times. None where there is none.
    """
    taught = task.taught.take(slice(shots * len(task.taught.labels.unique())))
    predictor = _learn(task, setting, taught, query=slice(1))[0]
    log_probs = predict(predictor, task.test.inputs)
    recognized = ((log_probs.argmax(1) == task.test.labels) & task.new).nonzero().flatten()[:1]
    times = [_learn(task, setting, taught, query=recognized)[1] for _ in range(_ROUNDS)] if len(recognized) else []
    found = {
        name: round(measure(log_probs[rows], task.test.labels[rows]).top1, 4)
        for name, rows in {"all": slice(None), "old": ~task.new, "new": task.new}.items()
    }
    every = max(1, len(task.test.labels) // _QUERIES)
    time_each = milliseconds({"": predictor}, task.test.inputs[::every], rounds=3)[""]
    seconds = round(statistics.median(times), 5) if times else None
    return {**found, "seconds": seconds, "milliseconds": round(time_each, 5)}


def _learn(
    task: Task, setting: Learner, taught: Dataset, *, query: slice | Int[Tensor, " 1"]
) -> tuple[Predictor, float]:
    """Returns what has learned the new images, and the seconds until it has answered one query."""
    memory = EpisodicMemory(len(task.held.labels) + len(taught.labels), taught.inputs.shape[1])
    memory.write(*task.held)
    start = time.perf_counter()
    memory.write(*taught)
    if isinstance(setting, Adapted | Vote):
        predictor = setting.predictor(task.head, memory)
    else:
        held = Dataset(*(torch.cat(parts) for parts in zip(task.held, taught, strict=True)))
        predictor = setting.predictor(task.head, held)
    predictor(task.test.inputs[query])
    return predictor, time.perf_counter() - start


def teach(halves: Halves, test: Dataset, shots: Shots, *, generator: torch.Generator) -> Task:
    """Returns a split as a deployed network meets it: a head of the old classes alone, grown; random images."""
    order = torch.cat([(~halves.new).nonzero().squeeze(1), halves.new.nonzero().squeeze(1)])
    label = order.argsort()
    count = int((~halves.new).sum())
    trained = halves.features.head()
    head = nn.Linear(trained.in_features, count, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(trained.get_parameter(name)[order[:count]])
    drawn = draw(halves.train.labels, max(shots.kept, *shots.images), generator)
    held = halves.train.take(drawn[order[:count], : shots.kept].flatten())
    taught = halves.train.take(drawn[order[count:]].T.flatten())
    held, taught, renamed = (Dataset(data.inputs, label[data.labels]) for data in (held, taught, test))
    return Task(grow(head, len(order)), held, taught, renamed, halves.new[test.labels])


def draw(labels: Int[Tensor, " n"], count: int, generator: torch.Generator) -> Int[Tensor, "c m"]:
    """Returns random rows of each class, as many of each: ``count``, or all of the smallest class."""
    shuffled = torch.randperm(len(labels), generator=generator)
    rows = [shuffled[labels[shuffled] == one] for one in range(int(labels.max()) + 1)]
    count = min(count, *(len(found) for found in rows))
    return torch.stack([found[:count] for found in rows])
