"""Looking for damage in the file of a durable memory, all of it, without changing anything."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from recollect.errors import FormatError
from recollect.memory.checks import too_large
from recollect.memory.durable.contents import Advance
from recollect.memory.durable.database import Database, State, check_header


def problems(folder: Path, *, advance: Advance = lambda slots: None) -> list[str]:
    """Returns what is wrong with a memory's file: its structure, checksums, keys, write times and positions.

    Raises:
        MissingDataError: If there is no such file.
        FormatError: If it is not a memory's, or a newer version's.
        StorageError: If it cannot be read.
    """
    check_header(folder)
    try:
        with closing(Database(folder, write=False)) as database:
            found = database.integrity()
            stamps = torch.zeros(database.settings.slots, dtype=torch.long)
            with database.reading() as state:
                for number, blob in database.blocks():
                    found += _in_block(database, number, blob, stamps)
                    advance(database.per_block)
            return found + list(_in_order(stamps, state))
    except FormatError as error:  # it cannot be read to its end
        return [str(error)]


def _in_block(database: Database, number: int, blob: bytes, stamps: Int[Tensor, " n"]) -> list[str]:
    first, length = number * database.per_block, database.per_block * database.layout.length
    if not 0 <= first < len(stamps) or len(blob) != length:
        return [f"block {number} has {len(blob)} bytes, and {length} belong into each"]
    records, sound = database.layout.unpack(bytearray(blob))
    part = stamps[first : first + len(sound)]
    part.copy_(records.stamps[: len(part)])
    found = [f"the checksum of slot {first + row} is wrong" for row in (~sound).nonzero().squeeze(1).tolist()]
    if records.keys.is_floating_point():
        bad = too_large(records.keys) & sound
        found += [f"the key in slot {first + row} is not finite" for row in bad.nonzero().squeeze(1).tolist()]
    return found


def _in_order(stamps: Int[Tensor, " n"], state: State) -> Iterator[str]:
    times = stamps[stamps > 0] - 1
    if len(times) != state.size:
        yield f"there are {len(times)} entries, and the file says {state.size}"
    if len(times.unique()) != len(times):
        yield "two entries have the same write time"
    if len(times) and int(times.max()) >= state.step:
        yield f"an entry has write time {int(times.max())}, and only {state.step} were written"
    if not 0 <= state.position < len(stamps):
        yield f"the ring position is {state.position}, outside of {len(stamps)} slots"
    if int(stamps.min()) < -state.forgets:
        yield f"a slot was forgotten in call {-int(stamps.min())}, and there were {state.forgets}"
