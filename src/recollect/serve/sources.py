"""Where a ``Service`` comes from: a saved model, a factory of the user's, or the demo."""

import importlib
import sys
from pathlib import Path

from typing import TYPE_CHECKING

from recollect.errors import SettingError
from recollect.serve.service import Examples, Service
from recollect.serve.settings import Command

if TYPE_CHECKING:
    from recollect.data import Dataset


def service(command: Command) -> Service:
    """Returns what the command line names.

    Raises:
        SettingError: If there is no such thing, or it is none that can be served.
        MissingDataError, FormatError: If a saved model is not there, or damaged.
    """
    if command.model is None:
        return demo()
    return from_factory(command.model)


def demo() -> Service:
    """Returns digits without the nine, trained now; what it is taught is forgotten when it ends."""
    from recollect.experiments.teachable import UNSEEN, teachable

    made = teachable()
    side = made.side

    def examples(data: "Dataset") -> Examples:
        return Examples(data.inputs.view(-1, side, side), [str(label) for label in data.labels.tolist()])

    return Service(
        made.encode,
        made.layer,
        input_shape=(side, side),
        classes=tuple(map(str, range(UNSEEN))),
        examples=examples(made.known),
        samples=examples(made.samples),
    )


def from_factory(name: str) -> Service:
    """Returns what the function ``module:factory`` returns; modules are looked for in the working folder, too.

    Raises:
        SettingError: If there is no such function, or it returns something else.
    """
    module, _, factory = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), factory)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0] and error.name != module:
            raise
        raise SettingError(f"there is no module {module!r} here. Start in the folder that holds it.") from error
    except AttributeError as error:
        raise SettingError(f"{module} has no function {factory!r}.") from error
    result = made()
    if not isinstance(result, Service):
        raise SettingError(f"{name} must return a recollect.serve.Service, got {type(result).__name__}.")
    return result
