"""Figure 2: what local fitting does, on a line of regression targets.

Paper: Section 2.2. A network has learned one function; the memory has since seen another. Around a query, attention
(a constant fitted to the neighbors) is drawn to where most of them lie; the network does not explain them; the network
adapted to them does.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from recollect import (
    Context,
    EpisodicMemory,
    Gaussian,
    LocalAdaptation,
    MbPA,
    NonParametric,
    Parametric,
    gaussian,
    rules,
)
from recollect.adaptation import Head
from recollect.errors import SettingError
from recollect.experiments import plots
from recollect.experiments.runner import Progress, Run


@dataclass(frozen=True)
class Figure2:
    """Regression in one dimension: context, attention, network and adapted network."""

    out: Path = Path("runs/figure2")
    """The folder for results."""
    query: float = 0.75
    """Where the prediction is made, from 0 to 4."""
    neighbors: int = 12
    """K."""
    bandwidth: float = 0.3
    """The width of the Gaussian kernel."""
    rate: float = 0.05
    """The step size of local gradient descent."""
    steps: int = 50
    """The number of local steps."""
    seed: int = 0
    """Determines the data and the initial weights."""


def before(x: Tensor) -> Tensor:
    """The function that the network learned."""
    return torch.sin(1.5 * x)


def now(x: Tensor) -> Tensor:
    """The function that the memory has seen since."""
    return 1.2 * torch.sin(1.5 * x + 0.5) + 0.5


def run(config: Figure2) -> str:
    """Draws the figure and returns the errors of the three predictions.

    Raises:
        SettingError: If the query is not between 0 and 4, or ``out`` holds a run with other settings.
    """
    if not 0 <= config.query <= 4:
        raise SettingError(f"--query must be from 0 to 4, where the memories lie, got {config.query}.")
    settings = {k: v for k, v in vars(config).items() if k != "out"}
    record = Run(config.out, settings)
    generator = torch.Generator().manual_seed(config.seed)
    network = _train(generator)
    memory = EpisodicMemory(capacity=60, key_size=1, value_shape=(1,), value_dtype=torch.float32)
    # Memories are dense on the right of the query and rare on its left, where attention misjudges them.
    seen = 4 * torch.rand(60, 1, generator=generator).sqrt()
    memory.write(seen, now(seen) + 0.05 * torch.randn(60, 1, generator=generator))
    kernel = gaussian(config.bandwidth)
    adaptation = LocalAdaptation(rules.sgd(config.rate), steps=config.steps)
    query = torch.tensor([config.query])
    predictors = {
        "attention": NonParametric(memory, neighbors=config.neighbors, kernel=kernel, likelihood=Gaussian()),
        "network": Parametric(network, likelihood=Gaussian()),
        "adapted network": MbPA(
            network,
            memory,
            neighbors=config.neighbors,
            adaptation=adaptation,
            kernel=kernel,
            likelihood=Gaussian(),
        ),
    }
    predictions = {name: float(predictor(query)) for name, predictor in predictors.items()}
    truth = float(now(query))
    for name, value in predictions.items():
        if record.find(model=name) is None:
            record.add(model=name, prediction=value, truth=truth)
    lines = ["| model | prediction | error |", "|---|---|---|"]
    lines += [f"| {name} | {value:.3f} | {abs(value - truth):.3f} |" for name, value in predictions.items()]
    table = "\n".join([f"Truth at the query x = {config.query}: {truth:.3f}", "", *lines]) + "\n"
    record.write_table(table)
    context = memory.read(query, config.neighbors, kernel=kernel)
    _draw(config, network, memory, context, adaptation, predictions)
    return table


def _train(generator: torch.Generator) -> nn.Sequential:
    """Returns a network that has learned ``before``."""
    network = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            parameter.uniform_(-bound, bound, generator=generator)
    inputs = 4 * torch.rand(400, 1, generator=generator)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    with Progress(600, "training the network") as progress:
        for _ in range(600):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(inputs), before(inputs)).backward()
            optimizer.step()
            progress.advance(1)
    return network


def _draw(
    config: Figure2,
    network: nn.Module,
    memory: EpisodicMemory,
    context: Context,
    adaptation: LocalAdaptation,
    predictions: dict[str, float],
) -> None:
    picture, axes = plots.figure(7.2, 4.2)
    x = torch.linspace(0, 4, 200).unsqueeze(1)
    # The one adapted network, seen at every x: the same context for all of them.
    everywhere = Context(*(part.expand(len(x), *part.shape) for part in context))
    with torch.no_grad():
        adapted = adaptation.bind(Head(network), Gaussian())(x, everywhere)
    line = x.squeeze(1).numpy()
    axes.plot(
        line, Parametric(network, likelihood=Gaussian())(x).squeeze(1).numpy(), color=plots.PURPLE, label="network"
    )
    near = context.keys.squeeze(1)
    span = x[(x >= near.min() - 0.15) & (x <= near.max() + 0.15)]
    inside = torch.isin(x.squeeze(1), span)
    axes.plot(line[inside.numpy()], adapted[inside].squeeze(1).numpy(), color=plots.GREEN, linewidth=2.2)
    axes.plot([], [], color=plots.GREEN, linewidth=2.2, label="network adapted to the context")
    ends = [float(near.min()) - 0.15, float(near.max()) + 0.15]
    axes.plot(ends, [predictions["attention"]] * 2, "--", color=plots.ORANGE, label="attention (a constant)")
    axes.scatter(memory.keys.squeeze(1), memory.values.squeeze(1), s=14, color="#c8c8c8", label="memory", zorder=2)
    size = 15 + 250 * context.weights.numpy()
    axes.scatter(near, context.values.squeeze(1), s=size, color=plots.RED, label="context (size: weight)", zorder=3)
    for name, color in (("attention", plots.ORANGE), ("network", plots.PURPLE), ("adapted network", plots.GREEN)):
        axes.scatter(
            [config.query], [predictions[name]], marker="o", s=42, facecolor="white", edgecolor=color, zorder=5
        )
    axes.axvline(config.query, color=plots.BLUE, linewidth=1.2, label="query", zorder=1)
    axes.set_xlabel("x")
    axes.set_ylabel("y")
    axes.set_title(
        "Local fitting: a constant, a network, and a network adapted to the context", loc="left", fontsize=11
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    plots.save(picture, config.out / "figure.png")
