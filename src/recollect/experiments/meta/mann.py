"""Tables 1 and 2 of Santoro et al. (2016): recognizing characters after one look, by memory-augmented networks.

An episode shows ten drawings of each of a few characters that the network has never seen, in random order; the label
of each comes with the next drawing. What counts is how often the 1st, 2nd, ... 10th drawing of a character is named.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from recollect.data import jittered, sequences
from recollect.experiments.meta import mann_report
from recollect.experiments.meta.drawings import TEST, TRAIN, VALID, Drawings, drawings
from recollect.experiments.meta.intervals import half_width
from recollect.experiments.meta.training import train
from recollect.experiments.runner import Run, begin
from recollect.meta import MANN, Labels, LRUAccess, LSTMBaseline, NTMAccess, by_instance, offset

_SIDE, _INSTANCES, _HIDDEN = 20, 10, 200  # pixels, drawings of a character in an episode, units of a controller
_FEWER = 192  # units of the controller beside heads that write vectors of their own: as many parameters as without


@dataclass(frozen=True)
class Task:
    """What an episode shows, and how it names it."""

    ways: int
    letters: int = 1

    @property
    def labels(self) -> Labels:
        """One-hot labels, or strings of letters from a to e."""
        return Labels(self.ways) if self.letters == 1 else Labels(5, letters=self.letters)


TASKS = {"one-hot, 5 classes": Task(5), "strings, 5 classes": Task(5, 5), "strings, 15 classes": Task(15, 5)}


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    batches: int
    """Of training, for each network."""
    lines: tuple[tuple[str, str], ...]
    """Which task by which model."""
    batch: int = 16
    rate: float = 1e-3
    """Of Adam."""
    last_rate: float = 1e-3
    """What the rate falls to in the course of the training, along a cosine."""
    clip: float = 10.0
    """The largest norm of a gradient."""
    every: int = 1000
    """Batches between two looks at validation episodes."""
    valid: int = 100
    """Validation episodes."""
    test: int = 1000
    """Test episodes."""
    seed: int = 0


_ONE_HOT, _STRINGS, _MORE = TASKS
_TABLE1 = tuple((_ONE_HOT, model) for model in ("mann", "lstm", "mann-separate"))
_TABLE2 = tuple((_STRINGS, model) for model in ("mann-separate", "lstm", "knn"))
_MODELS = ("mann-separate", "mann", "mann-ntm", "mann-ff", "lstm", "knn")
_ALL = tuple((task, model) for task in (_STRINGS, _MORE) for model in _MODELS)
SCALES = {
    "mann-table1": {
        "smoke": Scale(20, _TABLE1, every=10, valid=10, test=20),
        "small": Scale(40_000, _TABLE1, last_rate=0.0),
        "paper": Scale(100_000, (*_TABLE1, (_ONE_HOT, "mann-ff"))),
    },
    "mann-table2": {
        "smoke": Scale(10, _TABLE2, every=10, valid=10, test=20),
        "small": Scale(25_000, _TABLE2, last_rate=0.0),
        "paper": Scale(100_000, _ALL),
    },
}


@dataclass(frozen=True)
class MannTable1:
    """One-hot labels, five characters in an episode: MANN against an LSTM of as many parameters."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (an hour and a half on one core) or ``paper``."""
    out: Path = Path("runs/mann-table1")
    """The folder for results; a run that was stopped goes on there."""


@dataclass(frozen=True)
class MannTable2:
    """Labels that are strings of five letters: MANN against an LSTM and the nearest neighbor."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (an hour and a half on one core) or ``paper``."""
    out: Path = Path("runs/mann-table2")
    """The folder for results; a run that was stopped goes on there."""


class Batch(NamedTuple):
    """Episodes."""

    inputs: Float[Tensor, "b t d"]
    """Drawings."""
    labels: Int[Tensor, "b t"]


def run(config: MannTable1 | MannTable2) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``recollect.data.omniglot``.
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    name = "mann-table1" if isinstance(config, MannTable1) else "mann-table2"
    record, scale = begin(config, SCALES[name])
    study = _Study(record, scale)
    for task, model in scale.lines:
        if record.find(part="test", task=task, model=model) is None:
            study.measure(task, model)
    return mann_report.report(record, name)


