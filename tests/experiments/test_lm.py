"""A language model of a user's own text files, from the command line."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recollect import Parametric
from recollect.cli import main
from recollect.errors import DeviceError
from recollect.experiments import language_models
from recollect.experiments import lm as module
from recollect.experiments.runner import Run, read_rows
from recollect.language import (
    Evaluation,
    Schedule,
    Vocabulary,
    blocks,
    gain_by_frequency,
    interval,
    keys_of,
    predictor,
)
from recollect.language import evaluate as evaluate_text
from recollect.language.train import striped_loss

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
    return [float(cells[1]) for cells in rows(table, "model", "+")]


def rows(table: str, *starts: str) -> list[list[str]]:
    """The cells of the lines that start so."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return [row for row in cells if row[0].startswith(starts)]


def readings(out: Path, text: Path, most: int | None = None) -> tuple[Vocabulary, Tensor, Evaluation, Evaluation]:
    """What the library makes of a text, or of its first words, with the model in the folder: alone, and mixed."""
    lm, vocabulary, choice = module._load(out, torch.device("cpu"))
    tokens = vocabulary.encode(text)[:most]
    mixture, memories = predictor(lm, choice, key="input")
    given = {"tokens": tokens, "first": vocabulary.end}
    alone = evaluate_text(keys_of(lm, "input"), Parametric(lm.output), None, **given)
    return vocabulary, tokens, alone, evaluate_text(keys_of(lm, "input"), mixture, memories, **given)


def pipe(content: bytes) -> Path:
    """A path from which this can be read once."""
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    return Path(f"/dev/fd/{reader}")


class Elsewhere(torch.Tensor):
    """A tensor that behaves as one on a GPU: it does not mix with those on the CPU until it is moved there."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        if any(type(one) is torch.Tensor and one.dim() for one in args):
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


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


def test_the_printed_numbers_are_those_of_the_library(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    assert train(files, out) == 0
    files["test"].write_text(songs(1400, start=4))  # of ten thousand words, for intervals
    capsys.readouterr()
    assert evaluate(files["test"], out) == 0
    printed = capsys.readouterr().out
    vocabulary, tokens, alone, mixed = readings(out, files["test"])
    assert len(tokens) > 10_000
    groups = blocks(len(tokens))
    change = interval(mixed.nats - alone.nats, groups)
    assert change.mean < -0.1
    model, mixture = rows(printed, "model", "+ cache + MbPA")
    assert model[1:4] == [f"{alone.perplexity:.1f}", f"{alone.loss:.3f}", ""]
    assert mixture[1:3] == [f"{mixed.perplexity:.1f}", f"{mixed.loss:.3f}"]
    assert mixture[3] == f"{change.mean:+.3f} +- {change.half_width:.3f}"
    assert all(float(row[4]) > 0 for row in (model, mixture))
    buckets = gain_by_frequency(tokens, vocabulary.counts, alone.nats, mixed.nats, groups)
    assert rows(printed, *"12345") == [
        [
            *(str(number), str(bucket.words), str(bucket.occurrences), str(bucket.rarest), f"{bucket.percent:.1f}"),
            f"{bucket.nats.mean:+.3f} +- {bucket.nats.half_width:.3f}",
        ]
        for number, bucket in enumerate(buckets, 1)
    ]
    assert sum(bucket.occurrences for bucket in buckets) == len(tokens)


def test_a_short_text_has_no_intervals(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks that a few hundred words can be cut into are not independent of each other."""
    out = tmp_path / "lm"
    assert train(files, out) == 0
    capsys.readouterr()
    assert evaluate(files["test"], out) == 0
    printed = capsys.readouterr().out
    assert "; too short for intervals, which take 10,000" in printed.splitlines()[0]
    assert "+-" not in printed
    _, _, alone, mixed = readings(out, files["test"])
    assert rows(printed, "+ cache + MbPA")[0][3] == f"{mixed.loss - alone.loss:+.3f}"


