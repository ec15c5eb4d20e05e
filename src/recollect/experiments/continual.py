"""EWC, MAS and their peers beside MbPA and replay, on permuted, rotated and split MNIST.

For each stream, each method's strength is chosen on validation images by one network of its own seed; the networks that
are reported are then judged on test images.
"""

import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recollect.continual import Accuracies, accuracy
from recollect.continual import run as learn
from recollect.data import Task, mnist
from recollect.errors import SettingError
from recollect.experiments import continual_report as reports
from recollect.experiments.continual_methods import (
    ADAPTED,
    COST,
    METHODS,
    STREAMS,
    Contender,
    Score,
    Setting,
    grid,
    joint,
    methods_on,
)
from recollect.experiments.figure3 import split
from recollect.experiments.runner import Progress, Run

_TUNING_SEED = 1000  # no seed of the reported runs
_SCALES: dict[str, dict[str, Any]] = {
    "smoke": {"seeds": 1, "tasks": 2, "examples": 500, "test": 100, "adapted": 50},
    "small": {"seeds": 1, "tasks": 5, "examples": 2000, "test": 500, "adapted": 100},
    "paper": {"seeds": 3, "tasks": 20, "examples": 10_000, "test": 2000, "adapted": 250},
}


@dataclass(frozen=True)
class Continual:
    """All methods on permuted, rotated and split MNIST."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """How much of it: smoke (a minute), small (half an hour) or paper (hours)."""
    out: Path = Path("runs/continual")
    """The folder for results; a run that was stopped goes on there."""
    streams: tuple[str, ...] = tuple(STREAMS)
    """Which streams to work on now: permuted, rotated, split-task, split-domain, split-class."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods to work on now: naive, ewc, mas, mas-average, mas-last, si, lwf, gem, agem, replay, vote, mbpa,
    mbpa+replay, joint. The network that a predictor reads its memory beside comes with it."""
    seeds: int | None = None
    """How many networks of each method. This and the next four go by the scale where they are not given."""
    tasks: int | None = None
    """The most tasks of a stream (permuted has 20, rotated 10, split 5)."""
    examples: int | None = None
    """The most training examples of each task."""
    test: int | None = None
    """Test images of each task for every point."""
    adapted: int | None = None
    """Test images of each task for every point of what is slow: MbPA and the vote."""


def run(config: Continual) -> str:
    """Runs what is missing and returns the tables.

    Raises:
        MissingDataError: If MNIST is neither at hand nor can be downloaded.
        SettingError: If a setting is out of range or ``out`` holds a run with other settings.
    """
    settings = {
        name: getattr(config, name) if getattr(config, name) is not None else value
        for name, value in _SCALES[config.scale].items()
    }
    for name, value in settings.items():
        if value < 1:
            raise SettingError(f"--{name} must be above 0, got {value}.")
    for flag, chosen, known in (("streams", config.streams, STREAMS), ("methods", config.methods, METHODS)):
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            raise SettingError(f"--{flag} must be some of {', '.join(known)}, got {' '.join(unknown) or 'none'}.")
    record = Run(config.out, {name: value for name, value in settings.items() if name != "seeds"})
    chosen = {*config.methods, *(ADAPTED[name] for name in config.methods if name in ADAPTED)}
    works = [_Work(record, name, chosen, **settings) for name in config.streams]
    with Progress(sum(work.cost() for work in works), "continual") as progress:
        for work in works:
            work.tune(progress)
            work.test(progress)
    return reports.report(record, settings["seeds"])


class _Work:
    """All that is to do on one stream."""

    def __init__(
        self,
        record: Run,
        name: str,
        chosen: set[str],
        *,
        seeds: int,
        tasks: int,
        examples: int,
        test: int,
        adapted: int,
    ) -> None:
        self._record = record
        self._name = name
        self._stream = STREAMS[name]
        self._tasks = min(tasks, self._stream.tasks)
        self._seeds = seeds
        self._examples = examples
        self._test = test
        self._adapted = adapted
        self._methods = [method for method in methods_on(name) if method in chosen]

    def cost(self) -> float:
        """Returns the work in trainings of a plain network."""
        tuning = sum(COST.get(m, 1.0) * len(grid(m, self._name)) for m in self._methods)
        return tuning + self._seeds * sum(COST.get(m, 1.0) for m in self._methods)

    def tune(self, progress: Progress) -> None:
        """Judges every strength of every grid on validation images."""
        tasks = self._make(_TUNING_SEED, validation=True)
        for method in self._methods:
            cost = COST.get(method, 1.0)
            for strength in grid(method, self._name):
                key = {"stream": self._name, "part": "validation", "method": method, "strength": strength}
                if self._record.find(**key) is not None:
                    progress.skip(cost)
                    continue
                contender = self._contender(method, strength, _TUNING_SEED)
                learn(contender.learner, tasks, predictors={})
                found = self._last(contender.predictor(method, strength), tasks, self._limit(method))
                self._record.add(**key, accuracy=statistics.fmean(found))
                progress.advance(cost, f"{self._name}: {method} with {strength:g}, validation")

    def best(self, method: str) -> float:
        """Returns the strength with the highest accuracy on validation images (the weaker of equals)."""
        return reports.best(self._record.rows, self._name, method)

    def test(self, progress: Progress) -> None:
        """Trains each seed's networks with the best strengths and records their accuracies on test images."""
        for seed in range(self._seeds):
            tasks: list[Task] = []
            for base in (m for m in self._methods if m not in ADAPTED):
                together = [base, *(m for m in self._methods if ADAPTED.get(m) == base)]
                cost = sum(COST.get(m, 1.0) for m in together)
                if all(self._record.find(**self._key(m, seed)) is not None for m in together):
                    progress.skip(cost)
                    continue
                tasks = tasks or self._make(seed, validation=False)
                for method, accuracies in self._results(base, together, tasks, seed).items():
                    if self._record.find(**self._key(method, seed)) is None:
                        row = reports.to_row(accuracies)
                        self._record.add(**self._key(method, seed), **row)
                self._checkpoint(base, seed).unlink(missing_ok=True)
                progress.advance(cost, f"{self._name}, seed {seed}: {', '.join(together)}")

    def _key(self, method: str, seed: int) -> dict[str, Any]:
        strength = self.best(method)
        return {"stream": self._name, "part": "test", "method": method, "seed": seed, "strength": strength}

    def _results(self, base: str, together: list[str], tasks: list[Task], seed: int) -> dict[str, Accuracies]:
        setting = self._setting(seed)
        if base == "joint":
            last = torch.tensor(self._last(joint(tasks, setting), tasks, self._test))
            matrix = torch.full((len(tasks), len(tasks)), torch.nan)
            matrix[-1] = last
            return {base: Accuracies(matrix, torch.full((len(tasks),), torch.nan))}
        contender = self._contender(base, self.best(base), seed)
        return learn(
            contender.learner,
            tasks,
            predictors={method: contender.predictor(method, self.best(method)) for method in together},
            examples={method: self._limit(method) for method in together},
            checkpoint=self._checkpoint(base, seed),
            settings={"strength": self.best(base), **dataclasses.asdict(setting)},
        )

    def _checkpoint(self, base: str, seed: int) -> Path:
        return self._record.folder / "checkpoints" / f"{self._name}-{base}-{seed}.safetensors"

    def _limit(self, method: str) -> int:
        return self._adapted if method in ADAPTED else self._test

    def _last(self, predictor: Score, tasks: list[Task], limit: int) -> list[float]:
        return [accuracy(predictor, task.test, outputs=task.outputs, examples=limit) for task in tasks]

    def _setting(self, seed: int) -> Setting:
        stream = self._stream
        return Setting(stream.hidden, stream.epochs, self._tasks, min(stream.kept, self._examples), seed)

    def _contender(self, method: str, strength: float, seed: int) -> Contender:
        return Contender(ADAPTED.get(method, method), strength, self._setting(seed))

    def _make(self, seed: int, *, validation: bool) -> list[Task]:
        """Returns the tasks of a seed; the images that tasks are judged by are shuffled for each."""
        train, held_out = split()
        judged = held_out if validation else mnist("test")
        generator = torch.Generator().manual_seed(10_000 + seed)
        made = self._stream.make(train, judged, tasks=self._tasks, examples=self._examples, generator=generator)
        tasks = []
        for task in made:
            order = torch.randperm(len(task.test.labels), generator=generator)[: max(self._test, self._adapted)]
            tasks.append(task._replace(test=task.test.take(order)))
        return tasks
