"""Reading the rows of a run: means over splits."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
TITLES = {
    "parametric": "parametric (last layer fine-tuned)",
    "non-parametric": "non-parametric (vote of the neighbors)",
    "mixture": "mixture",
    "mbpa-rmsprop": "MbPA (rmsprop)",
    "mbpa-sgd": "MbPA (sgd, factored)",
    "fine-tuning": "fine-tuning of the last layer",
    "nearest-mean": "nearest class mean",
    "vote": "k-NN vote",
}


class Mean(NamedTuple):
    """A mean over splits and its standard error (0 of a single one)."""

    mean: float
    error: float

    @staticmethod
    def of(values: Sequence[float]) -> "Mean":
        """Returns the mean of one value for each split."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return Mean(statistics.fmean(values), error)

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.error:.1f}"


def area(points: Iterable[tuple[float, float]], end: float) -> float:
    """Returns the mean height of a curve from 0 to ``end``: straight lines between its points, the first at 0."""
    steps = itertools.pairwise(sorted(point for point in points if point[0] <= end))
    return sum((right[0] - left[0]) * (left[1] + right[1]) / 2 for left, right in steps) / end


def of(rows: Iterable[Row], part: str, **key: Any) -> list[Row]:
    """Returns the rows of a part with these entries."""
    return [row for row in rows if row["part"] == part and all(row[name] == value for name, value in key.items())]


def series(rows: Iterable[Row], x: str, value: Callable[[Row], float]) -> dict[float, Mean]:
    """Returns the mean over splits for each ``x``, rising."""
    found: dict[float, list[float]] = {}
    for row in rows:
        found.setdefault(float(row[x]), []).append(value(row))
    return {point: Mean.of(found[point]) for point in sorted(found)}


def top1(group: str) -> Callable[[Row], float]:
    """Returns what reads a row's accuracy on a group of classes."""
    return lambda row: row[group]["top1"]
