"""The adaptation alone: the head is fitted to neighbors that were found before."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import adapting, floors
from benchmarks.case import Case, Work
from benchmarks.checks import same
from recollect import Categorical, Context, LocalAdaptation, rules
from recollect.adaptation.head import Head
from recollect.adaptation.rules import Rule

NAME = "adaptation"
TITLE = "Adapting the head to its neighbors"

# Bytes of parameter copies and logits that vmap may hold at once. A gigabyte would fit as well, but copies that leave
# the caches made it up to twice as slow.
_COPIES = 2**25
_PATIENCE = 2e9  # multiply-adds of one call of a baseline; it answers fewer queries where more are needed
_POOL = 5000  # entries of the memory whose neighborhoods overlap: the paper's size for language models
_RATES = {"sgd": 0.1, "rmsprop": 1e-3, "adam": 1e-3}


@dataclass(frozen=True)
class Setting:
    """A head and how it is adapted; the shape is C x d, or the sizes of the layers."""

    group: str
    head: Callable[[], nn.Module]
    size: int
    classes: int
    neighbors: int
    steps: int
    work: Callable[[int], Work]
    """The floor of a batch of so many queries."""
    rule: str = "sgd"
    quick: bool = True
    kept: bool = False
    """Whether what the head says of the entries is kept beside them; the entries then come from a memory of 5,000."""
    batches: tuple[int, ...] = (32, 1)
    """Numbers of queries; only the first is quick."""

    @property
    def label(self) -> str:
        return f"C={self.classes} d={self.size} K={self.neighbors} T={self.steps}"


def _linear(classes: int, size: int, neighbors: int, steps: int, *, rule: str = "sgd", quick: bool = True) -> Setting:
    if rule == "sgd":
        floor = functools.partial(floors.linear, steps=steps)
    else:
        states = {"rmsprop": 1, "adam": 2}[rule]
        floor = functools.partial(floors.elementwise, steps=steps, states=states)

    def work(batch: int) -> Work:
        return floor(size, classes, batch, neighbors)

    head = functools.partial(nn.Linear, size, classes)
    return Setting(f"linear, {rule}", head, size, classes, neighbors, steps, work, rule, quick)


def _kept(classes: int, size: int, neighbors: int, steps: int, *, quick: bool = True) -> Setting:
    def work(batch: int) -> Work:
        # As many as differ, on the average, among so many drawn from the pool.
        entries = round(_POOL * (1 - (1 - 1 / _POOL) ** (batch * neighbors)))
        return floors.linear_kept(size, classes, batch, neighbors, steps=steps, entries=entries)

    group, head = "linear, sgd, base predictions kept", functools.partial(nn.Linear, size, classes)
    kept = {"quick": quick, "kept": True, "batches": (256, 32, 1)}
    return Setting(group, head, size, classes, neighbors, steps, work, **kept)


def _mlp(sizes: tuple[int, ...], neighbors: int, steps: int) -> Setting:
    def head() -> nn.Module:
        pairs = [(nn.Linear(inputs, outputs), nn.ReLU()) for inputs, outputs in itertools.pairwise(sizes)]
        return nn.Sequential(*itertools.chain(*pairs))[:-1]

    def work(batch: int) -> Work:
        return floors.mlp(sizes, batch, neighbors, steps=steps)

    group = "MLP " + "-".join(str(size) for size in sizes)
    return Setting(group, head, sizes[0], sizes[-1], neighbors, steps, work)


def _convolution(channels: int, classes: int, neighbors: int, steps: int) -> Setting:
    side, kernel = 16, 3
    places = (side - kernel + 1) ** 2

    def head() -> nn.Module:
        image = nn.Unflatten(1, (1, side, side))
        linear = nn.Linear(channels * places, classes)
        return nn.Sequential(image, nn.Conv2d(1, channels, kernel), nn.ReLU(), nn.Flatten(), linear)

    def work(batch: int) -> Work:
        return floors.convolution(
            places, channels * kernel**2, channels * places, classes, batch=batch, neighbors=neighbors, steps=steps
        )

    return Setting(f"convolution ({channels} of 3x3) and linear", head, side**2, classes, neighbors, steps, work)


def _settings(full: bool) -> list[Setting]:
    settings = [
        _linear(10, 784, 50, 10),
        _linear(100, 512, 50, 10, quick=False),
        _linear(200, 512, 50, 5),
        _linear(1000, 2048, 50, 10),
        _linear(10_000, 268, 256, 1),
        _linear(33_278, 241, 256, 1, quick=False),
        _kept(1000, 2048, 50, 10),
        _kept(10_000, 268, 256, 1),
        _kept(33_278, 241, 256, 1, quick=False),
        _mlp((784, 256, 256, 10), 32, 10),
        *(_linear(100, 512, 50, 10, rule=rule) for rule in ("rmsprop", "adam")),
        *(_linear(1000, 2048, 50, 10, rule=rule, quick=False) for rule in ("rmsprop", "adam")),
        _convolution(8, 10, 32, 5),
    ]
    return [setting for setting in settings if full or setting.quick]


def _grid(full: bool) -> list[tuple[Setting, int]]:
    return [(setting, batch) for setting in _settings(full) for batch in setting.batches[: None if full else 1]]


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_grid(full))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other."""
    for setting, batch in _grid(full):
        yield _case(setting, batch, device)


