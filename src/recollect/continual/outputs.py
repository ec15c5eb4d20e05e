"""Which of a network's outputs a task has, and what labels must be to go with them."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from recollect.continual.importance import Directions
from recollect.errors import DtypeError, LabelError, SettingError, ShapeError
from recollect.likelihoods import Categorical, Likelihood

Outputs = Sequence[int] | Int[Tensor, " o"]


def output_mask(outputs: Outputs, size: int | None = None) -> Bool[Tensor, " c"]:
    """Returns which of ``size`` outputs are among these; as many as it takes to have them all if None.

    Raises:
        SettingError: If they are not distinct numbers of outputs, at least one.
    """
    try:
        numbers = torch.as_tensor(outputs)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.zeros(0)
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if not whole or numbers.dim() != 1 or len(numbers) == 0 or len(numbers.unique()) < len(numbers):
        raise SettingError(f"outputs must be the numbers of some outputs, each once, got {outputs!r}.")
    size = int(numbers.max()) + 1 if size is None else size
    if int(numbers.min()) < 0 or int(numbers.max()) >= size:
        raise SettingError(f"outputs must be from 0 to {size - 1} for this network, got {outputs!r}.")
    return torch.zeros(size, dtype=torch.bool).index_fill_(0, numbers.cpu().long(), True)


def restricted(directions: Directions, outputs: Outputs | None) -> Directions:
    """Returns directions as if the network had these outputs alone; labels stay the numbers of outputs."""
    if outputs is None:
        return directions

    def inside(full: Tensor, labels: Tensor | None) -> Iterator[Tensor]:
        require_matrix(full)
        mask = output_mask(outputs, full.shape[1]).to(full.device)
        places = mask.cumsum(0) - 1
        if labels is not None and not labels.is_floating_point() and labels.dim() == 1:
            known = (labels >= 0) & (labels < len(mask))
            known &= mask[labels.long().clamp(0, len(mask) - 1)]
            if not bool(known.all()):
                wrong = int(labels[~known][0])
                raise LabelError(f"the label {wrong} is not among the task's outputs, {list(map(int, outputs))}.")
            labels = places[labels.long()]
        for direction in directions(full[:, mask], labels):
            yield torch.zeros_like(full).masked_scatter_(mask.expand_as(full), direction)

    return inside


def require_matrix(outputs: Float[Tensor, "b ..."]) -> None:
    """Refuses outputs that are not ``(b, c)``.

    Raises:
        ShapeError: If they are not.
    """
    if outputs.dim() != 2:
        raise ShapeError(
            f"this needs a network that maps b examples to outputs (b, c), but its output for {len(outputs)} has shape "
            f"{tuple(outputs.shape)}. Sequences go with fisher='sampled' or 'empirical', without outputs=."
        )


def checked_labels(outputs: Tensor, labels: Tensor | None, likelihood: Likelihood) -> Tensor:
    """Returns the labels.

    Raises:
        SettingError: If there are none.
        DtypeError, ShapeError, LabelError: If the likelihood cannot score the outputs by them.
    """
    if labels is None:
        raise SettingError("this needs labels: pass pairs (inputs, labels), or use another fisher.")
    if not isinstance(likelihood, Categorical):
        if labels.shape != outputs.shape:
            raise ShapeError(
                f"targets must have the shape of the outputs, {tuple(outputs.shape)}, got {tuple(labels.shape)}."
            )
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DtypeError(f"labels must be whole numbers, got {labels.dtype}.")
    if labels.shape != outputs.shape[:-1]:
        raise ShapeError(
            f"labels must have shape {tuple(outputs.shape[:-1])} to match the outputs, got {tuple(labels.shape)}."
        )
    if not (0 <= int(labels.min()) and int(labels.max()) < outputs.shape[-1]):
        raise LabelError(
            f"labels must be from 0 to {outputs.shape[-1] - 1}, the numbers of the outputs, got {int(labels.min())} to "
            f"{int(labels.max())}."
        )
    return labels
