"""Writing to a full memory: its oldest entries are overwritten."""

from collections.abc import Iterator

import faiss
import torch

from benchmarks import floors, memories
from benchmarks.case import Call, Case

NAME = "write"
TITLE = "Writing to a full memory"

_RING = 8192
_SIZE = 784


def _grid(full: bool) -> list[int]:
    return [1, 32, 256, 2048] if full else [1, 256]


def count(full: bool) -> int:
    """Returns how many cases there are."""
    return len(_grid(full))


def cases(full: bool, device: torch.device) -> Iterator[Case]:
    """Makes one case after the other."""
    for rows in _grid(full):
        yield _case(rows, device)


def _case(rows: int, device: torch.device) -> Case:
    """Overwrites the whole ring once in each call, so that what is due only now and then has its share."""
    maker = memories.normal(_SIZE, device)
    memory = memories.filled(maker, _RING, _SIZE, device=device)
    keys = maker(rows, torch.Generator(device).manual_seed(3))
    values = torch.zeros(rows, dtype=torch.long, device=device)

    def turn() -> None:
        for _ in range(_RING // rows):
            memory.write(keys, values)

    contenders: dict[str, Call] = {"recollect": turn}
    if device.type == "cpu":
        flat, batch = faiss.IndexFlatL2(_SIZE), keys.numpy()

        def append() -> None:
            flat.reset()
            for _ in range(_RING // rows):
                flat.add(batch)

        contenders["faiss, appending"] = append
    return Case(
        group=f"N={_RING:,} d={_SIZE}",
        label=f"batches of {rows}",
        contenders=contenders,
        ours="recollect",
        work=floors.write(_RING, _SIZE, ring=_RING),
        queries=_RING,
        derived=lambda walls: {"rows per second": f"{1 / walls['recollect']:,.0f}"},
        note="faiss appends and checks nothing" if rows == 1 else "",
    )
