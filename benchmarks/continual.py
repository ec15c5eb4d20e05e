"""Learning task after task: an epoch under a penalty, how much each parameter matters, and buffers for replay."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from benchmarks import avalanche_lib, floors, learning
from benchmarks.case import Call, Case
from benchmarks.checks import DisagreementError, same
from recollect.continual import EWC, MAS, ClassBalanced, Learner, Reservoir
from recollect.data import Dataset, mnist, permuted
from recollect.data.fetch import data_folder
from recollect.memory import EpisodicMemory
from recollect.models import mlp

NAME = "continual"
TITLE = "Learning task after task"

_RATE = 0.01
_BATCH = 128
_TOLERANCE = 1e-3

Kind = Literal["exact", "empirical"]


class Scale(NamedTuple):
    """How large everything is; the tests take less."""

    sizes: tuple[int, ...] = (784, 256, 256, 10)
    tasks: int = 20
    examples: int = 10_000
    earlier: int = 1000
    """Examples of each task before the last."""
    short: int = 256
    """Examples of each of Avalanche's own experiences, whose importances are then replaced by ours."""
    strength: float = 100.0
    fewer: int = 200
    """Examples for the baselines that take one at a time, or few."""
    capacity: int = 2000


def _makers(full: bool, scale: Scale) -> list[Callable[[torch.device], Case]]:
    importances = [functools.partial(_fisher, "exact", scale)]
    buffers = []
    if full:
        importances += [functools.partial(_fisher, "empirical", scale), functools.partial(_mas, scale)]
        buffers = [functools.partial(_buffer, name, scale) for name in ("reservoir", "class-balanced")]
    return [functools.partial(_epoch, scale), *importances, *buffers]


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_makers(full, Scale()))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other."""
    if not avalanche_lib.installed():
        print(avalanche_lib.ADVICE, flush=True)
    for make in _makers(full, Scale()):
        yield make(device)


def _stream(scale: Scale, device: torch.device) -> tuple[str, Iterator[Dataset]]:
    """Returns what the data are, and the training data of each task: MNIST where it is at hand, else noise."""
    generator = torch.Generator().manual_seed(0)
    folder = data_folder()
    if scale.sizes[0] == 784 and folder is not None and (folder / "mnist").is_dir():
        name, source = "permuted MNIST", mnist("train")
    else:
        name = "noise"
        inputs = torch.rand(scale.examples, scale.sizes[0], generator=generator)
        source = Dataset(inputs, torch.randint(scale.sizes[-1], (scale.examples,), generator=generator))
    tasks = permuted(source, source.take(slice(1)), tasks=scale.tasks, examples=scale.examples, generator=generator)
    return name, (Dataset(task.train.inputs.to(device), task.train.labels.to(device)) for task in tasks)


def _network(scale: Scale, device: torch.device) -> nn.Module:
    return mlp(*scale.sizes, generator=torch.Generator().manual_seed(0)).to(device)


def _epoch(scale: Scale, device: torch.device) -> Case:
    """All contenders train the same network, from where it was after the tasks before, on the same batches."""
    data_name, stream = _stream(scale, device)
    network = _network(scale, device)
    optimizer = torch.optim.SGD(network.parameters(), lr=_RATE)
    merged, separate = (EWC(network, scale.strength, tasks=tasks) for tasks in ("merged", "separate"))
    before = Learner(network, optimizer, penalty=separate, batch=_BATCH)
    for _ in range(scale.tasks - 1):
        early = next(stream).take(slice(scale.earlier))
        before.learn(early)
        merged.consolidate(early)
    data = next(stream)
    start = [p.detach().clone() for p in network.parameters()]
    anchors = separate.anchors
    terms = [
        learning.Term(*({name: part(name)[t].clone() for name in anchors.names} for part in parts))
        for t in range(anchors.terms)
        for parts in [(anchors.importance, anchors.anchor)]
    ]
    order = torch.randperm(len(data.inputs), generator=torch.Generator().manual_seed(0))  # that a new learner draws

    for penalty in (merged, separate):  # stay as they are from now on: an epoch is measured, and nothing else
        penalty.consolidate = lambda *_, **__: None

    def ours(penalty: EWC | None) -> Call:
        return lambda: Learner(network, optimizer, penalty=penalty, batch=_BATCH).learn(data)

    by_hand = functools.partial(
        learning.epoch, network, optimizer, data, order=order.split(_BATCH), strength=scale.strength
    )
    calls: dict[str, Call] = {
        "merged": ours(merged),
        "separate": ours(separate),
        "autograd": functools.partial(by_hand, terms=terms),
        "no penalty": ours(None),
    }
    theirs = (avalanche_lib.NAME, f"{avalanche_lib.NAME}, no penalty")
    left_out = dict.fromkeys(theirs, avalanche_lib.MISSING)
    if avalanche_lib.installed():
        left_out = {}
        for name, own in zip(theirs, (terms, []), strict=True):
            calls[name] = avalanche_lib.epoch(
                network,
                optimizer,
                (data.inputs[order], data.labels[order]),
                terms=own,
                strength=scale.strength,
                batch=_BATCH,
                short=scale.short,
            )

    def from_start(call: Call) -> None:
        with torch.no_grad():
            for p, value in zip(network.parameters(), start, strict=True):
                p.copy_(value)
        call()

    contenders = {name: functools.partial(from_start, call) for name, call in calls.items()}

    def check() -> None:
        moves = {}
        for name, contender in contenders.items():
            contender()
            moves[name] = torch.cat(
                [(p.detach() - s).flatten() for p, s in zip(network.parameters(), start, strict=True)]
            )
        held, free = moves["merged"], moves["no penalty"]
        if not float((held - free).abs().max()) > 100 * _TOLERANCE * float(held.abs().max()):
            raise DisagreementError("The penalty changes next to nothing, so that it could be missing.")
        for name, move in moves.items():
            same(name, free if "no penalty" in name else held, move, tolerance=_TOLERANCE)

    return Case(
        group=f"EWC, MLP {'-'.join(map(str, scale.sizes))}",
        label=f"task {scale.tasks}, one epoch",
        contenders=contenders,
        ours="merged",
        work=floors.epoch(scale.sizes, scale.examples, batch=_BATCH),
        queries=1,
        left_out=left_out,
        check=check,
        note=f"{scale.examples:,} examples of {data_name}, batches of {_BATCH}, {len(terms)} earlier tasks",
    )


def _examples(scale: Scale, device: torch.device) -> tuple[nn.Module, Dataset]:
    _, stream = _stream(scale._replace(tasks=1), device)
    return _network(scale, device), next(stream)


def _fisher(kind: Kind, scale: Scale, device: torch.device) -> Case:
    network, data = _examples(scale, device)
    penalty = EWC(network, fisher=kind, tasks="online", decay=0.0)  # what was before is forgotten
    given = None if kind == "exact" else data.labels[: scale.fewer]
    few = data.inputs[: scale.fewer]
    chunk = 2 if kind == "exact" else 16  # what fits the caches; more was slower
    baselines = {
        "loop": functools.partial(learning.fisher, network, few, given),
        "vmap": functools.partial(learning.fisher_side_by_side, network, few, given, chunk=chunk),
    }
    return _importances(
        f"Fisher information, {kind}",
        penalty,
        baselines,
        data=data,
        scale=scale,
        directions=scale.sizes[-1] if kind == "exact" else 1,
    )


def _mas(scale: Scale, device: torch.device) -> Case:
    network, data = _examples(scale, device)
    few = data.inputs[: scale.fewer]
    baselines = {
        "loop": functools.partial(learning.output_norm, network, few),
        "vmap": functools.partial(learning.output_norm_side_by_side, network, few, chunk=16),
    }
    return _importances("MAS", MAS(network, accumulate="last"), baselines, data=data, scale=scale, directions=1)


def _importances(
    label: str,
    penalty: EWC | MAS,
    baselines: dict[str, Callable[[], learning.Importances]],
    *,
    data: Dataset,
    scale: Scale,
    directions: int,
) -> Case:
    def check() -> None:
        penalty.consolidate(data.take(slice(scale.fewer)))
        for name, call in baselines.items():
            for parameter, theirs in call().items():
                same(f"{name}, {parameter}", penalty.anchors.importance(parameter)[0], theirs, tolerance=_TOLERANCE)

    return Case(
        group=f"importances, MLP {'-'.join(map(str, scale.sizes))}",
        label=label,
        contenders={"recollect": functools.partial(penalty.consolidate, data), **baselines},
        ours="recollect",
        work=floors.importances(scale.sizes, len(data.inputs), directions=directions),
        queries=len(data.inputs),
        fewer=dict.fromkeys(baselines, scale.fewer),
        check=check,
        note=f"per example of {len(data.inputs):,}" + (f", all {directions} labels" if directions > 1 else ""),
    )


def _buffer(name: str, scale: Scale, device: torch.device) -> Case:
    """Each call fills a new buffer: what a write costs falls with the number of examples seen."""
    _, data = _examples(scale, device)
    size, examples = scale.sizes[0], len(data.inputs)
    batches = list(data.batches(_BATCH))
    kind = {"reservoir": Reservoir, "class-balanced": ClassBalanced}[name]
    by_hand = {"reservoir": learning.ListReservoir, "class-balanced": learning.ListBalanced}[name]

    def write(make: Callable[[], Any]) -> Any:
        buffer = make()
        for inputs, labels in batches:
            buffer.write(inputs, labels)
        return buffer

    makers = {
        "recollect": lambda: kind(EpisodicMemory(capacity=scale.capacity, key_size=size).to(device)),
        "list": lambda: by_hand(scale.capacity),
    }

    def check() -> None:
        for contender, make in makers.items():
            if len(write(make)) != scale.capacity:
                raise DisagreementError(f"{contender} is not full.")

    return Case(
        group=f"buffers of {scale.capacity:,}, d={size}",
        label=name,
        contenders={contender: functools.partial(write, make) for contender, make in makers.items()},
        ours="recollect",
        work=floors.sample(examples, size, capacity=scale.capacity),
        queries=examples,
        check=check,
        note=f"per example of {examples:,} written to a new one, batches of {_BATCH}",
    )
