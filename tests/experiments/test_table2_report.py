"""The table and the picture of Table 2, from made-up rows: no corpus is needed."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from recollect.experiments import plots, table2_report
from recollect.experiments.runner import read_rows

ROOT = Path(__file__).parents[2]

# The rows of the table, and what stands in the paper: perplexity on validation and test text, nats gained on test.
# Krause et al.'s dynamic evaluation gains from their own model's 57.7 and 66.1.
SHOWN = {
    "LSTM": ("static", "model"),
    "LSTM + cache": ("static", "cache"),
    "LSTM + MbPA": ("static", "mbpa"),
    "LSTM + MbPA + cache": ("static", "both"),
    "LSTM, dynamic evaluation": ("dynamic", "model"),
    "LSTM, dynamic evaluation + cache": ("dynamic", "cache"),
    "LSTM, dynamic evaluation + MbPA": ("dynamic", "mbpa"),
    "LSTM, dynamic evaluation + MbPA + cache": ("dynamic", "both"),
}
PAPER = {
    "ptb": (
        *(("61.8", "59.6", ""), ("55.7", "55.3", "-0.075"), ("54.8", "54.3", "-0.093"), ("54.8", "54.4", "-0.091")),
        *(("51.6", "51.1", "-0.121"), *[("", "", "")] * 3),
    ),
    "wikitext-2": (
        *(("69.3", "65.9", ""), ("53.2", "51.3", "-0.250"), ("58.4", "56.0", "-0.163"), ("51.8", "49.4", "-0.288")),
        *(("46.4", "44.3", "-0.400"), *[("", "", "")] * 3),
    ),
}
HEADINGS = {"ptb": "Penn Treebank", "wikitext-2": "WikiText-2"}
ADDED = {
    ("MbPA", "LSTM + cache"): ("cache", "both"),
    ("MbPA", "LSTM"): ("model", "mbpa"),
    ("cache", "LSTM"): ("model", "cache"),
}
BUCKETS = 5


def made_up_rows(shift: float) -> list[dict[str, Any]]:
    """Returns the rows of a run in which no number is there twice, so that each can be told in print."""
    found: list[dict[str, Any]] = [
        {"part": "choice", "key": "input", "cache": [500, 0.3], "mbpa": [1000, 32, 0.5, 1], "loss": 4.2, "model": 4.5},
        *({"part": "dynamic", "rate": rate, "decay": 0.01, "loss": loss} for rate, loss in ((1e-5, 4.4), (1e-4, 4.3))),
    ]
    found[0]["both"] = [[200, 0.1], [5000, 8, 2.0, 5]]
    for n, (reader, mixture) in enumerate(SHOWN.values()):
        weights = {"model": [1.0], "both": [0.7, 0.2, 0.1]}.get(mixture, [0.8, 0.2])
        for m, text in enumerate(("valid", "test"), 2 * n):
            row = {"part": "result", "reader": reader, "mixture": mixture, "text": text, "weights": weights}
            row |= {"loss": 4.0 + 0.03 * m + shift, "half_width": 9.0 + m, "words_per_second": 1000.0 + 10 * m + shift}
            row |= {"gain": 0.01 * m - 0.055 + shift / 9, "gain_half_width": 0.2 + 0.003 * m + shift}
            found.append(row | {"words": 1700 if text == "valid" else 1900})
    for n in range(len(ADDED) * BUCKETS):
        before, after = list(ADDED.values())[n // BUCKETS]
        row = {"part": "bucket", "before": before, "after": after, "number": n % BUCKETS + 1}
        row |= {"words": 100 + n, "occurrences": 200 + n, "rarest": 300 + n, "half_width": 0.5 + 0.013 * n + shift}
        row |= {"percent": 7.0 * n - 30 + shift, "deviation": 2.0 + 1.3 * n + shift, "nats": 0.017 * n - 0.1 + shift}
        found.append(row)
    return found


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder with the made-up rows of both corpora."""
    for corpus, shift in (("ptb", 0.0), ("wikitext-2", 0.7)):
        (tmp_path / corpus).mkdir()
        lines = [json.dumps(row) + "\n" for row in made_up_rows(shift)]
        (tmp_path / corpus / "results.jsonl").write_text("".join(lines))
    return tmp_path


def pick(folder: Path, corpus: str, **key: Any) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / corpus / "results.jsonl") if key.items() <= row.items()]


def cells(table: str, corpus: str) -> list[list[str]]:
    """Returns the rows of a corpus's tables, each with as many cells as the heading above it has."""
    (section,) = (part for part in table.split("### ") if part.startswith(HEADINGS[corpus] + "\n"))
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in section.splitlines() if line.startswith("|")]
    for before, row in pairwise(found):
        assert len(row) == len(before) or row[0] == "added"
    return found


