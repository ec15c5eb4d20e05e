"""Learning to learn: the gradients of one training step of MAML and of a MANN."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks import floors, oneself
from benchmarks.case import Case, Work
from benchmarks.checks import DisagreementError, same
from recollect import Gaussian, rules
from recollect.experiments.meta import maml_omniglot, maml_sinusoid
from recollect.meta import MAML, MANN, LRUAccess
from recollect.models import mlp

NAME = "meta"
TITLE = "Learning to learn"

Gradients = Callable[[], list[Tensor]]
_TOLERANCE = 1e-9  # the check is in float64


class Scale(NamedTuple):
    """How large everything is: that of the papers. The tests take less."""

    waves: int = 25
    points: int = 5
    drawings: int = 32
    """Tasks of Omniglot: 5 ways, 1 shot."""
    ways: int = 5
    episodes: int = 16
    steps: int = 50
    inputs: int = 405
    hidden: int = 200
    slots: int = 128
    width: int = 40
    reads: int = 4


def _makers(scale: Scale) -> list[Callable[[torch.device], Case]]:
    return [functools.partial(make, scale) for make in (_sinusoid, _convolutions, _mann)]


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_makers(Scale()))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other."""
    for make in _makers(Scale()):
        yield make(device)


def _sinusoid(scale: Scale, device: torch.device) -> Case:
    drawn = maml_sinusoid.waves(scale.waves, scale.points, scale.points, generator=torch.Generator().manual_seed(0))

    def contenders(dtype: torch.dtype) -> dict[str, Gradients]:
        net = mlp(1, 40, 40, 1, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        maml = MAML(net, rule=rules.sgd(0.01), likelihood=Gaussian(variance=0.5))
        return _maml(maml, tuple(part.to(device, dtype) for part in drawn), rate=0.01, loss=mse_loss)

    first, rest = 40, 40 * 40 + 40
    work = floors.maml(first, rest, tasks=scale.waves, support=scale.points, queries=scale.points, numbers=1761)
    label = f"sine waves, MLP 1-40-40-1, {scale.waves} tasks of {scale.points} points"
    return _case("MAML, one step, second order", label, contenders, work=work, queries=scale.waves)


def _convolutions(scale: Scale, device: torch.device) -> Case:
    g = torch.Generator().manual_seed(0)
    support, queries = (torch.rand(scale.drawings, scale.ways, 1, 28, 28, generator=g) for _ in range(2))
    labels = torch.arange(scale.ways, device=device).repeat(scale.drawings, 1)

    def contenders(dtype: torch.dtype) -> dict[str, Gradients]:
        # As one has it: the loop keeps running statistics, as with learn2learn, though MAML never reads them.
        net = maml_omniglot.network("convolutions", scale.ways, generator=torch.Generator().manual_seed(0))
        net = net.to(device, dtype)
        parts = (support.to(device, dtype), labels, queries.to(device, dtype), labels)
        return _maml(MAML(net, rule=rules.sgd(0.4)), parts, rate=0.4, loss=cross_entropy)

    first, rest = 14**2 * 64 * 9, (7**2 + 4**2 + 2**2) * 64 * 64 * 9 + 64 * scale.ways
    sizes = {"tasks": scale.drawings, "support": scale.ways, "queries": scale.ways}
    work = floors.maml(first, rest, numbers=111_936 + 65 * scale.ways, **sizes)
    label = f"Omniglot, four convolutions, {scale.drawings} tasks of {scale.ways} ways and 1 shot"
    return _case("MAML, one step, second order", label, contenders, work=work, queries=scale.drawings)


def _maml(maml: MAML, parts: tuple[Tensor, ...], *, rate: float, loss: oneself.Loss) -> dict[str, Gradients]:
    support, targets, queries, answers = parts

    def ours() -> list[Tensor]:
        maml.zero_grad()
        outputs = maml(support, targets, queries)
        (len(outputs) * loss(outputs.flatten(0, 1), answers.flatten(0, 1))).backward()
        return [p.grad.clone() for p in maml.parameters() if p.grad is not None]

    def loop() -> list[Tensor]:
        return oneself.maml(maml.net, zip(*parts, strict=True), rate=rate, loss=loss)

    return {"recollect": ours, "loop": loop}


def _mann(scale: Scale, device: torch.device) -> Case:
    g = torch.Generator().manual_seed(0)
    inputs = torch.rand(scale.episodes, scale.steps, scale.inputs, generator=g)
    labels = torch.randint(5, (scale.episodes, scale.steps), generator=g).to(device)
    memory = {"slots": scale.slots, "width": scale.width, "reads": scale.reads}

    def contenders(dtype: torch.dtype) -> dict[str, Gradients]:
        g = torch.Generator().manual_seed(1)
        access = LRUAccess(scale.hidden, **memory, generator=g)
        model = MANN(scale.inputs, 5, access=access, hidden=scale.hidden, generator=g).to(device, dtype)
        seen = inputs.to(device, dtype)

        def gradients(logits: Callable[[], Tensor]) -> list[Tensor]:
            model.zero_grad()
            cross_entropy(logits().flatten(0, 1), labels.flatten()).backward()
            return [p.grad.clone() for p in model.parameters() if p.grad is not None]

        return {
            "recollect": lambda: gradients(lambda: model(seen)[0]),
            "loop": lambda: gradients(lambda: oneself.mann(model, seen)),
        }

    work = floors.mann(scale.inputs, scale.hidden, 5, **memory, episodes=scale.episodes, steps=scale.steps)
    label = f"LSTM of {scale.hidden}, {scale.steps} steps, {scale.episodes} episodes"
    group = f"MANN, memory {scale.slots}x{scale.width}, {scale.reads} reads, forward and backward"
    return _case(group, label, contenders, work=work, queries=scale.episodes)


def _case(
    group: str, label: str, contenders: Callable[[torch.dtype], Mapping[str, Gradients]], *, work: Work, queries: int
) -> Case:
    def check() -> None:
        ours, theirs = (torch.cat([g.flatten() for g in call()]) for call in contenders(torch.float64).values())
        if not bool(ours.any()):
            raise DisagreementError("all gradients are 0.")
        same("the loop", ours, theirs, tolerance=_TOLERANCE)

    calls = contenders(torch.float32)
    return Case(group, label, calls, ours="recollect", work=work, queries=queries, check=check)
