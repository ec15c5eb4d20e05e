"""A durable memory is an ``EpisodicMemory`` that is still there: after closing, crashes, full disks, and damage."""

import copy
import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from recollect import (
    ApproximateIndex,
    DurableMemory,
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    Mixture,
    Parametric,
    load,
    neural_cache,
    rules,
    save,
)
from recollect.cli import main as command
from recollect.errors import (
    DtypeError,
    FormatError,
    LockedError,
    MissingDataError,
    NonFiniteError,
    SettingError,
    StorageError,
)
from recollect.memory.durable import records
from recollect.memory.durable.records import Layout, Records
from recollect.memory.durable.verifying import problems

ROOT = Path(__file__).parents[2]
CAPACITY, KEY, CLASSES = 40, 6, 5

Any = EpisodicMemory | DurableMemory


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count: int, seed: int = 1) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def live(memory: Any, *, seed: int = 0) -> None:
    """A life that leaves traces everywhere: the ring has turned, and some were forgotten in several calls."""
    memory.write(normal(33, KEY, seed=seed), labels(33, seed))
    memory.write(normal(57, KEY, seed=seed + 1), labels(57, seed))
    memory.forget(torch.tensor([3, 17, 18]))
    memory.write(normal(1, KEY, seed=seed + 2), labels(1, seed))
    memory.forget(torch.tensor([1, 30]))
    memory.forget(5)


def twins(folder: Path, **settings) -> tuple[DurableMemory, EpisodicMemory]:
    """Returns a durable memory and one in RAM that have lived the same."""
    both = DurableMemory(folder, CAPACITY, KEY, **settings), EpisodicMemory(CAPACITY, KEY, **settings)
    for each in both:
        live(each)
    return both


def state_of(memory: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in memory.state_dict().items()}


def assert_same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "writer.lock"}


def model(memory: Any) -> Mixture:
    torch.manual_seed(0)
    head = nn.Linear(KEY, CLASSES)
    adapted = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.5), steps=3))
    return Mixture(Parametric(head), adapted, neural_cache(memory, classes=CLASSES), weights=(0.2, 0.5, 0.3))


# Opening again


@pytest.mark.parametrize("history", [0, 9])
def test_a_reopened_memory_is_the_same_bit_for_bit_and_goes_on_the_same(tmp_path: Path, history: int) -> None:
    memory, beside = twins(tmp_path, history=history)
    keys = normal(9, KEY, seed=5)
    for turn in range(3):
        assert_same(memory, beside)
        expected = model(memory)(keys)
        assert torch.equal(expected, model(beside)(keys))
        memory.close()
        memory = DurableMemory(tmp_path)
        assert_same(memory, beside)
        assert torch.equal(model(memory)(keys), expected)
        for limit in (memory.ring.step.item() - 5, 60):
            assert torch.equal(model(memory)(keys, before=limit), model(beside)(keys, before=limit))
        for each in (memory, beside):
            live(each, seed=10 * turn)
    memory.clear()
    memory.write(normal(2, KEY), labels(2))
    memory.close()
    fresh = EpisodicMemory(CAPACITY, KEY, history=history)
    fresh.write(normal(2, KEY), labels(2))
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("values", [torch.long, torch.int8, torch.bool, torch.float16, torch.complex128])
@pytest.mark.parametrize("shape", [(), (2, 1), (0,)])
def test_every_dtype_is_kept(tmp_path: Path, dtype: torch.dtype, values: torch.dtype, shape: tuple[int, ...]) -> None:
    settings = {"key_dtype": dtype, "value_shape": shape, "value_dtype": values}
    both = DurableMemory(tmp_path, 5, 3, **settings), EpisodicMemory(5, 3, **settings)
    for each in both:
        each.write(torch.arange(21.0).view(7, 3), torch.ones(7, *shape, dtype=values))
    both[0].close()
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, both[1])
        assert memory.value_shape == shape


@pytest.mark.parametrize("block", [1, 400, 10**6])
def test_blocks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(records, "_BLOCK", block)
    memory, beside = twins(tmp_path)
    memory.close()
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, beside)
    assert problems(tmp_path) == []


