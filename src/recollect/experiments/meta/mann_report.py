"""Tables and figures of ``mann-table1`` and ``mann-table2``, beside the paper's numbers."""

from collections.abc import Iterable, Sequence
from typing import Any

from recollect.experiments import plots
from recollect.experiments.meta.intervals import standard_errors
from recollect.experiments.runner import Run

_SHOWN = (1, 2, 3, 4, 5, 10)
# Santoro et al. (2016), Table 1 and Table 2, the 1st, 2nd, 3rd, 4th, 5th and 10th instance.
PAPER = {
    ("one-hot, 5 classes", "human"): (34.5, 57.3, 70.1, 71.8, 81.4, 92.4),
    ("one-hot, 5 classes", "mann"): (36.4, 82.8, 91.0, 92.6, 94.9, 98.1),
    ("one-hot, 5 classes", "lstm"): (24.4, 49.5, 55.3, 61.0, 63.6, 62.5),
    ("strings, 5 classes", "mann"): (0.0, 69.5, 80.4, 87.9, 88.4, 93.1),
    ("strings, 5 classes", "mann-ff"): (0.0, 8.0, 16.2, 25.2, 30.9, 46.8),
    ("strings, 5 classes", "lstm"): (0.0, 9.0, 14.2, 16.9, 21.8, 25.5),
    ("strings, 5 classes", "knn"): (4.0, 36.7, 41.9, 45.7, 48.1, 57.0),
    ("strings, 15 classes", "mann"): (0.1, 62.6, 79.3, 86.6, 88.7, 95.3),
    ("strings, 15 classes", "mann-ff"): (0.1, 12.8, 22.3, 28.8, 32.2, 43.4),
    ("strings, 15 classes", "mann-ntm"): (0.0, 35.4, 61.2, 71.7, 77.7, 88.4),
    ("strings, 15 classes", "lstm"): (0.0, 2.2, 2.9, 4.3, 5.6, 12.7),
    ("strings, 15 classes", "knn"): (0.5, 18.7, 23.3, 26.5, 29.1, 37.0),
}
TITLES = {
    "mann": "MANN (LSTM controller, LRUA)",
    "mann-separate": "MANN (LSTM controller, LRUA, separate writes)",
    "mann-ff": "MANN (feedforward controller, LRUA)",
    "mann-ntm": "MANN (LSTM controller, NTM access)",
    "lstm": "LSTM",
    "knn": "nearest drawing by pixels",
    "human": "human",
}
_COLORS = {
    "mann": plots.NAVY,
    "mann-separate": plots.RED,
    "mann-ff": plots.CYAN,
    "mann-ntm": plots.BLUE,
    "lstm": plots.GREEN,
    "knn": plots.GRAY,
}
Row = dict[str, Any]


def report(record: Run, name: str) -> str:
    """Writes table.md and figure.png of what has been run, and returns the table."""
    tests = [row for row in record.rows if row["part"] == "test"]
    table = _table(tests, name)
    record.write_table(table)
    plots.panels(
        [*_by_instance(tests), *_learning(record.rows)],
        record.folder / "figure.png",
        xlabel=["drawing of a character"] * len(_tasks(tests)) + ["thousands of batches"] * len(_tasks(tests)),
        ylabel="named correctly (%)",
    )
    return table


def _tasks(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _table(tests: Sequence[Row], name: str) -> str:
    head = ["labels", "model", "parameters", "", *(_ordinal(shown) for shown in _SHOWN)]
    lines = [head, ["---"] * len(head)]
    for task in _tasks(tests):
        ran = {row["model"] for row in tests if row["task"] == task}
        for row in (row for row in tests if row["task"] == task):
            pairs = [(row["accuracy"][shown - 1], row["interval"][shown - 1]) for shown in _SHOWN]
            size = f"{row['parameters']:,}" if "parameters" in row else ""
            lines.append([task, TITLES[row["model"]], size, "ours", *(f"{a:.1f} +- {b:.1f}" for a, b in pairs)])
            # The paper has one MANN: beside its own equations where they ran.
            of = "mann" if row["model"] == "mann-separate" and "mann" not in ran else row["model"]
            lines.append(["", "", "", "paper", *(f"{number:.1f}" for number in PAPER.get((task, of), ()))])
        if (task, "human") in PAPER:
            lines.append([task, TITLES["human"], "", "paper", *(f"{number:.1f}" for number in PAPER[task, "human"])])
    intro = (
        "How often the k-th drawing of a character is named, in percent, with 95 % intervals over test episodes; "
        "characters that no training has seen."
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines if len(line) == len(head))
    return f"## {name}\n\n{intro}\n\n{body}\n"


def _ordinal(number: int) -> str:
    return f"{number}{({1: 'st', 2: 'nd', 3: 'rd'}).get(number, 'th')}"


def _by_instance(tests: Sequence[Row]) -> list[tuple[str, list[plots.Curve]]]:
    panels = []
    for task in _tasks(tests):
        curves = []
        for row in (row for row in tests if row["task"] == task):
            count = range(1, len(row["accuracy"]) + 1)
            error = standard_errors(row["interval"])
            curves.append(plots.Curve(TITLES[row["model"]], count, row["accuracy"], error, _COLORS[row["model"]]))
        panels.append((f"After training: {task}", curves))
    return panels


def _learning(rows: Sequence[Row]) -> list[tuple[str, list[plots.Curve]]]:
    """Returns the accuracy of the 1st, 2nd, 5th and 10th drawing over training, of each network."""
    panels = []
    found = [row for row in rows if row["part"] == "learning"]
    for task in _tasks(row for row in rows if row["part"] == "test"):
        curves = []
        for model in dict.fromkeys(row["model"] for row in found if row["task"] == task):
            own = [row for row in found if row["task"] == task and row["model"] == model]
            x = [row["batches"] / 1000 for row in own]
            for shown, width in ((2, 1.0), (10, 2.0)):
                y = [row["accuracy"][shown - 1] for row in own]
                label = f"{TITLES[model]}, {_ordinal(shown)}"
                curves.append(plots.Curve(label, x, y, [0.0] * len(y), _COLORS[model], width=width))
        panels.append((f"While learning: {task}", curves))
    return panels
