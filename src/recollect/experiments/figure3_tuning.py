"""How the hyper-parameters of Figure 3 were chosen: grids on validation images, every model with its own.

A network of its own seed learns the 20 tasks; each point of a grid is then judged once on validation images, which are
training images that no network is trained on. Test images are not touched.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recollect import (
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    NonParametric,
    Parametric,
    dot_product,
    gaussian,
    inverse_distance,
)
from recollect import rules as update_rules
from recollect.data import permuted
from recollect.errors import SettingError
from recollect.experiments.figure3 import Figure3, split
from recollect.experiments.permuted import Learner, RandomIndex
from recollect.experiments.runner import Progress, Run
from recollect.kernels import Kernel
from recollect.predictors import Predictor

_SEED = 1000  # no seed of the reported runs


@dataclass(frozen=True)
class Figure3Tuning:
    """The grid behind the hyper-parameters of figure3, on validation images."""

    out: Path = Path("runs/figure3-tuning")
    """The folder for results; a run that was stopped goes on there."""
    tasks: int = 20
    """How many tasks the network learns first."""
    queries: int = 400
    """Validation images, spread evenly over the tasks."""
    neighbors: tuple[int, ...] = (16, 32)
    """K of MbPA."""
    bandwidths: tuple[float, ...] = (0.0, 1.5, 2.0, 2.5)
    """Widths of the Gaussian kernel of MbPA; 0 stands for the inverse distance of the paper."""
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """Step sizes of MbPA."""
    steps: tuple[int, ...] = (10, 20)
    """Numbers of steps of MbPA."""
    vote_neighbors: tuple[int, ...] = (3, 5, 10, 32)
    """K of the vote."""
    vote_bandwidths: tuple[float, ...] = (0.0, 0.75, 1.0, 1.5, 2.0, 2.5)
    """Widths of the Gaussian kernel of the vote; 0 stands for the inverse distance."""
    random_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Step sizes of the control."""
    random_steps: tuple[int, ...] = (1, 5, 20)
    """Numbers of steps of the control."""


def run(config: Figure3Tuning) -> str:
    """Runs what is missing of the grids and returns the table of the best settings.

    Raises:
        MissingDataError: If MNIST is neither at hand nor can be downloaded.
        SettingError: If there are fewer queries than tasks, or ``out`` holds a run with other settings.
    """
    if config.queries < config.tasks or config.tasks < 1 or config.queries > 10_000:
        raise SettingError(f"--queries must be from --tasks to 10000, got {config.queries} and {config.tasks}.")
    settings = {"tasks": config.tasks, "queries": config.queries}
    record = Run(config.out, settings)
    training = dataclasses.replace(Figure3(scale="paper"), tasks=config.tasks).settings()
    learner = Learner(training, _SEED, 784, config.out / "checkpoints" / "network.safetensors")
    train, validation = split()
    inputs, labels = [], []
    rows = query_rows(config, len(validation.labels))
    generator = torch.Generator().manual_seed(10_000 + _SEED)
    for number, task in enumerate(
        permuted(train, validation, tasks=config.tasks, examples=training.examples, generator=generator), 1
    ):
        learner.learn(number, task.train)
        part = task.test.take(rows[number - 1])  # the tasks share their images: each is judged by others
        inputs.append(part.inputs)
        labels.append(part.labels)
    queries, answers = torch.cat(inputs), torch.cat(labels)
    points = list(_grid(config, learner))
    with Progress(sum(p.get("neighbors", 1) * p.get("steps", 1) for p, _ in points), "figure 3: tuning") as progress:
        for point, predictor in points:
            cost = point["neighbors"] * point.get("steps", 1)
            if record.find(**point) is not None:
                progress.skip(cost)
                continue
            learner.draws.manual_seed(_SEED)
            accuracy = float((predictor(queries).argmax(-1) == answers).float().mean())
            record.add(**point, accuracy=accuracy)
            progress.advance(cost)
    return report(record, settings)


def query_rows(config: Figure3Tuning, images: int) -> list[Tensor]:
    """Returns, for each task, which validation images it is judged by; no two tasks have one in common."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(_SEED))
    return list(order[: config.queries // config.tasks * config.tasks].view(config.tasks, -1))


def _grid(config: Figure3Tuning, learner: Learner) -> Iterator[tuple[dict[str, Any], Predictor]]:
    """Yields every point of the grids and its predictor."""
    largest = max(learner.memories)
    for size, memory in learner.memories.items():
        for k, width in itertools.product(config.vote_neighbors, config.vote_bandwidths):
            point = {"curve": f"vote-{size}", "neighbors": k, "bandwidth": width}
            yield point, NonParametric(memory, classes=10, neighbors=k, kernel=_kernel(width))
        grid = itertools.product(config.neighbors, config.bandwidths, config.rates, config.steps)
        for k, width, rate, steps in grid:
            point = {"curve": f"mbpa-{size}", "neighbors": k, "bandwidth": width, "rate": rate, "steps": steps}
            yield point, _mbpa(learner, memory, k, rate, steps, _kernel(width))
    anywhere = EpisodicMemory(learner.memories[largest].capacity, 784, index=RandomIndex(learner.draws))
    anywhere.load_state_dict(learner.memories[largest].state_dict())
    for k, rate, steps in itertools.product(config.neighbors, config.random_rates, config.random_steps):
        point = {"curve": f"random-{largest}", "neighbors": k, "rate": rate, "steps": steps}
        yield point, _mbpa(learner, anywhere, k, rate, steps, dot_product(0.0))
    yield {"curve": "mlp", "neighbors": 0}, Parametric(learner.network)


def _kernel(width: float) -> Kernel:
    return gaussian(width) if width else inverse_distance(epsilon=1e-3)


def _mbpa(learner: Learner, memory: EpisodicMemory, k: int, rate: float, steps: int, kernel: Kernel) -> MbPA:
    adaptation = LocalAdaptation(update_rules.sgd(rate), steps=steps)
    return MbPA(learner.network, memory, neighbors=k, adaptation=adaptation, kernel=kernel)


def report(record: Run, sample: dict[str, int]) -> str:
    """Writes the five best points of each grid as a table, and returns it."""
    lines = [
        f"Validation images, {sample['queries']} in all, {sample['tasks']} tasks.",
        "",
        "| model | neighbors | bandwidth | rate | steps | accuracy (%) |",
        "|---|---|---|---|---|---|",
    ]
    curves = list(dict.fromkeys(row["curve"] for row in record.rows))
    for curve in curves:
        best = sorted((row for row in record.rows if row["curve"] == curve), key=lambda row: -row["accuracy"])[:5]
        for row in best:
            width = {0.0: "inverse distance", None: "none"}.get(row.get("bandwidth"), row.get("bandwidth"))
            settings = f"{row['neighbors']} | {width} | {row.get('rate', '')} | {row.get('steps', '')}"
            lines.append(f"| {curve} | {settings} | {100 * row['accuracy']:.1f} |")
    table = "\n".join(lines) + "\n"
    record.write_table(table)
    return table
