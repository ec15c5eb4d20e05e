"""The tables and pictures of Section 4.2, from made-up rows: no image is needed."""

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recollect.experiments import plots
from recollect.experiments.incremental import report as reporting
from recollect.experiments.incremental.report import PAPER, report
from recollect.experiments.incremental.rows import TITLES
from recollect.experiments.incremental.scales import MODELS, SCALES
from recollect.experiments.runner import Run

MARKS, POINTS, SPLITS = (0.1, 1.0, 3.0), (0.0, 0.1, 0.5, 1.0, 3.0), (1, 2, 3)
GROUPS = ("all", "old", "new", "full", "rare")
GRID = SCALES["smoke"].grids
# Table 1 of the paper: top-1 and area under the curve at 0.1, 1 and 3 epochs, the lines as they are printed.
PRINTED = {
    "new": """MbPA 46.2 64.5 65.7 27.4 57.7 63.0
        Non-Parametric 40.0 53.3 52.9 28.3 47.9 51.8
        Mixture 31.6 56.0 59.1 18.6 47.4 54.7
        Parametric 16.2 53.6 57.9 5.7 41.7 51.9""",
    "old": """MbPA 68.5 70.9 70.9 71.4 70.3 70.3
        Non-Parametric 62.7 69.4 70.0 45.9 65.8 68.7
        Mixture 71.9 70.3 70.2 74.8 70.6 70.1
        Parametric 71.4 68.1 68.8 76.0 68.6 68.3""",
}
NAMES = {
    "MbPA": "mbpa-rmsprop",
    "Non-Parametric": "non-parametric",
    "Mixture": "mixture",
    "Parametric": "parametric",
}


def worth(number: int) -> dict[str, dict[str, float]]:
    """Returns measures that no other row has."""
    base = (number * 7919) % 9001 / 150
    return {
        group: {"top1": round(base + 5 * place, 4), "nll": round(base / 20 + place, 4), "ece": round(base / 3, 4)}
        for place, group in enumerate(GROUPS)
    }


def made_up() -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each part, split by split as a run adds them."""
    parts: dict[str, list[dict[str, Any]]] = {"tuning": [], "curve": [], "cost": [], "unbalanced": [], "size": []}
    parts |= {"rate": [], "neighbors": [], "shots": []}

    def add(part: str, **key: Any) -> None:
        number = sum(map(len, parts.values()))
        whole = {"curve": MARKS, "unbalanced": (20.0,)}
        images = 1234 if key.get("epochs") in whole.get(part, ()) else 1001
        parts[part].append({"part": part, **key, "images": images, **worth(number)})

    for model in MODELS:
        for (place, setting), mark in itertools.product(enumerate(GRID.of(model)), MARKS):
            add("tuning", model=model, place=place, epochs=mark, setting=dataclasses.asdict(setting))
        parts["cost"].append({"part": "cost", "model": model, "milliseconds": len(model) / 7, "entries": 54_321})
    for split, epochs, model in itertools.product(SPLITS, POINTS, MODELS):
        add("curve", split=split, model=model, epochs=epochs)
    for split, epochs in itertools.product(SPLITS, (0.2, 20.0)):
        for model in MODELS:
            add("unbalanced", split=split, model=model, epochs=epochs)
        for capacity in (1000, 90_000):
            add("size", split=split, capacity=capacity, epochs=epochs)
        for count in (5, 50):
            add("neighbors", split=split, neighbors=count, epochs=epochs)
        for rate, model in itertools.product((0.003, 0.3), ("parametric", "mixture", "mbpa-sgd")):
            add("rate", split=split, rate=rate, model=model, epochs=epochs)
    for split, shots, model in itertools.product(SPLITS, (1, 20), ("mbpa-sgd", "fine-tuning", "nearest-mean", "vote")):
        add("shots", split=split, model=model, shots=shots)
        row = parts["shots"][-1]
        row |= {group: row[group]["top1"] for group in ("all", "old", "new")}
        row |= {"seconds": row["all"] / 1000, "milliseconds": row["new"] / 100}
    return parts


def folder_with(path: Path, **parts: list[dict[str, Any]]) -> Run:
    record = Run(path, {})
    for rows in parts.values():
        record.rows.extend(rows)
    return record


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Draws nothing, and holds the names of the pictures."""
    drawn: list[str] = []
    monkeypatch.setattr(plots, "panels", lambda parts, path, **how: drawn.append(path.name))
    return drawn


