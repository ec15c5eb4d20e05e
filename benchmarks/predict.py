"""The whole prediction of ``MbPA``, and where its time goes."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks import floors, memories
from benchmarks.adaptation import adapter_call
from benchmarks.case import Case, Work
from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules

NAME = "predict"
TITLE = "A prediction and its parts"

_RATE = 0.01


@dataclass(frozen=True)
class Setting:
    """A memory of N keys, a head on them, and how it is adapted."""

    slots: int
    sizes: tuple[int, ...]
    """Sizes of the head's layers: the key's, hidden ones, the number of classes."""
    neighbors: int
    steps: int

    def head(self) -> nn.Module:
        """Returns a new head: a linear layer, or several with ReLU between them."""
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(self.sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return layers[0] if len(self.sizes) == 2 else nn.Sequential(*layers[:-1])

    def work(self, batch: int) -> Work:
        """Returns the floor of a batch."""
        size = self.sizes[0]
        if len(self.sizes) == 2:
            adapt = floors.linear(size, self.sizes[1], batch, self.neighbors, steps=self.steps)
        else:
            adapt = floors.mlp(self.sizes, batch, self.neighbors, steps=self.steps)
        return floors.together(floors.search(self.slots, size, batch), adapt)


_SETTINGS = (
    Setting(20_000, (784, 256, 256, 10), neighbors=24, steps=10),
    Setting(200_000, (512, 200), neighbors=50, steps=5),
    Setting(5_000, (268, 10_000), neighbors=256, steps=1),
)
_BATCHES = (32, 1)


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_SETTINGS) * len(_BATCHES)


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other; those with the same memory share it."""
    for setting in _SETTINGS:
        maker = memories.normal(setting.sizes[0], device)
        memory = memories.filled(maker, setting.slots, setting.sizes[0], classes=setting.sizes[-1], device=device)
        torch.manual_seed(0)  # layers draw their weights from it
        head = setting.head().to(device)
        for batch in _BATCHES:
            yield _case(setting, memory, head, memories.queries(maker, batch, device))


def _case(setting: Setting, memory: EpisodicMemory, head: nn.Module, queries: torch.Tensor) -> Case:
    rule, neighbors, steps = rules.sgd(_RATE), setting.neighbors, setting.steps
    model = MbPA(head, memory, neighbors=neighbors, adaptation=LocalAdaptation(rule, steps=steps))
    context = memory.read(queries, neighbors)
    search = functools.partial(memory.index.search, memory.keys, memory.written, queries, neighbors, None)
    return Case(
        group="prediction",
        label=f"N={setting.slots:,} head {'-'.join(map(str, setting.sizes))} K={neighbors} T={steps} B={len(queries)}",
        contenders={
            "predict": lambda: model(queries),
            "read": lambda: memory.read(queries, neighbors),
            "search": torch.no_grad()(search),
            "adapt": adapter_call(head, rule, steps, queries=queries, context=context),
        },
        ours="predict",
        work=setting.work(len(queries)),
        queries=len(queries),
        derived=_shares,
    )


def _shares(walls: Mapping[str, float]) -> Mapping[str, str]:
    """Returns which part of a prediction each step takes; what is left over is none of them."""
    whole, search, adapt = walls["predict"], walls["search"], walls["adapt"]
    gather = walls["read"] - search  # reading is searching, gathering the neighbors and weighing them
    parts = {"search": search, "gather": gather, "adapt": adapt, "rest": whole - walls["read"] - adapt}
    return {f"{name} share": f"{100 * part / whole:.0f} %" for name, part in parts.items()}
