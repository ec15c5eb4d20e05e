"""Table and figure of ``few-shot`` and ``meta-lstm``: accuracy against what an answer costs."""

from typing import Any

from recollect.experiments import plots
from recollect.experiments.runner import Run

TITLES = {
    "nearest": "nearest neighbor",
    "vote": "k-NN vote",
    "prototypes": "prototypes",
    "mbpa": "MbPA",
    "hypernetwork": "context hypernetwork",
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
    "hypernetwork": plots.BLUE,
    "mann": plots.PURPLE,
    "fine-tuning": plots.BROWN,
    "maml": plots.NAVY,
    "meta-lstm": plots.ORANGE,
}
_CURVES = {"hypernetwork": "hypernetwork", "mann": "mann", "maml": "maml", "meta-lstm": "meta-lstm-last"}
# In percent, of Omniglot on splits and networks of their own: Finn et al. (2017), Table 1; there MANN is that of
# Santoro et al.
_PAPER = {("maml", 1): "98.7", ("maml", 5): "99.9", ("mann", 1): "82.8", ("mann", 5): "94.9"}
# The Meta-LSTM was published on mini-ImageNet alone: Ravi and Larochelle (2017), Table 1.
_MINI_IMAGENET = {
    ("meta-lstm", 1): "43.4",
    ("meta-lstm", 5): "60.6",
    ("fine-tuning", 1): "28.9",
    ("fine-tuning", 5): "49.8",
    ("nearest", 1): "41.1",
    ("nearest", 5): "51.0",
}
Row = dict[str, Any]


def report(record: Run, name: str) -> str:
    """Writes table.md and figure.png of what has been run, and returns the table."""
    tests = dict[tuple[str, int], Row]()
    for part in ("test", "cost"):
        for row in record.rows:
            if row["part"] == part:
                tests.setdefault((row["learner"], row["shots"]), {}).update(row)
    table = _table(tests, name)
    record.write_table(table)
    _figure(record, tests)
    return table


def _table(tests: dict[tuple[str, int], Row], name: str) -> str:
    intro = (
        "How often a query is named, in tasks of five characters that no training has seen, in percent with 95 % "
        "intervals over tasks; and the milliseconds for a query, with those to learn its task. The queries of a task "
        "are asked together, or one at a time. Fine-tuning, MAML and the Meta-LSTM normalize by the statistics of what "
        "is asked together, as the code of MAML does; the others answer each query by itself. All begin with one "
        "embedding, which MAML and the Meta-LSTM train further."
    )
    parts = [f"## {name}", intro]
    for shots in (1, 5):
        head = ["learner", "together", "ms", "one at a time", "ms", "paper", "paper, mini-ImageNet"]
        lines = [head, ["---"] * len(head)]
        for learner, title in TITLES.items():
            if (learner, shots) in tests:
                row = tests[learner, shots]
                together = [f"{row['accuracy']:.1f} +- {row['interval']:.1f}", f"{row['together']:.1f}"]
                alone = [f"{row['alone']:.1f} +- {row['alone_interval']:.1f}", f"{row['milliseconds']:.1f}"]
                paper = [papers.get((learner, shots), "") for papers in (_PAPER, _MINI_IMAGENET)]
                lines.append([title, *together, *alone, *paper])
        parts += [f"{_drawings(shots)} of each character:", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def _figure(record: Run, tests: dict[tuple[str, int], Row]) -> None:
    picture, axes = plots.grid(3, columns=3, width=5.8, height=4.2)
    for panel, shots in zip(axes, (1, 5), strict=False):
        plots.dress(panel)
        panel.set_xscale("log")
        panel.set_title(f"{_drawings(shots)} of each character", loc="left", fontsize=11)
        panel.set_xlabel("milliseconds for a query (hollow: all of a task at once)")
        panel.set_ylabel("named correctly (%)")
        for name, title in TITLES.items():
            if (name, shots) in tests:
                row, color = tests[name, shots], _COLORS[name]
                x, y = row["milliseconds"], row["alone"]
                panel.errorbar(x, y, yerr=row["alone_interval"], fmt="o", color=color, label=f"{title}  {y:.1f}")
                x, y = row["together"], row["accuracy"]
                panel.errorbar(x, y, yerr=row["interval"], fmt="o", color=color, markerfacecolor="white")
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
