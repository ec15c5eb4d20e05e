"""A run's folder: resumable, exact about its settings, whole after any interruption."""

import json
from pathlib import Path

import pytest

from recollect.errors import FormatError, SettingError
from recollect.experiments.runner import Progress, Run, read_rows, write_text


def test_rows_are_found_again_by_the_next_run(tmp_path: Path) -> None:
    run = Run(tmp_path, {"steps": 5})
    run.add(seed=0, curve="mlp", correct=3)
    again = Run(tmp_path, {"steps": 5})
    assert again.find(seed=0, curve="mlp") == {"seed": 0, "curve": "mlp", "correct": 3}
    assert again.find(seed=1) is None


def test_other_settings_are_refused_by_name_and_nothing_changes(tmp_path: Path) -> None:
    Run(tmp_path, {"steps": 5, "rate": 0.1}).add(seed=0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SettingError, match=r"steps=5 there, 6 asked"):
        Run(tmp_path, {"steps": 6, "rate": 0.1})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_of_another_scale_only_the_scale_is_named(tmp_path: Path) -> None:
    Run(tmp_path, {"scale": "smoke", "steps": 5, "rates": [0.1] * 50}).add(seed=0)
    with pytest.raises(SettingError) as caught:
        Run(tmp_path, {"scale": "small", "steps": 6, "rates": [0.2] * 50})
    assert "(scale=smoke there, small asked)" in str(caught.value)
    with pytest.raises(SettingError, match=r"\(steps=5 there, 6 asked\)"):
        Run(tmp_path, {"scale": "smoke", "steps": 6, "rates": [0.1] * 50})


def test_of_long_values_the_part_that_differs_is_shown(tmp_path: Path) -> None:
    Run(tmp_path, {"grid": {"rates": list(range(500))}}).add(seed=0)
    with pytest.raises(SettingError) as caught:
        Run(tmp_path, {"grid": {"rates": [7] * 500}})
    text = str(caught.value).removeprefix(str(tmp_path))
    assert "grid={'rates': [0, 1, 2," in text
    assert "... there, {'rates': [7, 7, 7," in text
    assert len(text) < 300
    assert len(text.splitlines()) == 1


def test_a_row_that_two_commands_have_added_counts_once(tmp_path: Path) -> None:
    lines = ['{"part": "a", "score": 1}', '{"part": "b", "score": 1}', '{"score": 1, "part": "a"}']
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text('{"settings": {}, "commands": []}')
    assert Run(tmp_path, {}).rows == [{"part": "a", "score": 1}, {"part": "b", "score": 1}]


def test_a_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2, "b"')
    assert read_rows(path) == [{"a": 1}]
    assert path.read_bytes() == b'{"a": 1}\n'


@pytest.mark.parametrize("line", ["not json", "[1, 2]"])
def test_a_foreign_file_is_refused_with_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(FormatError, match="line 2"):
        read_rows(path)


def test_a_foreign_config_is_refused(tmp_path: Path) -> None:
    Run(tmp_path, {}).add(seed=0)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"config\.json"):
        Run(tmp_path, {})


def test_results_without_their_settings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(SettingError, match=r"results\.jsonl is there, but it is of no run"):
        Run(tmp_path, {})


def test_settings_that_measured_nothing_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        monkeypatch.setattr("sys.argv", ["recollect", "reproduce", f"--seed={seed}"])
        Run(tmp_path, {"seed": seed})
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["settings"] == {"seed": 2}
    assert record["commands"] == ["recollect reproduce --seed=2"]


def test_config_records_settings_and_versions(tmp_path: Path) -> None:
    Run(tmp_path, {"memory": (1, 2)})
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["settings"] == {"memory": [1, 2]}
    assert {"python", "torch"} <= record["versions"].keys()
    assert len(record["commands"]) == 1


def test_every_command_that_made_results_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["demo", "--seed", "1"], ["demo", "--seed", "2"], ["demo", "--seed", "1"]):
        monkeypatch.setattr("sys.argv", ["recollect", *arguments])
        Run(tmp_path, {"memory": (1, 2)}).add(a=1)  # a tuple and the list that JSON makes of it are the same setting
    commands = json.loads((tmp_path / "config.json").read_text())["commands"]
    assert commands == ["recollect demo --seed 2", "recollect demo --seed 1"]


def test_write_text_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]


def test_progress_says_how_much_time_is_left(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("recollect.experiments.runner._SECONDS_BETWEEN_LINES", 0.0)
    with Progress(4.0, "work") as progress:
        progress.skip(2.0)
        progress.advance(1.0, "half")
    assert "half: 75%" in capsys.readouterr().err


def test_one_display_inside_another(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal the inner one takes the outer one's place, and hands it back, after an error too."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Progress(2, "outer") as outer:
        outer.advance(1)
        with pytest.raises(ZeroDivisionError), Progress(1, "inner"):
            raise ZeroDivisionError
        shown = capsys.readouterr().err
        assert shown.rindex("inner") < shown.rindex("outer")
        with Progress(1, "second") as second:
            capsys.readouterr()  # the outer one's last line
            second.advance(1)
        shown = capsys.readouterr().err
        assert shown.index("second") < shown.index("outer")
        outer.advance(1)
    assert "100 %" in capsys.readouterr().err
