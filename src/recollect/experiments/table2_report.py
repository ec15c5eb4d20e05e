"""The table and the picture of ``recollect reproduce table2``: all corpora that a folder holds, beside the paper."""

import math
from pathlib import Path
from typing import Any

from recollect.experiments import plots
from recollect.experiments.runner import read_rows, write_text

TITLES = {"ptb": "Penn Treebank", "wikitext-2": "WikiText-2"}
_ROWS = (
    ("static", "model", "LSTM"),
    ("static", "cache", "LSTM + cache"),
    ("static", "mbpa", "LSTM + MbPA"),
    ("static", "both", "LSTM + MbPA + cache"),
    ("dynamic", "model", "LSTM, dynamic evaluation"),
    ("dynamic", "cache", "LSTM, dynamic evaluation + cache"),
    ("dynamic", "mbpa", "LSTM, dynamic evaluation + MbPA"),
    ("dynamic", "both", "LSTM, dynamic evaluation + MbPA + cache"),
)
# Table 2: perplexity on validation and test text. Dynamic evaluation stands in it as Krause et al.'s, on AWD-LSTM.
_PAPER = {
    "ptb": {
        ("static", "model"): (61.8, 59.6),
        ("static", "cache"): (55.7, 55.3),
        ("static", "mbpa"): (54.8, 54.3),
        ("static", "both"): (54.8, 54.4),
        ("dynamic", "model"): (51.6, 51.1),
    },
    "wikitext-2": {
        ("static", "model"): (69.3, 65.9),
        ("static", "cache"): (53.2, 51.3),
        ("static", "mbpa"): (58.4, 56.0),
        ("static", "both"): (51.8, 49.4),
        ("dynamic", "model"): (46.4, 44.3),
    },
}
_ADDED = {
    ("MbPA", "LSTM + cache"): {"before": "cache", "after": "both"},
    ("MbPA", "LSTM"): {"before": "model", "after": "mbpa"},
    ("cache", "LSTM"): {"before": "model", "after": "cache"},
}
_COLORS = plots.BLUE, plots.ORANGE, plots.GRAY
_AWD = {"ptb": 57.7, "wikitext-2": 66.1}  # the test perplexity of the model that Krause et al. adapt


def report(folder: Path) -> str:
    """Writes the table and the figure of what the folder holds by now, and returns the table."""
    rows = _finished(folder)
    table = "\n".join(_table(corpus, found) for corpus, found in rows.items())
    write_text(folder / "table.md", table)
    _figure(folder / "figure8.png", rows)
    return table


def buckets(folder: Path) -> str:
    """Returns the gains by training frequency of what the folder holds by now."""
    return "\n".join("\n".join([f"### {TITLES[c]}", "", *_buckets(found)]) for c, found in _finished(folder).items())


