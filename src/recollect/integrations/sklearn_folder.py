"""How the scikit-learn estimators are kept in a folder: JSON and safetensors, no pickle."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Shaped
from torch import Tensor

from recollect import snapshot
from recollect.errors import FormatError, SettingError, require_number
from recollect.integrations.sklearn_network import Network, plain
from recollect.memory import EpisodicMemory

Tensors = dict[str, Shaped[Tensor, "..."]]
_Kind = TypeVar("_Kind", bound="Saveable")


class Saveable(ABC):
    """An estimator that can be saved and loaded."""

    @abstractmethod
    def _learned(self) -> dict[str, Any]:
        """Returns what JSON can hold of what was learned, beside network, memory and the scale of steps."""

    @abstractmethod
    def _restore_learned(self, learned: dict[str, Any]) -> None:
        """Takes what ``_learned`` returned."""

    def save(self: Any, folder: str | os.PathLike[str]) -> None:
        """Saves the fitted estimator to a folder that ``load`` reads: JSON and safetensors, no pickle.

        The folder holds either the old save or the new one, complete, whenever the process is killed.

        Args:
            folder: Where to. It is created if need be; a folder that holds an older save is overwritten.

        Raises:
            SettingError: If a setting cannot be stored, such as a ``numpy.random.RandomState``.
            FormatError: If ``folder`` is a file, or holds something other than a save. It stays as it is.
            OSError: If writing fails (a full disk). What was saved before stays as it is.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        names = vars(self).get("feature_names_in_")
        learned = self._learned() | {"feature_names": None if names is None else names.tolist()}
        learned["reference"] = self._reference
        name, settings = type(self).__name__, self.get_params(deep=False)
        _save(Path(folder), name, settings, self.network_, self.memory_, learned)

    @classmethod
    def load(cls: type[_Kind], folder: str | os.PathLike[str]) -> _Kind:
        """Loads what ``save`` saved: it predicts the same, bit for bit, and ``partial_fit`` goes on the same.

        Raises:
            MissingDataError: If there is no such folder.
            FormatError: If it is not a complete, undamaged save of an estimator of this class.
        """
        import numpy as np

        make: Any = cls
        saved = _read(Path(folder), cls.__name__)
        try:
            model = make(**saved.settings)
            model.network_, model.memory_ = saved.restore()
            model.n_features_in_ = model.network_.sizes[0]
            if saved.learned["feature_names"] is not None:
                model.feature_names_in_ = np.array(saved.learned["feature_names"], dtype=object)
            model._reference = saved.reference
            model._restore_learned(saved.learned)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            why = f"the estimator in {folder} cannot be restored: {error}"
            raise FormatError(f"{why.rstrip('.')}. Fit and save it again.") from error
        return model


class _Saved(NamedTuple):
    """What a folder holds of an estimator."""

    settings: dict[str, Any]
    sizes: list[int]
    learned: dict[str, Any]
    tensors: Tensors

    @property
    def reference(self) -> float:
        """The squared length of keys that sets the step size.

        Raises:
            ValueError: If it is not there.
        """
        if "reference" not in self.learned:
            raise ValueError("it does not say how long the keys in fit were, as no save of an older recollect does")
        require_number("reference", self.learned["reference"], low=0.0)
        return self.learned["reference"]

    def restore(self) -> tuple[Network, EpisodicMemory]:
        """Returns network and memory.

        Raises:
            LookupError, TypeError, RuntimeError, ValueError: If the tensors are not theirs.
        """
        tensors, values = self.tensors, self.tensors["memory.values"]
        network, shape = Network(*self.sizes), tuple(values.shape[1:])
        memory = EpisodicMemory(*tensors["memory.keys"].shape, value_shape=shape, value_dtype=values.dtype)
        for part, module in (("network.", network), ("memory.", memory)):
            module.load_state_dict({name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)})
        return network, memory


def _save(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    network: Network,
    memory: EpisodicMemory,
    learned: dict[str, Any],
) -> None:
    """Writes an estimator of the class ``name`` to a folder.

    Raises:
        SettingError: If a setting is nothing that JSON can hold.
        FormatError, OSError: As ``snapshot.write`` does.
    """
    parts = {"network": network, "memory": memory}
    tensors = {f"{part}.{key}": t for part, module in parts.items() for key, t in module.state_dict().items()}
    settings = {key: plain(value) for key, value in settings.items()}
    for key, value in settings.items():
        if not (value is None or isinstance(value, bool | int | float | str | tuple)):
            raise SettingError(f"{key} must be a number or None to be saved, got {value!r}. Use set_params, then save.")
    estimator = {"class": name, "settings": settings, "sizes": network.sizes, "learned": learned}
    # So that ``recollect.load`` says what this is: a model that it cannot build by itself.
    what = f"{name} for scikit-learn (use {name}.load of recollect.integrations.sklearn)"
    model = {"foreign": what, "parts": {}, "tensors": {key: key for key in tensors}}
    snapshot.write(folder, {"model": model, "parameters": {}, "evaluating": [], "estimator": estimator}, tensors)


def _read(folder: Path, name: str) -> _Saved:
    """Returns what a folder holds of an estimator of the class ``name``.

    Raises:
        MissingDataError: If there is no such folder.
        FormatError: If it is not a complete, undamaged save of such an estimator.
    """
    description, tensors = snapshot.read(folder)
    found = description.get("estimator")
    if not (isinstance(found, dict) and found.keys() >= {"class", "settings", "sizes", "learned"}):
        raise FormatError(f"{folder} holds a save of recollect, but no estimator. Use recollect.load.")
    if found["class"] != name:
        raise FormatError(f"{folder} holds a {found['class']}, need a {name}. Use {found['class']}.load.")
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in found["settings"].items()}
    return _Saved(settings, found["sizes"], found["learned"], tensors)
