"""A language model of a user's own text files, from the command line."""

from pathlib import Path

import pytest

from recollect.cli import main
from recollect.experiments.runner import read_rows

SMALL = ["--hidden-size", "12", "--embedding-size", "8", "--epochs", "3", "--min-count", "1", "--tune", "200"]


def songs(count: int, start: int = 0) -> str:
    """Verses that count up: each has a word of its own, which comes back at once."""
    names = ("ann", "bob", "cat", "dan", "eve", "fay", "gus")
    return "".join(
        f"{names[n % 7]} has a {names[n * n % 7]} and {names[n % 7]} sings\n" for n in range(start, start + count)
    )


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / f"{name}.txt" for name in ("text", "valid", "test")}
    for (name, file), count in zip(found.items(), (400, 40, 60), strict=True):
        file.write_text(songs(count, start=len(name)))
    return found


def train(files: dict[str, Path], out: Path, *more: str) -> int:
    given = ["--text", str(files["text"]), "--valid", str(files["valid"]), "--out", str(out)]
    return main(["lm", "train", *given, *SMALL, *more])


def evaluate(text: Path, model: Path, *more: str) -> int:
    return main(["lm", "evaluate", "--text", str(text), "--model", str(model), *more])


def perplexities(table: str) -> list[float]:
    return [float(line.split(" | ")[1]) for line in table.splitlines()[2:] if line.startswith(("| model", "| +"))]


def error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_it_trains_chooses_and_reads(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    assert train(files, out) == 0
    table = capsys.readouterr().out
    assert "| + cache + MbPA |" in table
    assert table in (out / "table.md").read_text() + "\n"
    assert any(row["part"] == "train" for row in read_rows(out / "results.jsonl"))
    assert train(files, out) == 0  # goes on where it was: at its end
    assert capsys.readouterr().out == table
    assert evaluate(files["test"], out) == 0
    printed = capsys.readouterr().out
    text = files["test"].read_text()
    assert printed.startswith(f"{len(text.split()) + text.count(chr(10))} words of ")  # the first one and <eos> too
    alone, mixed = perplexities(printed)[-2:]
    assert 1 < mixed < alone < 30


def test_what_is_read_is_what_was_chosen(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the text that the choice was made by, reading word by word costs what the grid said."""
    out = tmp_path / "lm"
    assert train(files, out, "--tune", "1000") == 0
    alone, _, _, mixed = perplexities(capsys.readouterr().out)
    assert evaluate(files["valid"], out) == 0
    assert perplexities(capsys.readouterr().out) == pytest.approx([alone, mixed], abs=0.11)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"ann has a \xff\xfe and\n", "no text in utf-8: byte 0xff"),
        (b"ann has a zebra\n", "zebra"),
        (None, "No such file"),
    ],
)
def test_a_text_that_cannot_be_read(
    content: bytes | None, message: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    assert train(files, out) == 0
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    assert evaluate(bad, out) == 2
    assert message in error(capsys)
    assert train({**files, "text": bad if content != b"ann has a zebra\n" else files["text"], "valid": bad}, out) == 2
    assert message in error(capsys)


def test_other_encodings(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in files.values():
        file.write_bytes(file.read_text().replace("ann", "änn").encode("latin-1"))
    out = tmp_path / "lm"
    assert train(files, out) == 2
    assert "pass the encoding that it has" in error(capsys)
    assert train(files, out, "--encoding", "latin-1") == 0
    assert evaluate(files["test"], out, "--encoding", "latin-1") == 0


def test_no_model(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(files["test"], tmp_path / "nothing") == 2
    assert "recollect lm train" in error(capsys)
    assert main(["lm", "sing"]) == 2
    assert "recollect lm train or recollect lm evaluate" in error(capsys)