def _finished(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows = {corpus: read_rows(folder / corpus / "results.jsonl") for corpus in TITLES}
    return {corpus: found for corpus, found in rows.items() if any(row["part"] == "bucket" for row in found)}


def _table(corpus: str, rows: list[dict[str, Any]]) -> str:
    words = next(row["words"] for row in rows if _is(row, part="result", text="valid"))
    lines = [
        f"### {TITLES[corpus]}",
        "",
        f"| model | valid, {words:,} words | test | nats (95 %) | words/s | paper: valid | test | nats |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for reader, mixture, title in _ROWS:
        found = [r for r in rows if _is(r, part="result", reader=reader, mixture=mixture)]
        if len(found) < 2:
            continue  # not read yet: dynamic evaluation comes last
        valid, test = sorted(found, key=lambda row: row["text"] == "test")
        ours = [f"{math.exp(row['loss']):.1f}" for row in (valid, test)]
        base = (reader, mixture) == ("static", "model")
        gain = "" if base else f"{-test['gain']:.3f} +- {test['gain_half_width']:.3f}"
        numbers = *ours, gain, f"{test['words_per_second']:.0f}", _paper(corpus, reader, mixture)
        lines.append(f"| {title} | {' | '.join(numbers)} |")
    return "\n".join([*lines, "", *_choices(rows), *_buckets(rows)])


def _is(row: dict[str, Any], **key: Any) -> bool:
    return key.items() <= row.items()


def _paper(corpus: str, reader: str, mixture: str) -> str:
    found = _PAPER[corpus].get((reader, mixture))
    if found is None:
        return " | | "
    valid, test = found
    before = _AWD[corpus] if reader == "dynamic" else _PAPER[corpus]["static", "model"][1]
    nats = "" if (reader, mixture) == ("static", "model") else f"{math.log(test / before):.3f}"
    return f"{valid} | {test} | {nats}"


def _choices(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["Chosen on validation words:", ""]
    for row in (r for r in rows if r["part"] == "choice"):
        both = f"{_cache(row['both'][0])}, {_mbpa(row['both'][1])}: {row['loss'] - row['model']:+.3f} nats"
        lines.append(f"- key {row['key']}: {_cache(row['cache'])}; {_mbpa(row['mbpa'])}; together {both}")
    tried = [r for r in rows if r["part"] == "dynamic"]
    if any(_is(r, part="result", reader="dynamic") for r in rows):  # before that the search may not be over
        best = min((row for row in tried if row["loss"] is not None), key=lambda row: row["loss"])
        lines.append(f"- dynamic evaluation: rate {best['rate']:g}, decay {best['decay']:g}, of {len(tried)} settings")
    for reader in ("static", "dynamic"):
        for mixture in ("cache", "mbpa", "both"):
            row = next((r for r in rows if _is(r, part="result", reader=reader, mixture=mixture, text="test")), None)
            if row is None:
                continue
            weights = ", ".join(f"{w:.3f}" for w in row["weights"])
            names = {"cache": "model, cache", "mbpa": "model, MbPA", "both": "model, cache, MbPA"}[mixture]
            lines.append(f"- weights ({reader} model; {names}): {weights}")
    return [*lines, ""]


def _cache(setting: list[int | float]) -> str:
    size, flatness = setting
    return f"cache N={size}, theta={flatness:g}"


def _mbpa(setting: list[int | float]) -> str:
    size, neighbors, rate, steps = setting
    return f"MbPA N={size}, K={neighbors}, T={steps}, alpha={rate:g}"


def _buckets(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "What each occurrence of a word gains on test, from the most frequent words to the rarest: the fall of the "
        "perplexity in percent; the same in nats (95 %), and its standard deviation over the occurrences:",
        "",
        "| added | to | bucket | words | occurrences | rarest in training | percent | nats | deviation |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += (
        f"| {added} | {to} | {row['number']} | {row['words']} | {row['occurrences']} | {row['rarest']} "
        f"| {row['percent']:.1f} | {row['nats']:.3f} +- {row['half_width']:.3f} | {row['deviation']:.3f} |"
        for (added, to), key in _ADDED.items()
        for row in rows
        if _is(row, part="bucket", **key)
    )
    return [*lines, ""]


def _figure(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Draws Figure 8: what is gained in each bucket, with its interval, one panel for each corpus."""
    picture, panels = plots.grid(len(rows), columns=2, width=4.8, height=3.6)
    width = 0.27
    for axes, (corpus, found) in zip(panels, rows.items(), strict=True):
        plots.dress(axes)
        for number, ((added, to), key) in enumerate(_ADDED.items()):
            buckets = [row for row in found if _is(row, part="bucket", **key)]
            axes.bar(
                [row["number"] + (number - 1) * width for row in buckets],
                [row["nats"] for row in buckets],
                yerr=[row["half_width"] for row in buckets],
                label=f"{added} added to {to}",
                **{"width": width, "color": _COLORS[number], "ecolor": "black", "capsize": 2},
            )
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(TITLES[corpus], loc="left", fontsize=11)
        axes.set_xlabel("bucket of words, from frequent to rare")
        axes.set_ylabel("gain per occurrence, nats (95 %)")
        axes.legend(fontsize=8, loc="upper left")
    plots.save(picture, path)
