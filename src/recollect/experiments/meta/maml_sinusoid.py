"""Sinusoid regression of Finn et al. (2017), Section 5.1: a start from which a step or two on a few points suffice.

A task is a sine wave of its own amplitude and phase. Beside MAML stands a network that was trained on all waves at
once, the best that one function can do for them all, and then adapts to the same points by as many steps.
"""

import itertools
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from recollect.adaptation import rules
from recollect.errors import NonFiniteError
from recollect.experiments import plots
from recollect.experiments.meta.intervals import half_width, standard_errors
from recollect.experiments.meta.training import train
from recollect.experiments.runner import Run, begin
from recollect.likelihoods import Gaussian
from recollect.meta import MAML
from recollect.models import mlp

# Finn et al. (2017): mean squared error on 5 points at 1, 5 and 10 steps.
PAPER = {"MAML": {1: 0.67, 5: 0.38, 10: 0.35}, "pretrained": {1: 2.41, 5: 2.23, 10: 2.19}}
_COLORS = {"MAML": plots.NAVY, "MAML, first order": plots.BLUE, "pretrained": plots.GREEN}
_STEPS = 10
_TRAINING = ("iterations", "tasks", "rate", "outer", "hidden", "seed")  # settings that a training depends on


@dataclass(frozen=True)
class Scale:
    """How much is run. The numbers are the paper's where nothing is said."""

    iterations: int = 70_000
    tasks: int = 25
    rate: float = 0.01
    """Of a task's step in training."""
    outer: float = 1e-3
    """Of Adam."""
    hidden: tuple[int, ...] = (40, 40)
    shots: tuple[int, ...] = (5, 10)
    """Points of each task; there is a network for each number."""
    rates: tuple[float, ...] = (0.001, 0.002, 0.005, 0.006, 0.007, 0.008, 0.01, 0.02)
    """Tried for a task's steps in the test, with each model. (Ours.)"""
    valid: int = 4000
    """Tasks to choose the rate by. (Ours.)"""
    test: int = 1000
    """Test tasks. (Ours.)"""
    seed: int = 0


SCALES = {"smoke": Scale(iterations=50, valid=20, test=20), "small": Scale(), "paper": Scale()}


@dataclass(frozen=True)
class MamlSinusoid:
    """Sine waves from 5 and 10 points: MAML, first-order MAML and a pretrained network."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds) or ``small`` (ten minutes), which is the paper's."""
    out: Path = Path("runs/maml-sinusoid")
    """The folder for results; a run that was stopped goes on there."""


class Waves(NamedTuple):
    """Points of sine waves, and others to be judged by."""

    x: Float[Tensor, "t n 1"]
    y: Float[Tensor, "t n 1"]
    queries: Float[Tensor, "t m 1"]
    answers: Float[Tensor, "t m 1"]


def run(config: MamlSinusoid) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    record, scale = begin(config, SCALES)
    for shots, model in itertools.product(scale.shots, _COLORS):
        if record.find(part="test", model=model, shots=shots) is None:
            _measure(record, scale, model, shots)
    return _report(record, scale)


def waves(tasks: int, points: int, queries: int | None, *, generator: torch.Generator) -> Waves:
    """Returns points of random waves: amplitudes from 0.1 to 5, phases from 0 to pi, x from -5 to 5.

    Args:
        tasks: Waves.
        points: Of each, to learn from.
        queries: Of each, to be judged by: as many random ones, or 101 at equal distances when None.
        generator: Draws them.
    """
    amplitude = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=generator)
    phase = math.pi * torch.rand(tasks, 1, 1, generator=generator)
    x = 10 * torch.rand(tasks, points, 1, generator=generator) - 5
    if queries is None:
        new = torch.linspace(-5, 5, 101)[:, None].expand(tasks, -1, 1)
    else:
        new = 10 * torch.rand(tasks, queries, 1, generator=generator) - 5
    return Waves(x, amplitude * torch.sin(x - phase), new, amplitude * torch.sin(new - phase))