def test_the_training_text_is_no_validation_text(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train({**files, "valid": files["text"]}, tmp_path / "lm") == 2
    assert "text.txt has the words of the training text" in error(capsys)


@pytest.mark.parametrize("part", ["text", "valid"])
def test_other_texts_are_another_training(
    part: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as the ones before, and yet others: what was found by the first would stay among the results."""
    assert train(files, tmp_path / "lm") == 0
    content = files[part].read_text()
    files[part].write_text(content.replace("ann", "tmp").replace("bob", "ann").replace("tmp", "bob"))
    assert train(files, tmp_path / "lm") == 2
    assert "holds a run with other settings" in error(capsys)
    moved = tmp_path / "moved.txt"
    moved.write_text(content)
    assert train({**files, part: moved}, tmp_path / "lm") == 0


@pytest.mark.parametrize("name", ["model", "config.json", "results.jsonl", "table.md"])
def test_files_of_others_are_not_written_over(
    name: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "lm" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    assert train(files, tmp_path / "lm") == 2
    assert str(mine) in error(capsys)
    assert mine.read_text() == "mine"
    assert os.listdir(mine.parent) == [name]


def test_settings_are_chosen_by_the_first_words_of_the_validation_text(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = files["valid"].read_text().splitlines()
    backwards = "".join(" ".join(reversed(line.split())) + "\n" for line in lines)
    files["valid"].write_text(backwards[: len(backwards) // 2] + "\n" + files["text"].read_text()[:2000])
    out = tmp_path / "lm"
    assert train(files, out, "--tune", "150", "--epochs", "10", "--batch", "8", "--rate", "0.01") == 0
    table = capsys.readouterr().out
    model, mixture = rows(table, "model", "+ cache + MbPA")
    _, _, alone, mixed = readings(out, files["valid"], 150)
    assert float(model[1]) == pytest.approx(alone.perplexity, abs=0.06)
    assert float(model[2]) == pytest.approx(alone.loss, abs=6e-4)
    assert float(mixture[2]) == pytest.approx(mixed.loss, abs=0.01)
    assert float(mixture[3]) == pytest.approx(mixed.loss - alone.loss, abs=0.01)
    for other in (readings(out, files["text"], 150), readings(out, files["valid"])):
        assert other[2].loss < alone.loss - 0.1, "another text would not be noticed"
    lm, vocabulary, _ = module._load(out, torch.device("cpu"))  # with the weights that were best on this text
    best = min(row["valid"] for row in read_rows(out / "results.jsonl"))
    assert striped_loss(lm, vocabulary.encode(files["valid"])) == pytest.approx(best, rel=0.01)


def test_a_text_shorter_than_the_buckets(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    assert train(files, out) == 0
    (tmp_path / "short").write_text("ann ann\n")
    capsys.readouterr()
    assert evaluate(tmp_path / "short", out) == 0
    assert [row[2] for row in rows(capsys.readouterr().out, *"12345")] == ["1", "2"]


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
        (b"\n \n\n", "bad.txt holds blank lines only"),
        (b"ann has a \xff\xfe and\n", "no text in utf-8: byte 0xff"),
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
    for part in ("text", "valid"):
        assert train({**files, part: bad}, out) == 2
        assert message in error(capsys)


def test_new_words_can_be_read_though_no_word_was_rare(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm"
    for part in ("valid", "test"):
        files[part].write_text(files[part].read_text() + "ann has a zebra\n")
    assert train(files, out, "--min-count", "2") == 0
    assert evaluate(files["test"], out) == 0
    assert all(1 < perplexity < 30 for perplexity in perplexities(capsys.readouterr().out))
    _, vocabulary, _ = module._load(out, torch.device("cpu"))
    assert vocabulary.counts[vocabulary.number("zebra")] == 0


def test_a_pipe(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a text is read once it may come through a pipe."""
    out, content = tmp_path / "lm", files["test"].read_bytes()
    assert train(files, out) == 0
    capsys.readouterr()
    assert evaluate(files["test"], out) == 0
    expected = perplexities(capsys.readouterr().out)
    assert evaluate(pipe(content), out) == 0
    assert perplexities(capsys.readouterr().out) == expected
    assert train({**files, "text": pipe(content)}, out) == 2
    assert "--text must be a file, got /dev/fd/" in error(capsys)


@pytest.mark.parametrize("rate", ["1e30", "500"])
def test_training_that_diverges(
    rate: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether by a loss of NaN or by one whose perplexity is no number of the machine's."""
    assert train(files, tmp_path / "lm", "--rate", rate) == 2
    assert "Start anew with a lower " in error(capsys)
    assert not (tmp_path / "lm" / "model").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--tune", "-5"), ("--tune", "0"), ("--batch", "0"), ("--batch", "-3"), ("--min-count", "0")),
        *(("--max-vocabulary", "1"), ("--hidden-size", "0"), ("--embedding-size", "-1")),
    ],
)
def test_settings_out_of_range(
    option: str, value: str, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(files, tmp_path / "lm", option, value) == 2
    assert f"{option} must be a whole number " in error(capsys)
    assert not (tmp_path / "lm").exists()


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", ""])
def test_a_device_that_is_not_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before anything is read, and so by name although no file is there."""
    message = "device must be one that PyTorch can use here ('cpu'"
    nothing = dict.fromkeys(("text", "valid"), tmp_path / "nothing")
    for status in (
        train(nothing, tmp_path / "lm", "--device", device),
        evaluate(tmp_path / "nothing", tmp_path / "lm", "--device", device),
    ):
        assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert [message in line and f"got {device!r} (" in line for line in lines] == [True, True]
    text = language_models.Text(Vocabulary(["<eos>"], torch.tensor([1])), *[torch.zeros(9, dtype=torch.long)] * 3)
    size = language_models.Size(4, 4, 0.0, 0.0, 0.0)
    with pytest.raises(DeviceError, match="Name one of those"):
        language_models.trained(Run(tmp_path / "run", {}), text, size, Schedule(batch=1), seed=0, device=device)


def test_what_lies_on_a_device_is_brought_back(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "lm"
    assert train(files, out) == 0
    assert evaluate(files["test"], out) == 0
    expected = perplexities(capsys.readouterr().out)[-2:]

    def elsewhere(*given: Any, **settings: Any) -> Evaluation:
        found = evaluate_text(*given, **settings)
        return found._replace(nats=found.nats.as_subclass(Elsewhere), tokens=found.tokens.as_subclass(Elsewhere))

    monkeypatch.setattr(module, "evaluate", elsewhere)
    assert evaluate(files["test"], out) == 0
    assert perplexities(capsys.readouterr().out) == expected


# Training and reading on a device need one. That results come back from it is tested everywhere, just above.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: it trains there and reads on both devices")
def test_on_a_gpu(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(files, tmp_path / "lm", "--device", "cuda") == 0
    capsys.readouterr()
    results = []
    for device in ("cuda", "cpu"):
        assert evaluate(files["test"], tmp_path / "lm", "--device", device) == 0
        results.append(perplexities(capsys.readouterr().out))
    assert results[0] == pytest.approx(results[1], abs=0.11)


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
    assert "There are recollect lm train and recollect lm evaluate" in error(capsys)
