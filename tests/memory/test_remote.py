"""``MilvusMemory`` in a file of milvus-lite: what it promises beyond the laws of every memory (tests/laws)."""

import copy
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pymilvus import DataType, MilvusClient
from torch import Tensor, nn

from recollect import (
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    MilvusMemory,
    NonParametric,
    dot_product,
    load,
    rules,
    save,
)
from recollect.errors import LockedError, MissingExtraError, RecollectError, SettingError, UnreachableError
from recollect.kernels import Kernel, inverse_distance
from recollect.memory import Context
from recollect.memory.milvus import collection
from recollect.memory.milvus.connection import Connection, _reason

KEY, CAPACITY = 6, 30
Open = Callable[..., MilvusMemory]


@pytest.fixture
def open_memory(tmp_path: Path) -> Iterator[Open]:
    """Opens the same collection again and again, and closes all handles when the test is over."""
    handles: list[MilvusMemory] = []

    def new(**settings) -> MilvusMemory:
        settings = {"capacity": CAPACITY, "key_size": KEY, "timeout": 5.0} | settings
        handles.append(MilvusMemory(tmp_path / "memory.db", "entries", **settings))
        return handles[-1]

    yield new
    for handle in handles:
        handle.close()


def pairs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, KEY, generator=generator), torch.randint(4, (count,), generator=generator)


def assert_same(a: Context, b: Context) -> None:
    """All that means something is equal, bit for bit; but empty places round the sums of weights."""
    torch.testing.assert_close(a.weights, b.weights, rtol=1e-5, atol=1e-9)
    hidden = (b.slots < 0).unsqueeze(-1)
    assert torch.equal(a.keys.masked_fill(hidden, 0), b.keys.masked_fill(hidden, 0))
    for one, other in ((a.values, b.values), (a.distances, b.distances), (a.slots, b.slots)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# The ring's own answers


@pytest.mark.parametrize(
    ("index", "local_keys", "kernel"),
    [("HNSW", True, inverse_distance(1e-3)), ("HNSW", False, dot_product(0.3)), ("FLAT", True, inverse_distance(1e-3))],
    ids=str,
)
def test_contexts_are_those_of_the_ring(open_memory: Open, index: str, local_keys: bool, kernel: Kernel) -> None:
    memory, ring = open_memory(index=index, local_keys=local_keys), EpisodicMemory(CAPACITY, KEY)
    queries = pairs(7, seed=9)[0]
    times = torch.tensor([0, 1, 20, 30, 35, 99, 20])
    for part in range(4):
        keys, values = pairs(13, seed=part)
        keys[3] = keys[2]  # a tie
        assert torch.equal(memory.write(keys, values), ring.write(keys, values))
        for neighbors in (1, 5, 500, None):
            for before in (None, 20, times):
                assert_same(
                    memory.read(queries, neighbors, kernel=kernel, before=before),
                    ring.read(queries, neighbors, kernel=kernel, before=before),
                )


def test_batches_and_answers_larger_than_a_request(open_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collection, "_REQUEST", 20_000)  # 18 rows; bytes
    monkeypatch.setattr(collection, "_HITS", 60)  # 2 queries
    monkeypatch.setattr(collection, "MOST", 25)  # rows that one query returns
    ring = EpisodicMemory(CAPACITY, KEY)
    for local_keys in (True, False):
        memory = open_memory(local_keys=local_keys)
        memory.clear()
        ring.clear()
        for each in (memory, ring):
            each.write(*pairs(3 * CAPACITY))
        queries = pairs(5, seed=2)[0]
        for reader in (memory, open_memory(local_keys=local_keys)):  # one has written them, the other must fetch them
            for neighbors in (5, None):
                assert_same(reader.read(queries, neighbors), ring.read(queries, neighbors))
        assert open_memory().write(*pairs(1)).item() == 0  # step 90 of 90


def test_a_file_is_asked_what_it_has_memory_for() -> None:
    """At 512 numbers an entry has 2 KiB; a table of 2^28 bytes has room for 6 queries of 20,000 entries."""

    def at_once(uri: str, capacity: int, index: str) -> int:
        memory = MilvusMemory(uri, "entries", capacity=capacity, key_size=512, index=index, local_keys=False)
        return memory._collection.at_once(66, whole=False)

    assert [at_once("memory.db", capacity, "HNSW") for capacity in (100, 20_000, 10**6)] == [1310, 6, 2]
    assert [at_once("memory.db", capacity, "FLAT") for capacity in (100, 20_000, 10**6)] == [1310, 6, 1]
    assert at_once(NOBODY, 10**6, "FLAT") == 2**18 // 66


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.complex64])
def test_values_of_any_dtype_come_back_bit_for_bit(open_memory: Open, dtype: torch.dtype) -> None:
    values = torch.randn(9, 2, 3).mul(3).to(dtype)
    keys = pairs(9)[0]
    open_memory(value_shape=(2, 3), value_dtype=dtype).write(keys, values)
    for local_keys in (True, False):
        reader = open_memory(value_shape=(2, 3), value_dtype=dtype, local_keys=local_keys)
        found = reader.read(keys, 1).values.squeeze(1)
        assert found.dtype == dtype
        assert torch.equal(found, values)


