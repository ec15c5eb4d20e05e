"""Figure 6: what the size of the memory and the learning rate of the parametric model do.

Paper: Appendix A. Everything else is as in Figure 4, with its settings.
"""

from dataclasses import dataclass, replace
from functools import partial

from recollect.experiments.incremental.follow import Line, follow
from recollect.experiments.incremental.report import report
from recollect.experiments.incremental.scales import Choices
from recollect.experiments.incremental.study import Incremental, Study
from recollect.experiments.runner import Progress


@dataclass(frozen=True)
class Figure6(Incremental):
    """The size of the memory, and the learning rate of the parametric model."""


def run(config: Figure6) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError, SettingError: See ``table1.run``.
    """
    study = Study(config)
    choices = study.choices()
    _sizes(study, choices)
    _rates(study, choices)
    return report(study.record, study.scale.marks, study.splits)


def _sizes(study: Study, choices: Choices) -> None:
    capacities, points = study.scale.capacities, study.scale.sweep
    with Progress(len(study.splits) * len(capacities) * len(points), "sizes of the memory") as progress:
        for number in study.splits:
            for capacity in capacities:
                key = {"part": "size", "split": number, "capacity": capacity}
                begin = partial(study.course, number, choices.parametric, capacity=capacity, marks=())
                follow(study.record, [Line(key, choices.sgd)], points, begin, progress)


def _rates(study: Study, choices: Choices) -> None:
    rates, points = study.scale.rates, study.scale.sweep
    with Progress(len(study.splits) * len(rates) * len(points) * 3, "learning rates") as progress:
        for number in study.splits:
            for rate in rates:
                fine = replace(choices.parametric, rate=rate * choices.parametric.rate)
                key = {"part": "rate", "split": number, "rate": fine.rate}
                models = {"parametric": fine, "mixture": choices.mixture, "mbpa-sgd": choices.sgd}
                lines = [Line({**key, "model": model}, setting) for model, setting in models.items()]
                follow(study.record, lines, points, partial(study.course, number, fine, marks=()), progress)