def test_settings_that_are_left_out_are_those_of_the_file(tmp_path: Path) -> None:
    memory, beside = twins(tmp_path)
    memory.close()
    for given in (
        {},
        {"capacity": CAPACITY, "key_size": KEY},
        {"value_dtype": torch.long, "index": ApproximateIndex()},
    ):
        with DurableMemory(tmp_path, **given) as memory:
            assert (memory.capacity, memory.key_size, memory.value_shape, memory.history) == (CAPACITY, KEY, (), 0)
            assert len(memory) == len(beside)
            assert "35 of 40 entries" in repr(memory)
            assert str(tmp_path) in repr(memory)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"capacity": 41}, "capacity=40 there, 41 asked"),
        ({"capacity": CAPACITY, "key_size": 7, "history": 2}, "key_size=6 there, 7 asked, history=0 there, 2 asked"),
        ({"value_shape": (2,)}, r"value_shape=\(\) there, \(2,\) asked"),
        ({"value_dtype": torch.int32}, "value_dtype=torch.int64 there, torch.int32 asked"),
        ({"key_dtype": torch.float16}, "key_dtype=torch.float32 there, torch.float16 asked"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_other_settings_are_refused(tmp_path: Path, given, message, read_only: bool) -> None:
    twins(tmp_path)[0].close()
    before = (tmp_path / "memory.sqlite").read_bytes()
    with pytest.raises(SettingError, match=message):
        DurableMemory(tmp_path, read_only=read_only, **given)
    assert (tmp_path / "memory.sqlite").read_bytes() == before
    DurableMemory(tmp_path).close()  # the lock was given back


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, MissingDataError, "there is no memory in .*. Give capacity and key_size to make one"),
        ({"capacity": 3}, MissingDataError, "Give key_size"),
        ({"capacity": 0, "key_size": 2}, SettingError, "capacity must be a whole number above 0"),
        ({"capacity": 3, "key_size": 2, "key_dtype": torch.int64}, DtypeError, "got key_dtype=torch.int64"),
        ({"capacity": 3, "key_size": 2, "sync": "never"}, SettingError, "sync must be one of 'full', 'normal'"),
        ({"capacity": 3, "key_size": 2, "read_only": True}, MissingDataError, "there is no memory in"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, given, error, message) -> None:
    with pytest.raises(error, match=message):
        DurableMemory(tmp_path / "new" / "memory", **given)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match=r"is a file\. Name a folder"):
        DurableMemory(tmp_path / "file", 3, 2)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "memory.sqlite").mkdir(parents=True)
    (tmp_path / "locked" / "writer.lock").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"file/new cannot be made: Not a directory\. Name another folder"):
        DurableMemory(tmp_path / "file" / "new", 3, 2)
    with pytest.raises(StorageError, match=r"memory\.sqlite cannot be read: Is a directory\. Name another folder"):
        DurableMemory(tmp_path / "taken", 3, 2)
    with pytest.raises(StorageError, match=r"writer\.lock cannot be written: Is a directory.*read_only=True"):
        DurableMemory(tmp_path / "locked", 3, 2)


def test_new_folders_are_on_the_disk_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    DurableMemory(tmp_path / "a" / "b", 3, 2).close()
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(synced)


def test_inference_mode_leaves_no_traces(tmp_path: Path) -> None:
    """What is made, refreshed or replaced within it is changed outside of it later."""
    beside = EpisodicMemory(CAPACITY, KEY)
    with torch.inference_mode():
        memory, reader = DurableMemory(tmp_path, CAPACITY, KEY), DurableMemory(tmp_path, read_only=True)
    for turn in range(3):
        for each in (memory, beside):
            live(each, seed=turn)
        reader.refresh()
        with torch.inference_mode():
            memory.clear()
            memory.load_state_dict(state_of(beside))
            reader.refresh()
        assert_same(reader, beside)
    memory.close()
    reader.close()


def test_normal_sync_keeps_what_was_written(tmp_path: Path) -> None:
    with DurableMemory(tmp_path, CAPACITY, KEY, sync="normal") as memory:
        beside = EpisodicMemory(CAPACITY, KEY)
        for each in (memory, beside):
            live(each)
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, beside)


# Forgetting is for good


