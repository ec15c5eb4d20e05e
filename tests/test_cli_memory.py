"""``recollect memory``: what it shows, copies and removes, its exit statuses, and that it breaks nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recollect import DurableMemory, EpisodicMemory
from recollect.cli import main

CAPACITY, KEY = 40, 6


def make(folder: Path, count: int = 57, seed: int = 0, **settings) -> EpisodicMemory:
    """Makes a durable memory, closes it, and returns one in RAM that is the same."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(count, KEY, generator=generator)
    beside = EpisodicMemory(CAPACITY, KEY, **settings)
    with DurableMemory(folder, CAPACITY, KEY, **settings) as memory:
        for each in (memory, beside):
            each.write(keys, torch.arange(count))
            each.forget(torch.tensor([3, 17]))
            each.write(keys[:1], torch.tensor([0]))
    return beside


def assert_same(folder: Path, beside: nn.Module) -> None:
    with DurableMemory(folder, read_only=True) as memory:
        one, other = memory.state_dict(), beside.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


def test_info_says_what_is_there_and_who_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "m", history=3)
    assert main(["memory", "info", str(tmp_path / "m")]) == 0
    shown = capsys.readouterr().out
    assert "entries  42 of 43, 3 for the past" in shown
    assert "keys     6 numbers, torch.float32" in shown
    assert "values   shape (), torch.int64" in shown
    assert "written  58 so far" in shown
    assert "writer   none" in shown
    with DurableMemory(tmp_path / "m"):
        assert main(["memory", "info", str(tmp_path / "m")]) == 0
        assert "writer   process " in capsys.readouterr().out


@pytest.mark.parametrize("history", [0, 5])
def test_what_is_exported_and_imported_is_the_same(tmp_path: Path, capsys, history: int) -> None:
    beside, file = make(tmp_path / "m", history=history), tmp_path / "entries.safetensors"
    with DurableMemory(tmp_path / "m"):  # while another writes
        assert main(["memory", "export", str(tmp_path / "m"), str(file)]) == 0
    assert f"{len(beside)} entries in {file}" in capsys.readouterr().out
    assert torch.equal(load_file(file)["keys"], beside.keys)
    assert main(["memory", "import", str(tmp_path / "new" / "m"), str(file)]) == 0
    assert_same(tmp_path / "new" / "m", beside)
    assert main(["memory", "verify", str(tmp_path / "new" / "m")]) == 0
    assert "is sound" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entries.safetensors", "m", "new"]


def test_nothing_is_replaced_unasked(tmp_path: Path, capsys) -> None:
    first, second, file = make(tmp_path / "a"), make(tmp_path / "b", seed=1), tmp_path / "file"
    file.write_text("mine")
    assert main(["memory", "export", str(tmp_path / "a"), str(file)]) == 2
    assert "is there already. Name another file, or add --replace" in error_of(capsys)
    assert file.read_text() == "mine"
    assert main(["memory", "export", str(tmp_path / "a"), str(file), "--replace"]) == 0
    capsys.readouterr()
    assert main(["memory", "import", str(tmp_path / "b"), str(file)]) == 2
    assert "holds 39 entries. Name another, or add --replace" in error_of(capsys)
    assert_same(tmp_path / "b", second)
    assert main(["memory", "import", str(tmp_path / "b"), str(file), "--replace"]) == 0
    assert_same(tmp_path / "b", first)


def test_forget_removes_for_good(tmp_path: Path, capsys) -> None:
    beside = make(tmp_path / "m")
    assert main(["memory", "forget", str(tmp_path / "m"), "5", "6", "5", "6"]) == 0
    beside.forget(torch.tensor([5, 6]))
    assert "2 forgotten, 37 entries are left" in capsys.readouterr().out
    assert_same(tmp_path / "m", beside)
    assert main(["memory", "forget", str(tmp_path / "m"), "40"]) == 2
    assert "slots must be from 0 to 39" in error_of(capsys)
    with DurableMemory(tmp_path / "m"):
        assert main(["memory", "forget", str(tmp_path / "m"), "7"]) == 2
        assert "this process has the memory" in error_of(capsys)
    assert_same(tmp_path / "m", beside)


