"""What a memory refuses: entries that it cannot store as they are, and queries that it cannot compare with its keys."""

from typing import NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from recollect.errors import (
    DeviceError,
    DtypeError,
    NonFiniteError,
    SettingError,
    ShapeError,
    require,
    require_tensor,
    require_whole,
)
from recollect.memory.index import compute_dtype


@runtime_checkable
class Storage(Protocol):
    """The part of a memory that the checks look at: shapes, dtypes and devices of its slots."""

    keys: Tensor
    values: Tensor


def check_value_settings(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuses what values cannot be made of.

    Raises:
        SettingError: If ``shape`` is no tuple of whole numbers, or ``dtype`` no dtype.
    """
    require("value_shape", shape, tuple, "a tuple, such as (3,) for three numbers or () for a label")
    for size in shape:
        require_whole("each of value_shape", size, low=0)
    require("value_dtype", dtype, torch.dtype, "a dtype, such as torch.long")


def check_entries(
    memory: Storage, keys: Shaped[Tensor, "*b d"], values: Shaped[Tensor, "..."]
) -> tuple[Shaped[Tensor, "n d"], Shaped[Tensor, "n ..."]]:
    """Returns keys and values as the memory stores them, one row for each entry.

    Raises:
        ShapeError: If keys or values do not fit the memory or each other.
        DtypeError: If they cannot be stored in its dtypes without loss of meaning.
        DeviceError: If they are on another device.
        NonFiniteError: If a value or a key is not finite, or a key so large that squared distances overflow, by
            row number.
    """
    _check_keys(memory, keys, "keys")
    require_tensor("values", values)
    shape, wanted = tuple(memory.values.shape[1:]), memory.keys.dtype
    rows = keys.shape[:-1]
    if tuple(values.shape) != (*rows, *shape):
        raise ShapeError(
            f"values must have shape {(*rows, *shape)} to match keys of shape {tuple(keys.shape)} in "
            f"this memory, got {tuple(values.shape)}."
        )
    if values.device != memory.values.device:
        raise DeviceError(_other_device("values", values, memory.values))
    flat = keys.detach().reshape(-1, memory.keys.shape[1])
    stored = flat.to(wanted)
    if wanted == torch.uint8:
        bad = (stored.to(flat.dtype) != flat).any(1)
        if flat.dtype.is_signed:
            bad |= (flat < 0).any(1)  # as an int8, 255 reads -1
    else:
        bad = too_large(stored)
    if bool(bad.any()):
        _refuse_rows(flat, bad, wanted)
    return stored, _as_stored(values.detach().reshape(len(flat), *shape), memory.values.dtype)


def check_queries(memory: Storage, queries: Shaped[Tensor, "*b d"]) -> Float[Tensor, "n d"]:
    """Returns the queries in the dtype in which distances are computed, one row for each.

    Raises:
        ShapeError, DtypeError, DeviceError, NonFiniteError: If they do not fit the memory.
    """
    _check_keys(memory, queries, "queries")
    flat = queries.reshape(-1, memory.keys.shape[1]).to(compute_dtype(memory.keys))
    bad = too_large(flat)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise bad_query(row, finite=bool(flat[row].isfinite().all()))
    return flat


def bad_query(row: int, *, finite: bool) -> NonFiniteError:
    """Returns the error of a query that has no distance to anything."""
    what = "is so large that squared distances overflow" if finite else "holds NaN or infinity"
    message = f"queries must be finite, but row {row} {what}. Check the network that makes them."
    return NonFiniteError(message, query=row)


def check_limit(before: int | Tensor, batch: torch.Size, device: torch.device) -> Int[Tensor, " n"]:
    """Returns one write time for each query of a batch."""
    limit = torch.as_tensor(before, device=device)
    if limit.is_floating_point() or limit.dtype == torch.bool:
        raise DtypeError(f"before must be a write time, which is a whole number, got {limit.dtype}.")
    if limit.dim() and limit.shape != batch:
        raise ShapeError(
            f"before must be one number or have one for each query, shape {tuple(batch)}, got {tuple(limit.shape)}."
        )
    return limit.long().expand(batch).reshape(-1)


def check_neighbors(neighbors: int, otherwise: str = "") -> None:
    """Refuses a number of neighbors that is none.

    Raises:
        SettingError: If it is not a whole number above 0.
    """
    if isinstance(neighbors, bool) or not isinstance(neighbors, int) or neighbors < 1:
        raise SettingError(f"neighbors must be a whole number above 0{otherwise}, got {neighbors!r}.")


def check_slots(slots: int | Int[Tensor, "..."], keys: Shaped[Tensor, "n d"]) -> Int[Tensor, " m"]:
    """Returns the slots in rising order, each once, without the -1 that marks places that nothing fills.

    Raises:
        SettingError: If one is no slot of this memory.
    """
    asked = torch.as_tensor(slots, device=keys.device).reshape(-1)
    if len(asked) == 0:
        return asked.long()
    if asked.is_floating_point() or asked.dtype == torch.bool:
        raise SettingError(f"slots must be whole numbers, got {asked.dtype}. Turn a mask into slots by .nonzero().")
    asked = asked.long().unique()
    if not (-1 <= int(asked[0]) and int(asked[-1]) < len(keys)):
        outside = int(asked[0]) if int(asked[0]) < -1 else int(asked[-1])
        raise SettingError(f"slots must be from 0 to {len(keys) - 1} in this memory, got {outside}.")
    return asked[asked >= 0]


def too_large(keys: Float[Tensor, "b d"]) -> Bool[Tensor, " b"]:
    """Whether a key is NaN, infinite, or so large that a sum of squares in a search could overflow."""
    dtype = compute_dtype(keys)
    return ~(torch.linalg.vector_norm(keys, dim=1, dtype=dtype) < (torch.finfo(dtype).max / 64) ** 0.5)


def overflows(values: Tensor, stored: Tensor) -> bool:
    """Whether conversion has made a number infinite."""
    return bool((stored.isinf() & ~values.isinf()).any())


def _check_keys(memory: Storage, keys: Tensor, name: str) -> None:
    require_tensor(name, keys)
    size = memory.keys.shape[1]
    if keys.dim() < 1 or keys.shape[-1] != size:
        raise ShapeError(
            f"{name} must have shape (*, {size}) to match this memory, got {tuple(keys.shape)}. "
            "Did you pass logits instead of features?"
        )
    if keys.is_complex() or keys.dtype == torch.bool:
        raise DtypeError(f"{name} must be real numbers, got {keys.dtype}.")
    if keys.device != memory.keys.device:
        raise DeviceError(_other_device(name, keys, memory.keys))


def _as_stored(values: Tensor, wanted: torch.dtype) -> Tensor:
    if values.is_floating_point() and not bool(values.isfinite().all()):
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise NonFiniteError(
            f"values must be finite, but row {row} holds NaN or infinity. Nothing of the batch was stored."
        )
    stored = values.to(wanted)
    lossy = not torch.can_cast(values.dtype, wanted)
    if not lossy and values.dtype != wanted:
        whole = not (wanted.is_floating_point or wanted.is_complex)
        lossy = bool((stored != values).any()) if whole else overflows(values, stored)
    if lossy:
        raise DtypeError(
            f"these values of {values.dtype} cannot be stored as {wanted}: they would lose their fractions or "
            f"overflow. Convert them, or create the memory with value_dtype={values.dtype}."
        )
    return stored


def _refuse_rows(keys: Tensor, bad: Tensor, wanted: torch.dtype) -> NoReturn:
    row = int(bad.nonzero()[0])
    more = f" ({int(bad.sum())} rows in all)" if int(bad.sum()) > 1 else ""
    if not bool(keys[row].isfinite().all()):
        raise NonFiniteError(
            f"keys must be finite, but row {row} holds NaN or infinity{more}. Nothing of the batch was stored. "
            "Check the network that makes the keys."
        )
    if wanted == torch.uint8:
        raise DtypeError(
            f"a uint8 memory stores whole numbers from 0 to 255, but row {row} holds others{more}. Nothing of the "
            "batch was stored. Use key_dtype=torch.float32, or scale the keys to 0..255."
        )
    raise NonFiniteError(
        f"row {row} of keys is too large for key_dtype={wanted}{more}: it, or its squared distance to "
        "other keys, overflows. Nothing of the batch was stored. Scale the keys down, or use a wider key_dtype."
    )


def _other_device(name: str, given: Tensor, memory: Tensor) -> str:
    return f"{name} are on {given.device}, the memory is on {memory.device}. Move one of them with .to()."
