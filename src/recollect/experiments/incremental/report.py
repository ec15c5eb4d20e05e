"""The tables of Section 4.2, of all that a folder holds by now, beside the paper's numbers."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from recollect.experiments.incremental import pictures
from recollect.experiments.incremental.rows import TITLES, Mean, Row, area, of, series, top1
from recollect.experiments.incremental.scales import MODELS
from recollect.experiments.runner import Run

# Table 1: top-1 at 0.1, 1 and 3 epochs, area under the curve at 0.1, 1 and 3 epochs. The paper's MbPA uses rmsprop.
PAPER = {
    ("new", "mbpa-rmsprop"): (46.2, 64.5, 65.7, 27.4, 57.7, 63.0),
    ("new", "non-parametric"): (40.0, 53.3, 52.9, 28.3, 47.9, 51.8),
    ("new", "mixture"): (31.6, 56.0, 59.1, 18.6, 47.4, 54.7),
    ("new", "parametric"): (16.2, 53.6, 57.9, 5.7, 41.7, 51.9),
    ("old", "mbpa-rmsprop"): (68.5, 70.9, 70.9, 71.4, 70.3, 70.3),
    ("old", "non-parametric"): (62.7, 69.4, 70.0, 45.9, 65.8, 68.7),
    ("old", "mixture"): (71.9, 70.3, 70.2, 74.8, 70.6, 70.1),
    ("old", "parametric"): (71.4, 68.1, 68.8, 76.0, 68.6, 68.3),
}


def report(record: Run, marks: Sequence[float], splits: Sequence[int]) -> str:
    """Writes table.md and the figures of what the run has finished by now, and returns the table."""
    parts = {
        "curve": (_table1, pictures.figure4),
        "unbalanced": (_figure5, pictures.figure5),
        "size": (_figure6_left, None),
        "rate": (_figure6_right, pictures.figure6),
        "neighbors": (_figure7, pictures.figure7),
        "shots": (_shots, pictures.new_classes),
    }
    text = []
    for part, (table, picture) in parts.items():
        counts = Counter(row["split"] for row in of(record.rows, part))
        if set(counts) == set(splits) and len(set(counts.values())) == 1:
            text.append(table(record.rows, marks))
            if picture is not None:
                picture(record.rows, record.folder)
    whole = "\n".join(text)
    record.write_table(whole)
    return whole


def _table(title: str, intro: str, head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    body = [f"| {' | '.join(str(cell) for cell in line)} |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join([f"## {title}", "", intro, "", *body, ""])


def _table1(rows: Sequence[Row], marks: Sequence[float]) -> str:
    count = len({row["split"] for row in of(rows, "curve")})
    images = of(rows, "curve", epochs=marks[-1])[0]["images"]
    at = ", ".join(f"{mark:g}" for mark in marks)
    intro = (
        f"Accuracy in percent at {at} epochs of all classes, and the mean accuracy until then (AUC): mean of {count} "
        f"splits +- standard error, {images:,} test images. In brackets: the paper, on ImageNet."
    )
    head = ["classes", "model", *(f"top-1, {m:g}" for m in marks), *(f"AUC, {m:g}" for m in marks)]
    lines = []
    for group in ("new", "old"):
        for model in MODELS:
            paper = PAPER.get((group, model), (None,) * 6)
            beside = [*paper[: len(marks)], *paper[3 : 3 + len(marks)]]
            ours = [*_tops(rows, model, group, marks), *_areas(rows, model, group, marks)]
            lines.append([group, TITLES[model], *map(_beside, [f"{Mean.of(values)}" for values in ours], beside)])
    tables = [_table("Table 1: new and old classes", intro, head, lines), _gaps(rows, marks), _calibration(rows, marks)]
    return "\n".join([*tables, _settings(rows)])


def _beside(cell: str, paper: float | None) -> str:
    return cell if paper is None else f"{cell} ({paper})"


def _tops(rows: Sequence[Row], model: str, group: str, marks: Sequence[float]) -> list[list[float]]:
    """Returns the accuracy of each split at each mark."""
    return [[top1(group)(row) for row in of(rows, "curve", model=model, epochs=mark)] for mark in marks]


def _areas(rows: Sequence[Row], model: str, group: str, marks: Sequence[float]) -> list[list[float]]:
    """Returns the area under each split's curve until each mark."""
    curves: dict[int, list[tuple[float, float]]] = {}
    for row in of(rows, "curve", model=model):
        curves.setdefault(row["split"], []).append((row["epochs"], top1(group)(row)))
    return [[area(curve, mark) for curve in curves.values()] for mark in marks]


def _gaps(rows: Sequence[Row], marks: Sequence[float]) -> str:
    """Returns the differences between MbPA and the other models, paired by split, beside the paper's."""
    lines = []
    for group, other in (("new", "parametric"), ("new", "non-parametric"), ("new", "mixture"), ("old", "parametric")):
        known = zip(PAPER[group, "mbpa-rmsprop"], PAPER[group, other], strict=True)
        paper = [f"{ours - theirs:+.1f}" for ours, theirs in known][: len(marks)]
        lines.append(["the paper", group, other, *paper])
        for model in ("mbpa-rmsprop", "mbpa-sgd"):
            pairs = zip(_tops(rows, model, group, marks), _tops(rows, other, group, marks), strict=True)
            means = [Mean.of([a - b for a, b in zip(*pair, strict=True)]) for pair in pairs]
            lines.append([TITLES[model], group, other, *(f"{m.mean:+.1f} +- {m.error:.1f}" for m in means)])
    head = ["MbPA of", "classes", "minus", *(f"top-1, {mark:g}" for mark in marks)]
    return _table("What MbPA adds", "Differences in points of top-1 accuracy, split by split.", head, lines)


