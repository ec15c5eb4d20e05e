"""No accident while saving costs the save that was there before, and no damage on disk goes unnoticed."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from recollect import snapshot
from recollect.errors import DtypeError, FormatError, MissingDataError
from recollect.persistence import load, save


def model(value: float = 0.0, size: int = 2) -> nn.Sequential:
    linear = nn.Linear(size, size)
    nn.init.constant_(linear.weight, value)
    nn.init.constant_(linear.bias, value)
    return nn.Sequential(linear, nn.LeakyReLU(0.25))


def value(folder: Path) -> float:
    """Returns the number of which the saved model is full, and checks that it is full of it."""
    [number] = {x for p in load(folder).parameters() for x in p.flatten().tolist()}
    return number


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[os.stat_result]:
    """Returns what was to be forced to the disk, and leaves out the waiting for it, which takes long."""
    synced: list[os.stat_result] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    return synced


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(model(1.0), tmp_path / "saved")
    return tmp_path / "saved"


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def tensor_file(folder: Path) -> Path:
    [path] = folder.glob("tensors-*.safetensors")
    return path


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tensors"])
def test_a_file_cut_off_anywhere_is_refused(name, saved):
    path = saved / name if name == "config.json" else tensor_file(saved)
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=r"damaged|truncated"):
            load(saved)
    path.write_bytes(whole + b" " if name == "tensors" else whole + b"}")
    with pytest.raises(FormatError, match=r"damaged|truncated"):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "tensors"])
def test_a_flipped_bit_anywhere_is_refused_or_without_effect(name, saved):
    path = saved / name if name == "config.json" else tensor_file(saved)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            loaded = load(saved)
        except FormatError:
            continue
        assert name == "config.json"
        assert whole[place : place + 1].isspace()
        assert loaded[1].negative_slope == 0.25


def test_a_folder_without_its_tensor_file_is_refused(saved):
    tensor_file(saved).unlink()
    with pytest.raises(FormatError, match=r"lacks .*tensors-.*which its config\.json names"):
        load(saved)


def test_what_is_no_save_is_refused(tmp_path):
    with pytest.raises(MissingDataError, match="there is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "missing")
    with pytest.raises(FormatError, match=r"holds no config\.json"):
        load(tmp_path)
    for text in ("", "{", "[]", "null", '{"format": "other"}', "[" * 100_000, '{"format": "recollect", "a": \ud800'):
        (tmp_path / "config.json").write_text(text, errors="replace")
        with pytest.raises(FormatError, match=r"damaged|recollect's"):
            load(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FormatError, match=r"config\.json is damaged"):
        load(tmp_path)
    with pytest.raises(FormatError, match="is a file"):
        load(tmp_path / "config.json")


def test_a_newer_format_is_refused_by_its_number(saved):
    config = json.loads((saved / "config.json").read_text())
    config |= {"version": 2, "library": "9.9"}
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"format version 2 \(written by recollect 9\.9\).*reads version 1.*Update"):
        load(saved)


def rewrite(folder: Path, change) -> None:
    """Changes description and tensors of a save, and signs the result as save would."""
    description, tensors = snapshot.read(folder)
    description = {name: description[name] for name in ("model", "parameters", "evaluating")}
    change(description["model"]["modules"]["0"], tensors)
    snapshot.write(folder, description, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node, tensors: tensors.pop("0.weight"), r"lacks \['0\.weight'\]"),
        (lambda node, tensors: tensors.update(more=torch.zeros(1)), r"\['more'\].*belong to no module"),
        (lambda node, tensors: tensors.update({"0.weight": torch.zeros(2, 3)}), "size mismatch for weight"),
        (lambda node, tensors: node["tensors"].pop("weight"), "Missing key"),
        (lambda node, tensors: node["settings"].update(out_features=3), "size mismatch"),
        (lambda node, tensors: node["settings"].update(unknown=3), "unexpected keyword"),
        (lambda node, tensors: node.update({"class": "Popen"}), "'0' cannot be restored: 'Popen'"),
        (lambda node, tensors: node.update({"class": "save"}), "'0' cannot be restored: 'save'"),
    ],
)
def test_a_description_that_does_not_fit_its_tensors_is_refused(change, message, saved):
    rewrite(saved, change)
    with pytest.raises(FormatError, match=message):
        load(saved)


def test_a_description_cannot_point_outside_its_folder(saved):
    config = json.loads((saved / "config.json").read_text())
    tensor_file(saved).rename(saved.parent / "elsewhere.safetensors")
    config["tensors"]["file"] = "../elsewhere.safetensors"
    del config["sha256"]
    (saved / "config.json").write_text(json.dumps(config | {"sha256": snapshot._seal(config)}))
    with pytest.raises(FormatError, match="names the tensor file"):
        load(saved)


# --- overwriting ----------------------------------------------------------------------------------------------------


def test_a_save_replaces_an_older_one_and_nothing_else(saved):
    (saved / "notes.txt").write_text("mine")
    old = tensor_file(saved)
    save(model(2.0), saved)
    assert value(saved) == 2.0
    assert not old.exists()
    assert (saved / "notes.txt").read_text() == "mine"
    save(model(2.0), saved)  # the same contents: the same name
    assert value(saved) == 2.0
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_both_files_and_all_folders_are_forced_to_the_disk(saved, synced):
    for path in (*saved.iterdir(), saved, saved.parent):
        assert any(os.path.samestat(path.stat(), status) for status in synced), path
    synced.clear()
    save(model(2.0), saved)
    for path in (*saved.iterdir(), saved, saved.parent):
        assert any(os.path.samestat(path.stat(), status) for status in synced), path


def test_folders_are_made_and_empty_ones_and_links_are_used(tmp_path, monkeypatch):
    save(model(3.0), tmp_path / "a" / "b" / "model")
    assert value(tmp_path / "a" / "b" / "model") == 3.0
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    save(model(4.0), tmp_path / "link")
    assert value(tmp_path / "empty") == 4.0
    assert (tmp_path / "link").is_symlink()
    monkeypatch.chdir(tmp_path / "empty")
    save(model(5.0), ".")
    assert value(tmp_path / "empty") == 5.0


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "tensors-1.safetensors"])
def test_what_is_not_ours_is_refused_and_stays_as_it_is(name, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text('{"model_type": "bert"}')
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for path in ("theirs", "file"):
        with pytest.raises(FormatError):
            save(model(), tmp_path / path)
    assert contents(tmp_path) == before


def test_both_files_are_readable_as_the_process_wants_it(tmp_path):
    mask = os.umask(0o027)
    try:
        save(model(), tmp_path / "model")
    finally:
        os.umask(mask)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "model").iterdir()} == {0o640}


def test_a_tensor_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(DtypeError, match="cannot be stored as safetensors"):
        save(nn.Linear(2, 2, dtype=torch.complex128), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_a_writer_overtakes_reads_the_new_save(saved, monkeypatch):
    read, calls = snapshot._read_tensors, []

    def overtaken(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            save(model(2.0), saved)
        return read(*arguments, **named)

    monkeypatch.setattr(snapshot, "_read_tensors", overtaken)
    assert value(saved) == 2.0
    assert len(calls) == 2


# --- accidents ------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_save_are_removed_and_other_folders_are_not(saved):
    mine, others = (
        saved.with_name(".saved.0123456789abcdef.partial"),
        saved.with_name(".saved.x.0123456789abcdef.partial"),
    )
    for folder in (mine, others):
        folder.mkdir()
        (folder / "tensors").write_text("half")
    save(model(2.0), saved)
    assert not mine.exists()
    assert others.exists()


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_exception_at_any_point_leaves_a_whole_save_and_no_partial_one(exists, error, tmp_path, monkeypatch):
    """Interrupts save before the n-th call to the file system, for every n."""
    folder, names = tmp_path / "saved", ("_sync", "save_file", "_digest")
    for point in range(100):
        if exists:
            save(model(1.0), folder)
        left = [point]

        def interrupted(call, left=left):
            def replacement(*arguments, **named):
                if left[0] == 0:
                    left[0] = -1
                    raise error
                left[0] -= 1
                return call(*arguments, **named)

            return replacement

        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(snapshot, name, interrupted(getattr(snapshot, name)))
            for name in ("replace", "rename"):
                patch.setattr(os, name, interrupted(getattr(os, name)))
            for name in ("rename", "chmod", "write_text", "unlink"):
                patch.setattr(Path, name, interrupted(getattr(Path, name)))
            try:
                save(model(2.0), folder)
            except error:
                assert not list(tmp_path.glob(".*"))
                assert not folder.exists() or value(folder) in {1.0, 2.0}
                assert folder.exists() >= exists
                continue
            finally:
                finished = left[0] >= 0
        break
    assert finished
    assert point > 8
    assert value(folder) == 2.0


ACCIDENTS = """
import json, os, random, resource, signal, sys, time
from pathlib import Path

