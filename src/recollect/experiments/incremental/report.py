"""The tables of Section 4.2, of all that a folder holds by now, beside the paper's numbers."""

import itertools
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
    images, fewer = _most_and_fewest(of(rows, "curve"))
    at = ", ".join(f"{mark:g}" for mark in marks)
    intro = (
        f"Accuracy in percent at {at} epochs of all classes ({images} test images), and the mean accuracy until then "
        f"(AUC; {fewer} images at the points between): mean of {count} splits +- standard error, the best of ours in "
        "bold. In brackets: the paper, on ImageNet."
    )
    head = ["classes", "model", *_columns(marks)]
    lines = []
    for group in ("new", "old"):
        ours = {model: [Mean.of(values) for values in _values(rows, model, group, marks)] for model in MODELS}
        best = [max(mean.mean for mean in column) for column in zip(*ours.values(), strict=True)]
        for model, means in ours.items():
            known = PAPER.get((group, model), (None,) * 6)
            paper = [*known[: len(marks)], *known[3 : 3 + len(marks)]]
            cells = [f"**{mean}**" if mean.mean == top else f"{mean}" for mean, top in zip(means, best, strict=True)]
            lines.append([group, TITLES[model], *map(_beside, cells, paper)])
    tables = [_table("Table 1: new and old classes", intro, head, lines), _gaps(rows, marks)]
    return "\n".join([*tables, _calibration(rows, marks), _cost(rows, marks), _settings(rows)])


def _most_and_fewest(rows: Sequence[Row]) -> tuple[str, str]:
    """Returns how many test images counted."""
    counts = [row["images"] for row in rows]
    return f"{max(counts):,}", f"{min(counts):,}"


def _columns(marks: Sequence[float]) -> list[str]:
    return [f"{what}, {mark:g}" for what in ("top-1", "AUC") for mark in marks]


def _beside(cell: str, paper: float | None) -> str:
    return cell if paper is None else f"{cell} ({paper})"


def _values(rows: Sequence[Row], model: str, group: str, marks: Sequence[float]) -> list[list[float]]:
    """Returns the accuracy at each mark, then the area until each mark, each for all splits in their order."""
    curves: dict[int, dict[float, float]] = {}
    for row in sorted(of(rows, "curve", model=model), key=lambda row: row["split"]):
        curves.setdefault(row["split"], {})[row["epochs"]] = top1(group)(row)
    tops = [[curve[mark] for curve in curves.values()] for mark in marks]
    return [*tops, *([area(curve.items(), mark) for curve in curves.values()] for mark in marks)]


def _gaps(rows: Sequence[Row], marks: Sequence[float]) -> str:
    """Returns the differences between MbPA and the other models, paired by split, beside the paper's."""
    lines = []
    for group, other in itertools.product(("new", "old"), MODELS[:3]):
        known = [ours - theirs for ours, theirs in zip(PAPER[group, "mbpa-rmsprop"], PAPER[group, other], strict=True)]
        paper = [*known[: len(marks)], *known[3 : 3 + len(marks)]]
        lines.append([group, other, "the paper's", *(f"{gap:+.1f}" for gap in paper)])
        for model in MODELS[3:]:
            pairs = zip(_values(rows, model, group, marks), _values(rows, other, group, marks), strict=True)
            lines.append([group, other, TITLES[model], *(_gap(*pair) for pair in pairs)])
    head = ["classes", "minus", "MbPA", *_columns(marks)]
    return _table("What MbPA adds", "Differences in points of accuracy, split by split.", head, lines)


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the mean difference over splits with its sign, and its standard error."""
    found = Mean.of([a - b for a, b in zip(ours, theirs, strict=True)])
    return f"{found.mean:+.1f} +- {found.error:.1f}"


def _calibration(rows: Sequence[Row], marks: Sequence[float]) -> str:
    lines = []
    for group, model in itertools.product(("all", "new", "old"), MODELS):
        cells = []
        for value, digits in (("ece", 1), ("nll", 2)):
            for mark in marks:
                mean = Mean.of([row[group][value] for row in of(rows, "curve", model=model, epochs=mark)])
                cells.append(f"{mean.mean:.{digits}f} +- {mean.error:.{digits}f}")
        lines.append([group, TITLES[model], *cells])
    head = ["classes", "model", *(f"{value}, {mark:g}" for value in ("ECE", "NLL") for mark in marks)]
    intro = (
        "Expected calibration error (percent, 15 bins) and negative log-likelihood (nats; a probability below 1e-6 "
        "counts as 1e-6). Before adaptation is the parametric model."
    )
    return _table("Calibration", intro, head, lines)


def _cost(rows: Sequence[Row], marks: Sequence[float]) -> str:
    costs = {row["model"]: row for row in of(rows, "cost")}
    if len(costs) < len(MODELS):
        return ""
    lines = []
    for model in MODELS:
        pairs = zip(_values(rows, model, "all", marks), _values(rows, MODELS[0], "all", marks), strict=True)
        gains = [_gap(*pair) for pair in pairs][: len(marks)]
        lines.append([TITLES[model], f"{costs[model]['milliseconds']:.3g}", *gains])
    intro = (
        f"The time of one prediction from a key, in batches, with {costs[MODELS[0]]['entries']:,} entries, all models "
        "measured in turns; and what it buys: accuracy over all classes, in points above the parametric model."
    )
    return _table("Cost beside the gain", intro, ["model", "ms", *_columns(marks)[: len(marks)]], lines)


def _settings(rows: Sequence[Row]) -> str:
    """Returns each model's best settings on the validation images of the first split."""
    lines = []
    for model in MODELS:
        found: dict[int, list[Row]] = {}
        for row in of(rows, "tuning", model=model):
            found.setdefault(row["place"], []).append(row)
        means = {place: statistics.fmean(top1("all")(row) for row in some) for place, some in found.items()}
        best = max(means, key=lambda place: means[place])
        parts = found[best][0]["setting"].items()
        setting = ", ".join("inverse distance" if v is None else f"{k} {v}" for k, v in parts)
        lines.append([TITLES[model], setting, f"{means[best]:.1f}", len(means)])
    intro = "Chosen by the mean accuracy over all classes at these epochs, on validation images of the first split."
    return _table("Settings", intro, ["model", "best", "accuracy", "of how many tried"], lines)