def section(table: str, title: str) -> list[list[str]]:
    """Returns the lines of a table by its heading, all as long as its first, without the one of dashes."""
    (found,) = (part for part in table.split("## ") if part.startswith(title + "\n"))
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in found.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert set(lines[1]) == {"---"}
    return [lines[0], *lines[2:]]


def cell(values: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """Returns mean and standard error of one value for each split."""
    count = len(values)
    mean = sum(values) / count
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1)) / math.sqrt(count)
    return f"{mean:{sign}.{digits}f} +- {error:.{digits}f}"


def pick(rows: list[dict[str, Any]], group: str, **key: Any) -> list[float]:
    """Returns the accuracy of each split."""
    found = [row for row in rows if key.items() <= row.items()]
    assert [row["split"] for row in found] == list(SPLITS)
    return [row[group]["top1"] for row in found]


def curve_area(rows: list[dict[str, Any]], group: str, model: str, split: int, end: float) -> float:
    """Returns the mean height of a curve, trapezoid by trapezoid."""
    ys = {r["epochs"]: r[group]["top1"] for r in rows if r["model"] == model and r["split"] == split}
    total = 0.0
    for left, right in ((0.0, 0.1), (0.1, 0.5), (0.5, 1.0), (1.0, 3.0)):
        if right <= end:
            total += (right - left) * (ys[left] + ys[right]) / 2
    return total / end


def paper_of(group: str, model: str) -> list[str]:
    """Returns the numbers of the paper, nothing where it has none."""
    for line in PRINTED[group].splitlines():
        name, *numbers = line.split()
        if NAMES[name] == model:
            return [f" ({number})" for number in numbers]
    return [""] * 6


def test_the_numbers_of_the_paper() -> None:
    assert len(PAPER) == 8
    for group, lines in PRINTED.items():
        for line in lines.splitlines():
            name, *numbers = line.split()
            assert PAPER[group, NAMES[name]] == tuple(map(float, numbers))


@pytest.mark.parametrize("marks", [MARKS, (0.1, 1.0)])
def test_table1(tmp_path: Path, undrawn: list[str], marks: tuple[float, ...]) -> None:
    """Each number stands beside the paper's number of the same epoch, whatever marks a scale has."""
    parts = made_up()
    rows = parts["curve"]
    table = report(folder_with(tmp_path, tuning=parts["tuning"], curve=rows, cost=parts["cost"]), marks, SPLITS)
    head, *lines = section(table, "Table 1: new and old classes")
    assert head == ["classes", "model", *(f"{name}, {mark:g}" for name in ("top-1", "AUC") for mark in marks)]
    wanted = []
    for group in ("new", "old"):
        ours = {}
        for model in MODELS:
            ours[model] = [pick(rows, group, model=model, epochs=mark) for mark in marks]
            ours[model] += [[curve_area(rows, group, model, split, mark) for split in SPLITS] for mark in marks]
        columns = zip(*ours.values(), strict=True)
        best = [MODELS[max(range(5), key=lambda place: sum(column[place]))] for column in columns]
        assert len(set(best)) > 1, "not one model in all columns"
        for model in MODELS:
            paper = paper_of(group, model)
            cells = [cell(values) for values in ours[model]]
            cells = [f"**{text}**" if model == top else text for text, top in zip(cells, best, strict=True)]
            beside = paper[: len(marks)] + paper[3 : 3 + len(marks)]
            wanted.append([group, TITLES[model], *(a + b for a, b in zip(cells, beside, strict=True))])
    assert lines == wanted
    assert "mean of 3 splits" in table
    assert "(1,234 test images)" in table
    assert "1,001 images at the points between" in table
    assert (tmp_path / "table.md").read_text() == table
    assert undrawn == ["figure4.png"]


def test_of_equal_means_each_is_the_best(tmp_path: Path, undrawn: list[str]) -> None:
    """Whatever their standard errors."""
    parts = made_up()
    for row in parts["curve"]:
        place, spread = MODELS.index(row["model"]), (2.0, 4.0, 4.0, 4.0, 6.0)[MODELS.index(row["model"])]
        for group in GROUPS:
            row[group]["top1"] = (40.0 if place in {1, 4} else 30.0) + spread * (row["split"] - 2)
    table = report(folder_with(tmp_path, **parts), MARKS, SPLITS)
    for line in section(table, "Table 1: new and old classes")[1:]:
        best = line[1] in {TITLES[MODELS[1]], TITLES[MODELS[4]]}
        assert [cell.startswith("**40.0 +- ") for cell in line[2:]] == [best] * 6


