"""Table and figure of ``learned-optimizer``."""

from collections.abc import Iterable
from typing import Any

from recollect.experiments import plots
from recollect.experiments.meta.intervals import standard_errors
from recollect.experiments.runner import Run

_COLORS = {
    "LSTM optimizer": plots.NAVY,
    "policy, by gradients": plots.NAVY,
    "policy, by evolution": plots.BLUE,
    "policy, by guided policy search": plots.CYAN,
    "policy, inputs as printed": plots.PALE_BLUE,
    "SGD": plots.GRAY,
    "momentum": plots.GREEN,
    "RMSprop": plots.ORANGE,
    "Adam": plots.RED,
    "conjugate gradient": plots.PURPLE,
    "L-BFGS": plots.BROWN,
}
_SHOWN = ("rate", "momentum", "decay")
Row = dict[str, Any]


def report(record: Run) -> str:
    """Writes table.md and figure.png of what has been run, and returns the table."""
    families = list(dict.fromkeys(row["family"] for row in record.rows))
    grouped = {family: [row for row in record.rows if row["family"] == family] for family in families}
    table = _table(grouped)
    record.write_table(table)
    panels = [(f"{family[0].upper()}{family[1:]}", _curves(rows)) for family, rows in grouped.items()]
    path = record.folder / "figure.png"
    plots.panels(panels, path, xlabel="steps", ylabel="loss on new problems", log_y=True, digits=3)
    return table


def _curves(rows: Iterable[Row]) -> list[plots.Curve]:
    curves = []
    for row in rows:
        name, loss = row["optimizer"], row["loss"]
        error = standard_errors(row["interval"])
        curves.append(plots.Curve(name, range(len(loss)), loss, error, _COLORS[name]))
    return curves


def _table(grouped: dict[str, list[Row]]) -> str:
    first, *others = grouped
    steps = len(grouped[first][0]["loss"]) - 1
    shown = (steps // 5, steps // 2, steps)
    head = ["optimizer", "settings", *(f"step {step}" for step in shown)]
    lines = [
        [row["optimizer"], _settings(row), *(_number(row["loss"][step], row["interval"][step]) for step in shown)]
        for row in grouped[first]
    ]
    intro = "Mean loss on new problems, with 95 % intervals over problems. The papers have figures, but no tables."
    parts = [f"## learned-optimizer\n\n{intro}", f"### {first}", _body(head, lines)]
    parts += ["### Li and Malik's problems", _body(*_margins([row for family in others for row in grouped[family]]))]
    parts.append(
        "The margin of victory is the lowest loss of all other optimizers, less the optimizer's own, as a mean over "
        "steps and problems: above zero, it is better than the best of the others on each. A policy's others are all "
        "that is made by hand. All ways to train a policy begin with the same imitation of momentum and then take "
        "about the same time. The one whose inputs are as printed is trained by gradients; it does not see the current "
        "gradient."
    )
    return "\n\n".join(parts) + "\n"


def _margins(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    head = ["problems", "optimizer", "settings", "gradients for a step", "last loss", "margin of victory"]
    lines = []
    for row in rows:
        loss = _number(row["loss"][-1], row["interval"][-1])
        margin = _number(row["margin"], row["margin_interval"])
        gradients = f"{row.get('gradients', 1):.3g}"
        lines.append([row["family"], row["optimizer"], _settings(row), gradients, loss, margin])
    return head, lines


def _body(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _settings(row: Row) -> str:
    found = row.get("settings", {})
    return ", ".join(f"{name} {found[name]:.3g}" for name in _SHOWN if found.get(name))


def _number(mean: float, interval: float) -> str:
    return f"{mean:.3f} +- {interval:.3f}"