class _Study:
    def __init__(self, record: Run, scale: Scale) -> None:
        self._record = record
        self._scale = scale

    @cached_property
    def _data(self) -> Drawings:
        return drawings(_SIDE, seed=self._scale.seed)

    def measure(self, task: str, model: str) -> None:
        """Trains a model of a task, and adds the row of its test."""
        if model == "knn":
            self._test(task, model, nearest)
            return
        scale, labels = self._scale, TASKS[task].labels
        g = torch.Generator().manual_seed(scale.seed)
        net = _network(model, labels, generator=g)
        optimizer = torch.optim.Adam(net.parameters(), lr=scale.rate)
        schedule = CosineAnnealingLR(optimizer, scale.batches, eta_min=scale.last_rate)

        def step(number: int) -> float:
            batch = self._draw(task, TRAIN, scale.batch, moved=True, generator=g)
            loss = -labels.log_prob(_logits(net, labels, batch), batch.labels).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), scale.clip)
            optimizer.step()
            schedule.step()
            key = {"part": "learning", "task": task, "model": model, "batches": number}
            if number % scale.every == 0 and self._record.find(**key) is None:
                seen = self._draw(task, VALID, scale.valid, moved=False, generator=torch.Generator().manual_seed(VALID))
                self._record.add(**key, loss=round(loss.item(), 5), accuracy=_percent(_guess(net, labels, seen), seen))
            return loss.item()

        parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
        run_of = {"task": task, "model": model, **asdict(scale)}
        title = f"{model}: {task}"
        train(self._record.folder, title, parts, run=run_of, generator=g, steps=scale.batches, step=step)
        size = sum(parameter.numel() for parameter in net.parameters())
        self._test(task, model, lambda batch: _guess(net, labels, batch), parameters=size)

    def _test(self, task: str, model: str, guess: Callable[[Batch], Int[Tensor, "b t"]], **more: Any) -> None:
        g = torch.Generator().manual_seed(TEST)
        some = self._draw(task, TEST, self._scale.test, moved=False, generator=g)
        parts = [Batch(*part) for part in zip(some.inputs.split(100), some.labels.split(100), strict=True)]
        right = torch.cat([_right(guess(part), part.labels) for part in parts])
        row = {"accuracy": _rounded(right.mean(0)), "interval": _rounded(half_width(right.mT)), **more}
        self._record.add(part="test", task=task, model=model, **row)

    def _draw(self, task: str, split: int, count: int, *, moved: bool, generator: torch.Generator) -> Batch:
        """Returns episodes of a split; ``moved`` ones are turned by quarters, and a little beside."""
        labels, ways = TASKS[task].labels, TASKS[task].ways
        some = sequences(
            self._data.pixels,
            self._data.splits[split],
            tasks=count,
            ways=ways,
            instances=_INSTANCES,
            turned=moved,
            generator=generator,
        )
        names = labels.draw(count, ways, generator=generator)
        images = jittered(some.inputs, generator=generator) if moved else some.inputs
        return Batch(images.flatten(2), names.gather(1, some.labels))


def _network(model: str, labels: Labels, *, generator: torch.Generator) -> nn.Module:
    inputs = _SIDE**2 + labels.size
    separate = model == "mann-separate"
    hidden = _FEWER if separate else _HIDDEN
    if model == "mann-ntm":
        access = NTMAccess(hidden, generator=generator)
    else:
        access = LRUAccess(hidden, separate=separate, generator=generator)
    controller = "feedforward" if model == "mann-ff" else "lstm"
    mann = MANN(inputs, labels.size, access=access, controller=controller, hidden=hidden, generator=generator)
    return LSTMBaseline.like(mann, generator=generator) if model == "lstm" else mann


def _logits(net: nn.Module, labels: Labels, batch: Batch) -> Float[Tensor, "b t s"]:
    """Returns what a network says of each drawing, given the labels of those before."""
    return net(offset(batch.inputs, labels.encode(batch.labels)))[0]


@torch.inference_mode()
def _guess(net: nn.Module, labels: Labels, batch: Batch) -> Int[Tensor, "b t"]:
    return labels.predict(_logits(net, labels, batch))


def nearest(batch: Batch) -> Int[Tensor, "b t"]:
    """Returns the label of the nearest drawing before each, by its pixels; -1 for the first of an episode."""
    distances = torch.cdist(batch.inputs, batch.inputs)
    later = torch.ones_like(distances[0]).triu().bool()
    found = batch.labels.gather(1, distances.masked_fill(later, torch.inf).argmin(2))
    found[:, 0] = -1
    return found


def _right(guesses: Int[Tensor, "b t"], labels: Int[Tensor, "b t"]) -> Float[Tensor, "b k"]:
    """Returns the accuracy of each episode by instance, in percent."""
    pairs = zip(guesses.split(1), labels.split(1), strict=True)
    return 100 * torch.stack([by_instance(*pair) for pair in pairs])


def _percent(guesses: Int[Tensor, "b t"], batch: Batch) -> list[float]:
    return _rounded(100 * by_instance(guesses, batch.labels))


def _rounded(numbers: Float[Tensor, " k"]) -> list[float]:
    return [round(number, 2) for number in numbers.tolist()]
