"""Table and figure of ``few-shot`` and ``meta-lstm``: accuracy against what an answer costs."""

from typing import Any

from recollect.experiments import plots
from recollect.experiments.runner import Run

TITLES = {
    "nearest": "nearest neighbor",
    "vote": "k-NN vote",
    "prototypes": "prototypes",
    "mbpa": "MbPA",
    "mann": "MANN",
    "fine-tuning": "fine-tuning",
    "maml": "MAML",
    "meta-lstm": "Meta-LSTM",
}
_COLORS = {
    "nearest": plots.GRAY,
    "vote": plots.CYAN,
    "prototypes": plots.GREEN,
    "mbpa": plots.RED,
    "mann": plots.PURPLE,
    "fine-tuning": plots.BROWN,
    "maml": plots.NAVY,
    "meta-lstm": plots.ORANGE,
}
_CURVES = {"mann": "mann", "maml": "maml", "meta-lstm": "meta-lstm-last"}
# In percent, on splits and networks of their own: Finn et al. (2017), Table 1; there MANN is that of Santoro et al.
_PAPER = {"maml": ("98.7", "99.9"), "mann": ("82.8", "94.9")}
Row = dict[str, Any]


def report(record: Run) -> str:
    """Writes table.md and figure.png of what has been run, and returns the table."""
    tests = dict[tuple[str, int], Row]()
    for part in ("test", "cost"):
        for row in record.rows:
            if row["part"] == part:
                tests.setdefault((row["learner"], row["shots"]), {}).update(row)
    table = _table(tests)
    record.write_table(table)
    _figure(record, tests)
    return table


def _table(tests: dict[tuple[str, int], Row]) -> str:
    head = ["learner", "1 shot (%)", "paper", "ms", "5 shots (%)", "paper", "ms"]
    lines = [head, ["---"] * len(head)]
    for name, title in TITLES.items():
        if (name, 5) in tests:
            cells = [title]
            for shots, paper in zip((1, 5), _PAPER.get(name, ("", "")), strict=True):
                row = tests[name, shots]
                cells += [f"{row['accuracy']:.1f} +- {row['interval']:.1f}", paper, f"{row['milliseconds']:.1f}"]
            lines.append(cells)
    intro = (
        "How often a query is named, in tasks of five characters that no training has seen, with 95 % intervals over "
        "tasks; and the milliseconds to learn a task and answer one query of it, one at a time. All begin with one "
        "embedding, which MAML and the Meta-LSTM train further. Fine-tuning, MAML and the Meta-LSTM see all queries of "
        "a task at once and normalize by their statistics, as in the code of MAML; the others answer each by itself."
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## few-shot\n\n{intro}\n\n{body}\n"


def _figure(record: Run, tests: dict[tuple[str, int], Row]) -> None:
    picture, axes = plots.grid(3, columns=3, width=5.8, height=4.2)
    for panel, shots in zip(axes, (1, 5), strict=False):
        plots.dress(panel)
        panel.set_xscale("log")
        panel.set_title(f"{_drawings(shots)} of each character", loc="left", fontsize=11)
        panel.set_xlabel("milliseconds to learn a task and answer a query")
        panel.set_ylabel("named correctly (%)")
        for name, title in TITLES.items():
            if (name, shots) in tests:
                row = tests[name, shots]
                x, y = row["milliseconds"], row["accuracy"]
                panel.errorbar(x, y, yerr=row["interval"], fmt="o", color=_COLORS[name], label=f"{title}  {y:.1f}")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    last = axes[2]
    plots.dress(last)
    last.set_title("While learning: new characters", loc="left", fontsize=11)
    last.set_xlabel("iterations")
    last.set_ylabel("named correctly (%)")
    for name, trained in _CURVES.items():
        rows = [row for row in record.rows if row["part"] == "learning" and row["learner"] == trained]
        for place, (shots, style) in enumerate(((1, "--"), (5, "-"))):
            x, y = [row["iterations"] for row in rows], [row["accuracy"][place] for row in rows]
            if rows:
                last.plot(x, y, style, color=_COLORS[name], label=f"{TITLES[name]}, {_drawings(shots)}")
    if last.lines:
        last.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    plots.save(picture, record.folder / "figure.png")


def _drawings(shots: int) -> str:
    return f"{shots} drawing{'s' if shots > 1 else ''}"
