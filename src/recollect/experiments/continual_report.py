"""The tables and pictures of ``recollect reproduce continual``."""

import math
import statistics
from typing import Any

import torch
from torch import Tensor

from recollect.continual import Accuracies
from recollect.experiments import plots
from recollect.experiments.continual_methods import METHODS, STREAMS
from recollect.experiments.runner import Run, read_rows

_COLORS = {
    "naive": plots.GRAY,
    "ewc": plots.ORANGE,
    "mas": plots.GREEN,
    "si": plots.PURPLE,
    "lwf": plots.BROWN,
    "gem": plots.CYAN,
    "agem": plots.CYAN,
    "replay": plots.RED,
    "vote": plots.PALE_BLUE,
    "mbpa": plots.BLUE,
    "mbpa+replay": plots.NAVY,
}


def report(record: Run, seeds: int) -> str:
    """Writes the tables and the figures of what a run's folder holds by now, and returns the tables."""
    record.rows = read_rows(record.folder / "results.jsonl")  # other processes may have worked on other streams
    streams = [name for name in STREAMS if any(_of(record, name, part="test"))]
    table = "\n".join([*(_results(record, name, seeds) for name in streams), _grids(record)])
    record.write_table(table)
    _curves(record, streams, seeds)
    for name in streams:
        _matrices(record, name, seeds)
    return table


def _of(record: Run, stream: str, **key: Any) -> list[dict[str, Any]]:
    wanted = {"stream": stream, **key}.items()
    return [row for row in record.rows if wanted <= row.items()]


def _accuracies(record: Run, stream: str, method: str, seeds: int) -> list[Accuracies]:
    strength = best(record.rows, stream, method)  # rows of others were made before a grid grew
    rows = [row for row in _of(record, stream, part="test", method=method, strength=strength) if row["seed"] < seeds]
    return [_from_row(row) for row in rows]


def best(rows: list[dict[str, Any]], stream: str, method: str) -> float:
    """Returns the strength with the highest accuracy on validation images, the weaker of equals; 0 without a grid."""
    own = [r for r in rows if (r["stream"], r["part"], r["method"]) == (stream, "validation", method)]
    return max(sorted(own, key=lambda r: r["strength"]), key=lambda r: r["accuracy"])["strength"] if own else 0.0


def to_row(accuracies: Accuracies) -> dict[str, Any]:
    """Returns accuracies as JSON can hold them: what was not measured is left out."""
    rows = [[round(value, 5) for value in row if not math.isnan(value)] for row in accuracies.matrix.tolist()]
    return {
        "matrix": rows,
        "initial": [round(value, 5) for value in accuracies.initial.tolist() if not math.isnan(value)],
    }


def _from_row(row: dict[str, Any]) -> Accuracies:
    size = len(row["matrix"])
    matrix, initial = torch.full((size, size), torch.nan), torch.full((size,), torch.nan)
    for number, values in enumerate(row["matrix"]):
        matrix[number, : len(values)] = torch.tensor(values)
    initial[: len(row["initial"])] = torch.tensor(row["initial"])
    return Accuracies(matrix, initial)


def _results(record: Run, stream: str, seeds: int) -> str:
    lines = [
        f"### {STREAMS[stream].title}",
        "",
        f"Test images, {seeds} seed{'s (+-: standard error)' if seeds > 1 else ''}. In percent; transfer and "
        "forgetting are means over all tasks but one.",
        "",
        "| method | strength | published | accuracy | backward transfer | forward transfer | forgetting |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, about in METHODS.items():
        found = _accuracies(record, stream, method, seeds)
        if not found:
            continue
        strength = best(record.rows, stream, method)
        numbers = [_cell([a.average for a in found])]
        if method == "joint":
            numbers += ["", "", ""]
        else:
            numbers += [_cell([a.backward_transfer for a in found]), _cell([a.forward_transfer for a in found])]
            numbers += [_cell([a.forgetting for a in found])]
        chosen = f"{strength:g}" if about.grid else ""
        lines.append(
            f"| {about.title} | {chosen} | {STREAMS[stream].published.get(method, '')} | {' | '.join(numbers)} |"
        )
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    mean = f"{round(100 * statistics.fmean(values), 1) + 0.0:.1f}"  # + 0.0: no minus before a zero
    if len(values) == 1:
        return mean
    return f"{mean} +- {100 * statistics.stdev(values) / len(values) ** 0.5:.1f}"


def _grids(record: Run) -> str:
    lines = [
        "### How the strengths were chosen",
        "",
        "Accuracy in percent on validation images, one network for each point.",
    ]
    for stream, about in STREAMS.items():
        grids = [_of(record, stream, part="validation", method=method) for method in METHODS]
        if any(grids):
            lines += ["", f"**{about.title}**", ""]
        for rows in grids:
            if rows:
                best = max(row["accuracy"] for row in rows)
                points = [
                    f"{row['strength']:g}: {'**' if row['accuracy'] == best else ''}{100 * row['accuracy']:.1f}"
                    f"{'**' if row['accuracy'] == best else ''}"
                    for row in sorted(rows, key=lambda row: row["strength"])
                ]
                lines.append(f"- {METHODS[rows[0]['method']].title}: {', '.join(points)}")
    return "\n".join(lines) + "\n"


def _curves(record: Run, streams: list[str], seeds: int) -> None:
    panels = []
    for stream in streams:
        lines = []
        for method, color in _COLORS.items():
            found = _accuracies(record, stream, method, seeds)
            if not found:
                continue
            points = list(zip(*(a.averages for a in found), strict=True))
            means = [100 * statistics.fmean(p) for p in points]
            errors = [100 * statistics.stdev(p) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in points]
            style = {"vote": ":", "agem": "--", "mbpa": "--", "mbpa+replay": "--"}.get(method, "-")
            lines.append(plots.Curve(METHODS[method].title, range(1, len(means) + 1), means, errors, color, style))
        panels.append((STREAMS[stream].title, lines))
    plots.panels(panels, record.folder / "figure.png", xlabel="tasks learned", ylabel="accuracy over them (%)")


def _matrices(record: Run, stream: str, seeds: int) -> None:
    matrices: list[tuple[str, Tensor]] = []
    for method, about in METHODS.items():
        found = _accuracies(record, stream, method, seeds) if method != "joint" else []
        if found:
            mean = torch.stack([a.matrix for a in found]).mean(0)
            matrices.append((f"{about.title}  {100 * float(mean[-1].mean()):.1f}", 100 * mean))
    if matrices:
        title = f"{STREAMS[stream].title}: accuracy (%) on each task (across) after each task (down)"
        plots.heat_maps(matrices, record.folder / f"matrices-{stream}.png", title=title)