def test_what_is_forgotten_is_in_no_file_any_more(tmp_path: Path) -> None:
    secret = torch.tensor([[1.2345, 6.7891, -3.2109, 5.4321, 9.8765, 2.4681]])
    sought = bytes(secret.flatten().view(torch.uint8).tolist())
    with DurableMemory(tmp_path, CAPACITY, KEY) as memory:
        memory.write(normal(9, KEY), labels(9))
        slots = memory.write(secret, torch.tensor([3]))
        assert any(sought in data for data in contents(tmp_path).values())
        memory.forget(slots)
        assert not any(sought in data for data in contents(tmp_path).values())
        memory.write(secret, torch.tensor([3]))
        memory.clear()
        assert not any(sought in data for data in contents(tmp_path).values())
        assert len(memory) == 0


# Two who want the same folder

HOLD = """
import sys, time, torch
from recollect import DurableMemory
memory = DurableMemory(sys.argv[1], 40, 6)
memory.write(torch.ones(3, 6), torch.arange(3))
print("ready", flush=True)
time.sleep(600)
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_second_writer_is_refused_until_the_first_is_gone_however_it_went(tmp_path: Path) -> None:
    other = start(HOLD, tmp_path)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(LockedError, match=rf"process {other.pid} has the memory in .* open for writing") as caught:
            DurableMemory(tmp_path)
        assert caught.value.holder == other.pid
        with DurableMemory(tmp_path, read_only=True) as reader:
            assert len(reader) == 3
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert (tmp_path / "writer.lock").read_text() == f"{other.pid}\n"  # stale, and nobody minds
        with DurableMemory(tmp_path) as memory:
            assert len(memory) == 3
            memory.write(torch.zeros(1, 6), torch.tensor([3]))
    finally:
        other.kill()
        other.wait()
        if other.stdout is not None:
            other.stdout.close()


def test_a_second_writer_in_the_same_process_is_refused(tmp_path: Path) -> None:
    memory = DurableMemory(tmp_path, CAPACITY, KEY)
    with pytest.raises(LockedError, match=r"this process has the memory in .*read_only=True") as caught:
        DurableMemory(tmp_path)
    assert caught.value.holder == os.getpid()
    other = start("import sys\nfrom recollect import DurableMemory\nDurableMemory(sys.argv[1])\n", tmp_path)
    other.communicate()
    assert other.returncode != 0  # the refusal has not released the lock
    del memory  # nobody can write to it any more
    DurableMemory(tmp_path).close()


def test_a_reader_sees_what_is_committed_when_it_refreshes(tmp_path: Path) -> None:
    memory, beside = DurableMemory(tmp_path, CAPACITY, KEY), EpisodicMemory(CAPACITY, KEY)
    reader, keys = DurableMemory(tmp_path, read_only=True), normal(9, KEY, seed=5)
    predictor = model(reader)
    assert reader.refresh() == 0

    def both(operate: Callable[[Any], object]) -> None:
        for each in (memory, beside):
            operate(each)

    steps: list[tuple[Callable[[Any], object], int]] = [
        (lambda each: each.write(normal(5, KEY), labels(5)), 5),
        (lambda each: each.write(normal(60, KEY), labels(60)), CAPACITY),
        (lambda each: each.write(normal(1, KEY, seed=3), labels(1)), 1),
        (lambda each: each.forget(torch.tensor([2, 7])), 2),
        (lambda each: each.forget(9), 1),
        (live, -1),
        (lambda each: (each.clear(), each.write(normal(3, KEY, seed=4), labels(3))), CAPACITY),
        # The same number of entries at the same times, and others.
        (lambda each: (each.clear(), each.write(normal(3, KEY, seed=5), labels(3))), CAPACITY),
        (lambda each: each.load_state_dict(state_of(others[0])), CAPACITY),
        (lambda each: each.load_state_dict(state_of(others[1])), CAPACITY),
    ]
    others = EpisodicMemory(CAPACITY, KEY), EpisodicMemory(CAPACITY, KEY)
    live(others[0], seed=7)
    live(others[1], seed=17)
    for operate, changed in steps:
        before = state_of(reader)
        both(operate)
        assert all(torch.equal(tensor, before[name]) for name, tensor in reader.state_dict().items())
        count = reader.refresh()
        assert changed in {count, -1}
        assert_same(reader, beside)
        assert torch.equal(predictor(keys), model(beside)(keys))
        assert reader.refresh() == 0
    assert memory.refresh() == 0
    memory.close()
    with DurableMemory(tmp_path) as memory:  # another writer
        memory.write(normal(2, KEY), labels(2))
        assert reader.refresh() == 2
        assert_same(reader, memory)


@pytest.mark.parametrize(
    "change",
    [
        lambda memory: memory.write(torch.ones(1, KEY), torch.tensor([1])),
        lambda memory: memory.forget(0),
        lambda memory: memory.clear(),
        lambda memory: memory.load_state_dict(memory.state_dict()),
    ],
)
def test_a_reader_changes_nothing(tmp_path: Path, change) -> None:
    twins(tmp_path)[0].close()
    before = contents(tmp_path)["memory.sqlite"]
    with DurableMemory(tmp_path, read_only=True) as reader:
        state = state_of(reader)
        with pytest.raises(StorageError, match="was opened with read_only=True"):
            change(reader)
        assert all(torch.equal(tensor, state[name]) for name, tensor in reader.state_dict().items())
    assert contents(tmp_path)["memory.sqlite"] == before


def test_a_forked_process_may_read_and_nothing_else(tmp_path: Path) -> None:
    memory, _ = twins(tmp_path)
    expected = memory.read(torch.zeros(KEY), 5).slots.tolist()
    context = multiprocessing.get_context("fork")
    receive, answer = context.Pipe(duplex=False)

    def child() -> None:
        answers: list[object] = [memory.read(torch.zeros(KEY), 5).slots.tolist()]
        for call in (lambda: memory.write(torch.ones(1, KEY), torch.tensor([1])), memory.refresh, memory.clear):
            try:
                call()
            except StorageError as error:
                answers.append("from which this one was forked" in str(error))
        try:
            DurableMemory(tmp_path)
        except LockedError as error:
            answers.append(error.holder)
        answer.send(answers)

    process = context.Process(target=child)
    process.start()
    assert receive.recv() == [expected, True, True, True, os.getpid()]
    process.join()
    memory.write(torch.ones(1, KEY), torch.tensor([1]))
    with pytest.raises(LockedError):
        DurableMemory(tmp_path)
    memory.close()
    assert problems(tmp_path) == []


LOOK = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT size FROM state").fetchone())
connection.close()
"""


