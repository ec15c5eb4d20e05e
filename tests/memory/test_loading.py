"""Loading a durable memory: its blocks, some at a time, with gaps between them and damage in the midst."""

import re
import sqlite3
from pathlib import Path

import pytest
import torch

from recollect import DurableMemory, EpisodicMemory
from recollect.errors import FormatError
from recollect.memory.durable import contents, records

SLOTS, KEY = 30, 4


@pytest.fixture(autouse=True)
def _a_record_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_BLOCK", 1)
    monkeypatch.setattr(contents, "_TOGETHER", 4)


def beside(count: int, gone: slice) -> EpisodicMemory:
    memory = EpisodicMemory(SLOTS, KEY)
    memory.write(torch.randn(count, KEY, generator=torch.Generator().manual_seed(0)), torch.arange(count))
    memory.forget(torch.arange(count)[gone])
    return memory


@pytest.mark.parametrize(
    ("count", "gone"),
    [(30, slice(0, 0)), (30, slice(5, 16)), (29, slice(0, 9)), (13, slice(12, 13)), (1, slice(0, 0)), (0, slice(0, 0))],
)
def test_blocks_with_gaps_between_them(tmp_path: Path, count: int, gone: slice) -> None:
    expected = beside(count, gone).state_dict()
    with DurableMemory(tmp_path, SLOTS, KEY) as memory:
        memory.load_state_dict(expected)
    connection = sqlite3.connect(tmp_path / "memory.sqlite")
    there = [number for (number,) in connection.execute("SELECT number FROM blocks ORDER BY number")]
    connection.close()
    assert there == [slot for slot in range(count) if slot not in range(*gone.indices(count))]
    with DurableMemory(tmp_path, read_only=True) as memory:
        for name, tensor in memory.state_dict().items():
            seen = expected["written"] >= 0 if name in ("keys", "values") else ...
            assert torch.equal(tensor[seen], expected[name][seen]), name


@pytest.mark.parametrize("slot", [0, 3, 4, 17, 29])
def test_the_slot_that_is_damaged_is_named(tmp_path: Path, slot: int) -> None:
    with DurableMemory(tmp_path, SLOTS, KEY) as memory:
        memory.load_state_dict(beside(30, slice(0, 0)).state_dict())
    connection = sqlite3.connect(tmp_path / "memory.sqlite")
    (entry,) = connection.execute("SELECT entries FROM blocks WHERE number = ?", (slot,)).fetchone()
    connection.execute("UPDATE blocks SET entries = ? WHERE number = ?", (entry[:-1] + b"\x55", slot))
    connection.commit()
    connection.close()
    with pytest.raises(FormatError, match=re.escape(f"the checksum of slot {slot} is wrong")):
        DurableMemory(tmp_path, read_only=True)
