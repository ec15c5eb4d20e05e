"""``Ledger``: the memory and the journal beside it, kept in step. The only one that writes to either."""

import functools
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from recollect.errors import FormatError, SettingError
from recollect.memory import DurableMemory
from recollect.serve.journal import Announcement, Answer, Journal
from recollect.serve.problems import is_of_the_disk
from recollect.serve.service import Batch, Service, ring

_SHADES = 255  # of gray in which pictures are kept
_LOG = logging.getLogger("recollect.serve")


class Write(NamedTuple):
    """Entries to be written, and what must be known of them."""

    keys: Shaped[Tensor, "n d"]
    inputs: Batch
    labels: list[str]
    new: list[str]
    """The classes among the labels that had no name."""
    key: str | None
    """Of idempotency."""
    digest: str


class Ledger:
    """Writes entries, names and answers such that a crash or a full disk leaves them in agreement.

    Args:
        service: What is served.
        journal: What is known beside the memory.

    Raises:
        SettingError: If the memory can only be read.
        StorageError, FormatError: If the journal cannot be used.
    """

    def __init__(self, service: Service, journal: Journal) -> None:
        self.memory = service.layer.memory
        self._service, self._journal = service, journal
        self._unrecorded: Callable[[], None] | None = None  # what the journal has still to take of the last write
        durable = self.memory if isinstance(self.memory, DurableMemory) else None
        if durable is not None and durable.read_only:
            raise SettingError(
                f"the memory in {durable.folder} was opened with read_only=True: it cannot be taught, and would not "
                "see what others write. Serve it in the process that writes to it."
            )
        self.names: list[str] = []
        """Of the classes, by output."""
        self.entries = len(self.memory)
        """How many there are, as far as this process knows: to ask a server takes time."""
        self.settle()
        now = ring(self.memory)
        if now is not None:
            journal.keep(now.written.tolist())
        self._files = _Files([] if durable is None else sorted(durable.folder.glob("*.sqlite")))

    def close(self) -> None:
        """Closes journal and memory."""
        self._journal.close()
        if isinstance(self.memory, DurableMemory):
            self.memory.close()

    def answer(self, key: str | None) -> Answer | None:
        """Returns what was answered under an idempotency key."""
        return None if key is None else self._journal.answer(key)

    def write(self, wanted: Write) -> str:
        """Writes to memory and journal; returns the answer.

        Raises:
            RecollectError: If memory or journal refuse. Nothing was stored.
        """
        self._files.check()
        number = {name: place for place, name in enumerate([*self.names, *wanted.new])}
        now = ring(self.memory)
        step = -1 if now is None else int(now.step)
        announced = bool(wanted.new) or wanted.key is not None
        if announced:
            self._journal.announce(Announcement(step, wanted.labels, wanted.new, wanted.key, wanted.digest))
        # If this fails, what was announced stays: the next write, or the next start, sees how it ended.
        slots = self.memory.write(wanted.keys, torch.tensor([number[label] for label in wanted.labels]))
        self.names += wanted.new
        answer = Answer(bytes.fromhex(wanted.digest), self._text(slots, wanted.labels, wanted.new))
        inputs = self._kept(slots, wanted.inputs)
        record = functools.partial(
            self._journal.complete, names=wanted.new, inputs=inputs, key=wanted.key, answer=answer
        )
        try:
            record()
        except (OSError, FormatError) as error:  # the memory has it: the journal gets it before the next write
            _LOG.warning("the journal has not taken what the memory has: %s", error)
            self._unrecorded = record if announced else None
        self._files.note()
        return answer.text

    def forget(self, slot: int) -> bool:
        """Removes the entry in a slot, if there is one, and its picture; returns whether there was one."""
        self._files.check()
        self.settle()
        before = self._count()
        self._journal.forget(slot)  # first: a memory without its picture does no harm
        self.memory.forget(slot)
        self._files.note()
        return self._count() < before

    def settle(self) -> None:
        """Completes or drops a write that was announced and of which no more is known: a kill, or a full disk."""
        if self._unrecorded is not None:
            self._unrecorded()
            self._unrecorded = None
            return
        lost = self._journal.announced()
        if lost is None:
            return
        if isinstance(self.memory, DurableMemory):
            self.memory.refresh()  # finds out how a commit ended that was broken off
        now = ring(self.memory)
        if now is None or int(now.step) <= lost.step:
            self._journal.drop()
            return
        times = torch.arange(lost.step, lost.step + len(lost.labels))
        slots = torch.cat([(now.written == time).nonzero()[:, 0] for time in times])
        answer = Answer(bytes.fromhex(lost.digest), self._text(slots, lost.labels, lost.names))
        self._journal.complete(names=lost.names, key=lost.key, answer=answer)  # nothing is left of the pictures
        if self.names:  # else they are read from the journal later
            self.names += lost.names

    def shown(self, slot: int) -> tuple[int | None, list[list[float]] | str | None]:
        """Returns when a slot was written, and the input that it came from, where these are known."""
        now = ring(self.memory)
        if now is None:
            return None, None
        written = int(now.written[slot])
        try:
            stored = self._journal.input(slot, written)
        except (OSError, FormatError) as error:
            _LOG.warning("the journal cannot be read: %s", error)
            stored = None
        if stored is None or self._service.input_shape is None:
            return written, None if stored is None else stored.decode()
        flat = [round(shade / _SHADES, 4) for shade in stored]
        width = self._service.input_shape[1]
        return written, [flat[at : at + width] for at in range(0, len(flat), width)]

    def _text(self, slots: Int[Tensor, " n"], labels: list[str], new: list[str]) -> str:
        content = {"slots": slots.tolist(), "labels": labels, "new_classes": new, "entries": self._count()}
        return json.dumps(content)

    def _count(self) -> int:
        """Returns how many entries there are, or were when the memory could be asked."""
        try:
            self.entries = len(self.memory)
        except Exception as error:
            if not is_of_the_disk(error):
                raise
            _LOG.warning("the memory does not say how many entries it has: %s", error)
        return self.entries

    def _kept(self, slots: Int[Tensor, " n"], inputs: Batch) -> list[tuple[int, int, bytes]]:
        """Returns slot, write time and input of entries whose inputs can be shown."""
        now = ring(self.memory)
        if now is None or not (self._service.is_picture or isinstance(inputs, list)):
            return []
        rows = zip(slots.tolist(), now.written[slots].tolist(), map(_bytes, inputs), strict=True)
        return [(slot, written, shown) for slot, written, shown in rows if shown is not None]


class _Files:
    """Files that must stay whole while they are written to: SQLite does not notice that one was cut or taken away.

    Args:
        paths: Where they are.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._known = {path: path.stat() for path in paths}

    def note(self) -> None:
        """Remembers how long they are, now that they were written to."""
        self._known.update((path, path.stat()) for path in list(self._known) if path.exists())

    def check(self) -> None:
        """Looks at them.

        Raises:
            FormatError: If one is shorter than it was, another one, or gone.
        """
        for path, known in self._known.items():
            now = path.stat() if path.exists() else None
            if now is None or not os.path.samestat(now, known) or now.st_size < known.st_size:
                what = "gone" if now is None else "cut" if os.path.samestat(now, known) else "another one"
                raise FormatError(
                    f"{path} is {what} since the service began: what is written there would be lost. Stop the service, "
                    "restore the folder from a copy, and start again."
                )


def _bytes(one: Float[Tensor, "h w"] | str) -> bytes | None:
    """Returns an input as it is kept to be shown: a text, or a picture in 256 shades if it is one in gray."""
    if isinstance(one, str):
        return one.encode()
    if bool(((one < 0) | (one > 1)).any()):
        return None
    return bytes(one.mul(_SHADES).round().to(torch.uint8).flatten().tolist())