def random_context(
    batch: int, neighbors: int, size: int, *, classes: int, device: torch.device, pool: int | None = None
) -> tuple[Tensor, Context]:
    """Returns queries and neighbors: no two in common, as from a large memory, or drawn from a pool of entries."""
    generator = torch.Generator(device).manual_seed(0)
    shape = {"device": device, "generator": generator}
    # Keys of length 4, whatever their size: the descent is stable, so that rounding does not grow from step to step.
    entries = pool or batch * neighbors
    all_keys = torch.randn(entries, size, **shape) * (4 * size**-0.5)
    all_values = torch.randint(classes, (entries,), **shape)
    queries = torch.randn(batch, size, **shape) * (4 * size**-0.5)
    slots = torch.arange(batch * neighbors, device=device).view(batch, neighbors)
    if pool is not None:
        slots = torch.randint(pool, (batch, neighbors), **shape)
    keys, values = all_keys[slots], all_values[slots]
    weights = torch.rand(batch, neighbors, **shape)
    weights /= weights.sum(1, keepdim=True)
    distances = (keys - queries.unsqueeze(1)).square().sum(2)
    return queries, Context(keys, values, weights, distances, slots)


def adapter_call(
    head: nn.Module, rule: Rule, steps: int, *, queries: Tensor, context: Context, kept: bool = False
) -> Callable[[], Tensor]:
    """Returns the call that adapts ``head`` to a given context, as a prediction does."""
    adapter = LocalAdaptation(rule, steps=steps, keep_base=kept).bind(Head(head), Categorical())

    def call() -> Tensor:
        with torch.no_grad():
            return adapter(queries, context)

    return call


def _case(setting: Setting, batch: int, device: torch.device) -> Case:
    torch.manual_seed(0)  # layers draw their weights from it
    head = setting.head().to(device)
    pool = _POOL if setting.kept else None
    queries, context = random_context(
        batch, setting.neighbors, setting.size, classes=setting.classes, device=device, pool=pool
    )
    calls, fewer = _baselines(setting, head, queries, context)
    rule = {"sgd": rules.sgd, "rmsprop": rules.rmsprop, "adam": rules.adam}[setting.rule](_RATES[setting.rule])
    ours = adapter_call(head, rule, setting.steps, queries=queries, context=context, kept=setting.kept)

    def check() -> None:
        outputs = ours()
        for name, call in calls.items():
            same(name, outputs, call(), tolerance=2e-3)

    return Case(
        group=setting.group,
        label=f"{setting.label} B={batch}",
        contenders={"recollect": ours, **calls},
        ours="recollect",
        work=setting.work(batch),
        queries=batch,
        fewer=fewer,
        check=check,
    )


def _baselines(
    setting: Setting, head: nn.Module, queries: Tensor, context: Context
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """Returns the calls of the baselines and how many queries each answers."""
    count = sum(parameter.numel() for parameter in head.parameters())
    per_query = 2 * setting.steps * setting.neighbors * count
    some = max(1, min(len(queries), int(_PATIENCE / per_query)))
    queries, context = queries[:some], Context(*(part[:some] for part in context))
    states = {"sgd": 0, "rmsprop": 1, "adam": 2}[setting.rule]
    # Parameters, gradients, changes and states of a query, and three arrays like its logits.
    held = 4 * ((4 + 2 * states) * count + 3 * setting.neighbors * setting.classes)
    rate, chunk = _RATES[setting.rule], max(1, min(some, _COPIES // held))
    stepper = adapting.optimizer(setting.rule, rate)
    steps = setting.steps
    calls = {
        "loop": lambda: adapting.loop(head, queries, context, optimizer=stepper, steps=steps),
        "vmap": lambda: adapting.side_by_side(
            head, queries, context, rule=setting.rule, rate=rate, steps=steps, chunk=chunk
        ),
    }
    return calls, dict.fromkeys(calls, some)