def _figure5(rows: Sequence[Row], marks: Sequence[float]) -> str:
    found = sorted(of(rows, "unbalanced"), key=lambda row: row["split"])
    points = sorted({row["epochs"] for row in found})
    lines: list[Sequence[object]] = []
    gaps: list[Sequence[object]] = []
    for group, title in (("rare", "new, a tenth"), ("full", "new, all"), ("old", "old"), ("all", "all")):
        last = {}
        for model in MODELS:
            own = of(found, "unbalanced", model=model)
            means = series(own, "epochs", top1(group))
            lines.append([title, TITLES[model], *(means[point] for point in points)])
            last[model] = [top1(group)(row) for row in of(own, "unbalanced", epochs=points[-1])]
        gaps.extend([title, TITLES[m], *(_gap(last[m], last[other]) for other in MODELS[:3])] for m in MODELS[3:])
    images, fewer = _most_and_fewest(found)
    intro = (
        f"Accuracy in percent over epochs; half of the new classes have a tenth of the images. {images} test images at "
        f"the last point, {fewer} before it."
    )
    head = ["classes", "model", *(f"{point:g}" for point in points)]
    heading = f"What MbPA adds to unbalanced data after {points[-1]:g} epochs"
    other = [f"minus {model}" for model in MODELS[:3]]
    table = _table("Figure 5: unbalanced data", intro, head, lines)
    return "\n".join([table, _table(heading, "Points of accuracy, split by split.", ["classes", "MbPA", *other], gaps)])


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
    return _table(
        "Figure 6, left: the size of the memory",
        f"Accuracy of MbPA (sgd) in percent, {_images(rows, 'size')} test images.",
        head,
        lines,
    )


def _figure6_right(rows: Sequence[Row], marks: Sequence[float]) -> str:
    lines = []
    for model in ("parametric", "mixture", "mbpa-sgd"):
        lines += [[TITLES[model], *line] for line in _sweep(rows, "rate", "rate", ("new", "old"), model=model)]
    head = ["model", "classes", "rate", *_epochs(rows, "rate")]
    intro = f"Accuracy in percent by the learning rate of the last layer, {_images(rows, 'rate')} test images."
    table = _table("Figure 6, right: the learning rate of the parametric model", intro, head, lines)
    return "\n".join([table, _gaps_by_rate(rows)])


def _gaps_by_rate(rows: Sequence[Row]) -> str:
    """Returns what MbPA adds at each learning rate of the head that it starts from."""
    found = sorted(of(rows, "rate"), key=lambda row: row["split"])
    rates, points = (sorted({row[name] for row in found}) for name in ("rate", "epochs"))
    lines = []
    for group, other, rate in itertools.product(("new", "old"), ("parametric", "mixture"), rates):
        cells = []
        for point in points:
            ours, theirs = (
                [top1(group)(row) for row in of(found, "rate", model=model, rate=rate, epochs=point)]
                for model in ("mbpa-sgd", other)
            )
            cells.append(_gap(ours, theirs))
        lines.append([group, other, f"{rate:g}", *cells])
    head = ["classes", "minus", "rate", *_epochs(rows, "rate")]
    intro = "MbPA (sgd) minus the model of the same head: points of accuracy, split by split."
    return _table("What MbPA adds, by the learning rate", intro, head, lines)


def _figure7(rows: Sequence[Row], marks: Sequence[float]) -> str:
    lines = _sweep(rows, "neighbors", "neighbors", ("new", "old"))
    head = ["classes", "neighbors", *_epochs(rows, "neighbors")]
    return _table(
        "Figure 7: the number of neighbors",
        f"Accuracy of MbPA (sgd) in percent, {_images(rows, 'neighbors')} test images.",
        head,
        lines,
    )


def _images(rows: Sequence[Row], part: str) -> str:
    return f"{of(rows, part)[0]['images']:,}"


def _shots(rows: Sequence[Row], marks: Sequence[float]) -> str:
    found = of(rows, "shots")
    counts = sorted({row["shots"] for row in found})
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        own = of(found, "shots", model=model)
        for group in ("new", "old"):
            means = series(own, "shots", lambda row, group=group: row[group])
            lines.append([TITLES[model], f"{group} classes, %", *means.values()])
        for name, title in (("seconds", "seconds to a recognition"), ("milliseconds", "ms of a prediction")):
            times = [[row[name] for row in own if row["shots"] == n and row[name] is not None] for n in counts]
            lines.append([TITLES[model], title, *(f"{statistics.median(some):.3g}" if some else "" for some in times)])
    intro = (
        "By the images of each new class. Accuracy among all classes; the median time from having the keys of these "
        "images until a test image of a new class has been recognized with them (nothing where none is); the median "
        "time of a prediction in batches."
    )
    return _table("From the first image of a new class", intro, ["model", "", *map(str, counts)], lines)
