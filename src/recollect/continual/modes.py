"""Running a network as it is used, and leaving it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_aside: ContextVar[bool] = ContextVar("_aside", default=False)


@contextmanager
def aside() -> Iterator[None]:
    """Marks what a companion runs a network for: these calls are no part of the training."""
    token = _aside.set(True)
    try:
        yield
    finally:
        _aside.reset(token)


def is_aside() -> bool:
    """Whether a companion is running the network."""
    return _aside.get()


@contextmanager
def evaluation(network: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode, and each of its modules back into its own mode in the end."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in modes:  # not network.eval(), which some override; and cuDNN's RNNs need training mode
            module.training = isinstance(module, nn.RNNBase) and not module.dropout
        yield
    finally:
        for module, training in modes:
            module.training = training