@pytest.mark.parametrize("corpus", ["ptb", "wikitext-2"])
def test_the_table_says_what_the_rows_and_the_paper_say(made_up: Path, corpus: str) -> None:
    table = table2_report.report(made_up)
    shown = {row[0]: row for row in cells(table, corpus) if row[0] in SHOWN}
    assert list(shown) == list(SHOWN)
    heading = cells(table, corpus)[0]
    assert heading[:5] == ["model", "valid, 1,700 words", "test", "nats (95 %)", "words/s"]
    assert heading[5:] == ["paper: valid", "test", "nats"]
    for (title, (reader, mixture)), paper in zip(SHOWN.items(), PAPER[corpus], strict=True):
        (valid,) = pick(made_up, corpus, part="result", reader=reader, mixture=mixture, text="valid")
        (test,) = pick(made_up, corpus, part="result", reader=reader, mixture=mixture, text="test")
        nats = f"{-test['gain']:.3f} +- {test['gain_half_width']:.3f}"
        assert shown[title] == [
            *(title, f"{math.exp(valid['loss']):.1f}", f"{math.exp(test['loss']):.1f}"),
            *("" if title == "LSTM" else nats, f"{test['words_per_second']:.0f}", *paper),
        ]


@pytest.mark.parametrize("corpus", ["ptb", "wikitext-2"])
def test_gains_by_frequency_are_those_of_the_rows(made_up: Path, corpus: str) -> None:
    expected = []
    for names, (before, after) in ADDED.items():
        for row in pick(made_up, corpus, part="bucket", before=before, after=after):
            counts = (str(row[name]) for name in ("number", "words", "occurrences", "rarest"))
            nats = f"{row['nats']:.3f} +- {row['half_width']:.3f}"
            expected.append([*names, *counts, f"{row['percent']:.1f}", nats, f"{row['deviation']:.3f}"])
    assert len(expected) == len(ADDED) * BUCKETS
    for table in (table2_report.report(made_up), table2_report.buckets(made_up)):
        shown = cells(table, corpus)
        start = next(number for number, row in enumerate(shown) if row[0] == "added")
        assert shown[start + 2 :] == expected


def test_the_figure_draws_what_each_bucket_gains(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = []
    monkeypatch.setattr(plots, "save", lambda picture, path: pictures.append((picture, path)))
    table2_report.report(made_up)
    ((picture, path),) = pictures
    assert path == made_up / "figure8.png"
    assert [axes.get_title(loc="left") for axes in picture.axes] == list(HEADINGS.values())
    for axes, corpus in zip(picture.axes, HEADINGS, strict=True):
        containers = [one for one in axes.containers if one.get_label() in {" added to ".join(n) for n in ADDED}]
        assert [one.get_label() for one in containers] == [" added to ".join(names) for names in ADDED]
        drawn: set[tuple[float, Any]] = set()
        for bars, (before, after) in zip(containers, ADDED.values(), strict=True):
            found = pick(made_up, corpus, part="bucket", before=before, after=after)
            centers = [bar.get_x() + bar.get_width() / 2 for bar in bars]
            assert [round(center) for center in centers] == [1, 2, 3, 4, 5]
            drawn |= {(round(center, 6), bars[0].get_facecolor()) for center in centers}
            assert [bar.get_height() for bar in bars] == pytest.approx([row["nats"] for row in found])
            _, _, (lines,) = bars.errorbar.lines
            ends = torch.tensor([line[:, 1].tolist() for line in lines.get_segments()])
            spans = [[row["nats"] + sign * row["half_width"] for sign in (-1, 1)] for row in found]
            torch.testing.assert_close(ends, torch.tensor(spans))
        assert len({center for center, _ in drawn}) == len(ADDED) * BUCKETS, "bars hide each other"
        assert len({color for _, color in drawn}) == len(ADDED)
        assert [one.get_text() for one in axes.get_legend().get_texts()] == [
            " added to ".join(names) for names in ADDED
        ]


@pytest.mark.parametrize("kept", [0, 1])
def test_what_has_not_been_read_is_not_shown(made_up: Path, kept: int) -> None:
    """While dynamic evaluation's settings are still tried, and the first ones may all have diverged."""
    file = made_up / "ptb/results.jsonl"
    found = [row for row in read_rows(file) if row.get("reader") != "dynamic" and row["part"] != "dynamic"]
    found += [{"part": "dynamic", "rate": 1e-4, "decay": 0.01, "loss": None}] * kept
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    table = table2_report.report(made_up)
    own, other = (part for part in table.split("### ") if part)
    assert "dynamic" not in own
    assert [row[0] for row in cells(table, "ptb") if row[0] in SHOWN] == list(SHOWN)[:4]
    assert "- dynamic evaluation: rate 0.0001, decay 0.01, of 2 settings" in other


def test_the_pages_show_the_tables_of_the_recorded_run() -> None:
    table = (ROOT / "results/table2/table.md").read_text()
    assert table in (ROOT / "docs/language.md").read_text()
    assert all(heading in table for heading in HEADINGS.values())
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| LSTM")]
    assert len(shown) >= 2 * 4
    assert all(line in table for line in shown)
