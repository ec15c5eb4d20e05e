"""A memory that is still there after a crash: what writing, opening and reading cost beside a memory in RAM."""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks import floors, memories
from benchmarks.case import Call, Case
from recollect import DurableMemory, EpisodicMemory
from recollect.memory.durable.database import Sync

NAME = "durable"
TITLE = "A memory on disk"

_SIZE = 512
_BATCH = 256
_TURN = 16_384  # rows that are written in each call
_SINGLE = 64  # rows that are written one by one


def _slots(full: bool) -> int:
    return 200_000 if full else 20_000


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return 4


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other; all but the first share a memory, which is gone at the end."""
    slots = _slots(full)
    group = f"N={slots:,} d={_SIZE}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        yield _fill(group, slots, folder, device)
        beside = memories.filled(memories.normal(_SIZE, device), slots, _SIZE, device=device)
        with DurableMemory(folder / "full", slots, _SIZE).to(device) as memory:
            memory.load_state_dict(beside.state_dict())
            yield _overwrite(group, memory, beside, folder, device)
            yield _read(group, memory, device)
        save_file(memory.state_dict(), folder / "snapshot.safetensors")
        torch.save(memory.state_dict(), folder / "snapshot.pt")
        yield _load(group, slots, folder)


def _writer(memory: DurableMemory | EpisodicMemory, rows: int, batch: int, device: torch.device) -> Call:
    keys = memories.normal(_SIZE, device)(batch, torch.Generator(device).manual_seed(3))
    values = torch.zeros(batch, dtype=torch.long, device=device)

    def turn() -> None:
        for _ in range(rows // batch):
            memory.write(keys, values)

    return turn


def _fill(group: str, slots: int, folder: Path, device: torch.device) -> Case:
    """Makes a memory and fills it."""
    numbers = itertools.count()

    def fill(sync: Sync) -> Call:
        def call() -> None:
            new = folder / str(next(numbers))
            with DurableMemory(new, slots, _SIZE, sync=sync).to(device) as memory:
                _writer(memory, slots, _BATCH, device)()
            shutil.rmtree(new)

        return call

    contenders = {"recollect": fill("full"), 'sync="normal"': fill("normal")}
    return _writing(group, f"made and filled, batches of {_BATCH}", contenders, slots, rows=slots)


def _overwrite(group: str, memory: DurableMemory, beside: EpisodicMemory, folder: Path, device: torch.device) -> Case:
    normal = DurableMemory(folder / "normal", len(beside), _SIZE, sync="normal").to(device)
    normal.load_state_dict(beside.state_dict())
    contenders: dict[str, Call] = {
        "recollect": _writer(memory, _TURN, _BATCH, device),
        'sync="normal"': _writer(normal, _TURN, _BATCH, device),
        "one commit a row": _writer(memory, _SINGLE, 1, device),
        "RAM alone": _writer(beside, _TURN, _BATCH, device),
    }
    return _writing(group, f"overwriting, batches of {_BATCH}", contenders, len(beside), {"one commit a row": _SINGLE})


def _writing(
    group: str,
    label: str,
    contenders: dict[str, Call],
    slots: int,
    fewer: dict[str, int] | None = None,
    rows: int = _TURN,
) -> Case:
    return Case(
        group=group,
        label=label,
        contenders=contenders,
        ours="recollect",
        work=floors.write(rows, _SIZE, ring=slots),
        queries=rows,
        fewer=fewer or {},
        derived=_per_second,
    )


def _read(group: str, memory: DurableMemory, device: torch.device) -> Case:
    queries = memories.queries(memories.normal(_SIZE, device), 32, device)
    return Case(
        group=group,
        label="reading, B=32 K=50",
        contenders={"recollect": lambda: memory.read(queries, 50), "RAM alone": lambda: memory.ring.read(queries, 50)},
        ours="recollect",
        work=floors.search(len(memory), _SIZE, 32),
        queries=32,
        derived=_per_second,
    )


def _load(group: str, slots: int, folder: Path) -> Case:
    def opened() -> None:
        DurableMemory(folder / "full", read_only=True).close()

    def snapshot(load: Callable[[], dict[str, torch.Tensor]]) -> Call:
        def call() -> None:
            memory = EpisodicMemory(slots, _SIZE)
            memory.load_state_dict(load())

        return call

    return Case(
        group=group,
        label="opening",
        contenders={
            "recollect": opened,
            "torch.load": snapshot(lambda: torch.load(folder / "snapshot.pt", weights_only=True)),
            "safetensors": snapshot(lambda: load_file(folder / "snapshot.safetensors")),
        },
        ours="recollect",
        work=floors.write(slots, _SIZE, ring=slots),
        queries=slots,
        derived=_per_second,
    )


def _per_second(walls: Mapping[str, float]) -> dict[str, str]:
    return {"per second": f"{1 / walls['recollect']:,.0f}"}
