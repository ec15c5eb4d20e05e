"""Nine ways to learn a few characters from a few drawings, all with one small network of convolutions.

A learner is a function from tasks to the labels that it gives their queries. Those that have settings come as one
learner for each of these, to be chosen among on validation tasks.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from recollect.adaptation import LocalAdaptation, rules
from recollect.data import Episodes
from recollect.mbpa import MbPA
from recollect.memory import EpisodicMemory
from recollect.meta import MAML, MANN, ContextHypernetwork, Labels, offset
from recollect.meta.coordinates import mapped
from recollect.meta.initial import drawn
from recollect.predictors import NonParametric

Learner = Callable[[Episodes], Int[Tensor, "t q"]]
_CHANNELS = 32  # of each convolution (Ravi and Larochelle, 2017)


class Choice(NamedTuple):
    """A learner under some settings."""

    settings: dict[str, Any]
    learner: Learner


def network(side: int, outputs: int, *, generator: torch.Generator) -> nn.Sequential:
    """Returns four convolutions of 32 channels, each of which halves the image, and a linear layer.

    *Differs from Ravi and Larochelle (2017):* convolutions take every second pixel, as in MAML's code, and no maximum.
    """
    layers: list[nn.Module] = []
    for channels in (1, *[_CHANNELS] * 3):
        convolution = nn.Conv2d(channels, _CHANNELS, 3, stride=2, padding=1, device="meta")
        layers += (drawn(convolution, 9 * channels, generator), nn.BatchNorm2d(_CHANNELS), nn.ReLU())
        side = -(-side // 2)
    size = _CHANNELS * side**2
    return nn.Sequential(*layers, nn.Flatten(), drawn(nn.Linear(size, outputs, device="meta"), size, generator))


def blank(size: int, ways: int) -> nn.Linear:
    """Returns a last layer that says nothing yet."""
    head = nn.Linear(size, ways, device="meta").to_empty(device="cpu")  # which draws nothing
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def keys(features: nn.Module, images: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b d"]:
    """Returns the features of drawings, scaled to length 1, by a network in the mode of its test."""
    return normalize(features(images.flatten(0, -4)), dim=-1).unflatten(0, images.shape[:-3])


def entries(features: nn.Module, images: Float[Tensor, "*b c h w"]) -> Float[Tensor, "*b d"]:
    """Returns the keys of drawings in the size in which a network reads them best: with a mean square of 1."""
    found = keys(features, images)
    return found * found.shape[-1] ** 0.5


def nearest(features: nn.Module) -> Learner:
    """The label of the nearest drawing."""

    def learner(some: Episodes) -> Int[Tensor, "t q"]:
        found = torch.cdist(keys(features, some.queries), keys(features, some.support)).argmin(2)
        return some.support_labels.gather(1, found)

    return learner


def prototypes(features: nn.Module) -> Learner:
    """The class with the nearest mean of its drawings (Snell et al., 2017, of an embedding that was not trained so)."""

    def learner(some: Episodes) -> Int[Tensor, "t q"]:
        ways = int(some.support_labels.max()) + 1
        members = nn.functional.one_hot(some.support_labels, ways).float().mT
        means = members @ keys(features, some.support) / members.sum(2, keepdim=True)
        return torch.cdist(keys(features, some.queries), means).argmin(2)

    return learner


def vote(features: nn.Module, shots: int, ways: int) -> list[Choice]:
    """The neighbors' weighted vote, Eq. (9) of the MbPA paper."""

    def choice(neighbors: int) -> Choice:
        def layer(memory: EpisodicMemory) -> nn.Module:
            return NonParametric(memory, classes=ways, neighbors=neighbors)

        return Choice({"neighbors": neighbors}, lambda some: _by_memory(features, layer, some))

    return [choice(neighbors) for neighbors in sorted({min(k, ways * shots) for k in (3, 5, 10, 25)})]


