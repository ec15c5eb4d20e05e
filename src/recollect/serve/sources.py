"""Where a ``Service`` comes from: a saved model, a factory of the user's, or the demo."""

import dataclasses
import importlib
import sys
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor, nn

from recollect.errors import SettingError
from recollect.mbpa import MbPA
from recollect.memory import EpisodicMemory
from recollect.persistence import load
from recollect.serve.service import Examples, Service
from recollect.serve.settings import Command, is_folder


def service(command: Command) -> Service:
    """Returns what the command line names.

    Raises:
        SettingError: If there is no such thing, or it is none that can be served.
        MissingDataError, FormatError: If a saved model is not there, or damaged.
    """
    if command.model is None:
        made = demo()
    elif is_folder(command.model):
        made = from_folder(Path(command.model), command.classes, command.shape)
    else:
        made = from_factory(command.model)
    return made if command.memory is None else dataclasses.replace(made, folder=command.memory)


def from_folder(folder: Path, classes: tuple[str, ...], shape: tuple[int, ...] | None) -> Service:
    """Returns a saved model: an ``MbPA``, or an ``nn.Sequential`` that ends with one.

    What it is taught is kept in the folder's sub-folder ``memory``: a copy of the saved entries at the first start,
    which counts from then on.

    Raises:
        SettingError: If it is something else, or nothing says what shape inputs have.
        MissingDataError, FormatError: See ``recollect.load``.
    """
    model = load(folder)
    layers = list(model) if isinstance(model, nn.Sequential) else [model]
    *first, layer = layers
    if not isinstance(layer, MbPA):
        raise SettingError(
            f"{folder} holds a {type(layer).__name__}, need an MbPA, or an nn.Sequential that ends with one. Write a "
            "factory for it, and serve module:factory."
        )
    known = shape or _first_shape(layer if not first else nn.Sequential(*first))
    if known is None:
        raise SettingError(f"nothing in {folder} says what shape one input has. Add --shape, such as --shape 3,32,32.")
    return Service(nn.Sequential(*first), layer, input_shape=known, classes=classes, folder=folder / "memory")


def _first_shape(network: nn.Module) -> tuple[int, ...] | None:
    """Returns the shape of an input, where the first layer says it."""
    for part in network.modules():
        if isinstance(part, EpisodicMemory):
            return (part.key_size,)
        if isinstance(part, nn.Linear):
            return (part.in_features,)
        if not isinstance(part, nn.Sequential | MbPA):
            return None
    return None


def demo() -> Service:
    """Returns digits without the nine, trained now; what it is taught is forgotten when it ends."""
    from recollect.experiments.teachable import UNSEEN, teachable

    made = teachable()
    side = made.side

    def examples(inputs: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Examples:
        return Examples(inputs.view(-1, side, side), [str(label) for label in labels.tolist()])

    return Service(
        made.encode,
        made.layer,
        input_shape=(side, side),
        classes=tuple(map(str, range(UNSEEN))),
        examples=examples(*made.known),
        samples=examples(*made.samples),
    )


def from_factory(name: str) -> Service:
    """Returns what the function ``module:factory`` returns; modules are looked for in the working folder, too.

    Raises:
        SettingError: If there is no such function, or it returns something else.
    """
    module, _, factory = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), factory]):
        raise SettingError(f"need module:factory, such as service:service for a function in service.py, got {name!r}.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise SettingError(f"there is no module {module!r} here. Start in the folder that holds it.") from error
    made = found.__dict__.get(factory)
    if not callable(made):
        what = f"{factory!r} is a {type(made).__name__}" if made is not None else f"there is no {factory!r}"
        raise SettingError(f"{module} needs a function that returns a recollect.serve.Service, but {what}.")
    result = made()
    if not isinstance(result, Service):
        raise SettingError(f"{name} must return a recollect.serve.Service, got {type(result).__name__}.")
    return result
