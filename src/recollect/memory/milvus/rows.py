"""What a memory and Milvus exchange: entries, how they are written down, and which of them are known already."""

import base64
import re
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from recollect.errors import SettingError, require, require_choice, require_number, require_whole

_MOST_NUMBERS = 32_768  # in a key
_MOST_TEXT = 65_535  # characters in a field


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a collection lies, what its rows look like, and how it is asked. See ``MilvusMemory``."""

    uri: str
    name: str
    token: str | None = field(repr=False)
    capacity: int
    key_size: int
    value_shape: tuple[int, ...]
    value_dtype: torch.dtype
    writers: int
    index: str
    links: int
    construction: int
    ef: int
    consistency: str
    timeout: float
    retries: int

    @property
    def value_bytes(self) -> int:
        """How many bytes one value takes."""
        return torch.empty(self.value_shape, dtype=self.value_dtype, device="meta").numel() * self.value_dtype.itemsize

    @property
    def text_size(self) -> int:
        """How many characters the field of values has: a value in base64, or this collection's settings."""
        return max(1024, -(-self.value_bytes // 3) * 4)

    @property
    def row_bytes(self) -> int:
        """How many bytes an entry takes on its way, nearly."""
        return 4 * self.key_size + self.text_size + 64

    def check(self) -> None:
        """Refuses what Milvus cannot hold.

        Raises:
            SettingError: By the argument's name.
        """
        for name in ("capacity", "key_size", "writers", "links", "construction", "ef"):
            require_whole(name, getattr(self, name))
        require_whole("retries", self.retries, low=0)
        require_number("timeout", self.timeout, above=0.0)
        require_choice("consistency", self.consistency, ("session", "strong", "bounded", "eventually"))
        require_choice("index", self.index, ("HNSW", "FLAT"))
        require("value_dtype", self.value_dtype, torch.dtype, "a dtype, such as torch.long")
        if not (_is_address(self.uri) if "://" in self.uri else self.uri.endswith(".db")):
            raise SettingError(
                "uri must be a file that ends in .db, or a server's address such as http://localhost:19530, "
                f"got {self.uri!r}."
            )
        if not re.fullmatch(r"[A-Za-z_]\w{0,254}", self.name, re.ASCII):
            raise SettingError(f"collection must be a name of letters, digits and _, got {self.name!r}.")
        if self.capacity % self.writers:
            raise SettingError(
                f"capacity must be a multiple of writers={self.writers}, as each has its part of the slots, "
                f"got {self.capacity}."
            )
        if self.key_size > _MOST_NUMBERS:
            raise SettingError(f"key_size must be at most {_MOST_NUMBERS} in Milvus, got {self.key_size}.")
        if self.text_size > _MOST_TEXT:
            raise SettingError(
                f"a value must have at most {_MOST_TEXT // 4 * 3} bytes in Milvus, got {self.value_bytes} "
                f"({self.value_shape} of {self.value_dtype}). Store what it can be found by instead."
            )

    def described(self) -> dict[str, Any]:
        """Returns what a collection must have been made with to be opened with these settings."""
        return {
            "capacity": self.capacity,
            "key_size": self.key_size,
            "value_shape": list(self.value_shape),
            "value_dtype": str(self.value_dtype).removeprefix("torch."),
            "writers": self.writers,
        }


def _is_address(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return parts.scheme in {"http", "https", "tcp"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        return False


class Stamps(NamedTuple):
    """Which entry lies in a slot: no two entries have the same write time and session."""

    slots: Int[Tensor, " n"]
    written: Int[Tensor, " n"]
    sessions: Int[Tensor, " n"]

    def only(self, which: Tensor | slice) -> "Stamps":
        return Stamps(*(part[which] for part in self))


class Rows(NamedTuple):
    """Entries with all that is stored of them."""

    stamps: Stamps
    keys: Float[Tensor, "n d"]
    values: Shaped[Tensor, "n *v"]

    def only(self, which: Tensor | slice) -> "Rows":
        return Rows(self.stamps.only(which), self.keys[which], self.values[which])

    @staticmethod
    def joined(parts: "list[Rows]") -> "Rows":
        stamps = Stamps(*(torch.cat(some) for some in zip(*(part.stamps for part in parts), strict=True)))
        return Rows(stamps, torch.cat([part.keys for part in parts]), torch.cat([part.values for part in parts]))


def as_texts(values: Shaped[Tensor, "n *v"]) -> list[str]:
    """Returns the bytes of each value in base64: every dtype travels as it is."""
    flat = values.reshape(len(values), -1).contiguous().view(torch.uint8)
    return [base64.b64encode(bytes(row)).decode() for row in flat.numpy()]


def from_texts(texts: list[str], shape: tuple[int, ...], dtype: torch.dtype) -> Shaped[Tensor, "n *v"]:
    joined = bytearray().join(base64.b64decode(text) for text in texts)
    if not joined:
        return torch.empty(len(texts), *shape, dtype=dtype)
    return torch.frombuffer(joined, dtype=torch.uint8).view(dtype).view(len(texts), *shape)


class Kept:
    """The entries that this process wrote or found, valid while Milvus has the same stamps."""

    def __init__(self, settings: Settings) -> None:
        capacity = settings.capacity
        self._keys = torch.zeros(capacity, settings.key_size)
        self._values = torch.zeros(capacity, *settings.value_shape, dtype=settings.value_dtype)
        self._written = torch.full((capacity,), -1)
        self._sessions = torch.full((capacity,), -1)
        self._lock = threading.Lock()

    def keep(self, rows: Rows) -> None:
        with self._lock:
            at = rows.stamps.slots
            self._keys[at], self._values[at] = rows.keys, rows.values
            self._written[at], self._sessions[at] = rows.stamps.written, rows.stamps.sessions

    def look_up(self, stamps: Stamps) -> tuple[Rows, Int[Tensor, " m"]]:
        """Returns the entries that are kept, and the slots of the others."""
        with self._lock:
            at = stamps.slots
            same = (self._written[at] == stamps.written) & (self._sessions[at] == stamps.sessions)
            known = at[same]
            return Rows(stamps.only(same), self._keys[known], self._values[known]), at[~same]

    def drop(self, slots: Int[Tensor, " m"]) -> None:
        with self._lock:
            self._written[slots] = -1
            self._keys[slots], self._values[slots] = 0, 0
