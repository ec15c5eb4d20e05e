"""Records: ``NAME.json`` with everything measured, the tables made from it, and the line printed for each row."""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TypedDict

from benchmarks.measure import Result, Row

_MARKED = re.compile(r"(<!-- table: ([\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class Record(TypedDict):
    """All that one run of a benchmark leaves behind."""

    name: str
    title: str
    command: str
    date: str
    machine: dict[str, str | int]
    rows: list[Row]


def write(record: Record, folder: Path) -> None:
    """Writes ``NAME.json`` and ``NAME.md``, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / f"{record['name']}.json", json.dumps(record, indent=1) + "\n")
    _write_text(folder / f"{record['name']}.md", f"# {record['title']}\n\n{tables(record)}")


def _write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's files are for their owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def tables(record: Record) -> str:
    """Returns the tables of a record, one for each group, in Markdown."""
    groups = dict.fromkeys(row["group"] for row in record["rows"])
    parts = [_table(group, [row for row in record["rows"] if row["group"] == group]) for group in groups]
    return "\n".join([*parts, _legend(record)])


def _table(group: str, rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    extras = list(dict.fromkeys(name for row in rows for name in row["extra"]))
    heads = [group, *names, "floor", "over the floor", "memory", *extras]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [_cell(row["contenders"].get(name), row["queries"]) for name in names]
        floor = [duration(row["floor"]), f"{row['over_floor']:.3g}x"]
        label = row["label"] + (f" ({row['note']})" if row["note"] else "")
        memory = memory_size(row["contenders"][row["ours"]].get("peak"))
        line = [label, *cells, *floor, memory, *(row["extra"].get(name, "") for name in extras)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def _cell(result: Result | None, queries: int) -> str:
    if result is None:
        return "-"
    if "wall" not in result:
        return result.get("left_out", "-")
    ratio = result.get("ratio", 1.0)
    compared = "" if ratio == 1 else f", **{ratio:.3g}x**"
    fewer = result.get("queries", queries)
    of = f", {fewer} of them" if fewer < queries else ""
    return f"{duration(result['wall'])} ({duration(result.get('cpu', 0.0))}{of}){compared}"


def _legend(record: Record) -> str:
    machine, rows = record["machine"], record["rows"]
    ours = " or ".join(f"*{name}*" for name in dict.fromkeys(row["ours"] for row in rows))
    what = ", ".join(f"{name} {value}" if name != "cpu" else str(value) for name, value in machine.items())
    rates = []
    texts = {"read_rate": "GB/s read", "copy_rate": "GB/s copied (read and written)", "products_rate": "Gflop/s"}
    for key, text in texts.items():
        values = [row[key] / 1e9 for row in rows]
        rates.append(f"{min(values):.0f} to {max(values):.0f} {text}")
    return (
        "Wall time for one query (CPU time; *n of them*: measured with n queries only), medians; in bold how many "
        "times as long it took as "
        f"{ours}. *Floor*: what the bytes and products need at the rates below. *Memory*: what "
        f"{ours} took at its peak for one query, beyond what was there before.\n\n"
        f"`{record['command']}`, {record['date']}. {what}; {', '.join(rates)}.\n"
    )


def line(number: int, total: int, row: Row) -> str:
    """Returns what the terminal shows of a row."""
    ours = row["contenders"][row["ours"]]
    cells = [f"{row['ours']} {duration(ours.get('wall', 0.0))} (cpu {duration(ours.get('cpu', 0.0))})"]
    for name, result in row["contenders"].items():
        if name != row["ours"]:
            cells.append(f"{name} {result['ratio']:.3g}x" if "ratio" in result else f"{name} {result.get('left_out')}")
    cells.append(f"{row['over_floor']:.3g}x floor")
    cells.append(f"memory {memory_size(ours.get('peak'))}")
    cells += [f"{name} {value}" for name, value in row["extra"].items()]
    return f"{number:3}/{total}  {row['group'] + ', ' + row['label']:<48}  {'; '.join(cells)}"


def duration(seconds: float) -> str:
    """Returns a time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-9)} ns"


def memory_size(count: float | None) -> str:
    """Returns a number of bytes with three digits and its unit."""
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{_three(count / size)} {unit}"
    return f"{_three(count / 1e3)} kB"


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:#.3g}"


def filled(page: str, records: dict[str, Record]) -> str:
    """Returns a page with the tables between its markers replaced by those of the records.

    Raises:
        KeyError: If the page has a marker for a table that was never recorded.
    """
    return _MARKED.sub(lambda found: f"{found[1]}{tables(records[found[2]])}{found[3]}", page)


def read_records(folder: Path) -> dict[str, Record]:
    """Returns the records in a folder and those below it by their path, such as ``read`` and ``two-threads/read``."""
    paths = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.json"))}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}


def update_page(page: Path, folder: Path) -> None:
    """Puts the recorded tables into a page."""
    _write_text(page, filled(page.read_text(encoding="utf-8"), read_records(folder)))