def mbpa(features: nn.Module, shots: int, ways: int) -> list[Choice]:
    """MbPA on the embedding: a last layer that knows nothing fits itself to the neighbors of each query."""

    def choice(neighbors: int, rate: float, steps: int) -> Choice:
        adaptation = LocalAdaptation(rules.sgd(rate), steps)

        def layer(memory: EpisodicMemory) -> nn.Module:
            return MbPA(blank(memory.key_size, ways), memory, neighbors=neighbors, adaptation=adaptation)

        settings = {"neighbors": neighbors, "rate": rate, "steps": steps}
        return Choice(settings, lambda some: _by_memory(features, layer, some))

    neighbors = sorted({min(k, ways * shots) for k in (5, 10, 25)})
    return [choice(*settings) for settings in itertools.product(neighbors, (0.1, 1.0, 10.0), (1, 5, 20))]


def generated(features: nn.Module, hypernetwork: ContextHypernetwork, ways: int) -> Learner:
    """A last layer that a network generates for each query, from the support."""

    def layer(memory: EpisodicMemory) -> nn.Module:
        return MbPA(blank(memory.key_size, ways), memory, neighbors=memory.capacity, adaptation=hypernetwork)

    return lambda some: _by_memory(features, layer, some)


def remembered(keys: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> EpisodicMemory:
    """Returns a memory of a task's support."""
    memory = EpisodicMemory(capacity=len(keys), key_size=keys.shape[1])
    memory.write(keys, labels)
    return memory


def _by_memory(features: nn.Module, layer: Callable[[EpisodicMemory], nn.Module], some: Episodes) -> Int[Tensor, "t q"]:
    """Returns what a layer on a memory of each task's support says of its queries."""
    support, queries = keys(features, some.support), keys(features, some.queries)
    found = list[Tensor]()
    for known, labels, asked in zip(support, some.support_labels, queries, strict=True):
        with torch.no_grad():
            found.append(layer(remembered(known, labels))(asked).argmax(-1))
    return torch.stack(found)


def fine_tuning(features: nn.Module, size: int, ways: int) -> list[Choice]:
    """The embedding's network with a new last layer, trained on the support: MAML's steps from an ordinary start."""
    net = nn.Sequential(features, blank(size, ways))

    def choice(parameters: tuple[str, ...] | None, rate: float, steps: int) -> Choice:
        maml = MAML(net, rule=rules.adam(rate), first_order=True, parameters=parameters)
        layers = "all" if parameters is None else "last"
        return Choice({"layers": layers, "rate": rate, "steps": steps}, after(maml, steps))

    return [choice(*settings) for settings in itertools.product((None, ("1",)), (0.001, 0.01, 0.1), (5, 20))]


def after(maml: MAML, steps: int) -> Learner:
    """A network after some steps on the support: by a given rule, MAML's from a learned start, or a learned rule."""

    def learner(some: Episodes) -> Int[Tensor, "t q"]:
        with torch.no_grad():
            return maml(some.support, some.support_labels, some.queries, steps=steps).argmax(-1)

    return learner


def read_on(features: nn.Module, mann: MANN, ways: int) -> Learner:
    """MANN: it reads the support, each label one step late, and then a query."""
    labels = Labels(ways)

    def learner(some: Episodes) -> Int[Tensor, "t q"]:
        support, queries = entries(features, some.support), entries(features, some.queries)
        codes = labels.encode(some.support_labels)
        with torch.no_grad():
            _, state = mann(offset(support, codes))
            each = mapped(lambda tensor: tensor.repeat_interleave(queries.shape[1], 0), state)
            last = codes[:, -1:].expand(-1, queries.shape[1], -1).to(queries)
            logits, _ = mann(torch.cat([queries, last], 2).flatten(0, 1).unsqueeze(1), each)
        return labels.predict(logits)[:, 0].unflatten(0, queries.shape[:2])

    return learner


def alone(learner: Learner) -> Learner:
    """A learner that is asked one query at a time, as a program is: it normalizes by the statistics of no other."""

    def each(some: Episodes) -> Int[Tensor, "t q"]:
        count = some.queries.shape[1]
        support, labels, classes = (
            part.repeat_interleave(count, 0) for part in (some.support, some.support_labels, some.classes)
        )
        queries, answers = (part.flatten(0, 1).unsqueeze(1) for part in (some.queries, some.query_labels))
        return learner(Episodes(support, labels, queries, answers, classes)).view(-1, count)

    return each
