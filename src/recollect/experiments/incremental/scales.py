"""How much of Section 4.2 is run, and what is tried for each model."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from recollect.experiments.incremental.models import Adapted, FineTuning, Mixed, Setting, Vote
from recollect.experiments.incremental.pretraining import Recipe
from recollect.experiments.incremental.shots import Shots, shots

MODELS: tuple[str, ...] = ("parametric", "non-parametric", "mixture", "mbpa-rmsprop", "mbpa-sgd")


@dataclass(frozen=True)
class Grids:
    """What is tried for each model: as many settings for one as for another."""

    parametric: tuple[FineTuning, ...]
    vote: tuple[Vote, ...]
    mixture: tuple[Mixed, ...]
    rmsprop: tuple[Adapted, ...]
    sgd: tuple[Adapted, ...]

    def of(self, model: str) -> tuple[Setting, ...]:
        """Returns what is tried for one of ``MODELS``."""
        grids: dict[str, tuple[Setting, ...]] = dict(zip(MODELS, vars(self).values(), strict=True))
        return grids[model]


@dataclass(frozen=True)
class Choices:
    """The settings of each model."""

    parametric: FineTuning
    vote: Vote
    mixture: Mixed
    rmsprop: Adapted
    sgd: Adapted

    def items(self) -> Iterable[tuple[str, Setting]]:
        """Returns each model's name, one of ``MODELS``, and its setting."""
        return zip(MODELS, vars(self).values(), strict=True)


def grids(
    rates: dict[str, tuple[float, ...]],
    votes: tuple[tuple[int, ...], tuple[float | None, ...]],
    mixtures: tuple[tuple[int, ...], tuple[float | None, ...], tuple[float, ...]],
    rmsprop: tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...], tuple[float | None, ...]],
    sgd: tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...], tuple[float | None, ...]],
) -> Grids:
    """Returns all combinations of the given numbers: neighbors, rates, steps, bandwidths, weights."""
    return Grids(
        tuple(FineTuning(name, rate) for name, found in rates.items() for rate in found),
        tuple(Vote(*point) for point in itertools.product(*votes)),
        tuple(Mixed(*point) for point in itertools.product(*mixtures)),
        tuple(Adapted("rmsprop", *point) for point in itertools.product(*rmsprop)),
        tuple(Adapted("sgd", *point) for point in itertools.product(*sgd)),
    )


@dataclass(frozen=True)
class Scale:
    """What a scale stands for."""

    recipe: Recipe
    grids: Grids
    shots: Shots
    splits: int = 5
    """The first is for the choice of settings; results are means over the others."""
    marks: tuple[float, ...] = (0.1, 1.0, 3.0)
    """Epochs at which Table 1 reads the curves, and settings are chosen."""
    points: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
    """Epochs of the curves, the marks among them."""
    long_points: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 7.0, 12.0, 20.0)
    """Epochs of Figure 5."""
    sweep: tuple[float, ...] = (0.02, 0.1, 0.35, 1.0, 3.0)
    """Epochs of Figures 6 and 7."""
    every: int = 5
    """One of so many images counts between the marks, in Figures 6 and 7, and where settings are chosen."""
    capacities: tuple[int, ...] = (1000, 3000, 10_000, 30_000, 90_000)
    """Figure 6, left."""
    rates: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0)
    """Figure 6, right: in units of the parametric model's learning rate."""
    neighbors: tuple[int, ...] = (5, 10, 20, 50, 100, 200)
    """Figure 7."""


_NONE: tuple[float | None, ...] = (None,)
_SMOKE = Scale(
    Recipe(widths=(8, 16), blocks=(1, 1), epochs=1, batch=64, examples=20),
    grids(
        {"sgd": (0.03, 0.1)},
        ((5, 20), _NONE),
        ((20,), _NONE, (0.3, 0.7)),
        ((10,), (1e-3, 3e-3), (3,), _NONE),
        ((10,), (0.1, 0.3), (3,), _NONE),
    ),
    shots((1, 5), ((10,), (0.1, 1.0), (3,)), ((1e-2,), (3, 10)), ((1, 5), _NONE)),
    splits=3,
    marks=(0.1, 1.0),
    points=(0.0, 0.1, 1.0),
    long_points=(0.1, 1.0),
    sweep=(0.1, 1.0),
    capacities=(1000, 4000),
    rates=(0.1, 1.0, 10.0),
    neighbors=(5, 20),
)
# Twelve settings for each model, of all that read the memory by the same kernels and as many neighbors; the vote, which
# costs least, may have fewer and more. The paper gives no grid.
_KERNELS: tuple[float | None, ...] = (None, 4.0)
_GRIDS = grids(
    {"sgd": (0.01, 0.02, 0.03, 0.05, 0.1, 0.2), "adam": (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)},
    ((10, 20, 50, 100, 200, 400), _KERNELS),
    ((100, 200), _KERNELS, (0.2, 0.4, 0.6)),
    ((100, 200), (3e-4, 1e-3, 3e-3), (5,), _KERNELS),
    ((100, 200), (0.03, 0.06, 0.12), (20,), _KERNELS),
)
_SHOTS = shots(
    (1, 2, 5, 10, 20),
    ((20, 50), (0.03, 0.1, 0.3), (10, 30)),
    ((3e-4, 1e-3, 3e-3, 1e-2), (3, 10, 30)),
    ((1, 3, 5, 10, 20, 50), (None, 4.0)),
)
_SMALL = Scale(Recipe(), _GRIDS, _SHOTS)
_PAPER = Scale(Recipe(blocks=(2, 2, 2, 2), epochs=60), _GRIDS, _SHOTS)
SCALES = {"smoke": _SMOKE, "small": _SMALL, "paper": _PAPER}
