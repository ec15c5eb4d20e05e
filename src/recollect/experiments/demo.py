"""``recollect demo``: ten permutations of real digits in sequence, and a network that does not forget them."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from recollect.data import Dataset, Task, digits, permuted
from recollect.experiments import permuted as shared
from recollect.experiments.permuted_report import report
from recollect.experiments.runner import Progress, Run

_SETTINGS = shared.Settings(
    tasks=10,
    examples=1297,
    memory=(40,),
    final=500,
    point=1000,
    hidden=128,
    epochs=5,
    batch=32,
    learning_rate=1e-3,
    neighbors=24,
    bandwidth=(0.7,),
    rate=0.07,
    steps=10,
    vote_neighbors=3,
    vote_bandwidth=(0.6,),
    random_rate=0.05,
    random_steps=10,
)


@dataclass(frozen=True)
class Demo:
    """Ten tasks in sequence, one network, 40 memories of each task: what is remembered?"""

    out: Path = Path("runs/demo")
    """The folder for results; started again, the demo shows what it found there."""
    seed: int = 0
    """Determines permutations, split and initial weights."""


def run(config: Demo) -> str:
    """Runs the demo and returns its table.

    The digits ship with scikit-learn: 1,297 are for training, 500 for the test.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
        SettingError: If ``out`` holds a run with other settings.
    """
    train, test = split(digits(), config.seed)
    record = Run(config.out, {**dataclasses.asdict(_SETTINGS), "seed": config.seed})

    def tasks() -> Iterator[Task]:
        generator = torch.Generator().manual_seed(10_000 + config.seed)
        return permuted(train, test, tasks=_SETTINGS.tasks, generator=generator)

    with Progress(shared.work(_SETTINGS), "ten tasks") as progress:
        shared.run_seed(record, _SETTINGS, config.seed, tasks, progress)
    title = "Permuted digits: mean test accuracy over the tasks seen so far"
    return report(record, [config.seed], _SETTINGS, title, {})


def split(full: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Returns 1,297 digits to train on and 500 to be judged by."""
    rows = torch.randperm(len(full.labels), generator=torch.Generator().manual_seed(seed))
    return full.take(rows[500:]), full.take(rows[:500])