def test_only_what_is_not_known_travels(open_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    rows = collection.Collection.rows

    def counted(self: collection.Collection, slots: Tensor, *, strong: bool = False) -> collection.Rows:
        fetched.append(len(slots))
        return rows(self, slots, strong=strong)

    monkeypatch.setattr(collection.Collection, "rows", counted)
    writer, reader = open_memory(), open_memory()
    writer.write(*pairs(20))
    queries = pairs(3, seed=5)[0]
    writer.read(queries, 50)
    assert fetched == []  # it wrote them itself
    reader.read(queries, 50)
    reader.read(queries, 50)
    assert fetched == [20]  # once
    writer.write(*pairs(12, seed=1))  # overwrites 2 of them
    reader.read(queries, 50)
    assert fetched == [20, 12]
    assert_same(reader.read(queries, 50), writer.read(queries, 50))


def test_a_prediction_is_one_request(open_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    ask = Connection.ask

    def counted(self: Connection, request: Callable) -> object:
        asked.append(1)
        return ask(self, request)

    memory = open_memory()
    memory.write(*pairs(20))
    monkeypatch.setattr(Connection, "ask", counted)
    adapted = MbPA(nn.Linear(KEY, 4), memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.1), steps=2))
    for model in (adapted, NonParametric(memory, classes=4, neighbors=5)):
        model(pairs(3, seed=5)[0])
        assert len(asked) == 1
        asked.clear()


# Restarts


@pytest.mark.parametrize("written", [7, CAPACITY, 2 * CAPACITY + 5])
def test_reopening_restores_entries_times_and_place(open_memory: Open, written: int) -> None:
    ring = EpisodicMemory(CAPACITY, KEY)
    first = open_memory()
    for each in (first, ring):
        each.write(*pairs(written))
    first.close()
    again = open_memory()
    queries = pairs(4, seed=3)[0]
    for memory in (again, first):  # a closed one opens again
        for before in (None, written - 3):
            assert_same(memory.read(queries, 5, before=before), ring.read(queries, 5, before=before))
    assert torch.equal(again.write(*pairs(4, seed=1)), ring.write(*pairs(4, seed=1)))
    assert_same(again.read(queries, None), ring.read(queries, None))


def test_no_write_time_is_used_twice(open_memory: Open) -> None:
    """The newest entries are forgotten, by another handle at that, and the writer starts again."""
    first = open_memory()
    slots = first.write(*pairs(10))
    open_memory().forget(slots[7:])
    again = open_memory()
    assert again.write(*pairs(2)).tolist() == [10, 11]
    assert len(again.read(pairs(1)[0], CAPACITY, before=10).slots[0].unique()) == 7 + 1  # and -1 for those after it
    again.clear()
    assert open_memory().write(*pairs(2)).tolist() == [0, 1]


def test_what_was_forgotten_is_nowhere(open_memory: Open) -> None:
    reader, writer = open_memory(), open_memory()
    slots = writer.write(*pairs(10))
    reader.read(pairs(1)[0], 10)  # keeps them all
    writer.forget(slots[:4])
    writer.clear()
    writer.write(*(part[4:8] for part in pairs(10)))  # the same write times and slots, other entries
    ring = EpisodicMemory(CAPACITY, KEY)
    ring.write(*(part[4:8] for part in pairs(10)))
    for memory in (reader, writer):
        assert_same(memory.read(pairs(3, seed=4)[0], 10), ring.read(pairs(3, seed=4)[0], 10))
    assert writer._kept is not None
    assert writer._kept._keys[8:].count_nonzero() == 0  # not in RAM either


