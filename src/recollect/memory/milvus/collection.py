"""One Milvus collection as a table of slots: its fields, its requests, and what is said when nobody answers.

A row of an entry has its slot as primary key, so that writing it again is an upsert. Rows with negative slots are the
memory's own notes: ``_SETTINGS`` says how the collection was made, ``_CLAIMS`` and those below it which session
writes as each writer, and the next ones up to which step entries of each writer have been forgotten.
"""

import json
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from recollect.errors import SettingError
from recollect.memory.milvus.connection import Connection
from recollect.memory.milvus.rows import Rows, Settings, Stamps, as_texts, from_texts

if TYPE_CHECKING:
    from pymilvus import MilvusClient

MOST = 16_384  # hits of a search, queries of a search, and rows of a query: limits of Milvus
_REQUEST = 16 * 2**20  # bytes that one request or answer may carry; gRPC takes 64 MB, the server sends 100 MB
_HITS = 2**18  # hits that one search may return: they come as Python objects
# milvus-lite makes a table of queries x entries x dimensions of the entries that no index has.
_TABLE = 2**28  # bytes that it may take
_UNINDEXED = 2**27  # bytes of keys that it holds before it makes an index of them

_SETTINGS = -1  # the slot of the row that says how the collection was made
_CLAIMS = -2  # that of the row that says which session writes as writer 0; one further down for each other writer
_NUMBERS = 48  # bits of a session's own number; the writer's number stands above them
_FIELDS = ("slot", "written", "session", "key", "value")
_VERSION = 1


