"""``MilvusMemory`` on a real server that is killed, hangs, comes back, and serves several writers at once."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from servers.keeper import PYTHON, TOKEN, Server
from torch import nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, MilvusMemory, rules
from recollect.errors import LockedError, SettingError, UnreachableError

if PYTHON is None:
    pytest.skip("needs a Milvus server: make test-milvus", allow_module_level=True)

KEY, CAPACITY = 8, 1200

# Writes rows whose key and value say the same, number by number, and prints how many rows were acknowledged.
WRITER = """
import sys, torch
from recollect import MilvusMemory
from recollect.errors import UnreachableError
uri, name, token, writer, writers, rounds = *sys.argv[1:4], *map(int, sys.argv[4:])
memory = MilvusMemory(
    uri, name, capacity=1200, key_size=8, token=token, writer=writer, writers=writers, timeout=5.0, retries=0
)
done = 0
while done < rounds * 32:
    values = torch.arange(done, done + 32)
    try:
        memory.write(values.float().unsqueeze(1).expand(-1, 8), values * writers + writer)
    except UnreachableError:
        break
    done += 32
    print(done, flush=True)
"""


def writing(server: Server, name: str, *, writer: int = 0, writers: int = 1, rounds: int) -> subprocess.Popen[str]:
    numbers = [str(writer), str(writers), str(rounds)]
    command = [sys.executable, "-c", WRITER, server.uri, name, TOKEN, *numbers]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def open_memory(server: Server, name: str, **settings) -> MilvusMemory:
    return MilvusMemory(server.uri, name, capacity=CAPACITY, key_size=KEY, token=TOKEN, **settings)


def check_rows(memory: MilvusMemory, acknowledged: list[int]) -> None:
    """No acknowledged row is missing, none is older than what was acknowledged in its slot, and none is torn."""
    writers, own = len(acknowledged), CAPACITY // len(acknowledged)
    context = memory.read(torch.zeros(KEY), None)
    turns = torch.div(context.values, writers, rounding_mode="floor")
    assert torch.equal(context.keys, turns.float().unsqueeze(1).expand(-1, KEY))
    assert torch.equal(context.slots, context.values % CAPACITY)
    for writer, done in enumerate(acknowledged):
        there = set(turns[context.values % writers == writer].tolist())
        newest = max(there)
        assert newest >= done - 1
        assert there == set(range(max(0, newest - own + 1), newest + 1))


def test_a_wrong_token_is_refused(server: Server) -> None:
    for token in (None, "root:wrong"):
        with pytest.raises(SettingError, match="refuses token=") as caught:
            MilvusMemory(server.uri, "entries", capacity=5, key_size=2, token=token, timeout=5.0).connect()
        assert "wrong" not in str(caught.value)


def test_consistency(server: Server) -> None:
    """Every level answers; a session sees its own writes at once, a strong read also those of others."""
    keys = torch.randn(5, KEY, generator=torch.Generator().manual_seed(0))
    for level in ("session", "strong"):
        memory = open_memory(server, f"level_{level}", consistency=level)
        other = open_memory(server, f"level_{level}", consistency=level)
        for row in range(5):
            memory.write(keys[row], torch.tensor(row))
            assert memory.read(keys[row], 1).values.item() == row
            if level == "strong":
                assert other.read(keys[row], 1).values.item() == row
        memory.forget(memory.read(keys[2], 1).slots)
        assert memory.read(keys[2], 1).values.item() != 2
        assert len(memory) == 4
    for level in ("bounded", "eventually"):
        memory = open_memory(server, "level_session", consistency=level)
        assert sorted(memory.read(keys[0], 9).values.tolist()) == [0, 1, 3, 4]


@pytest.mark.parametrize("index", [None, "HNSW"])
def test_what_each_index_finds(server: Server, index: str | None) -> None:
    """Exact search, the default, finds all that the ring finds; HNSW most of it."""
    memory, ring = open_memory(server, f"index_{index}", index=index), EpisodicMemory(CAPACITY, KEY)
    keys = torch.randn(CAPACITY, KEY, generator=torch.Generator().manual_seed(0))
    for each in (memory, ring):
        each.write(keys, torch.arange(CAPACITY))
    found, true = (each.read(keys[:20] + 0.1, 10).slots for each in (memory, ring))
    recall = (found.unsqueeze(2) == true.unsqueeze(1)).any(2).float().mean().item()
    assert torch.equal(found, true) if index is None else 0.5 < recall <= 1.0


def test_two_writers_at_once(server: Server) -> None:
    memory = open_memory(server, "two", writers=2, consistency="strong")
    memory.connect()
    children = [writing(server, "two", writer=number, writers=2, rounds=60) for number in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    acknowledged = [int(output.split()[-1]) for output in outputs]
    assert acknowledged == [60 * 32] * 2  # each went round its 600 slots three times
    check_rows(memory, acknowledged)
    again = open_memory(server, "two", writers=2, writer=1)
    assert again.write(torch.zeros(KEY), torch.tensor(0)).item() == (60 * 32 * 2 + 1) % CAPACITY


def test_two_with_one_number(server: Server) -> None:
    first, second = (open_memory(server, "one_number") for _ in range(2))
    first.write(torch.zeros(KEY), torch.tensor(0))
    assert second.write(torch.ones(KEY), torch.tensor(1)).tolist() == [1]
    time.sleep(1)  # by then the first can know
    with pytest.raises(LockedError, match="in use by another process"):
        first.write(torch.zeros(KEY), torch.tensor(0))
    assert sorted(second.read(torch.zeros(KEY), 5).values.tolist()) == [0, 1]


def test_a_server_that_hangs(server: Server) -> None:
    patient, memory = open_memory(server, "hang", timeout=20.0), open_memory(server, "hang", timeout=1.0, retries=1)
    patient.write(torch.zeros(KEY), torch.tensor(0))
    assert len(memory) == 1
    server.send(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(UnreachableError, match="did not answer: 2 attempts of at most 1 s"):
            memory.read(torch.zeros(KEY), 1)
        assert time.monotonic() - begin < 2 * (1 + 2)
    finally:
        server.send(signal.SIGCONT)
    assert patient.read(torch.zeros(KEY), 1).values.tolist() == [0]


@pytest.mark.parametrize("acknowledged_batches", [30, 75])
def test_kill_during_upserts(server: Server, acknowledged_batches: int) -> None:
    """The server dies while it is written to, is away, and comes back with all that it has acknowledged."""
    name = f"killed_{acknowledged_batches}"
    open_memory(server, name, timeout=20.0).connect()
    strict = open_memory(server, name, timeout=1.0, retries=1)
    lenient = open_memory(server, name, timeout=3.0, retries=0, on_unreachable="parametric")
    head = nn.Linear(KEY, 10 * CAPACITY)
    model = MbPA(head, lenient, neighbors=5, adaptation=LocalAdaptation(rules.sgd(0.1), steps=1))
    keys = torch.ones(3, KEY)
    assert len(strict) == len(lenient) == 0
    acknowledged = 0
    with writing(server, name, rounds=10_000) as child:
        assert child.stdout is not None
        for line in child.stdout:
            acknowledged = int(line)
            if acknowledged == acknowledged_batches * 32:
                assert not torch.equal(model(keys), head(keys).log_softmax(-1))
                server.send(signal.SIGKILL)
    try:
        begin = time.monotonic()
        for ask in (lambda: strict.read(keys, 5), lambda: strict.write(keys, torch.zeros(3).long()), strict.clear):
            with pytest.raises(UnreachableError):
                ask()
        assert time.monotonic() - begin < 3 * 2 * (1 + 2)
        with pytest.warns(RuntimeWarning, match="reads find nothing"):
            assert torch.equal(model(keys), head(keys).log_softmax(-1))
        assert torch.equal(model(keys), head(keys).log_softmax(-1))
        assert lenient.unanswered == 2
    finally:
        server.stop()
        server.start()
    check_rows(open_memory(server, name, timeout=60.0, consistency="strong"), [acknowledged])
    deadline = time.monotonic() + 90
    while torch.equal(model(keys), head(keys).log_softmax(-1)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert lenient.unanswered >= 2
    writer = open_memory(server, name, timeout=20.0)
    slot = writer.write(torch.ones(KEY), torch.tensor(3)).item()
    assert slot == (int(writer.read(keys[0], None).values.max()) + 1) % CAPACITY
