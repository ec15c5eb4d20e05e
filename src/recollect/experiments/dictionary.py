"""An embedding trained through its memory, as in Neural Episodic Control, beside one that is trained as in MbPA.

Both see a stream of MNIST once, batch after batch: predict, learn, write. The embedding of MbPA learns from the loss of
a classifier and its memory keeps what it made, out of the reach of gradients. The dictionary has no classifier: the
loss is that of the memory's own prediction, and its gradient reaches the embedding, the keys and the values.

Paper: Sprechmann et al. (2018), Section 3: "One key difference is that we do not train the embedding network through
the gradients from the memories".
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, nll_loss, one_hot

from recollect import (
    EpisodicMemory,
    Gaussian,
    LocalAdaptation,
    MbPA,
    NeuralDictionary,
    NonParametric,
    Parametric,
    rules,
)
from recollect.data import Dataset, digits, mnist, split
from recollect.experiments import plots
from recollect.experiments.runner import Progress, Run, begin
from recollect.models import mlp

CLASSES, _PARTS = 10, 5
_STREAMS = {"new classes": "Two new classes at a time", "shuffled": "All classes, shuffled"}
# What of the settings each model has. The others are not searched.
_MODELS = {
    "dictionary, one-hot rows": ("rate", "rows"),
    "dictionary, labels": ("rate", "rows"),
    "MbPA": ("rate", "local"),
    "vote": ("rate",),
    "network alone": ("rate",),
    "vote, untrained embedding": (),
}
_TRAINED_BY = ("memory", "memory", "classifier", "classifier", "classifier", "nothing")
_COLORS = (plots.ORANGE, plots.RED, plots.NAVY, plots.BLUE, plots.PURPLE, plots.GRAY)
_T = {2: 12.706, 3: 4.303, 5: 2.776, 10: 2.262}  # Student's t for 95 % intervals over so many seeds
_LEAST = 0.01  # of a label's probability: a label that no neighbor has must not have an infinite loss


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    data: Literal["digits", "mnist"] = "mnist"
    examples: int = 5000
    """Of the stream; each is seen once."""
    valid: int = 2000
    """Examples to choose settings by."""
    test: int = 5000
    batch: int = 32
    hidden: int = 128
    key: int = 32
    neighbors: int = 32
    steps: int = 10
    """Of MbPA."""
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    """Tried for the embedding, with Adam."""
    rows: tuple[float, ...] = (0.0, 3e-3)
    """Tried for keys and values, with RMSprop."""
    local_rates: tuple[float, ...] = (0.01, 0.03, 0.1)
    """Tried for MbPA's steps."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


SCALES = {
    "smoke": Scale(
        data="digits", examples=200, valid=100, test=100, rates=(3e-3,), rows=(3e-3,), local_rates=(0.1,), seeds=(0, 1)
    ),
    "small": Scale(),
    "paper": Scale(examples=50_000, valid=5000, test=10_000, seeds=tuple(range(10))),
}


@dataclass(frozen=True)
class Dictionary:
    """A stream of digits: an embedding trained through the memory, and one trained by a classifier."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (ten minutes) or ``paper`` (hours; no paper has this comparison)."""
    out: Path = Path("runs/dictionary")
    """The folder for results; a run that was stopped goes on there."""


class Settings(NamedTuple):
    """What is chosen on validation data."""

    rate: float
    """Of Adam, for the embedding (and the classifier)."""
    rows: float
    """Of RMSprop, for keys and values."""
    local: float
    """Of MbPA's steps."""


class Data(NamedTuple):
    """Where streams are drawn from, and what they are judged by."""

    train: Dataset
    valid: Dataset
    test: Dataset


class Learner(NamedTuple):
    """An embedding, what predicts from its keys, and one step of learning from a batch that was never seen before."""

    embedding: nn.Module
    predictor: nn.Module
    learn: Callable[[Dataset], None]


