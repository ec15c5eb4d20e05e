"""Table 2 and Figure 8 on a few hundred lines of the Penn Treebank: all stages, stopped and resumed."""

import json
import math
from pathlib import Path

import pytest
from torch import Tensor

from recollect import Parametric, checkpoint
from recollect.data import Corpus, penn_treebank
from recollect.data.fetch import data_folder
from recollect.experiments import figure8, language_models, table2
from recollect.experiments.language_models import Size
from recollect.experiments.runner import read_rows
from recollect.experiments.table2 import Scale, Table2
from recollect.experiments.table2_study import MIXTURES, Study, StudySettings
from recollect.language import CacheGrid, MbPAGrid, Schedule, evaluate, fit_weights, interval

FOLDER = data_folder()
pytestmark = pytest.mark.skipif(
    FOLDER is None or not (FOLDER / "ptb").is_dir(), reason="the Penn Treebank is not in RECOLLECT_DATA"
)
LINES = {"train": 300, "valid": 40, "test": 40}
TINY = Scale(
    Size(16, 12, input_dropout=0.1, state_dropout=0.1, output_dropout=0.1),
    Schedule(epochs=2.0, batch=8, segment=20, rate=0.01, turn=20, precision="float32"),
    StudySettings(
        CacheGrid((50, 200), (0.0, 0.5)),
        (MbPAGrid((200,), (4, 16), (0.5, 2.0)), MbPAGrid((200,), (4,), (0.5,), steps=(2, 4))),
        **{"tune": 400, "dynamic_tune": 200, "statistics": 5, "segment": 10, "rates": (1e-3, 1e-2), "decays": (0.01,)},
    ),
)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """The first lines of the Penn Treebank, and a scale that fits them."""
    files = []
    for part, count in LINES.items():
        lines = getattr(penn_treebank(), part).read_text().splitlines()[:count]
        words = {word for line in files[0].read_text().splitlines() for word in line.split()} if files else None
        known = [" ".join(w if words is None or w in words else "<unk>" for w in line.split()) for line in lines]
        files.append(tmp_path / f"{part}.txt")
        files[-1].write_text("\n".join(known) + "\n")
    few = Corpus(*files)
    monkeypatch.setitem(language_models.CORPORA, "ptb", lambda: few)
    monkeypatch.setitem(table2.SCALES, ("smoke", "ptb"), TINY)
    return few


def rows(out: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "words_per_second"} for row in read_rows(out / "ptb/results.jsonl")]


def kept(out: Path, reader: str, part: str, found: list[dict]) -> dict[str, Tensor]:
    """Returns what each part of the mixtures gave to each word."""
    steps = max(row["step"] for row in found if row["part"] == "train")
    file = out / f"ptb/{reader}-{part}.checkpoint"
    parts = checkpoint.read(file, run={"steps": steps, "name": f"{reader}-{part}"})
    assert parts is not None
    return parts


def test_a_run_has_every_row_and_its_numbers_are_those_of_the_readings(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = table2.run(Table2(out=out))
    found = rows(out)
    results = [row for row in found if row["part"] == "result"]
    assert {(r["reader"], r["mixture"], r["text"]) for r in results} == {
        (reader, mixture, text)
        for reader in ("static", "dynamic")
        for mixture in MIXTURES
        for text in ("valid", "test")
    }
    text = language_models.read("ptb")
    settings = json.loads((out / "ptb/config.json").read_text())["settings"]
    assert (settings["corpus"], settings["size"]["hidden_size"]) == ("ptb", 16)
    base = next(r for r in results if (r["reader"], r["mixture"], r["text"]) == ("static", "model", "test"))
    model = language_models.trained(
        table2.Run(out / "ptb", settings), text, TINY.size, TINY.schedule, seed=0, device="cpu"
    )
    alone = evaluate(model.hidden, Parametric(model.decoder), None, text.test, first=text.vocabulary.end)
    assert base["loss"] == pytest.approx(alone.loss, abs=1e-5)
    assert base["half_width"] == pytest.approx(interval(alone.nats, text.groups(text.test)).half_width, rel=1e-3)
    for row in results:
        static = next(r for r in results if (r["reader"], r["mixture"], r["text"]) == ("static", "model", row["text"]))
        assert row["gain"] == pytest.approx(static["loss"] - row["loss"], abs=1e-6)
        given, valid = (kept(out, row["reader"], part, found) for part in (row["text"], "valid"))
        names = MIXTURES[row["mixture"]]
        weights = fit_weights(*(valid[name] for name in names)).weights  # each reader's own, never of the test text
        assert row["weights"] == pytest.approx(weights.tolist(), abs=1e-4)
        mixed = sum(weight * given[name].double() for weight, name in zip(weights, names, strict=True))
        assert row["loss"] == pytest.approx(float(-mixed.log().mean()), abs=1e-6)
    assert f"{math.exp(base['loss']):.1f}" in table


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table2.run(Table2(out=tmp_path / "whole"))
    for method in ("_dynamic_loss", "_results", "_buckets"):
        with monkeypatch.context() as patch:

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(Study, method, stop)
            with pytest.raises(KeyboardInterrupt):
                table2.run(Table2(out=tmp_path / "stopped"))
    table = figure8.run(Table2(out=tmp_path / "stopped"))
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    assert "MbPA | LSTM + cache | 5 |" in table
    assert (tmp_path / "stopped/figure8.png").read_bytes().startswith(b"\x89PNG")
