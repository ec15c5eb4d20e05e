"""``DurableMemory``: an episodic memory that is still there after a crash. The ring in RAM, SQLite below it."""

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from recollect.errors import SettingError, StorageError, require_choice
from recollect.kernels import Kernel, inverse_distance
from recollect.memory.checks import check_entries, check_slots
from recollect.memory.durable import contents, opening
from recollect.memory.durable.contents import Contents, new_ring
from recollect.memory.durable.database import State, Sync
from recollect.memory.durable.records import Records
from recollect.memory.episodic import EpisodicMemory
from recollect.memory.index import Index
from recollect.memory.protocol import Context, Entries


class DurableMemory(nn.Module):
    """An ``EpisodicMemory`` whose entries lie in a folder: what was written is there after any crash.

    Reads are those of the ring in RAM. ``write``, ``forget`` and ``clear`` return once they are committed, each as a
    whole, and only then do reads see them; if they fail, nothing has changed. Opening the folder again restores the
    entries, their write times, and all predictions, bit for bit.

    One process writes to a folder; others may open it with ``read_only=True`` and see what is committed when they
    call ``refresh``. Threads may share a memory: a read sees all of a write or nothing. A forked process may only
    read. A memory cannot be pickled or copied.

    ``state_dict()`` and ``load_state_dict()`` are those of an ``EpisodicMemory`` of the same settings, so entries can
    be moved from one to the other; loading replaces all entries, durably. ``recollect.save`` saves a copy of the
    entries, which ``recollect.load`` returns as an ``EpisodicMemory``. ``.to(device)`` moves the ring, and its dtypes
    stay those of the file.

    Args:
        folder: Where the entries are. It is made if need be; it should lie on a local disk.
        capacity, key_size, value_shape, value_dtype, key_dtype, history: As in ``EpisodicMemory``. For a folder that
            holds a memory they may be left out, and must otherwise be what it was made with.
        index: Finds the neighbors; it is derived, and not stored.
        sync: When a write counts as done. ``"full"``: when it is on the disk. ``"normal"``: when the system has it, so
            that it survives the process, and a failure of the power may take the last writes, each as a whole.
        read_only: Only to read, beside a writer or without one.

    Raises:
        MissingDataError: If there is no memory in the folder, and ``capacity`` or ``key_size`` is missing.
        SettingError: If the memory there was made with other settings.
        LockedError: If someone else writes to it, by the process id.
        FormatError: If the file is not a memory's, of a newer version, or damaged. It stays as it is.
        StorageError: If it cannot be opened.

    Example:
        >>> import tempfile
        >>> import torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> with DurableMemory(folder.name, capacity=100, key_size=2) as memory:
        ...     slots = memory.write(torch.eye(2), torch.tensor([7, 8]))
        >>> with DurableMemory(folder.name, read_only=True) as memory:
        ...     memory.read(torch.tensor([1.0, 0.0]), neighbors=1).values
        tensor([7])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        capacity: int | None = None,
        key_size: int | None = None,
        *,
        value_shape: tuple[int, ...] | None = None,
        value_dtype: torch.dtype | None = None,
        key_dtype: torch.dtype | None = None,
        index: Index | None = None,
        history: int | None = None,
        sync: Sync = "full",
        read_only: bool = False,
    ) -> None:
        super().__init__()
        require_choice("sync", sync, ("full", "normal"))
        self.folder, self.read_only = Path(folder).absolute(), read_only
        sizes = {"capacity": capacity, "key_size": key_size, "history": history}
        given = {**sizes, "value_shape": value_shape, "value_dtype": value_dtype, "key_dtype": key_dtype}
        given = {name: value for name, value in given.items() if value is not None}
        lock = None if read_only else opening.prepare(self.folder, given, index)
        try:
            self._database, self._contents = opening.open_file(
                self.folder, given, index, write=not read_only, sync=sync
            )
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        self._process = os.getpid()
        self._finish = weakref.finalize(self, opening.close, self._database, lock, self._process)
        # One thread at a time is at the file, and one at the ring, so that reads need not wait for a disk. Who needs
        # both takes them in this order.
        self._writing, self._reading = threading.RLock(), threading.RLock()
        self._holder: int | None = None  # the thread that is within ``held``
        self._unsure = False  # whether a commit was broken off: the file may be ahead of the ring
        self._torn = False  # whether a change of the ring was

    @property
    def ring(self) -> EpisodicMemory:
        """The entries in RAM, for looking at keys, values and write times. Only this class may change it."""
        return self._contents.ring

    @property
    def capacity(self) -> int:
        """The largest number of entries that are seen at once."""
        return self.ring.capacity

    @property
    def key_size(self) -> int:
        """The length of a key."""
        return self.ring.key_size

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of one value."""
        return self.ring.value_shape

    @property
    def history(self) -> int:
        """How many overwritten entries are kept beside the others."""
        return self.ring.history

    def __len__(self) -> int:
        with self._steady() as ring:
            return len(ring)

    def __bool__(self) -> bool:
        return True  # an empty memory is still a memory

    def __getstate__(self) -> NoReturn:
        raise StorageError(
            f"the memory in {self.folder} cannot be copied or pickled: its file has one writer. Open the folder where "
            "it is needed with read_only=True, or copy the entries into an EpisodicMemory by state_dict()."
        )

    def __enter__(self) -> "DurableMemory":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def extra_repr(self) -> str:
        return f"{self.ring.extra_repr()}, folder={str(self.folder)!r}{', read_only=True' if self.read_only else ''}"

    def close(self) -> None:
        """Closes the file and lets others write. Reads go on from RAM."""
        with self._writing:
            self._finish()

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Stores pairs as ``EpisodicMemory.write`` does, and returns once they are committed.

        Args:
            keys: ``(*batch, key_size)``; gradients are not kept.
            values: ``(*batch, *value_shape)``.

        Returns:
            The slots of the entries that remain, in the order of the batch.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: If they do not fit this memory. Nothing was stored.
            StorageError: If they cannot be written, as on a full disk. Nothing was stored.
        """
        with self._changing() as (ring, state):
            new_keys, new_values = check_entries(ring, keys, values)
            slots = ring.upcoming(len(new_keys))
            if len(slots) == 0:
                return slots
            step, room = state.step + len(new_keys), len(ring.queue)
            kept = slice(len(new_keys) - len(slots), None)
            position = (state.position + len(new_keys)) % room
            after = state.next(position=position, step=step, size=min(state.size + len(new_keys), room))
            records = Records(torch.arange(step - len(slots), step) + 1, new_keys[kept].cpu(), new_values[kept].cpu())
            self._commit(slots.cpu(), records, after, lambda: ring.write(new_keys, new_values))
            return slots

    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries for good, as ``EpisodicMemory.forget`` does, and their bytes from the files.

        Args:
            slots: One slot or a tensor of them, as ``read`` and ``write`` return them.

        Raises:
            SettingError: If a slot is outside the memory; then nothing is forgotten.
            StorageError: If it cannot be written; then nothing is forgotten.
        """
        with self._changing() as (ring, state):
            asked = check_slots(slots, ring.keys)
            gone = asked[ring.written[asked] >= 0]
            if len(gone) == 0:
                return
            forgets = state.forgets + 1
            after = state.next(position=0, size=state.size - len(gone), forgets=forgets)
            stamps = torch.full((len(gone),), -forgets)
            nothing = Records(
                stamps, torch.zeros_like(ring.keys[gone]).cpu(), torch.zeros_like(ring.values[gone]).cpu()
            )
            self._commit(gone.cpu(), nothing, after, lambda: ring.forget(gone))
            with suppress(StorageError):  # it is forgotten: later commits overwrite what is left in the log
                self._database.erase()

    def clear(self) -> None:
        """Removes all entries, and their bytes from the files, and starts counting write times from 0 again.

        Raises:
            StorageError: If it cannot be written; then all are still there.
        """
        with self._changing() as (ring, state):
            self._unsure = True
            after = State(version=state.version + 1, epoch=state.epoch + 1)
            with self._database.writing(after):
                self._database.remove_all()
            self._show(ring.clear, after)
            with suppress(StorageError):
                self._database.erase(shrink=True)

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context:
        """Retrieves the nearest entries of each query: see ``EpisodicMemory.read``."""
        with self._steady() as ring:
            return ring.read(queries, neighbors, kernel=kernel, before=before)

    def read_entries(
        self,
        queries: Shaped[Tensor, "b d"],
        neighbors: int,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, " b"] | None = None,
    ) -> Entries:
        """Retrieves them each once: see ``EpisodicMemory.read_entries``."""
        with self._steady() as ring:
            return ring.read_entries(queries, neighbors, kernel=kernel, before=before)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it no write shows, so that several reads (a mixture's, a large batch's) see the same entries.

        Writes of other threads are committed meanwhile, and return when it is over; this thread must not write.
        """
        with self._steady():
            before, self._holder = self._holder, threading.get_ident()
            try:
                yield
            finally:
                self._holder = before

    def refresh(self) -> int:
        """Brings a memory that was opened with ``read_only=True`` up to date with the last commit.

        Only what has changed is read. The one who writes is always up to date.

        Returns:
            How many slots have changed.

        Raises:
            FormatError: If the file is damaged; then nothing has changed.
            StorageError: If it cannot be read.
        """
        self._require_free()
        with self._writing:
            self._settle()
            if not self.read_only:
                return 0
            changed = contents.changes(self._database, self._contents)
            if changed is None:  # everything was replaced
                self._exchange(contents.load(self._database))
                return len(self.ring.written)
            if changed.state.version == self._contents.state.version:
                return 0
            with self._reading:
                self._torn = True
                self._contents = contents.apply(self.ring, changed)
                self._torn = False
            return len(changed.slots)

    @contextmanager
    def _steady(self) -> Iterator[EpisodicMemory]:
        """Gives the ring as it is between two writes."""
        if os.getpid() != self._process:  # forked: this copy of the ring has no writer, and the locks no owner
            yield self.ring
            return
        self._reading.acquire()
        try:
            while self._torn:
                self._reading.release()
                try:
                    with self._writing:
                        self._settle()
                finally:
                    self._reading.acquire()
            yield self.ring
        finally:
            self._reading.release()

    @contextmanager
    def _changing(self) -> Iterator[tuple[EpisodicMemory, State]]:
        """Gives ring and state to the one thread that may change them."""
        self._require_free()
        if self.read_only:
            raise StorageError(f"the memory in {self.folder} was opened with read_only=True. Write where it was not.")
        with self._writing:
            self._settle()
            yield self.ring, self._contents.state

    def _require_free(self) -> None:
        if os.getpid() != self._process:
            raise StorageError(
                f"the memory in {self.folder} was opened by process {self._process}, from which this one was forked: "
                "it can only be read here. Open the folder again in this process."
            )
        if self._holder == threading.get_ident():
            raise SettingError("within held() a memory cannot change. Write when it is over, or in another thread.")

    def _commit(self, slots: Tensor, records: Records, after: State, change: Callable[[], object]) -> None:
        """Commits records, and then changes the ring."""
        self._unsure = True
        if bool((slots.diff() < 0).any()):
            slots, order = slots.sort()
            records = Records(*(part[order] for part in records))
        with self._database.writing(after):
            self._database.put(slots, self._database.layout.pack(records), after.version)
        self._show(change, after)

    def _show(self, change: Callable[[], object], after: State) -> None:
        with self._reading:
            self._torn = True
            change()
            self._contents = self._contents._replace(state=after)
            self._torn = False
        self._unsure = False

    def _settle(self) -> None:
        """Finds out how a write ended that was broken off, and makes the ring agree with the file."""
        if self._unsure or self._torn:
            with self._database.reading() as state:
                known = state.version == self._contents.state.version
            if self._torn or not known:
                self._exchange(contents.load(self._database))
        self._unsure = False

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def _exchange(self, new: Contents) -> None:
        """Puts other contents in the place of these."""
        with self._reading:
            self._torn = True
            old, ring = self.ring, new.ring.to(self.ring.keys.device)
            ring.index = old.index
            ring.index.rebuild(ring.keys, ring.written)
            self._contents = new
            self._torn = False

    # What torch.nn calls

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DurableMemory":
        with self._steady() as ring:
            ring.to(fn(ring.keys[:0]).device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._steady() as ring:
            ring._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        with self._changing() as (_, state):
            new, known = new_ring(self._database.settings), len(missing_keys) + len(error_msgs)
            others = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            new._load_from_state_dict(state_dict, prefix, *others)
            if len(missing_keys) + len(error_msgs) > known:
                return  # torch says what is wrong; the entries stay
            self._unsure = True
            after = contents.replace(self._database, new, state)
            self._exchange(Contents(new, self._contents.stamps, after))
            self._unsure = False
