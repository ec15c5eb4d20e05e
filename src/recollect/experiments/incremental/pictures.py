"""Figures 4 to 7, and the curve over images of each new class."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from recollect.experiments import plots
from recollect.experiments.incremental.rows import TITLES, Row, of, series, top1
from recollect.experiments.incremental.scales import MODELS

_COLORS = {
    "parametric": plots.GREEN,
    "non-parametric": plots.GRAY,
    "mixture": plots.RED,
    "mbpa-rmsprop": plots.NAVY,
    "mbpa-sgd": plots.BLUE,
    "fine-tuning": plots.GREEN,
    "nearest-mean": plots.PURPLE,
    "vote": plots.GRAY,
}
_GROUPS = "new", "old"
_SHORT = {"mbpa-sgd": "MbPA", "mixture": "Mixture", "parametric": "Parametric"}
_SHADES = plots.PALE_BLUE, plots.CYAN, plots.BLUE, plots.PURPLE, plots.NAVY, plots.ORANGE


def figure4(rows: Sequence[Row], folder: Path) -> None:
    """Draws accuracy over epochs: all classes, new ones, old ones."""
    _by_model(rows, "curve", {"all": "All classes", "new": "New classes", "old": "Old classes"}, folder / "figure4.png")


def figure5(rows: Sequence[Row], folder: Path) -> None:
    """Draws accuracy over epochs of unbalanced data."""
    titles = {"all": "All classes", "old": "Old classes", "rare": "New classes with a tenth of the images"}
    _by_model(rows, "unbalanced", {**titles, "full": "New classes with all images"}, folder / "figure5.png")


def figure6(rows: Sequence[Row], folder: Path) -> None:
    """Draws what the memory's size and the learning rate do, on new and on old classes."""
    panels = [
        (f"MbPA, {group} classes, by entries", _by_value(of(rows, "size"), "capacity", group)) for group in _GROUPS
    ]
    for model in ("mbpa-sgd", "mixture", "parametric"):
        found = of(rows, "rate", model=model)
        panels += [(f"{_SHORT[model]}, {g} classes, by learning rate", _by_value(found, "rate", g)) for g in _GROUPS]
    plots.panels(panels, folder / "figure6.png", xlabel="epochs of all classes", ylabel="top-1 (%)", log=True)


def figure7(rows: Sequence[Row], folder: Path) -> None:
    """Draws what the number of neighbors does."""
    panels = [
        (f"MbPA, {group} classes, by neighbors", _by_value(of(rows, "neighbors"), "neighbors", group))
        for group in _GROUPS
    ]
    plots.panels(panels, folder / "figure7.png", xlabel="epochs of all classes", ylabel="top-1 (%)", log=True)


def new_classes(rows: Sequence[Row], folder: Path) -> None:
    """Draws accuracy over images of each new class."""
    models = list(dict.fromkeys(row["model"] for row in of(rows, "shots")))
    panels = []
    for group, title in {"new": "New classes", "old": "Old classes"}.items():
        lines = []
        for model in models:
            found = of(rows, "shots", model=model)
            lines.append(_line(found, "shots", lambda row, group=group: row[group], TITLES[model], _COLORS[model]))
        panels.append((title, lines))
    timed = [row for row in of(rows, "shots") if row["seconds"] is not None]
    seconds = [
        _line(of(timed, "shots", model=m), "shots", lambda row: math.log10(row["seconds"]), TITLES[m], _COLORS[m])
        for m in models
        if of(timed, "shots", model=m)
    ]
    panels.append(("From the keys to the first recognition", seconds))
    label = "images of each new class"
    ylabel = ("top-1 (%)", "top-1 (%)", "log10 of seconds")
    plots.panels(panels, folder / "new-classes.png", xlabel=label, ylabel=ylabel, log=True)


def _by_model(rows: Sequence[Row], part: str, groups: dict[str, str], path: Path) -> None:
    panels = []
    for group, title in groups.items():
        lines = [_line(of(rows, part, model=m), "epochs", top1(group), TITLES[m], _COLORS[m]) for m in MODELS]
        panels.append((title, lines))
    plots.panels(panels, path, xlabel="epochs of all classes", ylabel="top-1 (%)", log=True)


def _by_value(rows: Sequence[Row], name: str, group: str) -> list[plots.Curve]:
    values = sorted({row[name] for row in rows})
    return [
        _line([row for row in rows if row[name] == value], "epochs", top1(group), f"{value:,g}", color)
        for value, color in zip(values, _SHADES, strict=False)
    ]


def _line(rows: Sequence[Row], x: str, value: Callable[[Row], float], label: str, color: str) -> plots.Curve:
    """Returns the mean over splits of what ``value`` reads, without the beginning, which no logarithm shows."""
    found = {point: mean for point, mean in series(rows, x, value).items() if point > 0}
    means, errors = ([part[i] for part in found.values()] for i in (0, 1))
    return plots.Curve(label, list(found), means, errors, color)
