"""``recollect explain``: one prediction as a picture, with its neighbors and what each of them added.

Paper: Figure 5, right. A query, the images that the memory finds near it, their weights and what each added to the
logit of the predicted class, and the class probabilities before and after adaptation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from recollect import Explanation
from recollect.errors import SettingError
from recollect.experiments import plots
from recollect.experiments.incremental.follow import Course
from recollect.experiments.incremental.measures import predict
from recollect.experiments.incremental.pretraining import split
from recollect.experiments.incremental.scales import Choices
from recollect.experiments.incremental.study import Incremental, Study
from recollect.experiments.runner import Progress

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = 20  # neighbors, the nearest ones
_BARS = 4  # classes, the most probable ones before and after


@dataclass(frozen=True)
class Explain(Incremental):
    """One prediction for an image of Tiny-ImageNet: its neighbors, what each added, and the probabilities.

    It needs the network and the settings of ``reproduce table1`` at the same scale, and makes them where they are
    missing. The networks of ``--scale smoke`` have learned next to nothing: use ``small`` for pictures that mean
    something.
    """

    split: int = 1
    """Which classes are new."""
    epochs: float = 0.1
    """How much of all training images has gone by."""
    image: int | None = None
    """A test image, by its number from 0 on. When not given: of the images of new classes that MbPA recognizes and the
    parametric model and the mixture do not, the one whose class gains the most probability."""


class Picture(NamedTuple):
    """All that is drawn."""

    query: UInt8[Tensor, "h w 3"]
    label: int
    neighbors: UInt8[Tensor, "k h w 3"]
    explanation: Explanation
    names: tuple[str, ...]
    """Of the classes."""


def run(config: Explain) -> str:
    """Draws ``explanation.png`` (what is not left to the defaults stands in the name), and says what it shows.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``recollect.data.tiny_imagenet``.
        SettingError: If there is no such split or image, or ``out`` holds a run with other settings.
    """
    study = Study(config)
    if config.split not in study.splits:
        raise SettingError(f"--split must be one of {list(study.splits)}, got {config.split}.")
    if not 0 <= config.epochs < math.inf:
        raise SettingError(f"--epochs must be a finite number of at least 0, got {config.epochs:g}.")
    choices = study.choices()
    course = study.course(config.split, choices.parametric)
    count = len(course.images.labels)
    if config.image is not None and not 0 <= config.image < count:
        raise SettingError(f"--image must be from 0 to {count - 1}, got {config.image}.")
    with Progress(2, "reading the images") as progress:
        course.stream.advance(config.epochs)
        progress.advance(1, "looking for an image")
        new = study.halves(config.split).new[course.images.labels]
        image = _found(course, choices, new) if config.image is None else config.image
        progress.advance(1)
    model = choices.sgd.predictor(course.stream.head, course.stream.memory)
    explanation = model.explain(course.images.inputs[image])
    data = study.data
    rows = split(data.train.labels, len(data.names), seed=config.split).train
    neighbors = data.train.pixels[rows[course.stream.rows[explanation.slots]]]
    label = int(course.images.labels[image])
    picture = Picture(data.test.pixels[image], label, neighbors, explanation, data.names)
    draw(picture, config.out / _name(config))
    return describe(picture, image)


def _found(course: Course, choices: Choices, new: Bool[Tensor, " n"]) -> int:
    """Returns the image that tells most about MbPA beside the parametric model and the mixture."""
    settings = (choices.sgd, choices.parametric, choices.mixture)
    predictors = [setting.predictor(course.stream.head, course.stream.memory) for setting in settings]
    model, *others = (predict(predictor, course.images.inputs) for predictor in predictors)
    return telling(model, others, course.images.labels, new)


def _name(config: Explain) -> str:
    given = {name: getattr(config, name) for name in ("split", "epochs", "image")}
    other = [f"-{name}-{value:g}" for name, value in given.items() if value != getattr(Explain, name)]
    return f"explanation{''.join(other)}.png"


def telling(
    model: Float[Tensor, "n c"],
    others: Sequence[Float[Tensor, "n c"]],
    labels: Int[Tensor, " n"],
    new: Bool[Tensor, " n"],
) -> int:
    """Returns the image ``new`` that the model gets right and the others wrong, and whose class gains most.

    Where there is none, it is the image whose class gains most. The gain is over the first of the others.

    Args:
        model: The log-probabilities of the model.
        others: Those of the others.
        labels: What is right.
        new: Which images count.
    """
    own, before = (log_probs.gather(1, labels.unsqueeze(1)).squeeze(1).exp() for log_probs in (model, others[0]))
    alone = new & (model.argmax(1) == labels)
    for log_probs in others:
        alone &= log_probs.argmax(1) != labels
    gain = (own - before).masked_fill(~(alone if alone.any() else new), -torch.inf)
    return int(gain.argmax())


def describe(picture: Picture, image: int) -> str:
    """Returns the picture in words: the prediction before and after, and the neighbors that added most."""
    found, names = picture.explanation, [_short(name) for name in picture.names]
    before, after = int(found.before.argmax()), int(found.after.argmax())
    if len(found.values) == 0:
        return f"Test image {image}: {names[picture.label]}. The memory is empty; the head says {names[before]}.\n"
    lines = [
        f"Test image {image}: {names[picture.label]}",
        f"before: {names[before]} ({float(found.before[before].exp()):.0%}; {_chance(found.before, picture, names)})",
        f"after:  {names[after]} ({float(found.after[after].exp()):.0%}; {_chance(found.after, picture, names)})",
        "",
        f"What added most to the logit of {names[after]}:",
    ]
    added = found.contributions[:, after]
    for place in added.topk(min(5, len(added))).indices.tolist():
        name, weight = names[int(found.values[place])], float(found.weights[place])
        lines.append(f"  {float(added[place]):+.3f}  neighbor {place + 1}, {name}, weight {weight:.3f}")
    return "\n".join(lines) + "\n"


def _chance(log_probs: Float[Tensor, " c"], picture: Picture, names: Sequence[str]) -> str:
    return f"{names[picture.label]} {float(log_probs[picture.label].exp()):.0%}"


def _short(name: str) -> str:
    return name.partition(",")[0]


def draw(picture: Picture, path: Path) -> None:
    """Draws the query and the probabilities at the left, the nearest neighbors at the right."""
    canvas = plots.empty(15.0, 7.6, dpi=100)  # photographs of 64 pixels need no more
    left, right = canvas.subfigures(1, 2, squeeze=False, width_ratios=(1.0, 2.1))[0]
    query, bars = left.subplots(2, 1, height_ratios=(1.2, 1.0))
    _show(query, picture.query, f"Query: {_short(picture.names[picture.label])}", size=12.0)
    _bars(bars, picture)
    found = picture.explanation
    after = int(found.after.argmax())
    count = min(_SHOWN, len(found.values))
    of_all = f"The {count} nearest of {len(found.values)} neighbors: weight, and what each added to the logit of "
    title = of_all + _short(picture.names[after]) if count else "The memory is empty"
    right.suptitle(title, fontsize=11)
    for place, axes in enumerate(right.subplots(-(-_SHOWN // 5), 5).flat):
        if place >= count:
            axes.set_axis_off()
            continue
        label = int(found.values[place])
        added = float(found.contributions[place, after])
        title = f"{_short(picture.names[label])[:22]}\n{float(found.weights[place]):.3f}, {added:+.3f}"
        _show(axes, picture.neighbors[place], title, size=8.0, color=plots.BLUE if label == after else plots.GRAY)
    plots.save(canvas, path)


def _show(axes: "Axes", pixels: UInt8[Tensor, "h w 3"], title: str, *, size: float, color: str = "white") -> None:
    axes.imshow(pixels.numpy(), interpolation="bilinear")
    axes.set_title(title, fontsize=size, loc="left" if size > 10 else "center")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(color)
        spine.set_linewidth(2.5)


def _bars(axes: "Axes", picture: Picture) -> None:
    """Draws the probabilities of the classes that are most probable before or after, and of the right one."""
    found = picture.explanation
    both = torch.stack([found.before, found.after]).exp()
    shown = torch.cat([both.topk(_BARS).indices.flatten(), torch.tensor([picture.label])]).unique()
    shown = shown[both[1, shown].argsort()]
    places = torch.arange(len(shown))
    for row, (color, label, shift) in enumerate(((plots.GRAY, "before", 0.2), (plots.BLUE, "after", -0.2))):
        axes.barh((places + shift).tolist(), (100 * both[row, shown]).tolist(), height=0.38, color=color, label=label)
    names = [_short(picture.names[one]) + (" (right)" if one == picture.label else "") for one in shown.tolist()]
    axes.set_yticks(places.tolist(), names, fontsize=9)
    axes.set_xlabel("probability (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
