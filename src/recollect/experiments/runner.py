"""A run of an experiment: a folder that records the settings, every result as it comes, a table and a figure.

    config.json     the settings, the commands and the versions that made the results
    results.jsonl   one line for each result, appended and synced as it is measured
    table.md        the table
    figure.png      the picture

A run that was stopped goes on where it was: what ``results.jsonl`` holds is not measured again.
"""

import itertools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch

from recollect.errors import FormatError, SettingError, require_choice

_MOST_LETTERS = 80  # of a setting in a message
_SECONDS_BETWEEN_LINES = 20.0  # of the progress display where the output is no terminal


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """The folder of one run.

    Args:
        folder: Where it is; created if need be.
        settings: What determines the results. A folder that holds results of other settings is refused.

    Raises:
        SettingError: If the folder belongs to another run.
        FormatError: If its files are not those of a run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._results = folder / "results.jsonl"
        refuse_strange(folder / "config.json", self._results, folder / "table.md")
        # Two commands at a time in one folder may both have added a row.
        self.rows = list({json.dumps(row, sort_keys=True): row for row in read_rows(self._results)}.values())
        plain = json.loads(json.dumps(settings))
        config = folder / "config.json"
        before = _read_config(config) if self.rows or config.exists() else {}
        if not self.rows:  # nothing has been measured
            before = {"settings": plain, "commands": []}
        other = sorted(k for k in plain.keys() | before["settings"].keys() if plain.get(k) != before["settings"].get(k))
        if other:
            other = ["scale"] if "scale" in other else other  # which stands for many others
            there, asked = before["settings"], plain
            pairs = {name: (there.get(name), asked.get(name)) for name in other}
            what = ", ".join(f"{k}={_shortly(a, b)} there, {_shortly(b, a)} asked" for k, (a, b) in pairs.items())
            raise SettingError(f"{folder} holds a run with other settings ({what}). Choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        command = shlex.join(["recollect", *sys.argv[1:]])
        record = {
            "commands": [*(c for c in before["commands"] if c != command), command],
            "settings": plain,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        write_text(config, json.dumps(record, indent=2) + "\n")

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Returns the row with these entries, or None if it has not been measured."""
        wanted = key.items()
        return next((row for row in self.rows if wanted <= row.items()), None)

    def add(self, **row: Any) -> None:
        """Appends a row and syncs it to disk."""
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def write_table(self, text: str) -> None:
        """Writes table.md."""
        write_text(self.folder / "table.md", text)


@runtime_checkable
class DataClass(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Scale = TypeVar("Scale", bound=DataClass)


@runtime_checkable
class Settings(Protocol):
    """What the commands of all experiments have."""

    @property
    def scale(self) -> str: ...

    @property
    def out(self) -> Path: ...


def begin(config: Settings, scales: Mapping[str, Scale]) -> tuple[Run, Scale]:
    """Returns the record of a run that draws ``figure.png``, and the scale that was asked for.

    Args:
        config: The command.
        scales: A dataclass for each name that ``config.scale`` may have; the record keeps what it says.

    Raises:
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
        FormatError: If the folder's files are not those of a run.
    """
    require_choice("--scale", config.scale, tuple(scales))
    refuse_strange(config.out / "config.json", config.out / "figure.png")
    scale = scales[config.scale]
    return Run(config.out, {"scale": config.scale, **asdict(scale)}), scale


def _shortly(value: object, other: object) -> str:
    """Returns a value as text, of a long one the part around where it differs from the other."""
    text = str(value)
    if len(text) <= _MOST_LETTERS:
        return text
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, str(other), strict=False)))
    start = max(0, same - _MOST_LETTERS // 2)
    return f"{'... ' if start else ''}{text[start : start + _MOST_LETTERS]} ..."


def refuse_strange(config: Path, *files: Path) -> None:
    """Refuses files that a run would write over although no run has made them.

    Raises:
        SettingError: If one of them is there without the record of a run.
    """
    for file in files:
        if file.exists() and not config.exists():
            raise SettingError(f"{file} is there, but it is of no run. Choose another folder with --out.")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(record["settings"]), "commands": list(record["commands"])}
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is missing or not the record of a run. Choose another folder with --out.") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads results.jsonl and cuts off a last line that a kill left half-written.

    Raises:
        FormatError: If any other line is no JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise FormatError(f"line {number} of {path} is no JSON. Repair or delete the file.") from error
        if not isinstance(row, dict):
            raise FormatError(f"line {number} of {path} is no JSON object. Repair or delete the file.")
        rows.append(row)
    if len(whole) < len(data):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return rows


class Progress:
    """A live bar with the time left; plain lines now and then where the output is no terminal.

    One that starts inside another takes its place on the screen until it ends.

    Args:
        total: The amount of work, in any unit.
        title: What is being done.
    """

    _open: ClassVar[list["Progress"]] = []

    def __init__(self, total: int | float, title: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %")),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(title, total=total)
        self._total = total
        self.title = title
        self._done = 0.0
        self._skipped = 0.0
        self._start = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        if Progress._open:
            Progress._open[-1]._bar.stop()
        Progress._open.append(self)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        Progress._open.remove(self)
        if Progress._open:
            Progress._open[-1]._bar.start()

    def skip(self, amount: int | float) -> None:
        """Counts work that an earlier run has done, without taking it for speed."""
        self._done += amount
        self._skipped += amount
        self._bar.update(self._task, completed=self._done)

    def advance(self, amount: int | float, title: str | None = None) -> None:
        """Counts work done."""
        self.title = title or self.title
        self._done += amount
        self._bar.update(self._task, completed=self._done, description=self.title)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last > _SECONDS_BETWEEN_LINES:
            self._last = now
            speed = (self._done - self._skipped) / (now - self._start)
            left = (self._total - self._done) / speed if speed else 0.0
            print(f"{self.title}: {self._done / self._total:.0%}, {left / 60:.1f} min left", file=sys.stderr)
