"""What a durable memory's file holds, in RAM: loaded, brought up to date, and written back as a whole."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from recollect.errors import NonFiniteError, SettingError
from recollect.memory.checks import too_large
from recollect.memory.durable.database import Database, Settings, State
from recollect.memory.durable.records import Records, order
from recollect.memory.episodic import EpisodicMemory
from recollect.memory.index import Index

_TOGETHER = 8  # blocks that are unpacked at once: many save calls, and too many leave the caches
Advance = Callable[[int], None]  # is told how many slots are done


class Contents(NamedTuple):
    """The entries of one moment."""

    ring: EpisodicMemory
    stamps: Int[Tensor, " n"]
    """What became of each slot: see ``Records``. As they were when this was loaded or updated last."""
    state: State


@torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
def new_ring(settings: Settings, index: Index | None = None) -> EpisodicMemory:
    """Returns an empty memory in RAM."""
    return EpisodicMemory(
        settings.capacity,
        settings.key_size,
        value_shape=settings.value_shape,
        value_dtype=settings.value_dtype,
        key_dtype=settings.key_dtype,
        history=settings.history,
        index=index,
    )


@torch.inference_mode(False)
def load(database: Database, index: Index | None = None, *, advance: Advance = lambda slots: None) -> Contents:
    """Loads all entries.

    Raises:
        FormatError: If the file is damaged.
    """
    settings = database.settings
    ring, stamps = new_ring(settings, index), torch.zeros(settings.slots, dtype=torch.long)
    scratch = bytearray(_TOGETHER * database.per_block * database.layout.length)
    with database.reading() as state:
        for number, blobs in _runs(database.blocks()):
            first, records = _unpack(database, number, blobs, scratch)
            part = slice(first, first + len(records.stamps))
            ring.keys[part], ring.values[part], stamps[part] = records.keys, records.values, records.stamps
            advance(len(records.stamps))
    _check(database, stamps, state)
    _settle(ring, stamps, state)
    ring.index.rebuild(ring.keys, ring.written)
    return Contents(ring, stamps, state)


class Changes(NamedTuple):
    """The slots that differ from what was loaded."""

    slots: Int[Tensor, " n"]
    records: Records
    stamps: Int[Tensor, " m"]
    """Those of all slots."""
    state: State


def changes(database: Database, contents: Contents) -> Changes | None:
    """Returns what was committed since, or None where everything was replaced.

    Raises:
        FormatError: If the file is damaged.
    """
    parts: list[tuple[Tensor, Records]] = []
    stamps = contents.stamps.clone()
    with database.reading() as state:
        if state.epoch != contents.state.epoch:
            return None
        blocks = database.blocks(contents.state.version) if state.version != contents.state.version else ()
        for number, blob in blocks:
            first, records = _unpack(database, number, [blob], bytearray(len(blob)))
            part = stamps[first : first + len(records.stamps)]
            new = (records.stamps != part).nonzero().squeeze(1)
            parts.append((new + first, Records(*(column[new] for column in records))))
            part.copy_(records.stamps)
    _check(database, stamps, state)
    if not parts:
        nothing = Records(stamps[:0], contents.ring.keys[:0].cpu(), contents.ring.values[:0].cpu())
        return Changes(stamps[:0], nothing, stamps, state)
    slots = torch.cat([slots for slots, _ in parts])
    columns = zip(*(records for _, records in parts), strict=True)
    return Changes(slots, Records(*(torch.cat(column) for column in columns)), stamps, state)


def apply(ring: EpisodicMemory, changed: Changes) -> Contents:
    """Brings a ring up to date, and returns the new contents."""
    slots = changed.slots.to(ring.keys.device)
    ring.keys[slots] = changed.records.keys.to(ring.keys.device)
    ring.values[slots] = changed.records.values.to(ring.keys.device)
    _settle(ring, changed.stamps, changed.state)
    ring.index.update(ring.keys, ring.written, slots)
    return Contents(ring, changed.stamps, changed.state)


def replace(database: Database, ring: EpisodicMemory, state: State, *, advance: Advance = lambda slots: None) -> State:
    """Puts the entries of a ring in the place of all that there are, in one transaction; returns the new state.

    Raises:
        SettingError: If the ring's buffers contradict each other.
        NonFiniteError: If its keys are not finite.
        StorageError: If they cannot be written; then the file is as it was.
    """
    stamps = _stamps(ring)
    used = (stamps != 0).nonzero().squeeze(1)
    after = State(
        position=int(ring.position),
        step=int(ring.step),
        size=int(ring.size),
        forgets=max(0, -int(stamps.min())),
        version=state.version + 1,
        epoch=state.epoch + 1,
    )
    with database.writing(after):
        database.remove_all()
        for slots in used.split(database.per_block) if len(used) else ():
            part = slots.to(ring.keys.device)
            records = Records(stamps[slots], ring.keys[part].cpu(), ring.values[part].cpu())
            if records.keys.is_floating_point() and bool(too_large(records.keys).any()):
                raise NonFiniteError("keys must be finite, and these are not. Nothing was changed.")
            database.put(slots, database.layout.pack(records), after.version)
            advance(len(slots))
    return after


def _stamps(ring: EpisodicMemory) -> Int[Tensor, " n"]:
    """Returns stamps that say the same as a ring's write times and queue."""
    stamps, position = (ring.written + 1).cpu(), int(ring.position)
    queue = ring.queue.cpu()
    overwritten = queue.roll(-position)
    free = overwritten[stamps[overwritten] <= 0]
    if bool((free.diff() < 0).any()):  # else all could have been empty from the start
        stamps[free] = torch.arange(-len(free), 0)
    occupied = stamps[stamps > 0]
    consistent = (
        torch.equal(order(stamps), overwritten)
        and len(occupied) == int(ring.size) == len(occupied.unique())
        and 0 <= position < len(queue)
        and (len(occupied) == 0 or int(occupied.max()) <= int(ring.step))
    )
    if not consistent:
        raise SettingError("these tensors are no memory: write times, queue, position, step and size do not agree.")
    return stamps


