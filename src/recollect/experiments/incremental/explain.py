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
from recollect.experiments.incremental.measures import predict
from recollect.experiments.incremental.pretraining import split
from recollect.experiments.incremental.study import Incremental, Study

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
    course.stream.advance(config.epochs)
    head, memory = course.stream.head, course.stream.memory
    model = choices.sgd.predictor(head, memory)
    image = config.image
    if image is None:
        rivals = [setting.predictor(head, memory) for setting in (choices.parametric, choices.mixture)]
        new = study.halves(config.split).new[course.images.labels]
        others = [predict(rival, course.images.inputs) for rival in rivals]
        image = telling(predict(model, course.images.inputs), others, course.images.labels, new)
    explanation = model.explain(course.images.inputs[image])
    data = study.data
    rows = split(data.train.labels, len(data.names), seed=config.split).train
    neighbors = data.train.pixels[rows[course.stream.rows[explanation.slots]]]
    label = int(course.images.labels[image])
    picture = Picture(data.test.pixels[image], label, neighbors, explanation, data.names)
    draw(picture, config.out / _name(config))
    return describe(picture, image)


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
    right.suptitle(
        f"The {count} nearest of {len(found.values)} neighbors: weight, and what each added to the logit of "
        f"{_short(picture.names[after])}",
        fontsize=11,
    )
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
