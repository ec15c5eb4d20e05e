"""A module without its numbers: what runs as a function of parameters, and which of them a name means."""

import copy
from typing import TypeVar

from torch import nn

from recollect.errors import HeadError

Module = TypeVar("Module", bound=nn.Module)


def empty_shell(module: Module, *, what: str) -> Module:
    """Returns a copy of a module with its parameters and buffers on the device "meta", for ``functional_call``.

    Args:
        module: Is left as it is.
        what: What messages call it.

    Raises:
        HeadError: If a parameter or buffer has no shape yet, or the module keeps a tensor computed from its parameters.
    """
    for name, part in module.named_modules():
        for kind, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if nn.parameter.is_lazy(tensor):
                where = f"submodule {name!r}" if name else f"the {what} itself"
                raise HeadError(f"{kind!r} of {where} has no shape yet. Run the network once before wrapping it.")
    # deepcopy takes what its memo already holds, so the shell gets empty tensors instead of copies.
    memo: dict[int, object] = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    memo.update((id(b), b.to("meta")) for b in module.buffers())
    try:
        return copy.deepcopy(module, memo)
    except RuntimeError as error:  # a tensor that is computed from the parameters, kept as an attribute
        raise HeadError(
            f"the {what} ({type(module).__name__}) cannot be seen as a function of its parameters: {error} The old "
            "torch.nn.utils.weight_norm and spectral_norm do this: use torch.nn.utils.parametrizations."
        ) from error


def aliases(module: nn.Module) -> dict[str, str]:
    """Returns all names of all parameters; a parameter that several submodules share is known by its first name."""
    first = {id(p): name for name, p in module.named_parameters()}
    return {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}


def select(module: nn.Module, names: tuple[str, ...] | None, *, what: str) -> tuple[str, ...]:
    """Returns the first names of the parameters that are meant: those named, or inside a submodule named; all for None.

    Raises:
        HeadError: If a name matches nothing.
    """
    every = tuple(name for name, _ in module.named_parameters())
    if names is None:
        return every
    chosen: set[str] = set()
    for name in names:
        found = {first for alias, first in aliases(module).items() if f"{alias}.".startswith(f"{name}.")}
        if not found:
            raise HeadError(f"the {what} has no parameter or submodule {name!r}. Its parameters: {list(every)}.")
        chosen |= found
    return tuple(name for name in every if name in chosen)