def test_verify_names_the_damage(tmp_path: Path, capsys) -> None:
    beside = make(tmp_path / "m")
    path = tmp_path / "m" / "memory.sqlite"
    data = bytearray(path.read_bytes())
    sought = bytes(beside.keys[9].view(torch.uint8).tolist())
    data[data.index(sought) + 2] ^= 1
    path.write_bytes(data)
    assert main(["memory", "verify", str(tmp_path / "m")]) == 1
    out = capsys.readouterr().out
    assert "the checksum of slot 9 is wrong" in out
    assert "is damaged" in out
    assert path.read_bytes() == bytes(data)
    for command in (["export", "file"], ["forget", "3"]):
        assert main(["memory", command[0], str(tmp_path / "m"), str(tmp_path / command[1])]) == 2
        assert not (tmp_path / "file").exists()
        capsys.readouterr()


def export_of(tensors: dict[str, Tensor], path: Path, **metadata: str) -> None:
    save_file(tensors, path, {"format": "recollect memory", "version": "1", "history": "0", **metadata})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda state, path: path.write_text("hello"), "is damaged, or no export of a memory"),
        (save_file, "is no export of a memory of this version"),
        (lambda state, path: export_of(state, path, version="2"), "is no export of a memory of this version"),
        (lambda state, path: export_of(state, path, history="many"), "is damaged, or no export"),
        (lambda state, path: export_of(state, path, history="40"), "is damaged, or no export"),
        (lambda state, path: export_of({"keys": state["keys"]}, path), "is damaged, or no export"),
        (lambda state, path: export_of(state | {"size": torch.tensor(3)}, path), "these tensors are no memory"),
        (lambda state, path: export_of(state | {"keys": state["keys"] / 0}, path), "keys must be finite"),
    ],
)
def test_what_is_no_export_is_refused(tmp_path: Path, capsys, write, message: str) -> None:
    beside = make(tmp_path / "m")
    write(dict(beside.state_dict()), tmp_path / "file")
    assert main(["memory", "import", str(tmp_path / "m"), str(tmp_path / "file"), "--replace"]) == 2
    assert message in error_of(capsys)
    assert_same(tmp_path / "m", beside)
    with DurableMemory(tmp_path / "m") as memory:  # the lock was given back
        memory.write(torch.ones(1, KEY), torch.tensor([1]))


def test_an_export_of_other_settings_is_refused(tmp_path: Path, capsys) -> None:
    make(tmp_path / "m")
    beside = make(tmp_path / "n", history=2)
    assert main(["memory", "export", str(tmp_path / "m"), str(tmp_path / "file")]) == 0
    capsys.readouterr()
    assert main(["memory", "import", str(tmp_path / "n"), str(tmp_path / "file"), "--replace"]) == 2
    assert "history=2 there, 0 asked" in error_of(capsys)
    assert_same(tmp_path / "n", beside)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "there is no recollect memory nonsense. There are: info, verify"),
        (("info",), "FOLDER"),
        (("info", "nowhere"), "there is no memory in nowhere"),
        (("verify", "nowhere"), "there is no memory in nowhere"),
        (("export", "nowhere", "file"), "there is no memory in nowhere"),
        (("import", "nowhere", "file"), "there is no file file"),
        (("forget", "nowhere", "1"), "there is no memory in"),
        (("forget", "nowhere", "one"), "'one'"),
        (("forget", "nowhere"), "SLOT"),
        (("info", "nowhere", "--nonsense"), "--nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["memory", *arguments]) == 2
    assert message in error_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["--help"], ["export", "--help"]])
def test_help_lists_the_commands(capsys, arguments: list[str]) -> None:
    assert main(["memory", *arguments]) == 0
    shown = capsys.readouterr().out
    assert all(f"recollect memory {name} " in shown for name in ("info", "verify", "export", "import", "forget"))