def run(config: Dictionary) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
        MissingDataError, MissingExtraError: If MNIST is not there and cannot be fetched.
    """
    record, scale = begin(config, SCALES)
    data = _data(scale)
    grids = {model: _grid(scale, model) for model in _MODELS}
    work = len(_STREAMS) * sum(len(scale.seeds) + len(grid) for grid in grids.values())
    with Progress(work, "streams") as progress:
        for stream, model in itertools.product(_STREAMS, _MODELS):
            best = _choose(record, scale, data, stream, model, progress)
            for seed in scale.seeds:
                key = {"part": "test", "stream": stream, "model": model, "seed": seed}
                if record.find(**key) is None:
                    accuracy = _accuracies(scale, data.train, data.test, stream, model, best, seed)
                    record.add(**key, **best._asdict(), accuracy=accuracy)
                progress.advance(1, f"{model}, {stream}")
    return _report(record, scale)


def _choose(record: Run, scale: Scale, data: Data, stream: str, model: str, progress: Progress) -> Settings:
    """Returns the settings with the best accuracy on validation data at the end of a stream of its own."""
    found = dict[Settings, float]()
    for settings in _grid(scale, model):
        key = {"part": "valid", "stream": stream, "model": model, **settings._asdict()}
        row = record.find(**key)
        if row is None:
            seed = max(scale.seeds) + 1
            accuracy = _accuracies(scale, data.train, data.valid, stream, model, settings, seed, only_last=True)
            row = key | {"accuracy": accuracy[-1]}
            record.add(**row)
        found[settings] = row["accuracy"]
        progress.advance(1, f"{model}, {stream}, settings")
    return max(found, key=lambda settings: found[settings])


def _grid(scale: Scale, model: str) -> list[Settings]:
    tried = {"rate": scale.rates, "rows": scale.rows, "local": scale.local_rates}
    searched = _MODELS[model]
    choices = (values if name in searched else values[:1] for name, values in tried.items())
    return [Settings(*values) for values in itertools.product(*choices)]


def _data(scale: Scale) -> Data:
    if scale.data == "mnist":
        full, test = mnist("train"), mnist("test")
    else:
        every = digits()
        full, test = every.take(slice(scale.test, None)), every.take(slice(scale.test))
    return Data(full.take(slice(scale.valid, None)), full.take(slice(scale.valid)), test.take(slice(scale.test)))


def _parts(
    scale: Scale, train: Dataset, test: Dataset, stream: str, generator: torch.Generator
) -> Iterator[tuple[Dataset, Dataset]]:
    """Yields the fifths of a stream, and the test examples of the classes that it has shown by their end."""
    if stream == "shuffled":
        rows = torch.randperm(len(train.labels), generator=generator)[: scale.examples]
        for some in rows.chunk(_PARTS):
            yield train.take(some), test
        return
    seen = list[Dataset]()
    for task in split(train, test, examples=scale.examples // _PARTS, generator=generator):
        seen.append(task.test)
        yield task.train, Dataset(torch.cat([d.inputs for d in seen]), torch.cat([d.labels for d in seen]))


def _accuracies(
    scale: Scale,
    train: Dataset,
    test: Dataset,
    stream: str,
    model: str,
    settings: Settings,
    seed: int,
    *,
    only_last: bool = False,
) -> list[float]:
    """Returns the percentage of right answers after each fifth of a stream, over the classes that it has shown."""
    draws, weights = (torch.Generator().manual_seed(number) for number in (seed, 1000 + seed))
    make = _through_memory if model.startswith("dictionary") else _beside_memory
    learner = make(scale, model, settings, train.inputs.shape[1], weights)
    accuracies = list[float]()
    for number, (part, judged) in enumerate(_parts(scale, train, test, stream, draws), 1):
        for batch in part.batches(scale.batch):
            learner.learn(batch)
        if number == _PARTS or not only_last:
            with torch.no_grad():
                right = learner.predictor(learner.embedding(judged.inputs)).argmax(-1) == judged.labels
            accuracies.append(round(100 * right.double().mean().item(), 2))
    return accuracies


def _through_memory(scale: Scale, model: str, settings: Settings, inputs: int, generator: torch.Generator) -> Learner:
    """Returns an embedding that learns from the loss of the memory's prediction."""
    embedding = mlp(inputs, scale.hidden, scale.key, generator=generator)
    if model == "dictionary, labels":
        dictionary = NeuralDictionary(scale.examples, scale.key, value_dtype=torch.long)
        predictor = NonParametric(dictionary, classes=CLASSES, neighbors=scale.neighbors)
    else:
        dictionary = NeuralDictionary(scale.examples, scale.key, value_shape=(CLASSES,))
        predictor = NonParametric(dictionary, neighbors=scale.neighbors, likelihood=Gaussian())
    optimizers = (
        torch.optim.Adam(embedding.parameters(), lr=settings.rate),
        torch.optim.RMSprop(dictionary.parameters(), lr=settings.rows),
    )

    def learn(batch: Dataset) -> None:
        keys = embedding(batch.inputs)
        targets = batch.labels if model == "dictionary, labels" else one_hot(batch.labels, CLASSES).float()
        if len(dictionary):
            _step(_loss(predictor(keys), targets), *optimizers)
        dictionary.write(keys, targets)  # it holds the whole stream: nothing is overwritten, so no read needs a touch

    return Learner(embedding, predictor, learn)