class Collection:
    """The requests that a memory makes. The connection is made by the first one, in each process anew."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._connection = Connection(
            settings.uri,
            token=settings.token,
            timeout=settings.timeout,
            retries=settings.retries,
            prepare=self._prepare,
        )
        self._notes = list(range(_SETTINGS, _CLAIMS - 2 * settings.writers, -1))

    # Requests

    def upsert(self, rows: Rows) -> None:
        """Stores entries, each in its slot; requests that fail are repeated, which changes nothing."""
        texts = as_texts(rows.values)
        fields = zip(*(part.tolist() for part in rows.stamps), list(rows.keys.numpy()), texts, strict=True)
        self._upsert([dict(zip(_FIELDS, row, strict=True)) for row in fields])

    def search(
        self, queries: Float[Tensor, "b d"], count: int, before: int | None, *, whole: bool
    ) -> tuple[Stamps, Rows | None]:
        """Returns the entries that are among the ``count`` nearest of some query, each once.

        Args:
            queries: Not more than ``at_once(count)``.
            count: At most ``MOST``.
            before: Where given, only entries written before this are found.
            whole: Whether keys and values are wanted, too.
        """
        limit = "" if before is None else f" and written < {before}"
        fields = _FIELDS if whole else _FIELDS[:3]
        search = {"params": {"ef": max(self.settings.ef, count)}} if self.settings.index == "HNSW" else {}
        found = self._connection.ask(
            lambda client: client.search(
                self.settings.name,
                data=list(queries.numpy()),
                anns_field="key",
                limit=count,
                filter=f"slot >= 0{limit}",
                output_fields=list(fields),
                search_params=search,
                consistency_level=self.settings.consistency.capitalize(),
                timeout=self.settings.timeout,
            )
        )
        entries = {hit["entity"]["slot"]: hit["entity"] for hits in found for hit in hits}
        return self._decoded(list(entries.values()), whole=whole)

    def no_rows(self) -> Rows:
        """Returns no entries."""
        none = torch.empty(0, dtype=torch.long)
        values = torch.empty(0, *self.settings.value_shape, dtype=self.settings.value_dtype)
        return Rows(Stamps(none, none, none), torch.empty(0, self.settings.key_size), values)

    def at_once(self, count: int, *, whole: bool) -> int:
        """Returns how many queries one search may have; 0 if a single one would find too much to be sent."""
        most = min(MOST, _HITS // count)
        if whole:
            most = min(most, _REQUEST // (count * self.settings.row_bytes))
        if self._connection.is_file:
            compared = 4 * self.settings.key_size * self.settings.capacity
            if self.settings.index == "HNSW":
                compared = min(compared, _UNINDEXED)
            most = min(most, max(1, _TABLE // compared))
        return most

    def rows(self, slots: Int[Tensor, " m"], *, strong: bool = False) -> Rows:
        """Returns the entries in these slots; not those of slots that are empty."""
        size = max(1, min(MOST, _REQUEST // self.settings.row_bytes))
        parts = [self._query(f"slot in {some.tolist()}", _FIELDS, strong=strong) for some in slots.split(size)]
        _, rows = self._decoded([entry for part in parts for entry in part], whole=True)
        assert rows is not None
        return rows

    def stamps(self, slots: Int[Tensor, " m"], *, strong: bool = False) -> Stamps:
        """Returns who wrote the entries in these slots, and when."""
        parts = [self._query(f"slot in {some.tolist()}", _FIELDS[:3], strong=strong) for some in slots.split(MOST)]
        return self._decoded([entry for part in parts for entry in part], whole=False)[0]

    def all_stamps(self) -> Stamps:
        """Returns who wrote all entries, and when."""
        ranges = range(0, self.settings.capacity, MOST)
        parts = [self._query(f"slot >= {start} and slot < {start + MOST}", _FIELDS[:3]) for start in ranges]
        return self._decoded([entry for part in parts for entry in part], whole=False)[0]

    def count(self, *, strong: bool = False) -> int:
        """Returns how many entries there are."""
        # Counting all and then the notes: milvus-lite would make a record of every row that passes a filter.
        rows = int(self._query("", ("count(*)",), strong=strong)[0]["count(*)"])
        return max(0, rows - len(self._query(f"slot in {self._notes}", ("slot",))))

    def delete(self, slots: Int[Tensor, " m"]) -> None:
        """Removes the entries in these slots, and returns when no read can find them any more."""
        name, timeout = self.settings.name, self.settings.timeout
        for ids in (some.tolist() for some in slots.split(MOST)):
            self._connection.ask(lambda client, ids=ids: client.delete(name, ids=ids, timeout=timeout))
        # A session does not wait for its own deletions (server 2.3). What a strong read has seen, later ones see.
        self.stamps(slots, strong=True)

    def delete_all(self) -> None:
        """Removes all entries and notes, but not the settings, and returns when no read can find them any more."""
        name, timeout = self.settings.name, self.settings.timeout
        self._connection.ask(lambda client: client.delete(name, filter=f"slot != {_SETTINGS}", timeout=timeout))
        self.count(strong=True)

    # Notes about writers

    def newest(self, writer: int) -> int:
        """Returns the largest write time that a writer is known to have used, -1 if there is none."""
        top, found = -1, MOST
        low, high = writer << _NUMBERS, (writer + 1) << _NUMBERS
        while found == MOST:  # as many as one answer may hold: there may be more
            mine = f"session >= {low} and session < {high} and written > {top}"
            times = [row["written"] for row in self._query(mine, ("written",), strong=True)]
            found, top = len(times), max(times, default=top)
        return top

    def claim(self, writer: int, newest: int) -> int:
        """Makes a new session the one that writes as ``writer``, and returns it."""
        session = writer << _NUMBERS | secrets.randbits(_NUMBERS - 1) + 1
        self._upsert([self._note(_CLAIMS - writer, newest, session)])
        return session

    def holder(self, writer: int) -> int | None:
        """Returns the session that writes as ``writer``, None if there is none."""
        rows = self._query(f"slot in [{_CLAIMS - writer}]", ("session",), level="Eventually")
        return int(rows[0]["session"]) if rows else None

    def remember(self, gone: Stamps) -> None:
        """Notes up to which step entries are about to be forgotten: no step is used twice."""
        last = dict.fromkeys((gone.sessions >> _NUMBERS).unique().tolist(), -1)
        places = {writer: _CLAIMS - self.settings.writers - writer for writer in last}
        noted = self._query(f"slot in {list(places.values())}", _FIELDS[:3], strong=True) if last else []
        times = [(note["session"], note["written"]) for note in noted]
        for session, written in (*times, *zip(gone.sessions.tolist(), gone.written.tolist(), strict=True)):
            writer = session >> _NUMBERS
            last[writer] = max(written, last[writer])
        self._upsert([self._note(places[writer], step, writer << _NUMBERS) for writer, step in last.items()])

    def _note(self, slot: int, written: int, session: int, text: str = "") -> dict[str, Any]:
        key = torch.zeros(self.settings.key_size).numpy()
        return {"slot": slot, "written": written, "session": session, "key": key, "value": text}

    # The wire

    def connect(self) -> None:
        """Connects, and makes or checks the collection, if that has not been done.

        Raises:
            UnreachableError: If nobody answers.
            SettingError: If the collection was made with other settings or is not one of a memory, or the token is
                refused.
        """
        self._connection.ask(lambda client: None)

    def close(self) -> None:
        """Gives the connection back, and a file to other processes. The next request connects anew."""
        self._connection.close()

    def _upsert(self, rows: list[dict[str, Any]]) -> None:
        name, timeout, size = self.settings.name, self.settings.timeout, max(1, _REQUEST // self.settings.row_bytes)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            self._connection.ask(lambda client, some=some: client.upsert(name, some, timeout=timeout))

    def _query(
        self, where: str, fields: Iterable[str], *, strong: bool = False, level: str | None = None
    ) -> list[dict[str, Any]]:
        level = "Strong" if strong else level or self.settings.consistency.capitalize()
        name, timeout, wanted = self.settings.name, self.settings.timeout, list(fields)
        limit = None if "count(*)" in wanted else MOST
        return self._connection.ask(
            lambda client: list(
                client.query(
                    name, filter=where, output_fields=wanted, consistency_level=level, timeout=timeout, limit=limit
                )
            )
        )

    def _prepare(self, client: "MilvusClient") -> None:
        """Makes the collection, or checks that it is the right one, and loads it."""
        from pymilvus.client.types import LoadState

        settings, name, timeout = self.settings, self.settings.name, self.settings.timeout
        if not client.has_collection(name, timeout=timeout):
            self._create(client)
        description = cast("dict[str, Any]", client.describe_collection(name, timeout=timeout))
        fields = {field["name"]: field for field in description["fields"]}
        if set(fields) != set(_FIELDS):
            raise SettingError(
                f"the collection {name!r} at {settings.uri} is not one of a memory: it has the fields "
                f"{sorted(fields)}. Nothing of it was changed. Choose another name."
            )
        index = client.describe_index(name, "key", timeout=timeout)
        if index is None:
            index = self._add_index(client)
        if client.get_load_state(name, timeout=timeout).get("state") != LoadState.Loaded:
            client.load_collection(name, timeout=timeout)  # else it may have more replicas than this would leave it
        notes = self._texts(client, f"slot in [{_SETTINGS}]")
        size = int(fields["key"]["params"]["dim"])
        if not notes and size == settings.key_size and not self._texts(client, "slot >= 0"):  # it is being made
            row = self._note(_SETTINGS, -1, -1, json.dumps({"recollect": _VERSION, **settings.described()}))
            client.upsert(name, [row], timeout=timeout)
            notes = self._texts(client, f"slot in [{_SETTINGS}]")
        self._check(notes, {"key_size": size, "index": index.get("index_type"), "metric": index.get("metric_type")})

    def _texts(self, client: "MilvusClient", where: str) -> list[str]:
        rows = client.query(
            self.settings.name,
            filter=where,
            output_fields=["value"],
            limit=1,
            consistency_level="Strong",
            timeout=self.settings.timeout,
        )
        return [row["value"] for row in rows]

    def _create(self, client: "MilvusClient") -> None:
        from pymilvus import DataType

        settings = self.settings
        schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("slot", DataType.INT64, is_primary=True)
        schema.add_field("written", DataType.INT64)
        schema.add_field("session", DataType.INT64)
        schema.add_field("key", DataType.FLOAT_VECTOR, dim=settings.key_size)
        schema.add_field("value", DataType.VARCHAR, max_length=settings.text_size)
        level = settings.consistency.capitalize()
        client.create_collection(settings.name, schema=schema, consistency_level=level, timeout=settings.timeout)

    def _add_index(self, client: "MilvusClient") -> dict[str, Any]:
        settings, timeout = self.settings, self.settings.timeout
        build = {"M": settings.links, "efConstruction": settings.construction} if settings.index == "HNSW" else {}
        indexes = client.prepare_index_params()
        indexes.add_index("key", index_type=settings.index, metric_type="L2", params=build)
        client.create_index(settings.name, indexes, timeout=timeout, sync=False)  # there is nothing to wait for
        return client.describe_index(settings.name, "key", timeout=timeout) or {}

    def _check(self, notes: list[str], found: dict[str, Any]) -> None:
        """Compares what the collection was made with to what it is opened with."""
        wanted = {"recollect": _VERSION, **self.settings.described(), "index": self.settings.index, "metric": "L2"}
        try:
            made = dict(json.loads(notes[0])) if notes else {}
        except ValueError:
            made = {}
        made |= found
        other = [name for name, value in wanted.items() if made.get(name) != value]
        if other:
            had, asked = (", ".join(f"{name}={some.get(name)!r}" for name in other) for some in (made, wanted))
            raise SettingError(
                f"the collection {self.settings.name!r} at {self.settings.uri} was made with {had}, but is opened with "
                f"{asked}. Open it as it was made, or choose another name."
            )

    def _decoded(self, entries: list[dict[str, Any]], *, whole: bool) -> tuple[Stamps, Rows | None]:
        stamps = Stamps(*(torch.tensor([entry[name] for entry in entries]).long() for name in _FIELDS[:3]))
        if not whole:
            return stamps, None
        from numpy import array, float32

        settings = self.settings
        keys = torch.from_numpy(array([entry["key"] for entry in entries], dtype=float32))
        values = from_texts([entry["value"] for entry in entries], settings.value_shape, settings.value_dtype)
        return stamps, Rows(stamps, keys.view(-1, settings.key_size), values)
