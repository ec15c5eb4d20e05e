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
        for module, _ in modes:  # not network.eval(), which some override
            module.training = _needs_training_mode(module)
        yield
    finally:
        for module, training in modes:
            module.training = training


def _needs_training_mode(module: nn.Module) -> bool:
    """Whether cuDNN refuses the backward pass in evaluation mode; without dropout the modes are the same."""
    if type(module) not in {nn.LSTM, nn.GRU, nn.RNN} or not isinstance(module, nn.RNNBase):
        return False
    return not module.dropout and any(p.is_cuda for p in module.parameters())