SCRIPT = """
import sys, torch
from recollect import MilvusMemory
memory = MilvusMemory(sys.argv[1], "entries", capacity=300, key_size=6)
batch = 0
while True:
    keys = torch.arange(batch * 16, batch * 16 + 16).float().unsqueeze(1).expand(16, 6)
    memory.write(keys, torch.arange(batch * 16, batch * 16 + 16))
    batch += 1
    print(batch, flush=True)
"""


def test_killed_while_writing(tmp_path: Path) -> None:
    """Every batch that was acknowledged is there, whole; nothing is torn; and the ring goes on."""
    path = str(tmp_path / "memory.db")
    acknowledged = 0
    with subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            acknowledged = int(line)
            if acknowledged == 40:  # the ring has come round twice
                child.kill()
    memory = MilvusMemory(path, "entries", capacity=300, key_size=6)
    context = memory.read(torch.zeros(6), None)
    assert torch.equal(context.keys, context.values.unsqueeze(-1).expand(-1, 6).float())  # key and value agree
    assert torch.equal(context.slots, context.values % 300)
    newest = int(context.values.max())
    assert newest >= 16 * acknowledged - 1
    assert sorted(context.values.tolist()) == list(range(newest - 299, newest + 1))
    assert memory.write(torch.zeros(6), torch.tensor(7)).item() == (newest + 1) % 300
    memory.close()


# Several writers


def test_writers_share_the_slots(open_memory: Open) -> None:
    writers = [open_memory(writers=3, writer=number) for number in range(3)]
    rows = [pairs(25, seed=number) for number in range(3)]
    done = [0, 0, 0]
    for count, number in ((4, 0), (7, 2), (10, 0), (3, 1), (9, 0), (2, 0), (8, 2)):
        part = slice(done[number], done[number] + count)
        slots = writers[number].write(rows[number][0][part], rows[number][1][part])
        assert (slots % 3 == number).all()
        done[number] += count
    for reader in (*writers, open_memory(writers=3)):
        found = {tuple(key) for key in reader.read(torch.zeros(KEY), None).keys.tolist()}
        expected = {
            tuple(key)
            for number in range(3)
            for key in rows[number][0][max(0, done[number] - 10) : done[number]].tolist()
        }
        assert found == expected  # each writer's last tenth, whatever the others did


def test_two_with_one_number(open_memory: Open) -> None:
    first = open_memory()
    first.write(*pairs(3))
    twin = copy.deepcopy(first)
    assert twin.write(*pairs(2, seed=1)).tolist() == [3, 4]
    with pytest.raises(LockedError, match=r"writer 0 of 'entries'.*in use by another process.*Nothing was written"):
        first.write(*pairs(1))
    assert len(first.read(torch.zeros(KEY), None).slots) == 5  # it still reads
    assert twin.write(*pairs(1)).tolist() == [5]
    twin.close()


def test_a_copy_travels_as_its_settings(open_memory: Open) -> None:
    memory = open_memory(token="secret", local_keys=False)
    memory.write(*pairs(5))
    copied = pickle.loads(pickle.dumps(memory))
    assert_same(copied.read(pairs(2)[0], 3), memory.read(pairs(2)[0], 3))
    assert "secret" not in repr(memory) + repr(memory._settings)
    copied.close()