def differences(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Returns the cell of differences split by split."""
    return cell([a - b for a, b in zip(ours, theirs, strict=True)], "+")


@pytest.mark.parametrize("marks", [MARKS, (0.1, 1.0)])
def test_differences_are_paired(tmp_path: Path, undrawn: list[str], marks: tuple[float, ...]) -> None:
    parts = made_up()
    rows = parts["curve"]
    table = report(folder_with(tmp_path, tuning=parts["tuning"], curve=rows), marks, SPLITS)
    head, *lines = section(table, "What MbPA adds")
    assert head == ["classes", "minus", "MbPA", *(f"{name}, {mark:g}" for name in ("top-1", "AUC") for mark in marks)]

    def values(group: str, model: str) -> list[list[float]]:
        tops = [pick(rows, group, model=model, epochs=mark) for mark in marks]
        return [*tops, *([curve_area(rows, group, model, split, mark) for split in SPLITS] for mark in marks)]

    wanted = []
    for group, other in itertools.product(("new", "old"), ("parametric", "non-parametric", "mixture")):
        ours, theirs = ([float(n.strip(" ()")) for n in paper_of(group, name)] for name in ("mbpa-rmsprop", other))
        gaps = [f"{a - b:+.1f}" for a, b in zip(ours, theirs, strict=True)]
        wanted.append([group, other, "the paper's", *gaps[: len(marks)], *gaps[3 : 3 + len(marks)]])
        for model in ("mbpa-rmsprop", "mbpa-sgd"):
            pairs = zip(values(group, model), values(group, other), strict=True)
            wanted.append([group, other, TITLES[model], *(differences(*pair) for pair in pairs)])
    assert lines == wanted
    if marks == MARKS:
        assert lines[0][3:] == ["+30.0", "+10.9", "+7.8", "+21.7", "+16.0", "+11.1"]


def test_what_all_splits_have_alike_is_no_error_of_a_difference(tmp_path: Path, undrawn: list[str]) -> None:
    parts = made_up()
    for row in parts["curve"] + parts["unbalanced"]:
        for group in GROUPS:
            row[group]["top1"] = 10.0 * row["split"] + 2.0 * MODELS.index(row["model"]) + row["epochs"]
    table = report(folder_with(tmp_path, **parts), MARKS, SPLITS)
    for _, other, model, *cells in section(table, "What MbPA adds")[1:]:
        if model != "the paper's":
            named = next(name for name in MODELS if TITLES[name] == model)
            assert cells == [f"{2 * (MODELS.index(named) - MODELS.index(other)):+.1f} +- 0.0"] * 6
    for _, model, *cells in section(table, "What MbPA adds to unbalanced data after 20 epochs")[1:]:
        place = [TITLES[name] for name in MODELS].index(model)
        assert cells == [f"{2 * (place - other):+.1f} +- 0.0" for other in range(3)]
    for line in section(table, "Table 1: new and old classes")[1:]:
        assert all(cell.partition(" (")[0].strip("*").endswith("+- 5.8") for cell in line[2:])


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_rows_is_no_matter(tmp_path: Path, undrawn: list[str], seed: int) -> None:
    """Splits may have been measured in any order; models of the last table stand as they come."""
    parts = made_up()
    wanted = report(folder_with(tmp_path / "one", **parts), MARKS, SPLITS)
    mixed = {part: random.Random(seed).sample(rows, len(rows)) for part, rows in parts.items() if part != "shots"}
    mixed["shots"] = sorted(parts["shots"], key=lambda row: -row["split"])
    assert [row["split"] for row in mixed["curve"]] != [row["split"] for row in parts["curve"]]
    found = report(folder_with(tmp_path / "other", **dict(reversed(mixed.items()))), MARKS, SPLITS)
    assert found == wanted


def test_calibration(tmp_path: Path, undrawn: list[str]) -> None:
    parts = made_up()
    table = report(folder_with(tmp_path, tuning=parts["tuning"], curve=parts["curve"]), MARKS, SPLITS)
    head, *lines = section(table, "Calibration")
    assert head == ["classes", "model", *(f"{name}, {mark:g}" for name in ("ECE", "NLL") for mark in MARKS)]
    wanted = []
    for group, model in itertools.product(("all", "new", "old"), MODELS):
        cells = []
        for name, digits in (("ece", 1), ("nll", 2)):
            for mark in MARKS:
                found = [r[group][name] for r in parts["curve"] if r["model"] == model and r["epochs"] == mark]
                assert len(found) == len(SPLITS)
                cells.append(cell(found, digits=digits))
        wanted.append([group, TITLES[model], *cells])
    assert lines == wanted


def test_cost_stands_beside_the_gain(tmp_path: Path, undrawn: list[str]) -> None:
    """Of all classes, over the parametric model; of costs that were measured twice the last ones count."""
    parts = made_up()
    stopped = [row | {"milliseconds": 1e6, "entries": 9} for row in parts["cost"][:2]]
    some = {"tuning": parts["tuning"], "curve": parts["curve"]}
    table = report(folder_with(tmp_path, **some, cost=stopped + parts["cost"]), MARKS, SPLITS)
    head, *lines = section(table, "Cost beside the gain")
    assert head == ["model", "ms", *(f"top-1, {mark:g}" for mark in MARKS)]
    for model, line in zip(MODELS, lines, strict=True):
        ours, theirs = (
            [pick(parts["curve"], "all", model=name, epochs=mark) for mark in MARKS] for name in (model, "parametric")
        )
        gains = [differences(*pair) for pair in zip(ours, theirs, strict=True)]
        assert line == [TITLES[model], f"{len(model) / 7:.3g}", *gains]
    assert lines[0][2:] == ["+0.0 +- 0.0"] * 3
    assert "with 54,321 entries" in table


@pytest.mark.parametrize("count", range(len(MODELS)))
def test_before_all_costs_are_taken_there_is_no_table_of_them(tmp_path: Path, undrawn: list[str], count: int) -> None:
    """A kill may leave some, and another experiment in the folder then writes its table."""
    parts = made_up()
    table = report(folder_with(tmp_path, **(parts | {"cost": parts["cost"][:count]})), MARKS, SPLITS)
    assert "Cost beside" not in table
    assert "## Calibration\n" in table
    assert "## Settings\n" in table


def test_settings(tmp_path: Path, undrawn: list[str]) -> None:
    parts = made_up()
    table = report(folder_with(tmp_path, tuning=parts["tuning"], curve=parts["curve"]), MARKS, SPLITS)
    _, *lines = section(table, "Settings")
    for model, line in zip(MODELS, lines, strict=True):
        tried = GRID.of(model)
        means = [
            statistics.fmean(r["all"]["top1"] for r in parts["tuning"] if r["model"] == model and r["place"] == place)
            for place in range(len(tried))
        ]
        best = tried[means.index(max(means))]
        pairs = dataclasses.asdict(best).items()
        shown = ", ".join("inverse distance" if v is None else f"{k} {v}" for k, v in pairs)
        assert line == [TITLES[model], shown, f"{max(means):.1f}", str(len(tried))]
    assert len({line[-1] for line in lines}) == 1, "as many tried for each"


def test_figures_5_to_7(tmp_path: Path, undrawn: list[str]) -> None:
    parts = made_up()
    some = {part: parts[part] for part in ("unbalanced", "size", "rate", "neighbors")}
    table = report(folder_with(tmp_path, **some), MARKS, SPLITS)
    epochs = (0.2, 20.0)
    head, *lines = section(table, "Figure 5: unbalanced data")
    assert head == ["classes", "model", "0.2", "20"]
    assert lines == [
        [title, TITLES[model], *(cell(pick(parts["unbalanced"], group, model=model, epochs=e)) for e in epochs)]
        for group, title in (("rare", "new, a tenth"), ("full", "new, all"), ("old", "old"), ("all", "all"))
        for model in MODELS
    ]
    head, *lines = section(table, "What MbPA adds to unbalanced data after 20 epochs")
    others = ("parametric", "non-parametric", "mixture")
    assert head == ["classes", "MbPA", *(f"minus {other}" for other in others)]
    last = {
        (group, model): pick(parts["unbalanced"], group, model=model, epochs=20.0)
        for group in ("rare", "full", "old", "all")
        for model in MODELS
    }
    assert lines == [
        [title, TITLES[model], *(differences(last[group, model], last[group, other]) for other in others)]
        for group, title in (("rare", "new, a tenth"), ("full", "new, all"), ("old", "old"), ("all", "all"))
        for model in ("mbpa-rmsprop", "mbpa-sgd")
    ]
    assert "1,234 test images at the last point, 1,001 before it" in table
    assert table.count("1,001 test images.") == 3, "Figures 6 and 7"
    sweeps = {
        "Figure 6, left: the size of the memory": ("size", "capacity", {1000: "1,000", 90_000: "90,000"}),
        "Figure 7: the number of neighbors": ("neighbors", "neighbors", {5: "5", 50: "50"}),
    }
    for title, (part, name, values) in sweeps.items():
        head, *lines = section(table, title)
        assert head[2:] == ["0.2 epochs", "20 epochs"]
        assert lines == [
            [group, shown, *(cell(pick(parts[part], group, epochs=e, **{name: value})) for e in epochs)]
            for group in ("new", "old")
            for value, shown in values.items()
        ]
    _, *lines = section(table, "Figure 6, right: the learning rate of the parametric model")
    assert lines == [
        [
            *(TITLES[model], group, f"{rate:g}"),
            *(cell(pick(parts["rate"], group, model=model, rate=rate, epochs=e)) for e in epochs),
        ]
        for model in ("parametric", "mixture", "mbpa-sgd")
        for group in ("new", "old")
        for rate in (0.003, 0.3)
    ]
    head, *lines = section(table, "What MbPA adds, by the learning rate")
    assert head == ["classes", "minus", "rate", "0.2 epochs", "20 epochs"]
    assert lines == [
        [
            *(group, other, f"{rate:g}"),
            *(
                differences(*(pick(parts["rate"], group, model=m, rate=rate, epochs=e) for m in ("mbpa-sgd", other)))
                for e in epochs
            ),
        ]
        for group in ("new", "old")
        for other in ("parametric", "mixture")
        for rate in (0.003, 0.3)
    ]
    assert undrawn == ["figure5.png", "figure6.png", "figure7.png"]


def test_shots(tmp_path: Path, undrawn: list[str]) -> None:
    parts = made_up()
    table = report(folder_with(tmp_path, shots=parts["shots"]), MARKS, SPLITS)
    head, *lines = section(table, "From the first image of a new class")
    assert head == ["model", "", "1", "20"]
    wanted = []
    for model in ("mbpa-sgd", "fine-tuning", "nearest-mean", "vote"):
        own = [[row for row in parts["shots"] if row["model"] == model and row["shots"] == n] for n in (1, 20)]
        for group in ("new", "old"):
            cells = [cell([row[group] for row in some]) for some in own]
            wanted.append([TITLES[model], f"{group} classes, %", *cells])
        for name, title in (("seconds", "seconds to a recognition"), ("milliseconds", "ms of a prediction")):
            assert all(len(some) == 3 for some in own)
            medians = [sorted(row[name] for row in some)[1] for some in own]
            wanted.append([TITLES[model], title, *(f"{median:.3g}" for median in medians)])
    assert lines == wanted
    assert undrawn == ["new-classes.png"]


def test_what_nobody_recognizes_has_no_time(tmp_path: Path) -> None:
    rows = made_up()["shots"]
    for row in rows:
        if row["model"] == "vote" or (row["model"] == "mbpa-sgd" and row["shots"] == 1):
            row["seconds"] = None
    table = report(folder_with(tmp_path, shots=rows), MARKS, SPLITS)
    _, *found = section(table, "From the first image of a new class")
    lines = {tuple(line[:2]): line[2:] for line in found}
    assert lines[TITLES["vote"], "seconds to a recognition"] == ["", ""]
    first, second = lines[TITLES["mbpa-sgd"], "seconds to a recognition"]
    assert first == ""
    assert second != ""
    assert (tmp_path / "new-classes.png").exists()


def test_what_is_half_finished_is_left_out(tmp_path: Path, undrawn: list[str]) -> None:
    parts = made_up()
    whole = report(folder_with(tmp_path / "whole", **parts), MARKS, SPLITS)
    titles = {
        "curve": "## Table 1",
        "unbalanced": "## Figure 5",
        "size": "## Figure 6, left",
        "rate": "## Figure 6, right",
        "neighbors": "## Figure 7",
        "shots": "## From the first",
    }
    assert [line for line in whole.splitlines() if line.startswith("## ")] == [
        "## Table 1: new and old classes",
        "## What MbPA adds",
        "## Calibration",
        "## Cost beside the gain",
        "## Settings",
        "## Figure 5: unbalanced data",
        "## What MbPA adds to unbalanced data after 20 epochs",
        "## Figure 6, left: the size of the memory",
        "## Figure 6, right: the learning rate of the parametric model",
        "## What MbPA adds, by the learning rate",
        "## Figure 7: the number of neighbors",
        "## From the first image of a new class",
    ]
    assert len(undrawn) == 5
    for part, rows in parts.items():
        if part not in titles:
            continue
        own = [row for row in rows if row["split"] == 1]
        for number, kept in enumerate((rows[:-1], own, rows[: len(own) + 1], [])):
            table = report(folder_with(tmp_path / f"{part}-{number}", **(parts | {part: kept})), MARKS, SPLITS)
            assert titles[part] not in table
            assert all(title in table for other, title in titles.items() if other != part)
    assert report(folder_with(tmp_path / "early", tuning=parts["tuning"]), MARKS, SPLITS) == ""


def test_pictures_show_the_means_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each panel by its title, each line by its name, and no beginning at 0, which a logarithm does not show."""
    parts, drawn = made_up(), {}
    monkeypatch.setattr(plots, "panels", lambda panels, path, **how: drawn.update({path.name: (panels, how)}))
    report(folder_with(tmp_path, **parts), MARKS, SPLITS)
    panels = {
        name: {title: {line.label: line for line in lines} for title, lines in found}
        for name, (found, _) in drawn.items()
    }
    assert all(how["log"] for _, how in drawn.values())

    def check(line: plots.Curve, group: str, points: Sequence[float], x: str = "epochs", **key: Any) -> None:
        assert list(line.x) == list(points)
        values = [pick(parts[key["part"]], group, **key, **{x: point}) for point in points]
        shown = [f"{mean:.1f} +- {error:.1f}" for mean, error in zip(line.mean, line.error, strict=True)]
        assert shown == [cell(found) for found in values]

    by_model = {
        "figure4.png": ("curve", POINTS[1:], {"All classes": "all", "New classes": "new", "Old classes": "old"}),
        "figure5.png": (
            "unbalanced",
            (0.2, 20.0),
            {
                "All classes": "all",
                "Old classes": "old",
                "New classes with a tenth of the images": "rare",
                "New classes with all images": "full",
            },
        ),
    }
    for name, (part, points, titles) in by_model.items():
        assert list(panels[name]) == list(titles)
        for title, group in titles.items():
            assert list(panels[name][title]) == [TITLES[model] for model in MODELS]
            assert len({line.color for line in panels[name][title].values()}) == len(MODELS)
            for model in MODELS:
                check(panels[name][title][TITLES[model]], group, points, part=part, model=model)
    for group in ("new", "old"):
        for capacity in (1000, 90_000):
            line = panels["figure6.png"][f"MbPA, {group} classes, by entries"][f"{capacity:,}"]
            check(line, group, (0.2, 20.0), part="size", capacity=capacity)
        for title, model in {"MbPA": "mbpa-sgd", "Mixture": "mixture", "Parametric": "parametric"}.items():
            rates = panels["figure6.png"][f"{title}, {group} classes, by learning rate"]
            assert len(rates) == 2
            for rate in (0.003, 0.3):
                check(rates[f"{rate:g}"], group, (0.2, 20.0), part="rate", model=model, rate=rate)
        for count in (5, 50):
            line = panels["figure7.png"][f"MbPA, {group} classes, by neighbors"][str(count)]
            check(line, group, (0.2, 20.0), part="neighbors", neighbors=count)
        shots = panels["new-classes.png"][f"{group.capitalize()} classes"]
        for model in ("mbpa-sgd", "fine-tuning", "nearest-mean", "vote"):
            line = shots[TITLES[model]]
            found = [
                [r[group] for r in parts["shots"] if r["model"] == model and r["shots"] == count] for count in (1, 20)
            ]
            assert list(line.x) == [1, 20]
            assert list(line.mean) == pytest.approx([statistics.fmean(one) for one in found])
    assert list(panels["new-classes.png"]) == ["New classes", "Old classes", "From the keys to the first recognition"]
    assert drawn["new-classes.png"][1]["ylabel"] == ("top-1 (%)", "top-1 (%)", "log10 of seconds")
    for model, title in ((m, TITLES[m]) for m in ("mbpa-sgd", "fine-tuning", "nearest-mean", "vote")):
        line = panels["new-classes.png"]["From the keys to the first recognition"][title]
        own = [row for row in parts["shots"] if row["model"] == model]
        for count, mean, error in zip((1, 20), line.mean, line.error, strict=True):
            logs = [math.log10(row["seconds"]) for row in own if row["shots"] == count]
            assert mean == pytest.approx(sum(logs) / 3)
            assert error == pytest.approx(statistics.stdev(logs) / math.sqrt(3))


def test_pictures_are_pictures(tmp_path: Path) -> None:
    parts = made_up()
    report(folder_with(tmp_path, tuning=parts["tuning"], curve=parts["curve"], shots=parts["shots"]), MARKS, SPLITS)
    for name in ("figure4.png", "new-classes.png"):
        with Image.open(tmp_path / name) as picture:
            picture.verify()
            assert picture.format == "PNG"
            assert min(picture.size) > 500
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def lines_at(*points: float) -> list[plots.Curve]:
    return [plots.Curve(name, points, [1.0] * len(points), [0.0] * len(points), "red") for name in ("a", "b")]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The axes of what would be saved."""
    found: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda canvas, path: found.extend(canvas.axes))
    return found


def test_a_label_for_each_panel(tmp_path: Path, axes: list[Any]) -> None:
    parts = [(title, lines_at(1.0, 2.0)) for title in ("one", "two", "three")]
    plots.panels(parts, tmp_path / "x.png", xlabel="x", ylabel=("p", "q", "r"))
    plots.panels(parts, tmp_path / "x.png", xlabel="x", ylabel="pqr")
    shown = [panel for panel in axes if panel.get_title(loc="left")]
    assert [panel.get_title(loc="left") for panel in shown] == ["one", "two", "three"] * 2
    assert [panel.get_ylabel() for panel in shown] == ["p", "q", "r", "pqr", "pqr", "pqr"]
    with pytest.raises(ValueError, match="zip"):
        plots.panels(parts, tmp_path / "x.png", xlabel="x", ylabel=("p", "q"))


@pytest.mark.parametrize("points", [(1, 2, 5, 10, 20), (0.1, 0.3, 1.0, 3.0, 7.0, 12.0, 20.0), tuple(range(1, 9))])
def test_a_logarithmic_axis_has_a_tick_on_each_of_a_few_points(
    tmp_path: Path, axes: list[Any], points: tuple[float, ...]
) -> None:
    lines = [*lines_at(*points[:-1]), *lines_at(*points[1:])]  # of both together
    plots.panels([("one", lines)], tmp_path / "x.png", xlabel="x", ylabel="y", log=True)
    (panel,) = (panel for panel in axes if panel.get_title(loc="left"))
    panel.figure.canvas.draw()
    assert panel.get_xscale() == "log"
    assert panel.get_xticks().tolist() == pytest.approx(points)
    assert [text.get_text() for text in panel.get_xticklabels()] == [f"{point:g}" for point in points]
    assert not len(panel.get_xticks(minor=True))


def test_ticks_of_many_points_are_powers_of_ten(tmp_path: Path, axes: list[Any]) -> None:
    lines = lines_at(*(0.01 * 2**step for step in range(9)))
    plots.panels([("one", lines)], tmp_path / "x.png", xlabel="x", ylabel="y", log=True)
    (panel,) = (panel for panel in axes if panel.get_title(loc="left"))
    assert {0.01, 0.1, 1.0} <= {round(float(tick), 6) for tick in panel.get_xticks()}


def test_every_model_and_learner_has_a_title() -> None:
    assert {*MODELS, *SCALES["smoke"].shots.grids} <= TITLES.keys()
    assert len(set(TITLES.values())) == len(TITLES)
    assert reporting.PAPER.keys() <= {(group, model) for group in ("new", "old") for model in MODELS}
