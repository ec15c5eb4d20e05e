"""Table 2 and Figure 8 on a few hundred lines of each corpus: all stages, stopped and resumed, and what they show."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from recollect import Parametric, checkpoint
from recollect.data import Corpus, penn_treebank, wikitext_2
from recollect.data.fetch import data_folder
from recollect.errors import NonFiniteError, SettingError
from recollect.experiments import figure8, language_models, table2, table2_report
from recollect.experiments.language_models import Size, Text
from recollect.experiments.runner import Run, read_rows
from recollect.experiments.table2 import Scale, Table2
from recollect.experiments.table2_study import MIXTURES, Study, StudySettings
from recollect.language import (
    CacheGrid,
    DynamicEvaluation,
    LSTMModel,
    MbPAGrid,
    Schedule,
    Vocabulary,
    evaluate,
    fit_weights,
    gain_by_frequency,
    gradient_statistics,
    interval,
)

FOLDER = data_folder()
pytestmark = pytest.mark.skipif(
    FOLDER is None or not (FOLDER / "ptb").is_dir(), reason="the Penn Treebank is not in RECOLLECT_DATA"
)
LINES = {"train": (0, 300), "valid": (0, 60), "test": (0, 60)}
ARTICLES = {"train": 14, "valid": 5, "test": 5}
TINY = Scale(
    Size(16, 12, input_dropout=0.1, state_dropout=0.1, output_dropout=0.1),
    Schedule(epochs=2.0, batch=8, segment=20, rate=0.01, turn=20, precision="float32"),
    StudySettings(
        CacheGrid((50, 200), (0.0, 0.5)),
        (MbPAGrid((200,), (4, 16), (0.5, 2.0)), MbPAGrid((200,), (4,), (0.5,), steps=(2, 4))),
        **{"valid": 1200, "tune": 400, "dynamic_tune": 200, "statistics": 5},
        **{"segment": 10, "rates": (1e-5, 1e-4), "decays": (0.01, 0.001)},
    ),
)


class Ran(NamedTuple):
    """A run that is over."""

    out: Path
    table: str


def few_lines(folder: Path, **lines: tuple[int, int]) -> Corpus:
    """Returns some lines of the Penn Treebank, from one to another of each part; the first ones unless given."""
    chosen = LINES | lines
    return write(
        folder, {part: getattr(penn_treebank(), part).read_text().splitlines()[slice(*chosen[part])] for part in chosen}
    )


def write(folder: Path, parts: dict[str, list[str]]) -> Corpus:
    """Writes a corpus in which what the training text does not have is ``<unk>``."""
    folder.mkdir()
    known = {word for line in parts["train"] for word in line.split()}
    for part, lines in parts.items():
        text = [" ".join(word if word in known else "<unk>" for word in line.split()) for line in lines]
        (folder / f"{part}.txt").write_text("\n".join(text) + "\n")
    return Corpus(*(folder / f"{part}.txt" for part in parts))


def few_articles(path: Path, count: int) -> list[list[str]]:
    """Returns the beginnings of the first articles of a WikiText-2 file: of 15 lines each the first 40 words."""
    articles: list[list[str]] = []
    with path.open() as file:
        for line in file:
            if line.startswith(" = ") and not line.startswith(" = = "):
                if len(articles) == count:
                    break
                articles.append([])
            if articles and len(articles[-1]) < 15:
                articles[-1].append(" ".join(islice(line.split(), 40)))
    return [[*lines, ""] for lines in articles]  # a title stands between blank lines


def use(patch: pytest.MonkeyPatch, name: str, corpus: Corpus) -> None:
    """Puts a corpus in the place of the real one, and a scale that fits it."""
    patch.setitem(language_models.CORPORA, name, lambda: corpus)
    patch.setitem(table2.SCALES, ("smoke", name), TINY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """A run on the first lines of the Penn Treebank; for all tests of this file, which leave it as it is."""
    folder = tmp_path_factory.mktemp("ptb")
    with pytest.MonkeyPatch.context() as patch:
        use(patch, "ptb", few_lines(folder / "corpus"))
        yield Ran(folder / "out", table2.run(Table2(out=folder / "out")))


@pytest.fixture(scope="module")
def both(whole: Ran, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The same folder once WikiText-2 has been run in it too."""
    if FOLDER is None or not (FOLDER / "wikitext-2").is_dir():
        pytest.skip("WikiText-2 is not in RECOLLECT_DATA")
    folder = tmp_path_factory.mktemp("wikitext-2")
    shutil.copytree(whole.out, folder / "out")
    parts = {part: few_articles(getattr(wikitext_2(), part), count) for part, count in ARTICLES.items()}
    with pytest.MonkeyPatch.context() as patch:
        use(patch, "wikitext-2", write(folder / "corpus", {part: list(chain(*found)) for part, found in parts.items()}))
        yield Ran(folder / "out", table2.run(Table2(corpus="wikitext-2", out=folder / "out")))