def test_another_program_that_looks_at_the_file_takes_nothing_away(tmp_path: Path) -> None:
    """SQLite removes the log when the last connection ends: that of the other program must not take itself for it."""
    memory, beside = twins(tmp_path)
    DurableMemory(tmp_path, read_only=True).close()
    assert problems(tmp_path) == []
    assert command(["memory", "info", str(tmp_path)]) == 0
    copied = multiprocessing.get_context("fork").Process(target=memory._database._connection.close)
    copied.start()
    copied.join()
    for turn in range(2):
        look = start(LOOK, tmp_path / "memory.sqlite")
        assert look.communicate()[0] == f"({len(beside)},)\n"
        for each in (memory, beside):
            each.write(normal(2, KEY, seed=turn), labels(2))
        with DurableMemory(tmp_path, read_only=True) as reader:
            assert_same(reader, beside)
    memory.close()
    with DurableMemory(tmp_path) as again:
        assert_same(again, beside)


@pytest.mark.parametrize("copier", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_memory_cannot_be_copied(tmp_path: Path, copier) -> None:
    with DurableMemory(tmp_path, CAPACITY, KEY) as memory:
        for thing in (memory,) if copier is copy.copy else (memory, model(memory)):
            with pytest.raises(StorageError, match=r"cannot be copied or pickled.*read_only=True") as caught:
                copier(thing)
            assert str(tmp_path) in str(caught.value)


def test_threads_see_all_of_a_write_or_nothing(tmp_path: Path) -> None:
    rows = 25
    memory, over, torn = DurableMemory(tmp_path, 2 * rows, KEY, sync="normal"), threading.Event(), []
    memory.write(torch.zeros(rows, KEY), torch.zeros(rows, dtype=torch.long))

    def look() -> None:
        while not over.is_set():
            values = memory.read(torch.zeros(KEY), None).values
            counts = values.unique(return_counts=True)[1].tolist()
            with memory.held():
                twice = [memory.read(torch.zeros(KEY), 1, before=10**6).values.item() for _ in range(2)]
                sizes = len(memory), len(memory)
            if set(counts) != {rows} or twice[0] != twice[1] or sizes[0] != sizes[1]:
                torn.append((counts, twice, sizes))

    def fill(numbers: range) -> None:
        for number in numbers:
            memory.write(torch.full((rows, KEY), float(number)), torch.full((rows,), number))

    readers = [threading.Thread(target=look) for _ in range(2)]
    writers = [threading.Thread(target=fill, args=(range(first, first + 30),)) for first in (1, 100)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    for thread in readers:
        thread.join()
    assert torn == []
    assert int(memory.ring.step) == 61 * rows
    memory.close()
    with DurableMemory(tmp_path) as again:
        assert_same(again, memory)


def test_a_read_waits_for_a_write_that_is_half_in_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, half, go, found = DurableMemory(tmp_path, CAPACITY, KEY), threading.Event(), threading.Event(), []
    update = memory.ring.index.update

    def slow(*arguments: Tensor) -> None:
        half.set()
        go.wait()
        update(*arguments)

    monkeypatch.setattr(memory.ring.index, "update", slow)
    writer = threading.Thread(target=lambda: memory.write(torch.ones(3, KEY), torch.arange(3)))
    reader = threading.Thread(target=lambda: found.append(memory.read(torch.ones(KEY), 3).values.tolist()))
    writer.start()
    half.wait()
    reader.start()
    reader.join(0.3)
    waited = reader.is_alive()
    go.set()
    writer.join()
    reader.join()
    assert waited
    assert found == [[0, 1, 2]]
    memory.close()


def test_who_holds_a_memory_cannot_write_to_it(tmp_path: Path) -> None:
    with DurableMemory(tmp_path, CAPACITY, KEY) as memory:
        with memory.held(), pytest.raises(SettingError, match=r"within held\(\) a memory cannot change"):
            memory.write(torch.ones(1, KEY), torch.tensor([1]))
        memory.write(torch.ones(1, KEY), torch.tensor([1]))


# What goes wrong


def test_a_closed_memory_reads_and_writes_no_more(tmp_path: Path) -> None:
    memory, beside = twins(tmp_path)
    memory.close()
    memory.close()
    assert torch.equal(model(memory)(torch.ones(2, KEY)), model(beside)(torch.ones(2, KEY)))
    for call in (lambda: memory.write(torch.ones(1, KEY), torch.tensor([1])), lambda: memory.forget(0), memory.clear):
        with pytest.raises(StorageError, match=r"was closed\. Open it again"):
            call()
    assert_same(memory, beside)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["memory.sqlite", "writer.lock"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_BLOCK", 16 * 2**10)  # some blocks of a write have room, and others have not
    memory, beside = DurableMemory(tmp_path, 4000, KEY), EpisodicMemory(4000, KEY)
    for each in (memory, beside):
        each.write(normal(900, KEY), labels(900))
        each.forget(torch.tensor([5, 6]))
    connection = memory._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 5}")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"full, and nothing of it was stored. Make room on the disk"):
            memory.write(normal(4000, KEY), labels(4000))
        assert_same(memory, beside)
        with DurableMemory(tmp_path, read_only=True) as reader:
            assert_same(reader, beside)
    with pytest.raises(StorageError, match="full"):
        memory.load_state_dict(state_of(lived(4000)))
    assert_same(memory, beside)
    for each in (memory, beside):  # what has room is still written
        each.write(normal(3, KEY, seed=9), labels(3))
        each.forget(9)
    connection.execute("PRAGMA max_page_count = 1000000")
    for each in (memory, beside):
        each.write(normal(4000, KEY), labels(4000))
    assert_same(memory, beside)
    memory.close()
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, beside)
    assert problems(tmp_path) == []


def lived(capacity: int, seed: int = 3) -> EpisodicMemory:
    memory = EpisodicMemory(capacity, KEY)
    live(memory, seed=seed)
    memory.write(normal(capacity, KEY), labels(capacity))
    return memory


TOO_BIG = """
import resource, sys, torch
from recollect import DurableMemory
from recollect.errors import StorageError
memory = DurableMemory(sys.argv[1], 100_000, 64)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))
written = 0
try:
    while True:
        memory.write(torch.full((500, 64), float(written)), torch.full((500,), written))
        written += 1
except StorageError as error:
    print(error)
assert len(memory) == 500 * written
print(written)
"""


def test_files_that_may_not_grow_lose_nothing(tmp_path: Path) -> None:
    process = start(TOO_BIG, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0
    *message, written = output.splitlines()
    assert "nothing of it was stored" in " ".join(message)
    assert int(written) > 3
    with DurableMemory(tmp_path) as memory:
        assert len(memory) == 500 * int(written)
        assert memory.ring.values[: len(memory)].unique(return_counts=True)[1].tolist() == [500] * int(written)


NO_ROOM = """
import os, resource, sys, time
from recollect import DurableMemory
from recollect.errors import StorageError
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for most in (0, 20_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        DurableMemory(sys.argv[1], 100, 64)
    except StorageError as error:
        print(error)
    print(os.listdir(sys.argv[1]), flush=True)
time.sleep(600)
"""


def test_no_room_for_a_new_memory_leaves_none_and_no_lock(tmp_path: Path) -> None:
    with start(NO_ROOM, tmp_path) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(4)]
            assert "writer.lock cannot be written: File too large. See to the disk" in lines[0]
            assert "nothing was made" in lines[2]
            assert lines[1] == lines[3] == "['writer.lock']\n"
            DurableMemory(tmp_path, CAPACITY, KEY).close()  # while the other process lives on
        finally:
            process.kill()


def test_a_write_that_is_broken_off_between_file_and_ring_shows_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C after the commit: RAM is brought up to what the file holds, before anything is read or written."""
    memory, beside = twins(tmp_path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memory.ring.index, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.write(normal(4, KEY, seed=8), labels(4))
    beside.write(normal(4, KEY, seed=8), labels(4))
    near = beside.read(normal(4, KEY, seed=8), 1)
    assert torch.equal(memory.read(normal(4, KEY, seed=8), 1).slots, near.slots)  # the index knows them, too
    assert len(memory) == len(beside)
    assert_same(memory, beside)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_show", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.write(normal(6, KEY, seed=9), labels(6))
    assert_same(memory, beside)  # not shown, and not half of it
    beside.write(normal(6, KEY, seed=9), labels(6))
    for each in (memory, beside):
        each.write(normal(2, KEY, seed=10), labels(2))
    assert_same(memory, beside)
    memory.close()
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, beside)


class Interrupted(sqlite3.Connection):
    """A Ctrl-C while the disk is busy: Python raises it as soon as the commit has returned."""

    armed = False

    def execute(self, sql: str, *arguments) -> sqlite3.Cursor:
        result = super().execute(sql, *arguments)
        if sql == "COMMIT" and Interrupted.armed:
            Interrupted.armed = False
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("operate", [live, lambda each: each.clear()])
def test_a_commit_that_is_interrupted_is_done_and_the_next_ones_are_as_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operate: Callable[[Any], object]
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *given, **named: connect(*given, **named, factory=Interrupted))
    memory, beside = DurableMemory(tmp_path, CAPACITY, KEY), EpisodicMemory(CAPACITY, KEY)
    for each in (memory, beside):
        each.write(normal(5, KEY), labels(5))
        each.clear()
    for rows in ((normal(5, KEY), labels(5)), (normal(9, KEY, seed=1), labels(9))):  # a new block, and a known one
        Interrupted.armed = True
        with pytest.raises(KeyboardInterrupt):
            memory.write(*rows)
        beside.write(*rows)
    Interrupted.armed = True
    with pytest.raises(KeyboardInterrupt):
        memory.clear()
    beside.clear()
    for each in (memory, beside):
        operate(each)
    assert_same(memory, beside)
    memory.close()
    with DurableMemory(tmp_path) as again:
        assert_same(again, beside)


def flip(path: Path, at: int, count: int = 1) -> None:
    data = bytearray(path.read_bytes())
    for place in range(at, at + count):
        data[place] ^= 0xFF
    path.write_bytes(data)


def at_value(name: str, column: str, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        connection.execute(f"UPDATE {name} SET {column} = ?", (value,))
        connection.commit()
        connection.close()

    return change


def script(*statements: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        connection = sqlite3.connect(path)
        for statement in statements:
            connection.execute(statement)
        connection.commit()
        connection.close()

    return change


def key_bytes(path: Path) -> int:
    """Where the file holds the key of an entry."""
    return path.read_bytes().index(bytes(normal(57, KEY, seed=1)[40].view(torch.uint8).tolist()))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "is not the file of a memory, or damaged"),
    "text": (lambda path: path.write_text("hello" * 100), "is not the file of a memory"),
    "foreign": (script("PRAGMA application_id = 7"), "is not the file of a memory"),
    "newer": (script("PRAGMA user_version = 2"), "has format version 2, and this recollect reads version 1. Update"),
    "header": (lambda path: flip(path, 20, 8), "is damaged"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "is truncated"),
    "cut by a byte": (lambda path: os.truncate(path, path.stat().st_size - 1), "is truncated"),
    "page": (lambda path: flip(path, 16384 * 3, 16384), "is damaged"),
    "a bit of a key": (lambda path: flip(path, key_bytes(path)), "the checksum of slot .* is wrong"),
    "state": (at_value("state", "size", 3), "it holds 35 entries"),
    "position": (at_value("state", "position", 99), "is damaged"),
    "step": (at_value("state", "step", 50), "is damaged"),
    "no state": (script("DELETE FROM state"), "it says no state"),
    "no settings": (script("DELETE FROM settings"), "its settings cannot be read"),
    "dtype": (script("UPDATE settings SET value = '\"nonsense\"' WHERE name = 'key_dtype'"), "cannot be read"),
    "no table": (script("DROP TABLE blocks"), "no such table"),
    "a lost block": (script("DELETE FROM blocks"), "it holds 0 entries"),
    "a short block": (script("UPDATE blocks SET entries = zeroblob(100)"), "100 bytes"),
    "a strange block": (script("INSERT INTO blocks VALUES (77, zeroblob(100))"), "its block 77"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("read_only", [False, True])
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, kind: str, read_only: bool) -> None:
    twins(tmp_path)[0].close()
    damage, message = DAMAGE[kind]
    damage(tmp_path / "memory.sqlite")
    before = (tmp_path / "memory.sqlite").read_bytes()
    for _ in range(2):
        with pytest.raises(FormatError, match=message):
            DurableMemory(tmp_path, read_only=read_only)
    assert (tmp_path / "memory.sqlite").read_bytes() == before
    if kind in {"empty", "text", "foreign", "newer"}:
        with pytest.raises(FormatError, match=message):
            problems(tmp_path)
    else:
        assert problems(tmp_path) != []


def test_a_reader_that_meets_damage_keeps_what_it_has(tmp_path: Path) -> None:
    memory, _ = twins(tmp_path)
    reader = DurableMemory(tmp_path, read_only=True)
    before = state_of(reader)
    memory.write(normal(1, KEY, seed=1), labels(1))
    memory.close()
    script("UPDATE blocks SET entries = zeroblob(length(entries))")(tmp_path / "memory.sqlite")
    with pytest.raises(FormatError):
        reader.refresh()
    assert all(torch.equal(tensor, before[name]) for name, tensor in reader.state_dict().items())
    reader.close()


def test_what_a_killed_creation_leaves_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".memory.sqlite.0123").write_text("half a file")
    with DurableMemory(tmp_path, CAPACITY, KEY) as memory:
        assert len(memory) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["memory.sqlite", "writer.lock"]


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_points_it_loses_nothing(seed: int) -> None:
    process = start((ROOT / "tests/memory/killing.py").read_text(), 6, seed)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0
    assert output == "2 kills while it did write, 2 kills while it did save, 2 kills while it did import: " + (
        "nothing was lost\n"
    )


# As a part of a model


def test_a_state_is_that_of_a_memory_in_ram(tmp_path: Path) -> None:
    memory, beside = twins(tmp_path / "a")
    network, other = nn.Sequential(nn.Linear(KEY, KEY), memory), nn.Sequential(nn.Linear(KEY, KEY), beside)
    assert network.state_dict().keys() == other.state_dict().keys()
    fresh = DurableMemory(tmp_path / "b", CAPACITY, KEY)
    fresh.write(normal(3, KEY), labels(3))
    nn.Sequential(nn.Linear(KEY, KEY), fresh).load_state_dict(other.state_dict())
    ram = EpisodicMemory(CAPACITY, KEY)
    ram.load_state_dict(fresh.state_dict())
    assert_same(ram, beside)
    for each in (fresh, beside):
        live(each, seed=4)
    fresh.close()
    emptier = EpisodicMemory(CAPACITY, KEY)
    emptier.write(normal(3, KEY), labels(3))
    with DurableMemory(tmp_path / "b") as again:
        assert_same(again, beside)
        again.load_state_dict(emptier.state_dict())
    with DurableMemory(tmp_path / "b") as again:
        assert_same(again, emptier)


def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    memory, beside = twins(tmp_path)
    good, keys = state_of(beside), normal(CAPACITY, KEY)
    keys[7, 2] = torch.nan
    cases: list[tuple[dict[str, Tensor], type[Exception], str]] = [
        (state_of(EpisodicMemory(CAPACITY + 1, KEY)), RuntimeError, "size mismatch"),
        ({name: tensor for name, tensor in good.items() if name != "queue"}, RuntimeError, "Missing key"),
        (good | {"queue": good["queue"].roll(1)}, SettingError, "these tensors are no memory"),
        (good | {"size": torch.tensor(3)}, SettingError, "these tensors are no memory"),
        (good | {"step": torch.tensor(3)}, SettingError, "these tensors are no memory"),
        (good | {"position": torch.tensor(99)}, SettingError, "these tensors are no memory"),
        (good | {"keys": keys}, NonFiniteError, "keys must be finite"),
    ]
    for state, error, message in cases:
        with pytest.raises(error, match=message):
            memory.load_state_dict(state)
        assert_same(memory, beside)
    memory.close()
    with DurableMemory(tmp_path) as memory:
        assert_same(memory, beside)


def test_conversions_move_the_ring_and_keep_what_the_file_holds(tmp_path: Path) -> None:
    memory, beside = twins(tmp_path)
    network = model(memory)
    network.double()
    assert memory.ring.keys.dtype == torch.float32
    assert_same(memory, beside)
    assert network(normal(2, KEY).double()).dtype == torch.float64
    memory.close()


@pytest.mark.parametrize("index", [None, ApproximateIndex()])
def test_a_saved_model_holds_a_copy_of_the_entries(tmp_path: Path, index: ApproximateIndex | None) -> None:
    memory, beside = twins(tmp_path / "memory", index=index)
    network, keys = model(memory), normal(9, KEY, seed=5)
    before = contents(tmp_path / "memory")
    save(network, tmp_path / "model")
    assert contents(tmp_path / "memory") == before
    if index is None:
        loaded = load(tmp_path / "model")
        assert isinstance(loaded, Mixture)
        assert torch.equal(loaded(keys), network(keys))
        adapted, cache = loaded.components[1], loaded.components[2]
        assert adapted.memory is cache.memory
        assert type(adapted.memory) is EpisodicMemory
        assert_same(adapted.memory, beside)
        adapted.memory = cache.memory = memory  # the entries that live
        assert torch.equal(loaded(keys), network(keys))
    else:
        instance = EpisodicMemory(CAPACITY, KEY, index=ApproximateIndex())
        loaded = load(tmp_path / "model", modules={"components.1.memory": instance})
        assert_same(instance, beside)


def test_a_record_says_what_it_was_made_of() -> None:
    layout = Layout(3, torch.bfloat16, (2,), torch.float64)
    entries = Records(torch.tensor([5, 0, -2]), normal(3, 3).bfloat16(), normal(3, 2).double())
    data = layout.pack(entries)
    assert len(data) == 3 * layout.length
    back, sound = layout.unpack(bytearray(data))
    assert all(torch.equal(one, other) for one, other in zip(back, entries, strict=True))
    assert sound.tolist() == [True] * 3
    for place in range(layout.length):  # any byte of the second record
        damaged = bytearray(data)
        damaged[layout.length + place] ^= 1 << place % 8
        assert layout.unpack(damaged)[1].tolist() == [True, False, True]
    assert layout.unpack(bytearray(layout.length))[1].tolist() == [True]  # a slot that was never written to


def test_a_folder_can_be_moved(tmp_path: Path) -> None:
    memory, beside = twins(tmp_path / "here")
    memory.close()
    shutil.move(tmp_path / "here", tmp_path / "there")
    with DurableMemory(tmp_path / "there") as memory:
        assert_same(memory, beside)
