"""Few-shot classification of Finn et al. (2017), Section 5.2: Omniglot, a few drawings of each of a few characters."""

import itertools
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from recollect.adaptation import rules
from recollect.data import Episodes, episodes
from recollect.experiments import plots
from recollect.experiments.meta.drawings import TEST, TRAIN, VALID, Drawings, drawings
from recollect.experiments.meta.intervals import half_width
from recollect.experiments.meta.training import train
from recollect.experiments.runner import Run, begin
from recollect.meta import MAML
from recollect.meta.initial import drawn

_SIDE = 28
_NETWORKS = {"convolutions": "four convolutions", "linear": "no convolutions"}
_COLORS = (plots.NAVY, plots.GREEN, plots.RED, plots.ORANGE, plots.PURPLE, plots.CYAN, plots.BROWN)


@dataclass(frozen=True)
class Line:
    """A network and the tasks that it learns."""

    network: str
    iterations: int = 60_000
    """Of the training. (Paper: 60,000; the default of its code: 15,000.)"""
    ways: int = 5
    shots: int = 1
    first_order: bool = False
    tasks: int = 32
    """Of a step of Adam. (Paper: 32 for 5 ways, 16 for 20.)"""
    steps: int = 1
    """Of a task in training. (Paper: 1 for 5 ways, 5 for 20.)"""
    test_steps: int = 3
    """Of a task in the test. (Paper.)"""
    rate: float = 0.4
    """Of a task's steps. (Paper: 0.4 for 5 ways, 0.1 for 20.)"""

    @property
    def title(self) -> str:
        """What the table calls it."""
        order = ", first order" if self.first_order else ""
        return f"{self.ways} ways, {self.shots} shot{'s' if self.shots > 1 else ''}, {_NETWORKS[self.network]}{order}"


# Finn et al. (2017), Table 1, in percent.
PAPER = {("convolutions", 5, 1): "98.7 +- 0.4", ("convolutions", 5, 5): "99.9 +- 0.1"}
PAPER |= {("convolutions", 20, 1): "95.8 +- 0.3", ("convolutions", 20, 5): "98.9 +- 0.2"}
PAPER |= {("linear", 5, 1): "89.7 +- 1.1", ("linear", 5, 5): "97.5 +- 0.6"}


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    lines: tuple[Line, ...]
    outer: float = 1e-3
    """The rate of Adam. (Paper.)"""
    last_outer: float = 1e-3
    """What that rate falls to in the course of the training, along a cosine. (Paper: it does not fall.)"""
    every: int = 500
    """Iterations between two looks at validation tasks."""
    valid: int = 200
    """Validation tasks."""
    test: int = 2000
    """Test tasks."""
    seed: int = 0


_TWENTY = {"ways": 20, "tasks": 16, "steps": 5, "test_steps": 5, "rate": 0.1}
_ALL = (
    *(Line(network, shots=shots) for shots in (1, 5) for network in _NETWORKS),
    Line("convolutions", first_order=True),
    *(Line("convolutions", shots=shots, **_TWENTY) for shots in (1, 5)),
)
SCALES = {
    "smoke": Scale((Line("convolutions", 3), Line("linear", 3)), every=2, valid=4, test=10),
    "small": Scale((Line("convolutions", 8_000), Line("linear", 24_000)), last_outer=0.0),
    "paper": Scale(_ALL),
}


@dataclass(frozen=True)
class MamlOmniglot:
    """Omniglot: MAML with and without convolutions, 5 ways and 1 shot; at ``paper`` 20 ways and 5 shots too."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (an hour and a half on one core) or ``paper`` (days)."""
    out: Path = Path("runs/maml-omniglot")
    """The folder for results; a run that was stopped goes on there."""


def run(config: MamlOmniglot) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``recollect.data.omniglot``.
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    record, scale = begin(config, SCALES)
    study = _Study(record, scale)
    for line in scale.lines:
        if record.find(part="test", line=asdict(line)) is None:
            study.measure(line)
    return _report(record, scale)


