"""The table and the figure of the permuted-pixels experiments."""

import statistics

from recollect.errors import FormatError
from recollect.experiments import plots
from recollect.experiments.permuted import Settings
from recollect.experiments.runner import Run


def curves(rows: list[dict], seeds: list[int]) -> dict[str, list[list[float]]]:
    """Returns, for each curve, each seed's mean accuracy in percent over the tasks seen so far, after each task."""
    cells: dict[tuple[str, int, int], list[float]] = {}
    fields = {"curve", "seed", "trained", "task", "correct", "total"}
    for row in rows:
        if not fields <= row.keys():
            raise FormatError(
                f"results.jsonl holds a row that is no result of this experiment: {row}. Choose another --out."
            )
        cells.setdefault((row["curve"], row["seed"], row["trained"]), []).append(row["correct"] / row["total"])
    names = list(dict.fromkeys(row["curve"] for row in rows))
    trained = sorted({row["trained"] for row in rows})
    return {
        name: [[100 * sum(c) / len(c) for n in trained if (c := cells.get((name, seed, n)))] for seed in seeds]
        for name in names
    }


def report(record: Run, seeds: list[int], settings: Settings, title: str, paper: dict[str, float]) -> str:
    """Writes the table and the figure of the rows that a run holds, and returns the table.

    Args:
        record: The run.
        seeds: The seeds to average over.
        settings: Their settings.
        title: Of the figure.
        paper: The paper's numbers for some of the curves; their column is left out where there are none.
    """
    results = {name: _summary(runs) for name, runs in curves(record.rows, seeds).items()}
    lines = [
        f"Accuracy in percent over all {settings.tasks} tasks after the last one: {len(seeds)} "
        f"seed{'s (+-: standard error)' if len(seeds) > 1 else ''}, {settings.final:,} test images for each task"
        f"{f' (MbPA with a companion: {settings.combined_final:,})' if settings.combined else ''}.",
        "",
        "| model | paper | ours | difference |" if paper else "| model | accuracy |",
        "|---|---|---|---|" if paper else "|---|---|",
    ]
    for name, (means, errors) in results.items():
        ours = f"{means[-1]:.2f} +- {errors[-1]:.2f}" if len(seeds) > 1 else f"{means[-1]:.2f}"
        known = paper.get(name)
        there = f"{known} | {ours} | {means[-1] - known:+.1f}" if known is not None else f" | {ours} | "
        lines.append(f"| {label(name)} | {there if paper else ours} |")
    table = "\n".join(lines) + "\n"
    record.write_table(table)
    left = [name for name in results if name.partition("-")[0] in {"mlp", "ewc", "mas", "vote", "mbpa", "random"}]
    right = [name for name in results if name.partition("-")[0] in {"ewc", "mas", "replay"} or "+" in name]
    panels = [(title, left)] if len(results) == len(left) else [(title, left), ("... and with companions", right)]
    drawn = [(heading, [_curve(name, *results[name]) for name in names]) for heading, names in panels]
    plots.panels(drawn, record.folder / "figure.png", xlabel="tasks", ylabel="accuracy (%)")
    return table


def _curve(name: str, means: list[float], errors: list[float]) -> plots.Curve:
    return plots.Curve(label(name), range(1, len(means) + 1), means, errors, *_style(name))


def _summary(runs: list[list[float]]) -> tuple[list[float], list[float]]:
    """Returns the mean over seeds and its standard error, point by point."""
    points = list(zip(*runs, strict=True))
    means = [statistics.fmean(p) for p in points]
    errors = [statistics.stdev(p) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in points]
    return means, errors


def label(name: str) -> str:
    """Returns how a curve is called in tables and figures."""
    kind, _, size = name.partition("-")
    names = {
        "mlp": "network alone",
        "ewc": "EWC",
        "mas": "MAS",
        "replay": "replay",
        "vote": "k-NN vote",
        "mbpa": "MbPA",
        "random": "random memories",
        "mbpa+ewc": "MbPA + EWC",
        "mbpa+mas": "MbPA + MAS",
        "mbpa+replay": "MbPA + replay",
    }
    return f"{names[kind]}, {size} per task" if size else names[kind]


def _style(name: str) -> tuple[str, str]:
    """Returns a color, by the size of the memory or for what has none, and a style, by the method."""
    kind, _, size = name.partition("-")
    colors = {"mlp": plots.GRAY, "random": plots.RED, "ewc": plots.PURPLE, "mas": plots.BROWN}
    by_size = {"100": plots.ORANGE, "250": plots.GREEN, "1000": plots.BLUE}
    styles = {"vote": ":", "random": "--", "replay": "--", "mbpa+ewc": "-.", "mbpa+mas": ":"}
    return colors.get(kind) or by_size.get(size, plots.PURPLE), styles.get(kind, "-")