import torch
from recollect import EpisodicMemory, LocalAdaptation, MbPA, rules, snapshot
from recollect.persistence import load, save

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # what a killed process has written stays written

def model(number, size=16, capacity=100):
    memory = EpisodicMemory(capacity, size)
    memory.write(torch.full((150, size), float(number)), torch.full((150,), number))
    head = torch.nn.Linear(size, 4)
    torch.nn.init.constant_(head.weight, number)
    torch.nn.init.constant_(head.bias, number)
    return MbPA(head, memory, neighbors=3, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1 + number))

def number_in(folder):
    loaded = load(folder)
    number = loaded.adaptation.steps - 1
    for tensor in (loaded.head.weight, loaded.head.bias, loaded.memory.keys, loaded.memory.values):
        assert (tensor == number).all()
    return number

def die_at(point, call=snapshot._sync):
    def sync(path):
        nonlocal point
        point -= 1
        if point < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        call(path)
    snapshot._sync = sync

def fork(work):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return child

def was_killed(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

def save_forever(folder):
    number = 0
    while True:
        number = number % 7 + 1
        save(model(number), folder)

def at_random(folder):
    start = time.perf_counter()
    save(model(0), folder)
    usual = time.perf_counter() - start
    seen = []
    for trial in range(20):
        child = fork(lambda: save_forever(folder))
        time.sleep(random.Random(trial).uniform(0, 4 * usual))
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        seen.append(number_in(folder))
    return seen

def at_every_sync(folder):
    seen = []
    for point in range(20):
        save(model(0), folder)
        child = fork(lambda: (die_at(point), save(model(1), folder)))
        killed = was_killed(child)
        seen.append(number_in(folder))
        assert len(list(folder.glob("tensors-*"))) <= 2
        if not killed:
            break
    return seen

def full_disk(folder):
    save(model(0), folder)
    seen = []
    for limit, *sizes in ((0, 16), (7, 16), (20_000, 400), (1_100, 1, 2)):  # the last: config.json does not fit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save(model(1, *sizes), folder)
        except OSError as error:
            seen.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        seen.append(number_in(folder))
    return seen

results = {}
for accident in (at_random, at_every_sync, full_disk):
    folder = Path(sys.argv[1]) / accident.__name__ / "saved"
    results[accident.__name__] = accident(folder)
    save(model(0), folder)
    assert number_in(folder) == 0
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"], "old files pile up"
    assert [p.name for p in folder.parent.iterdir()] == ["saved"], "leftovers pile up"
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Returns what was left after each accident, all of which happen in another process."""
    command = [sys.executable, "-c", ACCIDENTS, str(tmp_path_factory.mktemp("accidents"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_at_any_moment_leaves_a_whole_save(accidents):
    assert len(accidents["at_random"]) == 20
    assert len(set(accidents["at_random"])) > 1


def test_a_kill_before_any_step_leaves_the_old_save_or_the_new_one(accidents):
    seen = accidents["at_every_sync"]
    assert len(seen) >= 6
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


def test_a_full_disk_costs_nothing_but_the_new_save(accidents):
    seen = accidents["full_disk"]
    assert seen[1::2] == [0, 0, 0, 0]
    assert all("too large" in message for message in seen[::2])
    assert ["tensors" in message for message in seen[::2]] == [True, True, True, False]
