"""What the benchmarks record: whole or not at all, and the same in the documentation."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import report, runner
from benchmarks.case import Case, Work
from benchmarks.machine import Rates

CPU = torch.device("cpu")


class Sums:
    """A benchmark of two rows; ``stop`` is raised in the second."""

    NAME = "sums"
    TITLE = "Sums"

    def __init__(self, stop: type[BaseException] | None = None) -> None:
        self.stop = stop

    def count(self, full: bool) -> int:
        return 2

    def cases(self, full: bool, device: torch.device) -> Iterator[Case]:
        for length in (100, 200):
            yield Case("sums", f"n={length}", {"ours": self.total, "theirs": self.total}, "ours", Work(length, 0), 1)

    def total(self) -> int:
        if self.stop is not None:
            raise self.stop
        return sum(range(100))


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "measure_rates", lambda device: Rates({1: 1e9}, {1: 1e9}, 1e9))


def run(benchmark: Sums, out: Path) -> report.Record:
    return runner.run(benchmark, out, full=False, device=CPU, rounds=5, command="python -m benchmarks sums")


def test_record_holds_what_was_measured_and_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(Sums(), tmp_path / "new")
    assert report.read_records(tmp_path / "new") == {"sums": json.loads(json.dumps(record))}
    assert [row["label"] for row in record["rows"]] == ["n=100", "n=200"]
    assert record["machine"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "  1/2  sums, n=100" in printed
    assert "  2/2  sums, n=200" in printed
    text = (tmp_path / "new" / "sums.md").read_text()
    assert text.startswith("# Sums\n\n| sums | ours | theirs | floor | over the floor | memory |\n|---|")
    assert "`python -m benchmarks sums`" in text
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["sums.json", "sums.md"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_run_broken_off_leaves_the_last_record(tmp_path: Path, stop: type[BaseException]) -> None:
    run(Sums(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(stop):
        run(Sums(stop), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(PermissionError):
        run(Sums(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tables_go_between_their_markers(tmp_path: Path) -> None:
    record = run(Sums(), tmp_path)
    page = tmp_path / "page.md"
    page.write_text("# Speed\n\n<!-- table: sums -->\nyesterday\n<!-- end -->\n\nThe end.\n")
    report.update_page(page, tmp_path)
    text = page.read_text()
    assert text.startswith("# Speed\n\n<!-- table: sums -->\n| sums | ours |")
    assert text.endswith("<!-- end -->\n\nThe end.\n")
    assert "yesterday" not in text
    assert report.filled(text, {"sums": record}) == text
    with pytest.raises(KeyError):
        report.filled("<!-- table: others -->\n<!-- end -->", {"sums": record})


def test_the_documentation_shows_the_recorded_tables() -> None:
    if not command_line.PAGE.exists():
        pytest.skip("there is no page on performance yet")
    page = command_line.PAGE.read_text(encoding="utf-8")
    assert page == report.filled(page, report.read_records(command_line.RESULTS))


@pytest.mark.parametrize(
    ("number", "text"), [(2.0, "2.00 s"), (0.123456, "123 ms"), (1.5e-6, "1.50 µs"), (3e-9, "3.00 ns")]
)
def test_durations_have_three_digits(number: float, text: str) -> None:
    assert report.duration(number) == text


@pytest.mark.parametrize(("number", "text"), [(None, "-"), (512, "0.512 kB"), (2.5e6, "2.50 MB"), (8.2e9, "8.20 GB")])
def test_sizes_have_three_digits(number: float | None, text: str) -> None:
    assert report.memory_size(number) == text


def test_command_line_names_what_reproduces_a_run() -> None:
    chosen = command_line.arguments(["read", "--full"])
    again = command_line.command("read", chosen, threads=2, device="cpu")
    assert again == "python -m benchmarks read --full --threads 2 --rounds 5 --device cpu"


@pytest.mark.parametrize(
    ("words", "problem"), [(["reed"], "there is no benchmark reed"), (["--rounds", "4"], "fewer than 5 rounds")]
)
def test_command_line_refuses(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.arguments(words)
    assert problem in capsys.readouterr().err
