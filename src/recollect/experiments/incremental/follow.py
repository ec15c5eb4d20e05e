"""Following a stream: what each model is worth at each point of it, measured once and recorded."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from recollect.data import Dataset
from recollect.experiments.incremental.measures import measure, predict
from recollect.experiments.incremental.models import Setting
from recollect.experiments.incremental.stream import Stream
from recollect.experiments.runner import Progress, Run
from recollect.predictors import Predictor


class Line(NamedTuple):
    """A model whose worth is measured along a stream."""

    key: Mapping[str, Any]
    """What tells its rows from those of others."""
    setting: Setting


class Course(NamedTuple):
    """A stream, and what models are judged by along it."""

    stream: Stream
    images: Dataset
    """By class, as many of each."""
    groups: Mapping[str, Bool[Tensor, " c"]]
    """Classes that are also judged by themselves."""
    marks: Collection[float]
    """Where all images count ..."""
    every: int
    """... and elsewhere one of so many."""

    def measure(self, predictor: Predictor, epochs: float) -> dict[str, Any]:
        """Returns how many images counted, and what the predictions are worth, in all and for each group."""
        images = self.images if epochs in self.marks else self.images.take(slice(None, None, self.every))
        log_probs = predict(predictor, images.inputs)
        found = {"all": measure(log_probs, images.labels)}
        for name, classes in self.groups.items():
            among = classes[images.labels]
            found[name] = measure(log_probs[among], images.labels[among])
        rounded = {name: {k: round(v, 4) for k, v in part._asdict().items()} for name, part in found.items()}
        return {"images": len(images.labels), **rounded}


def follow(
    record: Run, lines: Sequence[Line], points: Sequence[float], begin: Callable[[], Course], progress: Progress
) -> None:
    """Measures each line at each point and adds the rows; what the record holds is not measured again.

    Args:
        record: Where the rows go.
        lines: The models, all of them made of the stream's head and memory.
        points: In epochs, rising.
        begin: Makes the stream, when it is needed.
        progress: Is told of each measurement.
    """
    course = None
    for epochs in points:
        for line in lines:
            key = {**line.key, "epochs": epochs}
            if record.find(**key) is not None:
                progress.skip(1)
                continue
            course = course or begin()
            course.stream.advance(epochs)
            predictor = line.setting.predictor(course.stream.head, course.stream.memory)
            record.add(**key, setting=asdict(line.setting), **course.measure(predictor, epochs))
            progress.advance(1)