def rows(out: Path, corpus: str = "ptb") -> list[dict[str, Any]]:
    """Returns the rows but for their times, which no two runs share."""
    found = read_rows(out / corpus / "results.jsonl")
    return [{name: value for name, value in row.items() if name != "words_per_second"} for row in found]


def pick(found: list[dict[str, Any]], **key: Any) -> list[dict[str, Any]]:
    return [row for row in found if key.items() <= row.items()]


def kept(out: Path, name: str, corpus: str = "ptb") -> dict[str, Tensor]:
    """Returns what a file beside the results holds: for a reading, what each part of the mixtures gave to each word."""
    steps = max(row["step"] for row in pick(rows(out, corpus), part="train"))
    parts = checkpoint.read(out / corpus / f"{name}.checkpoint", run={"steps": steps, "name": name})
    assert parts is not None
    return parts


def trained(out: Path, text: Text, corpus: str = "ptb") -> LSTMModel:
    """Returns the model of a run that is over."""
    settings = json.loads((out / corpus / "config.json").read_text())["settings"]
    record = Run(out / corpus, settings)
    return language_models.trained(record, text, TINY.size, TINY.schedule, seed=0, device="cpu")


def test_a_run_has_every_row_and_its_numbers_are_those_of_the_readings(whole: Ran) -> None:
    out, table = whole
    results = pick(rows(out), part="result")
    assert all(math.isfinite(row[name]) for row in results for name in ("loss", "half_width", "gain_half_width"))
    assert {(r["reader"], r["mixture"], r["text"]) for r in results} == {
        (reader, mixture, text)
        for reader in ("static", "dynamic")
        for mixture in MIXTURES
        for text in ("valid", "test")
    }
    text = language_models.read("ptb")
    settings = json.loads((out / "ptb/config.json").read_text())["settings"]
    assert (settings["corpus"], settings["size"]["hidden_size"]) == ("ptb", 16)
    model = trained(out, text)
    for part, tokens in (("valid", text.valid[:1200]), ("test", text.test)):
        (base,) = pick(results, reader="static", mixture="model", text=part)
        alone = evaluate(model.hidden, Parametric(model.decoder), None, tokens, first=text.vocabulary.end)
        assert base["loss"] == pytest.approx(alone.loss, abs=1e-5)
        assert base["half_width"] == pytest.approx(interval(alone.nats, text.groups(tokens)).half_width, rel=1e-3)
        assert f"{math.exp(base['loss']):.1f}" in table
    for row in results:
        (static,) = pick(results, reader="static", mixture="model", text=row["text"])
        assert row["gain"] == pytest.approx(static["loss"] - row["loss"], abs=1e-6)
        given, valid = (kept(out, f"{row['reader']}-{part}") for part in (row["text"], "valid"))
        names = MIXTURES[row["mixture"]]
        weights = fit_weights(*(valid[name] for name in names)).weights  # each reader's own, never of the test text
        assert row["weights"] == pytest.approx(weights.tolist(), abs=1e-4)
        mixed = sum(weight * given[name].double() for weight, name in zip(weights, names, strict=True))
        assert row["loss"] == pytest.approx(float(-mixed.log().mean()), abs=1e-6)