def network(name: str, ways: int, *, generator: torch.Generator) -> nn.Sequential:
    """Returns one of the paper's networks: 112,261 parameters with convolutions for 5 ways, 247,621 without.

    *Differs from the paper:* weights are drawn uniformly in ``+-1/sqrt(inputs)``, biases too, as torch does.
    """
    layers: list[nn.Module] = []
    if name == "convolutions":
        for channels in (1, 64, 64, 64):
            layers += (drawn(nn.Conv2d(channels, 64, 3, stride=2, padding=1, device="meta"), 9 * channels, generator),)
            layers += (nn.BatchNorm2d(64), nn.ReLU())
        layers += (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    else:
        layers.append(nn.Flatten())
        sizes = (_SIDE**2, 256, 128, 64, 64)
        for inputs, outputs in itertools.pairwise(sizes):
            layers += (
                drawn(nn.Linear(inputs, outputs, device="meta"), inputs, generator),
                nn.BatchNorm1d(outputs),
                nn.ReLU(),
            )
    return nn.Sequential(*layers, drawn(nn.Linear(64, ways, device="meta"), 64, generator))


class _Study:
    def __init__(self, record: Run, scale: Scale) -> None:
        self._record = record
        self._scale = scale

    @cached_property
    def _data(self) -> Drawings:
        return drawings(_SIDE, seed=self._scale.seed)

    def measure(self, line: Line) -> None:
        """Trains a network, and adds the row of its test."""
        scale = self._scale
        g = torch.Generator().manual_seed(scale.seed)
        net = network(line.network, line.ways, generator=g)
        maml = MAML(net, rule=rules.sgd(line.rate), steps=line.steps, first_order=line.first_order)
        optimizer = torch.optim.Adam(net.parameters(), lr=scale.outer)
        schedule = CosineAnnealingLR(optimizer, line.iterations, eta_min=scale.last_outer)

        def step(number: int) -> float:
            some = self._draw(line, TRAIN, line.tasks, generator=g)
            outputs = maml(some.support, some.support_labels, some.queries)
            loss = cross_entropy(outputs.flatten(0, 1), some.query_labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            key = {"part": "learning", "line": asdict(line), "iterations": number}
            if number % scale.every == 0 and self._record.find(**key) is None:
                right = self._right(maml, line, VALID, scale.valid)
                self._record.add(**key, loss=round(loss.item(), 5), accuracy=round(100 * float(right.mean()), 2))
            return loss.item()

        parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
        run_of = {"line": asdict(line), **asdict(scale)}
        train(self._record.folder, line.title, parts, run=run_of, generator=g, steps=line.iterations, step=step)
        right = 100 * self._right(maml, line, TEST, scale.test)
        row = {"accuracy": round(float(right.mean()), 2), "interval": _margin(right)}
        size = sum(parameter.numel() for parameter in net.parameters())
        self._record.add(part="test", line=asdict(line), parameters=size, **row)

    def _right(self, maml: MAML, line: Line, split: int, tasks: int) -> Tensor:
        """Returns the accuracy of each task of a split, drawn by the number of the split, from 0 to 1."""
        some = self._draw(line, split, tasks, generator=torch.Generator().manual_seed(split))
        with torch.no_grad():
            outputs = maml(some.support, some.support_labels, some.queries, steps=line.test_steps)
        return (outputs.argmax(-1) == some.query_labels).float().mean(1)

    def _draw(self, line: Line, split: int, tasks: int, *, generator: torch.Generator) -> Episodes:
        """Returns tasks of a split with as many queries as shots; those to train on are turned by quarters."""
        return episodes(
            self._data.pixels[:, :, None],
            self._data.splits[split],
            tasks=tasks,
            ways=line.ways,
            shots=line.shots,
            queries=line.shots,
            turned=split == TRAIN,
            generator=generator,
        )


def _margin(values: Tensor) -> float:
    return round(float(half_width(values)), 2)


def _report(record: Run, scale: Scale) -> str:
    lines = ["| task | parameters | accuracy | paper |", "| --- | --- | --- | --- |"]
    for line in scale.lines:
        row = record.find(part="test", line=asdict(line))
        if row is not None:
            paper = "" if line.first_order else PAPER.get((line.network, line.ways, line.shots), "")
            cells = [line.title, f"{row['parameters']:,}", f"{row['accuracy']:.1f} +- {row['interval']:.1f}", paper]
            lines.append(f"| {' | '.join(cells)} |")
    intro = (
        "Accuracy in percent on queries of new characters, with 95 % intervals over tasks. A network sees all queries "
        "of a task at once, and normalizes by their statistics, as in the paper."
    )
    table = "\n".join(["## maml-omniglot", "", intro, "", *lines, ""])
    record.write_table(table)
    curves = []
    for place, line in enumerate(scale.lines):
        rows = [row for row in record.rows if row["part"] == "learning" and row["line"] == asdict(line)]
        x, y = [row["iterations"] / 1000 for row in rows], [row["accuracy"] for row in rows]
        curves.append(plots.Curve(line.title, x, y, [0.0] * len(y), _COLORS[place]))
    title = [("While learning: new characters", curves)]
    plots.panels(title, record.folder / "figure.png", xlabel="thousands of iterations", ylabel="accuracy (%)")
    return table
