"""How an entry lies in a file: its stamp, a checksum, its key and its value, in a record of fixed length."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

_ALIGNED = 16  # bytes: what the dtype of the longest numbers needs
_HEADER = 16  # bytes: stamp and checksum
# Bytes that are read at once: smaller blocks load slower, larger ones are slower to write into. A part of the format.
_BLOCK = 128 * 2**10
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd, its bits well mixed


class Records(NamedTuple):
    """Entries as they are stored.

    A stamp says what became of a slot: 1 + the write time of the entry in it, 0 where nothing was ever written, and -n
    where the n-th call of ``forget`` has emptied it. So the order in which slots are to be overwritten, which a memory
    keeps as its ``queue``, is the order of their stamps, and of equal ones that of the slots.
    """

    stamps: Int[Tensor, " n"]
    keys: Shaped[Tensor, "n d"]
    values: Shaped[Tensor, "n ..."]


@dataclass(frozen=True)
class Layout:
    """What is where in a record.

    Args:
        key_size, key_dtype, value_shape, value_dtype: As in ``EpisodicMemory``.
    """

    key_size: int
    key_dtype: torch.dtype
    value_shape: tuple[int, ...]
    value_dtype: torch.dtype

    @property
    def _key_bytes(self) -> int:
        return self.key_size * self.key_dtype.itemsize

    @property
    def _value_bytes(self) -> int:
        return torch.Size(self.value_shape).numel() * self.value_dtype.itemsize

    @property
    def _value_start(self) -> int:
        return _aligned(_HEADER + self._key_bytes)

    @property
    def length(self) -> int:
        """The bytes of a record."""
        return self._value_start + _aligned(self._value_bytes)

    @property
    def block(self) -> int:
        """How many records lie together in a block, at the most."""
        return max(1, _BLOCK // self.length)

    @cached_property
    def _weights(self) -> Int[Tensor, " w"]:
        """What each word of a record counts in its checksum: odd numbers, and 0 for the checksum itself."""
        weights = _GOLDEN * (2 * torch.arange(self.length // 8) + 1)
        weights[1] = 0
        return weights

    def pack(self, records: Records) -> bytearray:
        """Returns records as they lie in the file, one after the other."""
        data = bytearray(len(records.stamps) * self.length)
        if data:
            rows = self._rows(data)
            words = rows.view(torch.long)
            words[:, 0] = records.stamps
            self._keys(rows).copy_(records.keys)
            self._values(rows).copy_(records.values)
            words[:, 1] = self._sums(words)
        return data

    def unpack(self, data: bytearray) -> tuple[Records, Bool[Tensor, " n"]]:
        """Returns the records in ``data``, which they share, and which of them are sound."""
        rows = self._rows(data)
        words = rows.view(torch.long)
        return Records(words[:, 0], self._keys(rows), self._values(rows)), self._sums(words) == words[:, 1]

    def _rows(self, data: bytearray) -> UInt8[Tensor, "n l"]:
        return torch.frombuffer(data, dtype=torch.uint8).view(-1, self.length)

    def _keys(self, rows: UInt8[Tensor, "n l"]) -> Shaped[Tensor, "n d"]:
        return rows[:, _HEADER : _HEADER + self._key_bytes].view(self.key_dtype)

    def _values(self, rows: UInt8[Tensor, "n l"]) -> Shaped[Tensor, "n ..."]:
        start = self._value_start
        flat = rows[:, start : start + self._value_bytes].view(self.value_dtype)
        return flat.unflatten(1, self.value_shape) if self.value_shape else flat.squeeze(1)

    def _sums(self, words: Int[Tensor, "n w"]) -> Int[Tensor, " n"]:
        """Returns the checksums, modulo 2^64: each differs where a single word does."""
        return (words * self._weights).sum(1)


def order(stamps: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Returns the slots in the order in which they will be overwritten: empty ones first, then the oldest."""
    return stamps.argsort(stable=True)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNED) * _ALIGNED
