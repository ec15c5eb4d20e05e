"""What the recurrent networks of this room ask of what they are given at a step."""

import torch
from torch import Tensor

from recollect.errors import DtypeError, ShapeError


def require_dtype(name: str, tensor: Tensor, weight: Tensor) -> None:
    """Refuses a tensor of another dtype than the weights; under ``torch.autocast``, which converts both, none.

    Raises:
        DtypeError: If it is of another.
    """
    if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
        raise DtypeError(
            f"{name} must be {weight.dtype} as the weights are, got {tensor.dtype}. Use .to({weight.dtype})."
        )


def require_state(state: object, kind: str, shapes: list[tuple[int, ...]], batch: int, weight: Tensor) -> None:
    """Refuses what is not a tuple of tensors of these shapes and of the dtype of the weights.

    Args:
        state: What the caller passed.
        kind: What it must be, with its article.
        shapes: Those of its tensors.
        batch: The number of sequences.
        weight: One of the weights.

    Raises:
        ShapeError: If it is something else, or a shape differs.
        DtypeError: If a dtype does.
    """
    parts = state if isinstance(state, tuple) else ()
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if len(parts) != len(tensors) or [part.shape for part in tensors] != shapes:
        same = tensors and len(parts) == len(tensors)
        got = [tuple(part.shape) for part in tensors] if same else f"something else ({type(state).__name__})"
        raise ShapeError(
            f"the state of {batch} sequences must be {kind} of tensors of the shapes {shapes}, got {got}. Is it that "
            "of another batch, or of another network? Pass on what the step before returned."
        )
    for part in tensors:
        require_dtype("the state", part, weight)
