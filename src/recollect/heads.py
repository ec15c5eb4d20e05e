"""Output layers for classes that nobody foresaw."""

import torch
from torch import nn

from recollect.errors import HeadError, SettingError


def grow(head: nn.Linear, classes: int) -> nn.Linear:
    """Returns a copy of a trained linear head with more outputs, for labels that it could not predict before.

    The new outputs' logits are the mean of the old ones at every key, so they are never the largest (but as large as
    all others where those are equal, as a single one is): no prediction changes before something is learned about the
    new classes. The rest of a softmax is shared: the old outputs keep their ratios. Write examples of the new classes
    to the memory, and an ``MbPA`` around the new head predicts them.

    Args:
        head: A ``torch.nn.Linear``; it is left as it is.
        classes: The number of outputs afterwards.

    Returns:
        A layer of the same dtype, on the same device, with ``requires_grad`` as before. It has parameters of its own:
        an optimizer and an ``MbPA`` of the old head know nothing of it.

    Raises:
        HeadError: If ``head`` is no plain linear layer: of a subclass of it, or with a weight made from other
            parameters, it would lose what is special about it.
        SettingError: If it has more outputs already.

    Example:
        >>> head = torch.nn.Linear(64, 10)
        >>> grown = grow(head, 12)
        >>> grown, torch.equal(grown.weight[:10], head.weight)
        (Linear(in_features=64, out_features=12, bias=True), True)
    """
    plain = {"weight", "bias"}  # a layer of other parameters, such as one with weight norm, is no linear layer to copy
    if type(head) is not nn.Linear or not plain.issuperset(name for name, _ in head.named_parameters()):
        raise HeadError(
            f"grow adds outputs to a torch.nn.Linear, got {type(head).__name__}. Of a network, grow the last layer: "
            "net[-1] = grow(net[-1], classes)."
        )
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < head.out_features:
        raise SettingError(f"classes must be a whole number of at least {head.out_features}, got {classes!r}.")
    with torch.no_grad():
        # Made without memory at first: it would draw weights, and move the global random state.
        empty = nn.Linear(head.in_features, classes, bias=head.bias is not None, device="meta", dtype=head.weight.dtype)
        grown = empty.to_empty(device=head.weight.device)
        for name, old in head.named_parameters():
            new = grown.get_parameter(name)
            new[: len(old)] = old
            new[len(old) :] = old.mean(0)
            new.requires_grad_(old.requires_grad)
    return grown.train(head.training)
