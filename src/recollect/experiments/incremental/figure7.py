"""Figure 7: what the number of neighbors does.

Paper: Appendix A. Everything else is as in Figure 4, with its settings.
"""

from dataclasses import dataclass, replace
from functools import partial

from recollect.experiments.incremental.follow import Line, follow
from recollect.experiments.incremental.report import report
from recollect.experiments.incremental.study import Incremental, Study
from recollect.experiments.runner import Progress


@dataclass(frozen=True)
class Figure7(Incremental):
    """The number of neighbors."""


def run(config: Figure7) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError, SettingError: See ``table1.run``.
    """
    study = Study(config)
    choices, points, counts = study.choices(), study.scale.sweep, study.scale.neighbors
    with Progress(len(study.splits) * len(points) * len(counts), "neighbors") as progress:
        for number in study.splits:
            lines = [
                Line({"part": "neighbors", "split": number, "neighbors": k}, replace(choices.sgd, neighbors=k))
                for k in counts
            ]
            begin = partial(study.course, number, choices.parametric, marks=())
            follow(study.record, lines, points, begin, progress)
    return report(study.record, study.scale.marks, study.splits)