def _runs(blocks: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, list[bytes]]]:
    """Returns blocks that follow on each other together, a few at a time, with the number of the first."""
    start, run = 0, list[bytes]()
    for number, blob in blocks:
        if run and (number != start + len(run) or len(run) == _TOGETHER):
            yield start, run
            run = []
        if not run:
            start = number
        run.append(blob)
    if run:
        yield start, run


def _unpack(database: Database, number: int, blobs: Sequence[bytes], scratch: bytearray) -> tuple[int, Records]:
    """Returns the first slot of a block, and its records and those of the next ones, which lie in ``scratch``."""
    slots, size = database.settings.slots, database.per_block * database.layout.length
    for place, blob in enumerate(blobs):
        if not 0 <= (number + place) * database.per_block < slots or len(blob) != size:
            raise database.damaged(f"its block {number + place} has {len(blob)} bytes and cannot be there")
        scratch[place * size : (place + 1) * size] = blob  # itself it may not be written to
    first, used = number * database.per_block, len(blobs) * size
    records, sound = database.layout.unpack(scratch if used == len(scratch) else scratch[:used])
    count = min(len(sound), slots - first)
    if not bool(sound.all()):
        bad = first + int((~sound).nonzero()[0])
        raise database.damaged(f"the checksum of slot {bad} is wrong")
    return first, Records(*(part[:count] for part in records))


def _check(database: Database, stamps: Int[Tensor, " n"], state: State) -> None:
    """Refuses slots that are not those that the state speaks of."""
    size, newest = int((stamps > 0).sum()), int(stamps.max()) - 1
    if size != state.size or newest >= state.step or not 0 <= state.position < len(stamps):
        raise database.damaged(f"it holds {size} entries until time {newest}, and says {state}")


def _settle(ring: EpisodicMemory, stamps: Int[Tensor, " n"], state: State) -> None:
    """Sets what a ring says of its slots; its keys and values are set by the caller."""
    ring.written.copy_((stamps - 1).clamp(min=-1))
    ring.queue.copy_(order(stamps).roll(state.position))
    ring.position.fill_(state.position)
    ring.step.fill_(state.step)
    ring.size.fill_(state.size)