def _measure(record: Run, scale: Scale, model: str, shots: int) -> None:
    """Trains a model, and adds the row of its test."""
    g = torch.Generator().manual_seed(scale.seed)
    net = mlp(1, *scale.hidden, 1, generator=g)
    maml = _adapting(net, scale.rate, first_order=model != "MAML")
    optimizer = torch.optim.Adam(net.parameters(), lr=scale.outer)

    def step(number: int) -> float:
        some = waves(scale.tasks, shots, shots, generator=g)
        answers = net(some.queries) if model == "pretrained" else maml(some.x, some.y, some.queries)
        loss = mse_loss(answers, some.answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    settings = asdict(scale)
    run_of = {"model": model, "shots": shots, **{name: settings[name] for name in _TRAINING}}
    parts, title = {"net": net, "optimizer": optimizer}, f"{model}, {shots} points"
    train(record.folder, title, parts, run=run_of, generator=g, steps=scale.iterations, step=step)
    rate = _best_rate(net, scale, shots)
    errors = _errors(net, rate, waves(scale.test, shots, None, generator=torch.Generator().manual_seed(3)))
    row = {"mse": _rounded(errors.mean(1)), "interval": _rounded(half_width(errors))}
    record.add(part="test", model=model, shots=shots, rate=rate, **row)


def _adapting(net: nn.Module, rate: float, *, first_order: bool = False) -> MAML:
    # Half the squared error with a variance of 1/2: gradients are those of the mean squared error.
    likelihood = Gaussian(variance=0.5)
    return MAML(net, rule=rules.sgd(rate), steps=1, first_order=first_order, likelihood=likelihood)


def _best_rate(net: nn.Module, scale: Scale, shots: int) -> float:
    """Returns the rate with the least mean error after 1 to 10 steps, on tasks that no test has."""
    some = waves(scale.valid, shots, None, generator=torch.Generator().manual_seed(1))
    found = dict.fromkeys(scale.rates, math.inf)
    for rate in scale.rates:
        with suppress(NonFiniteError):  # of points close together the steps may diverge
            found[rate] = float(_errors(net, rate, some)[1:].mean())
    return min(found, key=lambda rate: found[rate])


@torch.no_grad()
def _errors(net: nn.Module, rate: float, some: Waves) -> Float[Tensor, "s t"]:
    """Returns the mean squared error of each task after 0 to 10 steps."""
    maml = _adapting(net, rate, first_order=True)
    answers = [maml(some.x, some.y, some.queries, steps=steps) for steps in range(_STEPS + 1)]
    return torch.stack([(found - some.answers).square().mean((1, 2)) for found in answers])


def _rounded(numbers: Float[Tensor, " k"]) -> list[float]:
    return [round(number, 4) for number in numbers.tolist()]


def _report(record: Run, scale: Scale) -> str:
    tests = [row for row in record.rows if row["part"] == "test"]
    head = ["points", "model", "", *(f"{steps} step{'s' if steps > 1 else ''}" for steps in (1, 5, 10))]
    lines = [head, ["---"] * len(head)]
    for row in sorted(tests, key=lambda row: row["shots"]):
        cells = [f"{row['mse'][steps]:.2f} +- {row['interval'][steps]:.2f}" for steps in (1, 5, 10)]
        lines.append([str(row["shots"]), row["model"], "ours", *cells])
        if row["shots"] == 5 and row["model"] in PAPER:
            lines.append(["", "", "paper", *(f"{number:.2f}" for number in PAPER[row["model"]].values())])
    intro = "Mean squared error on new waves after some steps on a few of their points, with 95 % intervals over waves."
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    table = f"## maml-sinusoid\n\n{intro}\n\n{body}\n"
    record.write_table(table)
    panels = []
    for shots in scale.shots:
        curves = [
            plots.Curve(
                row["model"], range(_STEPS + 1), row["mse"], standard_errors(row["interval"]), _COLORS[row["model"]]
            )
            for row in tests
            if row["shots"] == shots
        ]
        panels.append((f"{shots} points of each wave", curves))
    plots.panels(panels, record.folder / "figure.png", xlabel="steps", ylabel="mean squared error", digits=2)
    return table