def _loss(predictions: Float[Tensor, "b c"], targets: Tensor) -> Float[Tensor, ""]:
    if targets.is_floating_point():
        return mse_loss(predictions, targets, reduction="sum") / len(targets)
    uniform = predictions.new_tensor(_LEAST / CLASSES).log()
    return nll_loss(torch.logaddexp(predictions + math.log(1 - _LEAST), uniform), targets)


def _beside_memory(scale: Scale, model: str, settings: Settings, inputs: int, generator: torch.Generator) -> Learner:
    """Returns an embedding that learns from a classifier's loss, or not at all, and fills a memory."""
    embedding = mlp(inputs, scale.hidden, scale.key, generator=generator)
    head = mlp(scale.key, CLASSES, generator=generator)
    memory = EpisodicMemory(scale.examples, scale.key)
    optimizer = torch.optim.Adam([*embedding.parameters(), *head.parameters()], lr=settings.rate)
    adaptation = LocalAdaptation(rules.sgd(settings.local), steps=scale.steps)
    if model == "network alone":
        predictor: nn.Module = Parametric(head)
    elif model == "MbPA":
        predictor = MbPA(head, memory, neighbors=scale.neighbors, adaptation=adaptation)
    else:
        predictor = NonParametric(memory, classes=CLASSES, neighbors=scale.neighbors)

    def learn(batch: Dataset) -> None:
        keys = embedding(batch.inputs)
        if model != "vote, untrained embedding":
            _step(cross_entropy(head(keys), batch.labels), optimizer)
        memory.write(keys, batch.labels)

    return Learner(embedding, predictor, learn)


def _step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def _report(record: Run, scale: Scale) -> str:
    head = ["model", "embedding trained by", *(title.lower() for title in _STREAMS.values())]
    lines, panels = [head, ["---"] * len(head)], []
    found = {(stream, model): _summary(record, stream, model) for stream, model in itertools.product(_STREAMS, _MODELS)}
    for model, trained in zip(_MODELS, _TRAINED_BY, strict=True):
        lines.append([model, trained, *(_cell(record, scale, stream, model) for stream in _STREAMS)])
    for stream, title in _STREAMS.items():
        seen = [scale.examples * part // _PARTS for part in range(1, _PARTS + 1)]
        models = zip(_MODELS, _COLORS, strict=True)
        panels.append((title, [plots.Curve(model, seen, *found[stream, model], color) for model, color in models]))
    intro = (
        f"Test accuracy (%) after {scale.examples:,} examples of {scale.data}, each seen once; mean over "
        f"{len(scale.seeds)} seeds with 95 % intervals, and the embedding's rate that validation data chose of "
        f"{', '.join(f'{rate:g}' for rate in scale.rates)}."
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    table = f"## dictionary\n\n{intro}\n\n{body}\n"
    record.write_table(table)
    label = "test accuracy on the classes so far (%)"
    plots.panels(panels, record.folder / "figure.png", xlabel="examples seen", ylabel=label)
    return table


def _cell(record: Run, scale: Scale, stream: str, model: str) -> str:
    """Returns the last accuracy with its interval, and the rate at which the embedding was trained."""
    mean, error = _summary(record, stream, model)
    margin = _T[len(scale.seeds)] * error[-1]
    row = record.find(part="test", stream=stream, model=model)
    rate = f" ({row['rate']:g})" if row and _MODELS[model] else ""
    return f"{mean[-1]:.1f} +- {margin:.1f}{rate}"


def _summary(record: Run, stream: str, model: str) -> tuple[list[float], list[float]]:
    """Returns mean accuracies after each part, and their standard errors over seeds."""
    wanted = {"part": "test", "stream": stream, "model": model}.items()
    rows = [row["accuracy"] for row in record.rows if wanted <= row.items()]
    points = list(zip(*rows, strict=True))
    mean = [statistics.mean(point) for point in points]
    return mean, [statistics.stdev(point) / math.sqrt(len(rows)) for point in points]
