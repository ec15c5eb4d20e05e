"""The forms in which examples may come: one pair of tensors, a ``DataLoader``, or any iterable of batches."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Shaped
from torch import Tensor

from recollect.errors import DtypeError, SettingError, ShapeError

_NEED = "examples must be a tensor, a pair (inputs, labels) of tensors or an iterable of those"

Examples = tuple[Tensor, Tensor] | Tensor | Iterable[Tensor] | Iterable[Sequence[Tensor]]


class Batch(NamedTuple):
    """Inputs and what belongs to them, row by row; labels are None where there are none."""

    inputs: Shaped[Tensor, "b ..."]
    labels: Shaped[Tensor, "b ..."] | None


def batches(data: Examples, size: int) -> Iterator[Batch]:
    """Yields examples in batches of at most ``size``, in their order.

    Args:
        data: A pair ``(inputs, labels)`` of tensors (a ``recollect.data.Dataset`` is one), inputs alone, or an iterable
            of either, such as a ``DataLoader``. An iterator is used up.
        size: The largest number of rows of a batch.

    Raises:
        ShapeError: If inputs and labels differ in their number of rows.
        DtypeError: If something else than tensors is found.
        SettingError: If there is no example at all.
    """
    found = False
    for part in _parts(data):
        inputs, labels = _batch(part)
        for first in range(0, len(inputs), size):
            rows = slice(first, first + size)
            found = True
            yield Batch(inputs[rows], None if labels is None else labels[rows])
    if not found:
        raise SettingError("there are no examples. If an iterator was passed, it may have been used up: pass a list.")


def as_pair(data: object) -> tuple[Tensor, Tensor] | None:
    """Returns data that are one pair ``(inputs, labels)`` of tensors; None for anything else.

    Raises:
        ShapeError: If they differ in their number of rows.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        _batch(data)
        return data
    return None


def _parts(data: object) -> Iterable[object]:
    if isinstance(data, Tensor) or as_pair(data) is not None:
        return [data]
    if isinstance(data, list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        raise SettingError(
            "a list of two tensors may be inputs and labels, or two batches of inputs. Pass a tuple (inputs, labels), "
            "or torch.cat([first, second])."
        )
    if isinstance(data, Iterable):
        return data
    raise DtypeError(f"{_NEED}, got {type(data).__name__}.")


def _batch(part: object) -> Batch:
    parts = list(part) if isinstance(part, tuple | list) else [part]
    tensors = [tensor for tensor in parts if isinstance(tensor, Tensor)]
    if not 1 <= len(parts) <= 2 or len(tensors) < len(parts):
        raise DtypeError(f"{_NEED}, got {type(part).__name__} among them.")
    sizes = [tensor.shape[:1] for tensor in tensors]
    if not sizes[0] or sizes.count(sizes[0]) < len(sizes):
        shapes = " and labels of shape ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise ShapeError(f"there must be one label for each input, got inputs of shape {shapes}.")
    return Batch(tensors[0], tensors[1] if len(tensors) == 2 else None)
