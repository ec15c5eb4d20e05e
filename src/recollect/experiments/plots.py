"""The pictures: matplotlib without its global state."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recollect.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GRAY, PURPLE = "#1f6fb4", "#e07b1a", "#2f9e5b", "#c23b3b", "#7a7a7a", "#7d4fa8"


class Curve(NamedTuple):
    """One line of a figure: the mean over seeds and its standard error at each point."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    error: Sequence[float]
    color: str
    style: str = "-"


def figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """Returns an empty figure of this size (inches) and its axes, in the style of all our pictures.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a figure needs matplotlib: pip install 'recollect[experiments]'.") from error
    picture = Figure(figsize=(width, height), dpi=160, layout="constrained")
    axes = picture.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return picture, axes


def save(picture: "Figure", path: Path) -> None:
    """Writes the picture as a PNG that is there whole or not at all."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def curves(lines: Sequence[Curve], path: Path, *, title: str, xlabel: str, ylabel: str) -> None:
    """Draws lines with a band of one standard error; the legend stands in the order in which they end."""
    from matplotlib.ticker import MaxNLocator

    picture, axes = figure(7.6, 4.4)
    for line in lines:
        axes.plot(line.x, line.mean, line.style, color=line.color, linewidth=1.8, label=line.label)
        low = [m - e for m, e in zip(line.mean, line.error, strict=True)]
        high = [m + e for m, e in zip(line.mean, line.error, strict=True)]
        axes.fill_between(line.x, low, high, color=line.color, alpha=0.15, linewidth=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    order = sorted(range(len(lines)), key=lambda i: -lines[i].mean[-1])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        [handles[i] for i in order],
        [f"{labels[i]}  {lines[i].mean[-1]:.1f}" for i in order],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        frameon=False,
        fontsize=9,
    )
    save(picture, path)