def test_another_test_text_changes_its_own_rows_and_nothing_else(whole: Ran, tmp_path: Path) -> None:
    """No setting, no weight and nothing of the validation rows comes from the text that is reported."""
    with pytest.MonkeyPatch.context() as patch:
        use(patch, "ptb", few_lines(tmp_path / "corpus", test=(60, 120)))
        table2.run(Table2(out=tmp_path / "out"))
    before, after = rows(whole.out), rows(tmp_path / "out")
    for part, count in (("train", 2), ("grid", 10), ("choice", 1), ("dynamic", 3)):
        found = pick(before, part=part)
        assert len(found) >= count
        assert pick(after, part=part) == found
    assert pick(after, part="result", text="valid") == pick(before, part="result", text="valid")
    tested = pick(before, part="result", text="test"), pick(after, part="result", text="test")
    for one, other in zip(*tested, strict=True):
        assert other["weights"] == one["weights"]
        assert abs(other["loss"] - one["loss"]) > 1e-3
    for one, other in zip(pick(before, part="bucket"), pick(after, part="bucket"), strict=True):
        assert other != one


def test_settings_are_chosen_by_the_validation_text_and_statistics_are_the_training_text_s(whole: Ran) -> None:
    text = language_models.read("ptb")
    model, first = trained(whole.out, text), text.vocabulary.end
    (choice,) = pick(rows(whole.out), part="choice")
    alone = evaluate(model.hidden, Parametric(model.decoder), None, text.valid[:400], first=first)
    assert choice["model"] == pytest.approx(alone.loss, abs=1e-5)

    statistics = gradient_statistics(model, text.train, batches=5)
    found = kept(whole.out, "statistics")
    assert found.keys() == statistics.keys()
    for name, part in statistics.items():
        torch.testing.assert_close(found[name], part)
    tried = pick(rows(whole.out), part="dynamic")
    assert [(row["rate"], row["decay"]) for row in tried[:2]] == [(1e-5, 0.01), (1e-4, 0.01)]
    assert (tried[2]["rate"], tried[2]["decay"]) == (min(tried[:2], key=lambda row: row["loss"])["rate"], 0.001)
    losses = []
    for row in tried:
        with DynamicEvaluation(model, statistics, rate=row["rate"], decay=row["decay"]) as dynamic:
            given = dynamic.hidden, Parametric(model.decoder), None, text.valid[:200]
            losses.append(evaluate(*given, first=first, block=10, after=dynamic.learn).loss)
    assert [row["loss"] for row in tried] == pytest.approx(losses, abs=1e-4)


def test_articles_are_what_a_run_on_wikitext_takes_for_independent(both: Ran) -> None:
    """Half widths are those over the articles as they were put together, in results and in buckets."""
    text = language_models.read("wikitext-2")
    sizes = {
        part: torch.tensor(
            [
                sum(len(line.split()) + 1 for line in lines)  # <eos> ends each
                for lines in few_articles(getattr(wikitext_2(), part), ARTICLES[part])
            ]
        )
        for part in ("valid", "test")
    }
    groups = {part: torch.arange(len(found)).repeat_interleave(found) for part, found in sizes.items()}
    results = pick(rows(both.out, "wikitext-2"), part="result")
    nats = {}
    for row in results:
        given, base = kept(both.out, f"{row['reader']}-{row['text']}", "wikitext-2"), row["text"]
        mixed = zip(row["weights"], MIXTURES[row["mixture"]], strict=True)
        cost = -sum(weight * given[name].double() for weight, name in mixed).log()
        nats[row["reader"], row["mixture"], row["text"]] = cost
        own = groups[row["text"]][: row["words"]]
        assert (len(cost), len(own)) == (row["words"], row["words"])
        gain = nats["static", "model", base] - cost
        assert row["half_width"] == pytest.approx(interval(cost, own).half_width, rel=0.01)
        assert row["gain_half_width"] == pytest.approx(interval(gain, own).half_width, rel=0.02, abs=1e-4)
    for before, after in (("cache", "both"), ("model", "mbpa"), ("model", "cache")):
        costs = (nats["static", mixture, "test"].float() for mixture in (before, after))
        expected = gain_by_frequency(text.test, text.vocabulary.counts, *costs, groups["test"])
        found = pick(rows(both.out, "wikitext-2"), part="bucket", before=before, after=after)
        assert [row["number"] for row in found] == [1, 2, 3, 4, 5]
        for row, bucket in zip(found, expected, strict=True):
            assert (row["words"], row["occurrences"], row["rarest"]) == bucket[:3]
            close = {"rel": 0.02, "abs": 1e-4}
            assert row["nats"] == pytest.approx(bucket.nats.mean, **close)
            assert row["half_width"] == pytest.approx(bucket.nats.half_width, **close)
            assert row["deviation"] == pytest.approx(bucket.deviation, **close)
            assert row["percent"] == pytest.approx(bucket.percent, rel=0.02, abs=1e-2)


