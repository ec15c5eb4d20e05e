"""Whether contenders compute the same: a benchmark of a wrong result is worthless."""

from torch import Tensor


class DisagreementError(Exception):
    """Contenders that should compute the same do not: their times would mean nothing."""


def same(name: str, ours: Tensor, theirs: Tensor, *, tolerance: float) -> None:
    """Compares outputs.

    Args:
        name: Whose outputs ``theirs`` are.
        ours: Ours.
        theirs: Those of a baseline, or the first rows of them.
        tolerance: The largest difference, as a part of the largest output.

    Raises:
        DisagreementError: If they differ by more.
    """
    scale = float(ours.abs().max())
    difference = float((ours[: len(theirs)] - theirs).abs().max())
    if not difference <= tolerance * scale:
        raise DisagreementError(f"{name} differs from ours by {difference:.3g}, of outputs up to {scale:.3g}.")


def agree(keys: Tensor, queries: Tensor, found: dict[str, Tensor]) -> None:
    """Checks by distances in float64 that nobody found nearer neighbors than we, and that all were near them.

    The other contenders may err a little: some take distances from the expanded form, which cancels.

    Args:
        keys: All keys.
        queries: The queries.
        found: The slots found, by contender; ours first.

    Raises:
        DisagreementError: If somebody found other neighbors.
    """
    distances = {name: _distances(keys, queries, slots) for name, slots in found.items()}
    (_, ours), *others = distances.items()
    for name, theirs in others:
        if bool((ours > theirs * (1 + 1e-5)).any()):
            raise DisagreementError(f"{name} found nearer neighbors than ours.")
        if bool((theirs > ours * 1.05).any()):
            raise DisagreementError(f"{name} found neighbors much farther away than ours.")


def _distances(keys: Tensor, queries: Tensor, slots: Tensor) -> Tensor:
    near = keys[slots.to(keys.device)].double()
    return (near - queries.double().unsqueeze(1)).square().sum(2).sort(1).values