def test_what_is_in_milvus_is_not_saved_again(open_memory: Open, tmp_path: Path) -> None:
    memory = open_memory()
    memory.write(*pairs(5))
    head, adaptation = nn.Linear(KEY, 4), LocalAdaptation(rules.sgd(0.1), steps=2)
    model = MbPA(head, memory, neighbors=3, adaptation=adaptation)
    with pytest.raises(SettingError, match=r"'memory' is MilvusMemory.*stay in Milvus\. Save the head by itself"):
        save(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    save(head, tmp_path / "saved")
    again = MbPA(load(tmp_path / "saved"), memory, neighbors=3, adaptation=adaptation)
    assert torch.equal(again(pairs(3)[0]), model(pairs(3)[0]))


@pytest.mark.usefixtures("untyped")
def test_a_memory_by_itself_is_not_saved_again(open_memory: Open, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"is stored already, in Milvus\. Open it again"):
        save(open_memory(), tmp_path / "saved")


def test_a_forked_process_is_told(open_memory: Open) -> None:
    memory = open_memory()
    memory.write(*pairs(5))
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            memory.read(torch.zeros(KEY), 1)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert "was forked from" in answer.read()
    assert len(memory) == 5


def test_a_loaded_collection_is_taken_as_it_is(open_memory: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """To load it again would leave it one replica, or be refused."""
    memory = open_memory()
    memory.write(*pairs(5))
    loads = []
    monkeypatch.setattr(MilvusClient, "load_collection", lambda *args, **settings: loads.append(args))
    other = open_memory()
    assert len(other) == 5
    assert loads == []


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 20}, "was made with capacity=30, but is opened with capacity=20"),
        ({"key_size": 7}, "key_size=6, but is opened with key_size=7"),
        ({"value_shape": (2,)}, r"value_shape=\[\], but"),
        ({"value_dtype": torch.float32}, "value_dtype='int64'"),
        ({"writers": 2}, "writers=1"),
        ({"index": "FLAT"}, "index='HNSW', but is opened with index='FLAT'"),
    ],
)
def test_other_settings_are_refused(open_memory: Open, settings: dict, message: str) -> None:
    memory = open_memory()
    memory.write(*pairs(5))
    other = open_memory(**settings)
    with pytest.raises(SettingError, match=message):
        other.connect()
    assert len(memory) == 5


def test_a_strangers_collection_stays_as_it_is(tmp_path: Path, open_memory: Open) -> None:
    client = MilvusClient(str(tmp_path / "memory.db"))
    client.create_collection("entries", dimension=KEY)
    client.insert("entries", [{"id": 1, "vector": [0.5] * KEY}])
    with pytest.raises(
        SettingError, match=r"'entries' at .* is not one of a memory: it has the fields .*Nothing of it"
    ):
        open_memory().write(*pairs(3))
    assert [row["id"] for row in client.query("entries", filter="id >= 0")] == [1]
    client.close()


@pytest.mark.parametrize("left_out", ["settings", "index", "all"])
def test_an_interrupted_creation_is_completed(tmp_path: Path, open_memory: Open, left_out: str) -> None:
    client = MilvusClient(str(tmp_path / "memory.db"))
    if left_out != "all":
        schema = client.create_schema(auto_id=False)
        for name in ("slot", "written", "session"):
            schema.add_field(name, DataType.INT64, is_primary=name == "slot")
        schema.add_field("key", DataType.FLOAT_VECTOR, dim=KEY)
        schema.add_field("value", DataType.VARCHAR, max_length=1024)
        client.create_collection("entries", schema=schema)
    if left_out == "settings":
        indexes = client.prepare_index_params()
        indexes.add_index("key", index_type="HNSW", metric_type="L2", params={"M": 8, "efConstruction": 64})
        client.create_index("entries", indexes)
    client.close()
    open_memory().write(*pairs(3))
    assert len(open_memory()) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity": 0}, "capacity must be a whole number above 0, got 0"),
        ({"capacity": 31, "writers": 2}, "capacity must be a multiple of writers=2"),
        ({"writer": 1}, "writer must be from 0 to 0 with writers=1, got 1"),
        ({"key_size": 32_769}, "key_size must be at most 32768"),
        ({"value_shape": (10_000,), "value_dtype": torch.float64}, "at most 49149 bytes in Milvus, got 80000"),
        ({"consistency": "strict"}, "consistency must be one of 'session', 'strong'"),
        ({"index": "IVF_PQ"}, "index must be one of 'HNSW', 'FLAT'"),
        ({"on_unreachable": "ignore"}, "on_unreachable must be one of 'raise', 'parametric'"),
        ({"timeout": 0.0}, "timeout must be a finite number above 0"),
        ({"retries": -1}, "retries must be a whole number of at least 0"),
        ({"uri": "memory"}, "uri must be a file that ends in .db, or a server's address"),
        ({"uri": "ftp://localhost:19530"}, "such as http://localhost:19530, got 'ftp://localhost:19530'"),
        ({"uri": "http://localhost:99999"}, "got 'http://localhost:99999'"),
        ({"uri": "http://localhost:port"}, "got 'http://localhost:port'"),
        ({"uri": "http://:19530"}, "got 'http://:19530'"),
        ({"collection": "my entries"}, "collection must be a name of letters, digits and _, got 'my entries'"),
    ],
)
def test_bad_arguments_are_refused(settings: dict, message: str) -> None:
    given = {"uri": "memory.db", "collection": "entries", "capacity": CAPACITY, "key_size": KEY} | settings
    uri, name = given.pop("uri"), given.pop("collection")
    with pytest.raises(SettingError, match=message):
        MilvusMemory(uri, name, **given)


