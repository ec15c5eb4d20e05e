"""What Table 1 and Figures 4 to 7 share: one folder, the splits, and the choice of settings."""

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor

from recollect.data import Dataset, ImageClasses, tiny_imagenet
from recollect.errors import require_choice, require_device
from recollect.experiments.incremental.follow import Course, Line, follow
from recollect.experiments.incremental.models import FineTuning
from recollect.experiments.incremental.pretraining import Features, features, reduced, split
from recollect.experiments.incremental.scales import MODELS, SCALES, Choices
from recollect.experiments.incremental.stream import Stream
from recollect.experiments.runner import Progress, Run, refuse_strange

TUNING = 0  # the split that settings are chosen on


@dataclass(frozen=True)
class Incremental:
    """Half of the classes of Tiny-ImageNet are new to a trained network."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (a minute), ``small`` (hours of two cores, most of them for the networks) or ``paper`` (for a GPU)."""
    out: Path = Path("runs/incremental")
    """The folder for results, shared by table1 and figures 4 to 7; a run that was stopped goes on there."""
    device: str = "cpu"
    """Where networks are trained: ``cpu`` or ``cuda``. The rest runs on the CPU."""


class Halves(NamedTuple):
    """The features of one split: which classes are new, and what is for learning, choosing and judging."""

    new: Bool[Tensor, " c"]
    train: Dataset
    valid: Dataset
    test: Dataset
    features: Features


class Study:
    """The record of one folder, and what all experiments in it need.

    Args:
        config: The settings of the command line.

    Raises:
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
        DeviceError: If there is no such device.
    """

    def __init__(self, config: Incremental) -> None:
        require_choice("--scale", config.scale, tuple(SCALES))
        require_device(config.device)
        refuse_strange(config.out / "config.json", *config.out.glob("*.png"))
        self.scale = SCALES[config.scale]
        self.record = Run(config.out, {"scale": config.scale, **dataclasses.asdict(self.scale)})
        self._device = config.device
        self._last: tuple[int, Halves] | None = None

    @cached_property
    def data(self) -> ImageClasses:
        """All images, decoded once."""
        with Progress(1.0, "reading Tiny-ImageNet") as progress:
            return reduced(tiny_imagenet(watch=progress.advance), self.scale.recipe.examples)

    @property
    def splits(self) -> range:
        """The splits that results are means over."""
        return range(TUNING + 1, self.scale.splits)

    def halves(self, number: int) -> Halves:
        """Returns the features of a split; the network is trained first where the cache has none."""
        if self._last is None or self._last[0] != number:
            found = features(self.data, self.scale.recipe, seed=number, device=self._device)
            labels = self.data.train.labels
            parts = split(labels, len(self.data.names), seed=number)
            train, valid = (Dataset(found.train[rows], labels[rows]) for rows in (parts.train, parts.valid))
            test = Dataset(found.test, self.data.test.labels)
            self._last = number, Halves(parts.new, train, valid, test, found)
        return self._last[1]

    def course(
        self,
        number: int,
        fine: FineTuning,
        *,
        capacity: int | None = None,
        rows: Int[Tensor, " n"] | slice = slice(None),
        groups: Mapping[str, Bool[Tensor, " c"]] | None = None,
        marks: tuple[float, ...] | None = None,
    ) -> Course:
        """Returns a stream of a split's training images, to be judged by its test images.

        Args:
            number: The split. The first is judged by its validation images.
            fine: How the head learns.
            capacity: Of the memory; the number of training images when None.
            rows: Which training images; all when not given.
            groups: Classes to be judged by themselves; the old and the new ones when None.
            marks: Where all test images count; as in the scale when None.
        """
        halves = self.halves(number)
        train = halves.train.take(rows)
        stream = Stream(train.inputs, train.labels, halves.features.head(), fine, capacity=capacity, seed=number)
        groups = {"old": ~halves.new, "new": halves.new} if groups is None else groups
        if number == TUNING:
            some = halves.valid.take(slice(None, None, self.scale.every))
            return Course(stream, some, groups, self.scale.marks, 1)
        return Course(stream, halves.test, groups, self.scale.marks if marks is None else marks, self.scale.every)

    def choices(self) -> Choices:
        """Returns the settings of each model that are best on validation images of the first split.

        Best is the mean accuracy over all classes and all marks. All models are made of the head that the parametric
        model trains, so its settings are chosen first.
        """
        grids, marks = self.scale.grids, self.scale.marks
        with Progress(len(grids.parametric) * len(marks), "choosing the parametric model's settings") as progress:
            for line, one in zip(self._lines("parametric"), grids.parametric, strict=True):
                follow(self.record, [line], marks, partial(self.course, TUNING, one, capacity=1), progress)
        fine = grids.parametric[self._best("parametric")]
        lines = [line for model in MODELS[1:] for line in self._lines(model)]
        with Progress(len(lines) * len(marks), "choosing the other models' settings") as progress:
            follow(self.record, lines, marks, partial(self.course, TUNING, fine), progress)
        best = [self._best(model) for model in MODELS[1:]]
        return Choices(fine, grids.vote[best[0]], grids.mixture[best[1]], grids.rmsprop[best[2]], grids.sgd[best[3]])

    def _lines(self, model: str) -> list[Line]:
        tried = self.scale.grids.of(model)
        return [Line({"part": "tuning", "model": model, "place": place}, one) for place, one in enumerate(tried)]

    def _best(self, model: str) -> int:
        """Returns the place of a model's best setting; of equally good ones the first."""
        found: list[list[float]] = [[] for _ in self.scale.grids.of(model)]
        for row in self.record.rows:
            if row["part"] == "tuning" and row["model"] == model:
                found[row["place"]].append(row["all"]["top1"])
        means = [statistics.fmean(scores) for scores in found]
        return means.index(max(means))
