"""The streams and the methods that ``recollect reproduce continual`` compares."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, NonParametric, gaussian, rules
from recollect.continual import AGEM, EWC, GEM, MAS, SI, Learner, LwF, Ring
from recollect.data import Dataset, Task, permuted, rotated, split
from recollect.models import mlp

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stream:
    """A stream of tasks, and how a network learns it."""

    title: str
    tasks: int
    hidden: int
    epochs: int
    kept: int  # examples of each task that a memory keeps
    make: Callable[..., Iterator[Task]]
    published: Mapping[str, str]  # accuracies of others, by method; the source is in docs/continual.md


def _split(scenario: Any):
    def make(train: Dataset, test: Dataset, *, tasks: int, examples: int, generator: torch.Generator):
        parts = split(train, test, scenario=scenario, examples=min(examples, 8_500), generator=generator)
        return (task for _, task in zip(range(tasks), parts, strict=False))

    return make


_AGEM = {"naive": "47.95", "ewc": "68.35", "mas-last": "69.85", "agem": "89.12", "gem": "90.30", "joint": "95.38"}
_GT_RIPL = {
    "ewc": ("97.70", "58.85", "19.80"),
    "si": ("98.56", "64.76", "19.67"),
    "mas": ("99.22", "68.57", "19.52"),
    "lwf": ("99.60", "71.02", "24.17"),
    "gem": ("98.42", "96.16", "92.20"),
    "replay": ("99.57", "97.11", "95.59"),
    "joint": ("99.52", "98.59", "97.53"),
}

STREAMS = {
    "permuted": Stream("permuted MNIST, 20 tasks", 20, 256, 1, 250, permuted, _AGEM),
    "rotated": Stream("rotated MNIST, 10 tasks", 10, 256, 1, 250, rotated, {}),
    **{
        f"split-{scenario}": Stream(
            f"split MNIST, {scenario}-incremental",
            5,
            400,
            2,
            250,
            _split(scenario),
            {name: numbers[place] for name, numbers in _GT_RIPL.items()},
        )
        for place, scenario in enumerate(("task", "domain", "class"))
    },
}

_DECADES = {
    "ewc": (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7),
    "mas": (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2),
    "si": (1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5),
}


@dataclass(frozen=True)
class Method:
    """A way of learning a stream, and the grid that its strength is chosen from (none: nothing to choose)."""

    title: str
    grid: tuple[float, ...] = ()
    fine: tuple[float, ...] = ()  # on permuted MNIST, where strengths are compared closely


METHODS = {
    "naive": Method("network alone"),
    "ewc": Method("EWC", _DECADES["ewc"], (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4)),
    "mas": Method("MAS, sum", _DECADES["mas"], (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)),
    "mas-average": Method("MAS, average", _DECADES["mas"], (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "mas-last": Method("MAS, last task only", _DECADES["mas"], (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)),
    "si": Method("SI", _DECADES["si"], (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3)),
    "lwf": Method("LwF", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
    "gem": Method("GEM", (0.0, 0.25, 0.5, 1.0)),
    "agem": Method("A-GEM"),
    "replay": Method("replay"),
    "vote": Method("k-NN vote"),
    "mbpa": Method("MbPA", (0.01, 0.03, 0.1, 0.3)),
    "mbpa+replay": Method("MbPA + replay", (0.01, 0.03, 0.1, 0.3)),
    "joint": Method("joint training"),
}
ADAPTED = {"mbpa": "naive", "mbpa+replay": "replay", "vote": "naive"}  # predictors on another method's network
COST = {"ewc": 2.0, "gem": 8.0, "agem": 2.0, "replay": 2.0, "vote": 0.5, "mbpa": 3.0, "mbpa+replay": 3.0}  # naive is 1
ONLY_ON = {"mas-average": "permuted", "mas-last": "permuted"}


def methods_on(stream: str) -> list[str]:
    """Returns the methods that are compared on a stream."""
    return [name for name in METHODS if ONLY_ON.get(name, stream) == stream]


def grid(method: str, stream: str) -> tuple[float, ...]:
    """Returns the strengths to choose from: penalty strengths, the margin of GEM, the local rate of MbPA."""
    found = METHODS[method]
    return found.fine or found.grid if stream == "permuted" else found.grid


@dataclass(frozen=True)
class Setting:
    """What determines a network and its memory, beside the method."""

    hidden: int
    epochs: int
    tasks: int
    kept: int
    seed: int


class Contender:
    """A learner of one method, and the predictors that it is judged by."""

    def __init__(self, method: str, strength: float, setting: Setting) -> None:
        self._setting = setting
        generator = torch.Generator().manual_seed(setting.seed)
        self.network = mlp(784, setting.hidden, setting.hidden, 10, generator=generator)
        optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.memory = EpisodicMemory(setting.kept * setting.tasks, 784)
        self.learner = Learner(
            self.network,
            optimizer,
            epochs=setting.epochs,
            keep=setting.kept,
            generator=generator,
            **self._companion(method, strength, optimizer),
        )

    def _companion(self, method: str, strength: float, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        network, kept = self.network, self._setting.kept
        match method:
            case "ewc":
                found: dict[str, Any] = {"penalty": EWC(network, strength)}
            case "mas":
                found = {"penalty": MAS(network, strength, accumulate="sum")}
            case "mas-average":
                found = {"penalty": MAS(network, strength, accumulate="average")}
            case "mas-last":
                found = {"penalty": MAS(network, strength, accumulate="last")}
            case "si":
                found = {"penalty": SI(network, optimizer, strength)}
            case "lwf":
                found = {"penalty": LwF(network, strength)}
            case "gem":
                found = {"projection": GEM(network, examples=kept, margin=strength)}
            case "agem":
                found = {"projection": AGEM(network, Ring(self.memory))}
            case "replay":
                found = {"replay": Ring(self.memory)}
            case _:
                found = {"memory": self.memory}
        return found

    def predictor(self, method: str, strength: float) -> Score:
        """Returns the network, or what reads the memory beside it, with Figure 3's settings but for MbPA's rate."""
        if method == "vote":
            return NonParametric(self.memory, classes=10, neighbors=10, kernel=gaussian(1.5))
        if method in ADAPTED:
            adaptation = LocalAdaptation(rules.sgd(strength), steps=10)
            return MbPA(self.network, self.memory, neighbors=16, adaptation=adaptation, kernel=gaussian(2.5))
        return self.network


def joint(tasks: list[Task], setting: Setting) -> nn.Module:
    """Returns a network that has learned all tasks at once: the bound that no sequence is expected to pass."""
    generator = torch.Generator().manual_seed(setting.seed)
    network = mlp(784, setting.hidden, setting.hidden, 10, generator=generator)
    beside = torch.zeros(10, 10, dtype=torch.bool)  # which outputs stand beside which label
    for task in tasks:
        own = torch.arange(10) if task.outputs is None else task.outputs
        beside[own[:, None], own] = True

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs.masked_fill(~beside[labels], -torch.inf), labels)

    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    learner = Learner(network, optimizer, loss=loss, epochs=setting.epochs, generator=generator)
    learner.learn((torch.cat([task.train.inputs for task in tasks]), torch.cat([task.train.labels for task in tasks])))
    return network