def test_more_neighbors_than_milvus_finds() -> None:
    memory = MilvusMemory("memory.db", "entries", capacity=20_000, key_size=2)
    with pytest.raises(SettingError, match="at most 16384 neighbors, got 16385"):
        memory.read(torch.zeros(2), 16_385)


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("milvus_lite.server_manager", "pymilvus"):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(MissingExtraError, match=r"pip install 'recollect\[milvus\]'"):
            MilvusMemory("memory.db", "entries", capacity=2, key_size=2)


def test_a_file_of_another_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = str(tmp_path / "memory.db")
    memory = MilvusMemory(path, "entries", capacity=300, key_size=6, retries=1)
    with subprocess.Popen([sys.executable, "-c", SCRIPT, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        with pytest.raises(LockedError, match="is open in another process") as caught, caplog.at_level(logging.INFO):
            memory.read(torch.zeros(6), 1)
        child.kill()
    assert "DataDirLocked" in str(caught.value)
    assert caplog.records == []
    assert memory.read(torch.zeros(6), 1).slots.shape == (1,)
    memory.close()


# When nobody answers

NOBODY = "http://127.0.0.1:9"  # the port of "discard", which nothing listens on


def lonely(**settings) -> MilvusMemory:
    return MilvusMemory(NOBODY, "entries", capacity=CAPACITY, key_size=KEY, **{"timeout": 0.5, "retries": 1} | settings)


def test_nobody_answers(caplog: pytest.LogCaptureFixture) -> None:
    memory, begin = lonely(), time.monotonic()
    for ask in (
        memory.connect,
        memory.clear,
        lambda: len(memory),
        lambda: memory.write(*pairs(2)),
        lambda: memory.read(torch.zeros(KEY), 2),
        lambda: memory.forget(3),
    ):
        with pytest.raises(UnreachableError, match=r"127\.0\.0\.1:9 did not answer: 2 attempts") as caught:
            ask()
        assert isinstance(caught.value, ConnectionError)
        assert isinstance(caught.value, RecollectError)
        assert caught.value.__cause__ is None
        assert len(str(caught.value)) < 500
    assert time.monotonic() - begin < 6 * 2 * (0.5 + 2)
    assert caplog.records == []  # no tracebacks
    logging.getLogger("pymilvus.decorators").error("of somebody else")
    assert [record.message for record in caplog.records] == ["of somebody else"]


def test_parametric_while_nobody_answers() -> None:
    memory, head = lonely(on_unreachable="parametric"), nn.Linear(KEY, 4)
    model = MbPA(head, memory, neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.1), steps=2))
    keys = pairs(3)[0]
    with pytest.warns(RuntimeWarning, match=r"did not answer.*Until it does, reads find nothing \(outage 1"):
        assert torch.equal(model(keys), head(keys).log_softmax(-1))
    assert memory.unanswered == 1
    for _ in range(3):  # no further warning (which would be an error here), and nobody is asked for a while
        assert torch.equal(model(keys), head(keys).log_softmax(-1))
    assert memory.unanswered == 4
    with pytest.raises(UnreachableError):
        memory.write(*pairs(2))
    assert memory.read(keys.view(3, 1, KEY), None).slots.shape == (3, 1, 0)


def test_reasons_that_are_their_own_cause() -> None:
    error = ValueError("round")
    error.__cause__ = KeyError("and")
    error.__cause__.__cause__ = error
    assert _reason(error, ["logged"]) == "ValueError: round; KeyError: 'and'; logged"
