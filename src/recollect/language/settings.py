"""Settings of the neural cache and of MbPA on a softmax layer: single ones, and grids of them."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from recollect.errors import SettingError, require_number
from recollect.kernels import inverse_distance

KERNEL = inverse_distance(epsilon=1e-3)
"""What weighs MbPA's neighbors; other kernels are scored by ``evaluate``, with ``MbPA(..., kernel=...)``."""


class CacheSetting(NamedTuple):
    """One setting of the neural cache."""

    size: int
    """How many words it remembers."""
    flatness: float
    """Theta, the inverse temperature."""


class MbPASetting(NamedTuple):
    """One setting of MbPA."""

    size: int
    """How many words the memory remembers, N."""
    neighbors: int
    """K."""
    rate: float
    """Alpha."""
    steps: int = 1
    """T."""


@dataclass(frozen=True)
class CacheGrid:
    """Settings of the neural cache, each combined with each.

    Raises:
        SettingError: If there are none, a size is no positive whole number, or a flatness negative.

    Example:
        >>> CacheGrid(sizes=(100, 1000), flatness=(0.3,)).points()
        [CacheSetting(size=100, flatness=0.3), CacheSetting(size=1000, flatness=0.3)]
    """

    sizes: tuple[int, ...]
    """How many words it remembers."""
    flatness: tuple[float, ...]
    """Theta, the inverse temperature; with 0 all entries count alike."""

    def __post_init__(self) -> None:
        _require_counts("sizes", self.sizes)
        _require_numbers("flatness", self.flatness)

    def points(self) -> list[CacheSetting]:
        """Returns all settings, in the order of ``Scores.cache``."""
        return [CacheSetting(*point) for point in itertools.product(self.sizes, self.flatness)]


@dataclass(frozen=True)
class MbPAGrid:
    """Settings of MbPA by gradient descent on the softmax layer, each combined with each.

    Raises:
        SettingError: If there are none, one that must be a positive whole number is not, neighbors or steps do not
            ascend, or a rate is negative.

    Example:
        >>> MbPAGrid(sizes=(500,), neighbors=(64, 256), rates=(0.15, 0.5), steps=(1, 5)).points()[-1]
        MbPASetting(size=500, neighbors=256, rate=0.5, steps=5)
    """

    sizes: tuple[int, ...]
    """How many words the memory remembers, N."""
    neighbors: tuple[int, ...]
    """K, ascending."""
    rates: tuple[float, ...]
    """Alpha."""
    steps: tuple[int, ...] = (1,)
    """T, ascending. More than one step costs, for each word, neighbors x words of the vocabulary numbers each."""

    def __post_init__(self) -> None:
        _require_counts("sizes", self.sizes)
        for name, values in (("neighbors", self.neighbors), ("steps", self.steps)):
            _require_counts(name, values)
            if tuple(sorted(set(values))) != values:
                raise SettingError(f"{name} must ascend, got {values}.")
        _require_numbers("rates", self.rates)

    def points(self) -> list[MbPASetting]:
        """Returns all settings, in the order of ``Scores.mbpa``."""
        all_of_them = itertools.product(self.sizes, self.neighbors, self.rates, self.steps)
        return [MbPASetting(*point) for point in all_of_them]


def _require_counts(name: str, values: tuple[int, ...]) -> None:
    given = values if isinstance(values, tuple) else ()
    if not given or not all(type(value) is int and value > 0 for value in given):
        raise SettingError(f"{name} must be a tuple of one or more whole numbers above 0, got {values!r}.")


def _require_numbers(name: str, values: tuple[float, ...]) -> None:
    if not (isinstance(values, tuple) and values):
        raise SettingError(f"{name} must be a tuple of one or more numbers, got {values!r}.")
    for value in values:
        require_number(f"each of {name}", value, low=0.0)