def _calibration(rows: Sequence[Row], marks: Sequence[float]) -> str:
    costs = {row["model"]: row for row in of(rows, "cost")}
    lines = []
    for model in MODELS:
        cells = []
        for value in ("ece", "nll"):
            for mark in marks:
                mean = Mean.of([row["all"][value] for row in of(rows, "curve", model=model, epochs=mark)])
                cells.append(f"{mean.mean:.1f}" if value == "ece" else f"{mean.mean:.2f}")
        lines.append([TITLES[model], *cells, f"{costs[model]['milliseconds']:.3g}" if model in costs else ""])
    head = ["model", *(f"{value}, {mark:g}" for value in ("ECE", "NLL") for mark in marks), "ms"]
    intro = (
        "All classes: expected calibration error (percent, 15 bins), negative log-likelihood (nats; a probability of 0 "
        "counts as 1e-6), and the time of one prediction from a key, in batches, measured side by side."
    )
    return _table("Calibration and cost", intro, head, lines)


def _settings(rows: Sequence[Row]) -> str:
    """Returns each model's best settings on the validation images of the first split."""
    lines = []
    for model in MODELS:
        found: dict[int, list[Row]] = {}
        for row in of(rows, "tuning", model=model):
            found.setdefault(row["place"], []).append(row)
        means = {place: statistics.fmean(top1("all")(row) for row in some) for place, some in found.items()}
        best = max(means, key=lambda place: means[place])
        setting = ", ".join(f"{k} {v}" for k, v in found[best][0]["setting"].items() if v is not None)
        lines.append([TITLES[model], setting, f"{means[best]:.1f}", len(means)])
    intro = "Chosen by the mean accuracy over all classes at these epochs, on validation images of the first split."
    return _table("Settings", intro, ["model", "best", "accuracy", "of how many tried"], lines)


def _figure5(rows: Sequence[Row], marks: Sequence[float]) -> str:
    points = sorted({row["epochs"] for row in of(rows, "unbalanced")})
    lines = []
    for group, title in (("rare", "new, a tenth"), ("full", "new, all"), ("old", "old"), ("all", "all")):
        for model in MODELS:
            means = series(of(rows, "unbalanced", model=model), "epochs", top1(group))
            lines.append([title, TITLES[model], *(means[point] for point in points)])
    intro = "Accuracy in percent over epochs; half of the new classes have a tenth of the images."
    head = ["classes", "model", *(f"{point:g}" for point in points)]
    return _table("Figure 5: unbalanced data", intro, head, lines)


def _sweep(rows: Sequence[Row], part: str, name: str, groups: Sequence[str], **key: Any) -> list[list[object]]:
    """Returns a line for each group and value of the swept number, over epochs."""
    found = of(rows, part, **key)
    lines: list[list[object]] = []
    for group in groups:
        for value in sorted({row[name] for row in found}):
            means = series([row for row in found if row[name] == value], "epochs", top1(group))
            lines.append([group, f"{value:,g}", *means.values()])
    return lines


def _epochs(rows: Sequence[Row], part: str) -> list[str]:
    return [f"{point:g} epochs" for point in sorted({row["epochs"] for row in of(rows, part)})]


def _figure6_left(rows: Sequence[Row], marks: Sequence[float]) -> str:
    lines = _sweep(rows, "size", "capacity", ("new", "old"))
    head = ["classes", "entries", *_epochs(rows, "size")]
    return _table("Figure 6, left: the size of the memory", "Accuracy of MbPA in percent.", head, lines)


def _figure6_right(rows: Sequence[Row], marks: Sequence[float]) -> str:
    lines = []
    for model in ("parametric", "mixture", "mbpa-sgd"):
        lines += [[TITLES[model], *line] for line in _sweep(rows, "rate", "rate", ("new", "old"), model=model)]
    head = ["model", "classes", "rate", *_epochs(rows, "rate")]
    intro = "Accuracy in percent by the learning rate of the last layer."
    return _table("Figure 6, right: the learning rate of the parametric model", intro, head, lines)


def _figure7(rows: Sequence[Row], marks: Sequence[float]) -> str:
    lines = _sweep(rows, "neighbors", "neighbors", ("new", "old"))
    head = ["classes", "neighbors", *_epochs(rows, "neighbors")]
    return _table("Figure 7: the number of neighbors", "Accuracy of MbPA in percent.", head, lines)


def _shots(rows: Sequence[Row], marks: Sequence[float]) -> str:
    found = of(rows, "shots")
    counts = sorted({row["shots"] for row in found})
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        own = of(found, "shots", model=model)
        last = [row for row in own if row["shots"] == counts[-1]]
        seconds, each = (statistics.median(row[name] for row in last) for name in ("seconds", "milliseconds"))
        for group in ("new", "old"):
            means = series(own, "shots", lambda row, group=group: row[group])
            lines.append([TITLES[model], group, *means.values(), f"{seconds:.3g}", f"{each:.3g}"])
    intro = (
        "Accuracy in percent among all classes, by the images of each new class. Seconds: from having the keys "
        f"of all {counts[-1]} images of each new class until they count. ms: one prediction from a key, in batches."
    )
    head = ["model", "classes", *map(str, counts), "seconds", "ms"]
    return _table("From the first image of a new class", intro, head, lines)
