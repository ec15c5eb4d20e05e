"""``MilvusMemory``: a ring of (key, value) pairs in Milvus, for several processes and for more than fits one machine.

What is stored in Milvus is the ring; which of several writers stores what, and what happens when nobody answers, is
said here. ``finding.py`` reads, ``collection.py`` makes the requests, ``connection.py`` sends them.
"""

import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from recollect.errors import (
    LockedError,
    SettingError,
    UnreachableError,
    require,
    require_choice,
    require_tensor,
    require_whole,
)
from recollect.kernels import Kernel, inverse_distance
from recollect.memory.checks import check_entries, check_limit, check_neighbors, check_queries, check_slots
from recollect.memory.milvus.collection import MOST, Collection
from recollect.memory.milvus.finding import Finder
from recollect.memory.milvus.rows import Kept, Rows, Settings, Stamps
from recollect.memory.protocol import Context

Result = TypeVar("Result")


@dataclass
class _Like:
    """What the checks look at: shapes, dtypes and device of all slots, without the memory they would take."""

    keys: Tensor
    values: Tensor


class MilvusMemory:
    """A memory in Milvus: a file of one process (milvus-lite), or a server that many processes share.

    Paper: Section 2 and Algorithm 1, as ``EpisodicMemory``, which it can take the place of in any predictor. How to set
    it up: docs/milvus.md.

    **The ring.** The t-th entry has write time t and lies in slot ``t % capacity``; writing there again is an upsert.
    So entries, write times and the place in the ring survive restarts, and the oldest entry is overwritten first. A
    forgotten slot stays empty until the ring comes to it, where ``EpisodicMemory`` would fill it first.

    **Several writers.** Milvus has no transactions, so writers share nothing: of ``writers=n`` writer i alone writes
    the steps i, i + n, i + 2n, ... and so alone the ``capacity / n`` slots of these. Whatever the others do meanwhile,
    however long it sleeps and how often it repeats a request, it overwrites no entry but its own oldest. Write times
    tell the age among one writer's entries; between writers, only as far as they write equally often. A writer
    finds its last step in the collection when it begins. Two must not have the same number: it belongs to who began
    last, and the other is refused at its next ``write``; until then the two may overwrite each other's entries.
    Any process may read and forget.

    **What is guaranteed.** ``write`` returns when Milvus has accepted the batch: a server has it in its log,
    milvus-lite has handed it to the operating system, so it survives the process but no loss of power. An entry is
    stored as a whole or not at all. A batch that ends with ``UnreachableError`` may be stored in part or as a whole;
    its steps are not used again. With consistency "session" a read sees all writes of its own process, and those of
    others a moment later (about 0.2 s on a server); with "strong" all that were accepted before it began; with
    "bounded" and "eventually" it waits for nothing. What was forgotten is gone for every later read of this process,
    and for those of others as a write is there.

    **Neighbors** are those that Milvus's index finds among the entries that ``before=`` lets be seen, a few more than
    asked for, ranked by distances that are computed here. HNSW may miss some; "FLAT" searches exactly.

    The connection is made by the first call that needs it, in each process anew; ``connect`` makes it now. A copied or
    unpickled memory is another handle to the same collection. It may be used by several threads.

    Args:
        uri: A file that ends in ``.db``, or a server's address such as ``http://localhost:19530``.
        collection: The collection's name. It is made if there is none.
        capacity: The largest number of entries; a multiple of ``writers``.
        key_size: The length ``d`` of a key, stored as float32.
        value_shape: The shape of one value: ``()`` for a label, ``(outputs,)`` for a regression target.
        value_dtype: The dtype of the values. They are stored bit for bit.
        token: What the server asks for: ``user:password`` or a key.
        local_keys: Whether this process keeps the entries that it wrote or found (``4 d`` bytes each, and the value),
            so that only slots and write times travel, and what others wrote once. Otherwise keys and values come with
            every hit.
        consistency: "session", "strong", "bounded" or "eventually".
        writer: Which of the writers this one is.
        writers: How many there are: a property of the collection.
        index: "FLAT" for exact search, or "HNSW". When None "FLAT" on a server, whose HNSW misses many of the newest
            entries, and "HNSW" in a file, where exact search is slow.
        links: M of HNSW.
        construction: efConstruction of HNSW.
        ef: How many nodes an HNSW search follows; never fewer than it is to find. docs/milvus.md says
            what was measured with the defaults of all three.
        timeout: Seconds that one attempt at a request may take.
        retries: How often a request that failed is made again.
        on_unreachable: What a read does when nobody answers: "raise" ``UnreachableError``, or return an empty context,
            so that MbPA's prediction is "parametric". A warning then says so once for each outage, ``unanswered``
            counts the reads, and for ``timeout`` seconds no further read waits. ``write`` and ``forget`` always raise.

    Raises:
        SettingError: If an argument is outside its range.
        MissingExtraError: If pymilvus or, for a file, milvus-lite is not installed.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     memory = MilvusMemory(f"{folder}/memory.db", "digits", capacity=3, key_size=2)
        ...     slots = memory.write(torch.eye(2), torch.tensor([7, 8]))
        ...     context = memory.read(torch.tensor([1.0, 0.0]), neighbors=1)
        ...     memory.close()
        >>> context.values
        tensor([7])
    """

    def __init__(
        self,
        uri: str | Path,
        collection: str,
        *,
        capacity: int,
        key_size: int,
        value_shape: tuple[int, ...] = (),
        value_dtype: torch.dtype = torch.long,
        token: str | None = None,
        local_keys: bool = True,
        consistency: str = "session",
        writer: int = 0,
        writers: int = 1,
        index: str | None = None,
        links: int = 16,
        construction: int = 128,
        ef: int = 128,
        timeout: float = 10.0,
        retries: int = 2,
        on_unreachable: str = "raise",
    ) -> None:
        settings = Settings(
            uri=str(uri),
            name=collection,
            token=token,
            capacity=capacity,
            key_size=key_size,
            value_shape=tuple(value_shape),
            value_dtype=value_dtype,
            writers=writers,
            index=("FLAT" if "://" in str(uri) else "HNSW") if index is None else index,
            links=links,
            construction=construction,
            ef=ef,
            consistency=consistency,
            timeout=timeout,
            retries=retries,
        )
        settings.check()
        require_whole("writer", writer, low=0)
        if writer >= writers:
            raise SettingError(f"writer must be from 0 to {writers - 1} with writers={writers}, got {writer}.")
        require_choice("on_unreachable", on_unreachable, ("raise", "parametric"))
        self.__setstate__((settings, writer, local_keys, on_unreachable))

    def __getstate__(self) -> tuple[Settings, int, bool, str]:
        return self._settings, self._writer, self._kept is not None, self._on_unreachable

    @torch.inference_mode(False)  # tensors made in inference mode could not be changed outside of it
    def __setstate__(self, state: tuple[Settings, int, bool, str]) -> None:
        settings, self._writer, local_keys, self._on_unreachable = state
        self._settings = settings
        self.unanswered = 0
        """Reads that returned an empty context since nobody answered."""
        self._outages = 0
        self._silent_until: float | None = None  # until when nobody is asked again; None while reads are answered
        self._collection = Collection(settings)
        self._kept = Kept(settings) if local_keys else None
        self._finder = Finder(self._collection, self._kept)
        self._session: int | None = None  # None until this memory writes
        self._count = 0  # how many entries this writer has written
        self._size = 0  # as it was when Milvus answered last
        self._writing = threading.RLock()
        self._like = _Like(
            torch.zeros(()).expand(settings.capacity, settings.key_size),
            torch.zeros((), dtype=settings.value_dtype).expand(settings.capacity, *settings.value_shape),
        )

    @property
    def capacity(self) -> int:
        """The largest number of entries."""
        return self._settings.capacity

    @property
    def key_size(self) -> int:
        """The length of a key."""
        return self._settings.key_size

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The shape of one value."""
        return self._settings.value_shape

    def __len__(self) -> int:
        """How many entries there are: a request. Where reads are "parametric" and nobody answers, the last number."""
        self._size = self._answered(self._collection.count, lambda: self._size)
        return self._size

    def __bool__(self) -> bool:
        return True  # an empty memory is still a memory, and asking for its length is a request

    def __repr__(self) -> str:
        some = self._settings
        return f"MilvusMemory({some.uri!r}, {some.name!r}, capacity={some.capacity}, key_size={some.key_size})"

    def connect(self) -> None:
        """Connects now rather than at the first use, and makes the collection or checks that it is the right one.

        Raises:
            UnreachableError: If nobody answers.
            SettingError: If the collection was made with other settings or is not one of a memory, or the server
                refuses the token.
        """
        self._collection.connect()

    def close(self) -> None:
        """Gives the connection back, and a file to other processes. The next call connects again."""
        with self._writing:
            self._session = None  # another process may write meanwhile
            self._collection.close()

    def write(self, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]) -> Int[Tensor, " n"]:
        """Stores pairs, overwriting this writer's oldest entries when its part of the memory is full.

        Args:
            keys: ``(*batch, key_size)``; gradients are not kept.
            values: ``(*batch, *value_shape)``.

        Returns:
            The slots of the entries that remain, in the order of the batch.

        Raises:
            ShapeError, DtypeError, DeviceError, NonFiniteError: As ``EpisodicMemory.write``; then nothing was stored.
            UnreachableError: If nobody answers; then a part of the batch may have been stored.
            LockedError: If another process writes as this writer by now, or has the file.
            SettingError: If the collection is not the right one.
        """
        new_keys, new_values = check_entries(self._like, keys, values)
        count, own = len(new_keys), self.capacity // self._settings.writers
        if count == 0:
            return torch.empty(0, dtype=torch.long)
        with self._writing:
            session = self._claimed()
            kept = min(count, own)
            turns = torch.arange(self._count + count - kept, self._count + count)
            self._count += count  # whatever happens to the requests: no step is used twice
            steps = turns * self._settings.writers + self._writer
            stamps = Stamps(steps % self.capacity, steps, torch.full_like(steps, session))
            rows = Rows(stamps, new_keys[-kept:], new_values[-kept:])
            self._collection.upsert(rows)
            if self._kept is not None:
                self._kept.keep(rows)
        return stamps.slots

    def _claimed(self) -> int:
        """Returns the session that this memory writes in, which is the one that holds this writer's number."""
        collection, writer = self._collection, self._writer
        if self._session is not None:
            holder = collection.holder(writer)
            if holder == self._session:
                return self._session
            if holder is not None:
                raise LockedError(
                    f"writer {writer} of {self._settings.name!r} at {self._settings.uri} is in use by another process, "
                    "or a copy of this memory, that began later. Nothing was written. Give each its own writer= of "
                    "writers=, or write from one of them."
                )
        # A note of the last step stands in the collection at any time. Once the number is ours, nobody adds to it.
        self._session = collection.claim(writer, collection.newest(writer))
        self._count = (collection.newest(writer) - writer) // self._settings.writers + 1
        return self._session

    def read(
        self,
        queries: Shaped[Tensor, "*b d"],
        neighbors: int | None,
        *,
        kernel: Kernel = inverse_distance(epsilon=1e-3),
        before: int | Int[Tensor, "*b"] | None = None,
    ) -> Context:
        """Retrieves the nearest entries of each query.

        Paper: Algorithm 1, MbPA-Test line 3. Of equally near entries the older comes first.

        Args:
            queries: ``(*batch, key_size)``, on any device.
            neighbors: How many entries to retrieve for each query, at most 16,384; all of them when None, which takes
                them all across the wire unless ``local_keys``.
            kernel: Weighs the neighbors.
            before: Only entries with a write time below this are seen: one number, or one for each query
                ``(*batch)``. Each different number is a search.

        Returns:
            The context, with leading dimensions ``*batch``, on the device of the queries.

        Raises:
            ShapeError, DtypeError, NonFiniteError: If the queries do not fit this memory.
            SettingError: If ``neighbors`` is not a positive whole number or None, or above 16,384.
            UnreachableError: If nobody answers, unless ``on_unreachable="parametric"``.
        """
        if neighbors is not None:
            check_neighbors(neighbors, ", or None for all entries")
            neighbors = min(neighbors, self.capacity)
            if neighbors > MOST:
                raise SettingError(
                    f"Milvus finds at most {MOST} neighbors, got {neighbors}. Read fewer, or None for all."
                )
        require("kernel", kernel, Kernel, "a kernel, such as inverse_distance(epsilon=1e-3)")
        require_tensor("queries", queries)
        flat = check_queries(self._like, queries.detach().cpu())
        limit = None if before is None else check_limit(before, queries.shape[:-1], flat.device)

        def found() -> Context:
            if neighbors is None:
                return self._finder.all(flat, kernel, limit)
            return self._finder.near(flat, neighbors, kernel, limit)

        def unanswered() -> Context:
            self.unanswered += 1
            return self._finder.nothing(flat, neighbors, kernel)

        with torch.no_grad():
            context = self._answered(found, unanswered)
        shape, device = queries.shape[:-1], queries.device
        return Context(*(part.reshape(*shape, *part.shape[1:]).to(device) for part in context))

    def forget(self, slots: int | Int[Tensor, "..."]) -> None:
        """Removes entries at once and for good, whoever wrote them; their slots stay empty until written again.

        Args:
            slots: One slot or a tensor of them, as ``read`` and ``write`` return them. Slots that are empty already,
                and -1, are passed over.

        Raises:
            SettingError: If a slot is outside the memory; then nothing is forgotten.
            UnreachableError: If nobody answers; then some may have been forgotten.
        """
        gone = check_slots(slots, self._like.keys)
        if len(gone) == 0:
            return
        with self._writing:
            self._collection.remember(self._collection.stamps(gone, strong=True))
            if self._kept is not None:
                self._kept.drop(gone)
            self._collection.delete(gone)

    def clear(self) -> None:
        """Removes all entries and starts counting write times from 0 again (another writer, when it begins anew).

        Raises:
            UnreachableError: If nobody answers; then some may have been removed.
        """
        with self._writing:
            self._session = None
            if self._kept is not None:
                self._kept.drop(torch.arange(self.capacity))
            self._collection.delete_all()

    def _answered(self, request: Callable[[], Result], otherwise: Callable[[], Result]) -> Result:
        """Makes a request; where reads are "parametric", returns something else if nobody answers."""
        if self._on_unreachable == "raise":
            return request()
        if self._silent_until is None or time.monotonic() >= self._silent_until:
            try:
                result = request()
            except UnreachableError as error:
                if self._silent_until is None:
                    self._outages += 1
                    warnings.warn(
                        f"{error} Until it does, reads find nothing (outage {self._outages} of this memory).",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                self._silent_until = time.monotonic() + self._settings.timeout
            else:
                self._silent_until = None
                return result
        return otherwise()
