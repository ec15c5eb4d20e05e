"""Figure 3: 20 permutations of MNIST in sequence, one network, a small memory, and what combines with it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recollect.data import Dataset, Task, mnist, permuted
from recollect.errors import SettingError
from recollect.experiments import permuted as shared
from recollect.experiments.permuted_report import report
from recollect.experiments.runner import Progress, Run

# Figure 3, left, after 20 tasks, read off the figure: the paper has no table.
PAPER = {"mlp": 46.1, "ewc": 62.3, "mbpa-100": 63.5, "mbpa-250": 70.6, "mbpa-1000": 81.7}

_SCALES: dict[str, dict[str, Any]] = {
    "smoke": {
        "tasks": 3,
        "examples": 1000,
        "memory": (50, 100),
        "bandwidth": (2.5,),
        "final": 100,
        "point": 100,
        "combined": (50,),
        "combined_final": 100,
    },
    "small": {
        "tasks": 10,
        "examples": 10_000,
        "memory": (100, 1000),
        "bandwidth": (2.5, 1.5),
        "final": 500,
        "point": 1000,
        "combined": (100, 1000),
        "combined_final": 500,
    },
    "paper": {
        "tasks": 20,
        "examples": 10_000,
        "memory": (100, 250, 1000),
        "bandwidth": (2.5, 2.5, 1.5),
        "final": 10_000,
        "point": 1000,
        "combined": (100, 1000),
        "combined_final": 1000,
    },
}


@dataclass(frozen=True)
class Figure3:
    """Permuted MNIST: one network, tasks in sequence, with and without local adaptation."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """How much of it: smoke (seconds), small (minutes) or paper (the figure itself)."""
    out: Path = Path("runs/figure3")
    """The folder for results; a run that was stopped goes on there."""
    seeds: int = 1
    """How many times, with other permutations and other weights."""
    tasks: int | None = None
    """How many tasks (paper: 20). This and the next four go by the scale where they are not given."""
    examples: int | None = None
    """Training examples for each task (paper: 10,000)."""
    memory: tuple[int, ...] | None = None
    """Examples of each task that a memory keeps, one number for each memory (paper: 100 250 1000)."""
    final: int | None = None
    """Test images of each task at the last point (of 10,000)."""
    point: int | None = None
    """Test images of each earlier point in all, spread evenly over the tasks seen so far."""
    hidden: int = 256
    """Units of each of the two hidden layers."""
    epochs: int = 1
    """Passes over each task's training examples."""
    batch: int = 128
    """Training examples for each step of Adam."""
    learning_rate: float = 1e-3
    """The step size of Adam (its default)."""
    neighbors: int = 16
    """K of MbPA and of the control."""
    bandwidth: tuple[float, ...] | None = None
    """The width of MbPA's Gaussian kernel in pixel distance: one number, or one for each memory.
    By scale where not given (paper: no such kernel; see figure3-tuning)."""
    rate: float = 0.05
    """The step size of local gradient descent (paper: from 0 to 1)."""
    steps: int = 10
    """The number of local steps (paper: from 1 to 20)."""
    vote_neighbors: int = 10
    """K of the k-NN vote."""
    vote_bandwidth: tuple[float, ...] = (1.5,)
    """The width of the vote's Gaussian kernel: one number, or one for each memory."""
    random_rate: float = 0.01
    """The step size of the control, which adapts to memories drawn at random."""
    random_steps: int = 5
    """The number of steps of the control."""
    ewc: float | None = 3.0
    """The strength of EWC, chosen on validation images by the experiment continual; None: without EWC."""
    mas: float | None = 0.01
    """The strength of MAS, chosen likewise; None: without MAS."""
    replay: bool = True
    """Whether networks also replay what each memory holds."""
    combined: tuple[int, ...] | None = None
    """Which memories MbPA reads beside a network with EWC, MAS or replay. By scale where not given."""
    combined_final: int | None = None
    """Test images of each task at the last point of those. By scale where not given."""

    def settings(self) -> shared.Settings:
        """Returns what determines the results of one seed, with the scale's values filled in.

        Raises:
            SettingError: If a number is out of range.
        """
        if self.seeds < 1:
            raise SettingError(f"--seeds must be above 0, got {self.seeds}.")
        scale = _SCALES[self.scale]
        names = [field.name for field in dataclasses.fields(shared.Settings)]
        given = {name: getattr(self, name) for name in names}
        filled = {name: scale[name] if value is None else value for name, value in given.items()}
        return shared.Settings(**filled)


def split() -> tuple[Dataset, Dataset]:
    """Returns MNIST's training images as 50,000 to train on and 10,000 to choose hyper-parameters by."""
    full = mnist("train")
    rows = torch.randperm(len(full.labels), generator=torch.Generator().manual_seed(0))
    return full.take(rows[10_000:]), full.take(rows[:10_000])


def run(config: Figure3) -> str:
    """Runs the experiment and returns its table.

    Raises:
        MissingDataError: If MNIST is neither at hand nor can be downloaded.
        SettingError: If a setting is out of range or ``out`` holds a run with other settings.
    """
    settings = config.settings()
    train, _ = split()
    test = mnist("test")
    record = Run(config.out, dataclasses.asdict(settings))
    with Progress(config.seeds * shared.work(settings), "figure 3") as progress:
        for seed in range(config.seeds):

            def tasks(seed: int = seed) -> Iterator[Task]:
                generator = torch.Generator().manual_seed(10_000 + seed)
                return permuted(train, test, tasks=settings.tasks, examples=settings.examples, generator=generator)

            shared.run_seed(record, settings, seed, tasks, progress)
    title = "Permuted MNIST: mean test accuracy over the tasks seen so far"
    protocol = ("tasks", "examples", "final")
    paper = PAPER if all(getattr(settings, name) == _SCALES["paper"][name] for name in protocol) else {}
    return report(record, list(range(config.seeds)), settings, title, paper)