def test_both_corpora_of_a_folder_are_shown(both: Ran, whole: Ran) -> None:
    assert both.table == (both.out / "table.md").read_text()
    assert [line for line in both.table.splitlines() if line.startswith("#")] == ["### Penn Treebank", "### WikiText-2"]
    assert both.table.startswith(whole.table.rstrip("\n"))
    gains = table2_report.buckets(both.out)
    assert [line for line in gains.splitlines() if line.startswith("#")] == ["### Penn Treebank", "### WikiText-2"]
    assert (both.out / "figure8.png").read_bytes() != (whole.out / "figure8.png").read_bytes()


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    whole: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("_dynamic_loss", "_results", "_buckets"):
        with monkeypatch.context() as patch:

            def stop(*_: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(Study, method, stop)
            with pytest.raises(KeyboardInterrupt):
                table2.run(Table2(out=tmp_path / "stopped"))
    table2.run(Table2(out=tmp_path / "stopped"))
    assert rows(tmp_path / "stopped") == rows(whole.out)


def test_figure8_needs_the_results_only(whole: Ran, tmp_path: Path) -> None:
    """The readings and the model need not be there any more: a clone has none."""
    (tmp_path / "out/ptb").mkdir(parents=True)
    for name in ("config.json", "results.jsonl"):
        shutil.copy(whole.out / "ptb" / name, tmp_path / "out/ptb" / name)
    table = figure8.run(figure8.Figure8(out=tmp_path / "out"))
    assert "MbPA | LSTM + cache | 5 |" in table
    assert (tmp_path / "out/figure8.png").read_bytes().startswith(b"\x89PNG")
    assert rows(tmp_path / "out") == rows(whole.out)
    with pytest.raises(SettingError, match="holds a run with other settings"):
        figure8.run(figure8.Figure8(out=tmp_path / "out", seed=1))


def test_files_of_others_are_not_written_over(tmp_path: Path) -> None:
    for name in ("table.md", "figure8.png"):
        mine = tmp_path / name / name
        mine.parent.mkdir()
        mine.write_text("mine")
        with pytest.raises(SettingError, match=f"{name} is there, but it is of no run"):
            table2.run(Table2(out=mine.parent))
        assert mine.read_text() == "mine"


def test_step_sizes_that_diverge_are_not_chosen(tmp_path: Path) -> None:
    """Nothing is smaller than NaN, and so the first one would be."""
    tokens = torch.randint(10, (600,), generator=torch.Generator().manual_seed(0))
    text = Text(Vocabulary(["<eos>", *"abcdefghi"], torch.ones(10, dtype=torch.long)), tokens, tokens, tokens)
    lm = LSTMModel(10, hidden_size=8, embedding_size=4, generator=torch.Generator().manual_seed(0)).eval()

    def study(name: str, *rates: float) -> Study:
        record = Run(tmp_path / name, {})
        record.add(part="train", step=1)
        return Study(record, text, lm, replace(TINY.study, rates=rates))

    assert study("one", 1e30, 1e-4)._dynamic_choice()[0] == 1e-4
    with pytest.raises(NonFiniteError, match="diverges with all rates"):
        study("none", 1e30, 1e31)._dynamic_choice()
    assert "NaN" not in (tmp_path / "one/results.jsonl").read_text()
