"""The pictures: matplotlib without its global state."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from recollect.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

BLUE, ORANGE, GREEN, RED, GRAY, PURPLE = "#1f6fb4", "#e07b1a", "#2f9e5b", "#c23b3b", "#7a7a7a", "#7d4fa8"
BROWN, CYAN, PALE_BLUE, NAVY = "#a0703c", "#3aa6a6", "#8fb4d9", "#10375c"


_MOST_TICKS = 8  # of a logarithmic axis, if each point has one


class Curve(NamedTuple):
    """One line of a figure: the mean over seeds and its standard error at each point."""

    label: str
    x: Sequence[float]
    mean: Sequence[float]
    error: Sequence[float]
    color: str
    style: str = "-"
    width: float = 1.8


def figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """Returns an empty figure of this size (inches) and its axes, in the style of all our pictures.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    picture = empty(width, height)
    axes = picture.add_subplot()
    dress(axes)
    return picture, axes


def empty(width: float, height: float, *, dpi: int = 160) -> "Figure":
    """Returns an empty figure of this size (inches), with so many dots to an inch.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a figure needs matplotlib: pip install 'recollect[experiments]'.") from error
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def dress(axes: "Axes") -> None:
    """Gives axes the style of all our pictures."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


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


def draw(
    axes: "Axes",
    lines: Sequence[Curve],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    log_y: bool = False,
    digits: int = 1,
    beside: bool = True,
) -> None:
    """Draws lines in one panel, with a band of one standard error.

    Args:
        axes: The panel.
        lines: What to draw; a line's last value stands behind its label.
        title: Above the panel.
        xlabel: What the horizontal axis shows; whole numbers, or on a logarithmic scale any.
        ylabel: What the vertical axis shows.
        log: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is.
        digits: Of the last values, after the point.
        beside: Whether the labels stand beside the panel or, of lines that fall, in its upper right corner.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

    dress(axes)
    for line in sorted(lines, key=lambda line: -line.mean[-1]):
        label = f"{line.label}  {line.mean[-1]:.{digits}f}"
        axes.plot(line.x, line.mean, line.style, color=line.color, linewidth=line.width, label=label)
        low = [m - e for m, e in zip(line.mean, line.error, strict=True)]
        high = [m + e for m, e in zip(line.mean, line.error, strict=True)]
        axes.fill_between(line.x, low, high, color=line.color, alpha=0.15, linewidth=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if log:
        axes.set_xscale("log")
        points = sorted({x for line in lines for x in line.x})
        if len(points) <= _MOST_TICKS:
            axes.set_xticks(points)
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.minorticks_off()
    if beside:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    else:
        axes.legend(loc="upper right", frameon=False, fontsize=9)


def panels(
    parts: Sequence[tuple[str, Sequence[Curve]]],
    path: Path,
    *,
    xlabel: str | Sequence[str],
    ylabel: str | Sequence[str],
    log: bool = False,
    log_y: bool = False,
    digits: int = 1,
) -> None:
    """Draws lines in panels of their own, two beside each other, with a band of one standard error.

    Args:
        parts: Each panel's title and lines.
        path: The PNG.
        xlabel: What the horizontal axes show, or what each of them shows; whole numbers, or on a logarithmic scale any.
        ylabel: What the vertical axes show, or what each of them shows.
        log: Whether the horizontal axes are logarithmic.
        log_y: Whether the vertical axes are.
        digits: Of the last value of a line, which stands beside its label, after the point.
    """
    picture, axes = grid(len(parts), columns=2, width=7.6, height=4.4)
    across, up = ([label] * len(parts) if isinstance(label, str) else label for label in (xlabel, ylabel))
    for (title, lines), panel, x, y in zip(parts, axes, across, up, strict=True):
        draw(panel, lines, title=title, xlabel=x, ylabel=y, log=log, log_y=log_y, digits=digits)
    save(picture, path)


def mosaic(axes: "Axes", kernels: "Tensor", *, title: str) -> None:
    """Draws the kernels of a convolution beside each other: a row for each output, a column for each input.

    The one percent of largest numbers have the darkest colors; else a few of them would leave the others pale.
    """
    rows, columns, high, wide = kernels.shape
    tiles = kernels.new_full((rows, columns, high + 1, wide + 1), float("nan"))  # a white line between them
    tiles[:, :, :high, :wide] = kernels
    limit = float(kernels.abs().flatten().quantile(0.99))
    table = tiles.transpose(1, 2).reshape(rows * (high + 1), columns * (wide + 1))[:-1, :-1]
    axes.imshow(table.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=11)


def heat_maps(parts: Sequence[tuple[str, "Tensor"]], path: Path, *, title: str) -> None:
    """Draws matrices of percentages, five beside each other, on one scale; NaN stays white."""
    from matplotlib.ticker import MaxNLocator

    picture, axes = grid(len(parts), columns=5, width=2.3, height=2.4)
    image = None
    for (name, matrix), panel in zip(parts, axes, strict=True):
        tasks = len(matrix)
        extent = (0.5, tasks + 0.5, tasks + 0.5, 0.5)
        image = panel.imshow(matrix.numpy(), vmin=0, vmax=100, cmap="viridis", extent=extent, interpolation="nearest")
        panel.set_title(name, loc="left", fontsize=9)
        panel.tick_params(labelsize=7)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    if image is not None:
        picture.colorbar(image, ax=list(axes), shrink=0.6, pad=0.01).ax.tick_params(labelsize=8)
    picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    save(picture, path)


def grid(count: int, *, columns: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    """Returns a figure with this many panels of a size (inches), in rows of at most ``columns``."""
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = empty(width * columns, height * rows)
    return picture, [picture.add_subplot(rows, columns, number + 1) for number in range(count)]
