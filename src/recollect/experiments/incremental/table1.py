"""Table 1 and Figure 4: how fast new classes are learned, by themselves and beside the old ones.

Paper: Section 4.2. A network that knows half of the classes sees images of all of them. Its last layer is fine-tuned,
and every image is written to a memory. Calibration and cost stand beside the accuracy.
"""

from dataclasses import dataclass
from functools import partial

from recollect.experiments.incremental.follow import Line, follow
from recollect.experiments.incremental.measures import milliseconds
from recollect.experiments.incremental.report import report
from recollect.experiments.incremental.scales import MODELS, Choices
from recollect.experiments.incremental.study import Incremental, Study
from recollect.experiments.runner import Progress

_QUERIES = 500  # of a batch whose time is taken


@dataclass(frozen=True)
class Table1(Incremental):
    """New classes: accuracy at 0.1, 1 and 3 epochs of all classes, calibration and cost, of five models."""


@dataclass(frozen=True)
class Figure4(Incremental):
    """New classes: the curves behind Table 1, which is made first where it has not been."""


def run(config: Incremental) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``recollect.data.tiny_imagenet``.
        SettingError: If a setting is out of range or ``out`` holds a run with other settings.
    """
    study = Study(config)
    choices, scale = study.choices(), study.scale
    with Progress(len(study.splits) * len(scale.points) * len(MODELS), "new classes") as progress:
        for number in study.splits:
            lines = [Line({"part": "curve", "split": number, "model": m}, setting) for m, setting in choices.items()]
            follow(study.record, lines, scale.points, partial(study.course, number, choices.parametric), progress)
    _cost(study, choices)
    return report(study.record, scale.marks, study.splits)


def _cost(study: Study, choices: Choices) -> None:
    """Takes the time of one prediction of each model, side by side, with the memory of one epoch."""
    if all(study.record.find(part="cost", model=model) for model in MODELS):
        return
    course = study.course(study.splits[0], choices.parametric)
    course.stream.advance(1.0)
    predictors = {m: setting.predictor(course.stream.head, course.stream.memory) for m, setting in choices.items()}
    every = max(1, len(course.images.labels) // _QUERIES)
    found = milliseconds(predictors, course.images.inputs[::every])
    for model, time in found.items():  # a kill may leave some; all are then measured anew, and the last ones count
        study.record.add(part="cost", model=model, milliseconds=round(time, 5), entries=len(course.stream.memory))
