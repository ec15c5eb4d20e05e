"""Figure 5, left: new classes of which half have a tenth of the images.

Paper: Section 4.2.1. Everything is as in Figure 4, with its settings, but the training images; the test images are as
many of every class.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from recollect.data import Dataset
from recollect.experiments.incremental.follow import Course, Line, follow
from recollect.experiments.incremental.models import FineTuning
from recollect.experiments.incremental.report import report
from recollect.experiments.incremental.scales import MODELS
from recollect.experiments.incremental.study import Incremental, Study
from recollect.experiments.runner import Progress

_RARE = 10  # one image of so many


@dataclass(frozen=True)
class Figure5(Incremental):
    """Unbalanced data: a tenth of the images for half of the new classes."""


def run(config: Figure5) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError, SettingError: See ``table1.run``.
    """
    study = Study(config)
    choices, points = study.choices(), study.scale.long_points
    with Progress(len(study.splits) * len(points) * len(MODELS), "unbalanced classes") as progress:
        for number in study.splits:
            key = {"part": "unbalanced", "split": number}
            lines = [Line({**key, "model": model}, setting) for model, setting in choices.items()]
            follow(study.record, lines, points, partial(_course, study, number, choices.parametric), progress)
    return report(study.record, study.scale.marks, study.splits)


def _course(study: Study, number: int, fine: FineTuning) -> Course:
    halves = study.halves(number)
    rare = halves.new & (halves.new.cumsum(0) % 2 == 0)  # labels do not know what they mean: every other one
    rows = unbalanced(halves.train, rare)
    groups = {"old": ~halves.new, "full": halves.new & ~rare, "rare": rare}
    return study.course(number, fine, rows=rows, groups=groups, marks=study.scale.long_points[-1:])


def unbalanced(train: Dataset, rare: Bool[Tensor, " c"]) -> Int[Tensor, " n"]:
    """Returns the rows of all images but nine of ten of the rare classes."""
    place = torch.cat([torch.arange(count) for count in train.labels.bincount(minlength=len(rare)).tolist()])
    by_class = train.labels.argsort(stable=True)
    kept = ~rare[train.labels[by_class]] | (place % _RARE == 0)
    return by_class[kept]
