"""What the permuted-pixels experiments share: the learner, its predictors, and the evaluation that can be resumed.

Paper: Section 4.1. One network is trained on one task after the other and forgets. The embedding is the identity: the
keys are pixels, and the whole network is the head that adapts.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from recollect import (
    EpisodicMemory,
    LocalAdaptation,
    MbPA,
    NonParametric,
    Parametric,
    continual,
    dot_product,
    gaussian,
    rules,
)
from recollect import checkpoint as checkpoints
from recollect.data import Dataset, Task
from recollect.errors import FormatError, SettingError
from recollect.experiments.runner import Progress, Run
from recollect.memory.index import Neighbors, exact_distances
from recollect.models import mlp
from recollect.predictors import Predictor


@dataclass(frozen=True)
class Settings:
    """What determines the results of one seed."""

    tasks: int
    examples: int
    memory: tuple[int, ...]
    final: int
    point: int
    hidden: int
    epochs: int
    batch: int
    learning_rate: float
    neighbors: int
    bandwidth: tuple[float, ...]
    rate: float
    steps: int
    vote_neighbors: int
    vote_bandwidth: tuple[float, ...]
    random_rate: float
    random_steps: int
    ewc: float | None = None  # strengths of the companions; None: without it
    mas: float | None = None
    replay: bool = False
    combined: tuple[int, ...] = ()  # which memories MbPA reads beside the companions' networks
    combined_final: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else (value,)
            required = name != "combined" and value is not None and not isinstance(value, bool)
            if required and (not values or not all(v > 0 for v in values)):
                raise SettingError(f"--{name.replace('_', '-')} must be above 0, got {value}.")
        if list(self.memory) != sorted(set(self.memory)) or self.memory[-1] > self.examples:
            raise SettingError(
                f"--memory must list rising sizes of at most {self.examples} (the examples of a task), "
                f"got {self.memory}."
            )
        if not set(self.combined) <= set(self.memory):
            raise SettingError(f"--combined must be some of the memory sizes {self.memory}, got {self.combined}.")
        for name in ("bandwidth", "vote_bandwidth"):
            if len(getattr(self, name)) not in {1, len(self.memory)}:
                raise SettingError(
                    f"--{name.replace('_', '-')} needs one number, or one for each of the {len(self.memory)} memory "
                    f"sizes, got {getattr(self, name)}."
                )

    def companions(self) -> list[str]:
        """Returns what the networks learn with: nothing, then each companion."""
        replays = [f"replay-{size}" for size in self.memory] if self.replay else []
        return ["alone", *(name for name in ("ewc", "mas") if getattr(self, name) is not None), *replays]

    def curves(self, companion: str) -> list[str]:
        """Returns the names of the curves that one companion's network gives."""
        if companion == "alone":
            pairs = [f"{kind}-{size}" for size in self.memory for kind in ("vote", "mbpa")]
            return ["mlp", *pairs, f"random-{self.memory[-1]}"]
        kind, _, size = companion.partition("-")
        sizes = [kept for kept in self.combined if not size or str(kept) == size]
        return [companion, *(f"mbpa+{kind}-{kept}" for kept in sizes)]

    def images(self, curve: str, number: int) -> int:
        """Returns how many test images of each task count for a curve's point after ``number`` tasks."""
        final = min(self.final, self.combined_final) if "+" in curve else self.final
        return final if number == self.tasks else max(1, min(self.point // number, self.final))


class Learner:
    """The network and the memories of one seed and one companion, with a checkpoint after each task.

    Args:
        settings: The settings.
        seed: Determines the initial weights and the order of the examples.
        inputs: The number of pixels.
        checkpoint: Where all lies between tasks; training goes on from there. None keeps nothing.
        companion: What the network learns with, one of ``settings.companions()``.
    """

    def __init__(
        self, settings: Settings, seed: int, inputs: int, checkpoint: Path | None = None, companion: str = "alone"
    ) -> None:
        self._settings = settings
        self._seed = seed
        self._checkpoint = checkpoint
        self._companion = companion
        self._order = torch.Generator().manual_seed(seed)  # seeded anew for each task
        self.network = mlp(inputs, settings.hidden, settings.hidden, 10, generator=self._order)
        self.memories = {size: EpisodicMemory(size * settings.tasks, inputs) for size in settings.memory}
        self.draws = torch.Generator()  # of the control; seeded anew for each result, so that a resumed run is the same
        self._learner = self._with_companion()
        saved = None if checkpoint is None else checkpoints.read(checkpoint, run=self._run())
        if saved is not None:
            self._learner.load_state_dict(saved["learner"])
            for size, memory in self.memories.items():
                memory.load_state_dict(saved["memories"][size])

    def _with_companion(self) -> continual.Learner:
        s, kind = self._settings, self._companion.partition("-")[0]
        optimizer = torch.optim.Adam(self.network.parameters(), lr=s.learning_rate)
        penalty, replay = None, None
        if kind == "ewc":
            penalty = continual.EWC(self.network, s.ewc or 0.0)
        elif kind == "mas":
            penalty = continual.MAS(self.network, s.mas or 0.0)
        elif kind == "replay":
            replay = continual.Ring(self.memories[int(self._companion.partition("-")[2])], generator=self._order)
        return continual.Learner(
            self.network,
            optimizer,
            penalty=penalty,
            replay=replay,
            keep=0,  # the memories are written to here, so that they hold the same for every companion
            epochs=s.epochs,
            batch=s.batch,
            generator=self._order,
        )

    @property
    def trained(self) -> int:
        """How many tasks the network has learned."""
        return self._learner.learned

    def learn(self, number: int, train: Dataset) -> None:
        """Appends the first examples of task ``number`` to the memories and trains on it, unless that is done."""
        if number <= self.trained:
            return
        for size, memory in self.memories.items():
            memory.write(train.inputs[:size], train.labels[:size])
        self._order.manual_seed(1000 * (self._seed + 1) + number)
        self._learner.learn(train)
        if self._checkpoint is not None:
            memories = {size: memory.state_dict() for size, memory in self.memories.items()}
            state = {"learner": self._learner.state_dict(), "memories": memories}
            checkpoints.write(self._checkpoint, state, run=self._run())

    def _run(self) -> dict[str, object]:
        """Returns what a network must have in common with this run."""
        return {"seed": self._seed, "companion": self._companion, **dataclasses.asdict(self._settings)}

    def predictors(self) -> Iterator[tuple[str, Predictor]]:
        """Yields the curves' names and predictors, sharing the network and the memories."""
        for name in self._settings.curves(self._companion):
            kind, _, size = name.partition("-")
            if kind == "vote":
                yield name, self._vote(int(size))
            elif kind.startswith("mbpa"):
                yield name, self._mbpa(int(size))
            elif kind == "random":
                yield name, self._random(self.memories[int(size)])
            else:
                yield name, Parametric(self.network)

    def _vote(self, size: int) -> NonParametric:
        kernel = gaussian(self._by_size(self._settings.vote_bandwidth, size))
        neighbors = self._settings.vote_neighbors
        return NonParametric(self.memories[size], classes=10, neighbors=neighbors, kernel=kernel)

    def _mbpa(self, size: int) -> MbPA:
        s = self._settings
        adaptation = LocalAdaptation(rules.sgd(s.rate), steps=s.steps)
        kernel = gaussian(self._by_size(s.bandwidth, size))
        return MbPA(self.network, self.memories[size], neighbors=s.neighbors, adaptation=adaptation, kernel=kernel)

    def _by_size(self, widths: tuple[float, ...], size: int) -> float:
        return widths[min(self._settings.memory.index(size), len(widths) - 1)]

    def _random(self, memory: EpisodicMemory) -> MbPA:
        """Returns the paper's control: as many steps on memories drawn at random, all weighted alike."""
        anywhere = EpisodicMemory(memory.capacity, memory.key_size, index=RandomIndex(self.draws))
        anywhere.load_state_dict(memory.state_dict())
        adaptation = LocalAdaptation(rules.sgd(self._settings.random_rate), steps=self._settings.random_steps)
        neighbors = self._settings.neighbors
        return MbPA(self.network, anywhere, neighbors=neighbors, adaptation=adaptation, kernel=dot_product(0.0))


class RandomIndex:
    """Draws entries at random, with replacement, instead of searching."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def rebuild(self, keys: Tensor, written: Tensor) -> None:
        """There is nothing to derive."""

    def update(self, keys: Tensor, written: Tensor, slots: Tensor) -> None:
        """There is nothing to derive."""

    def search(
        self, keys: Tensor, written: Tensor, queries: Tensor, neighbors: int, before: Tensor | None
    ) -> Neighbors:
        """Returns each query's own draw."""
        occupied = (written >= 0).nonzero().squeeze(1)
        drawn = occupied[torch.randint(len(occupied), (len(queries), neighbors), generator=self._generator)]
        return Neighbors(exact_distances(queries, keys, drawn), drawn)


def work(settings: Settings) -> float:
    """Returns the amount of work of one seed, for the display of the time left."""
    return sum(_work(settings, companion) for companion in settings.companions())


def _work(settings: Settings, companion: str) -> float:
    numbers = range(1, settings.tasks + 1)
    names = settings.curves(companion)
    return sum(_cost(name) * n * settings.images(name, n) for name in names for n in numbers)


def _cost(curve: str) -> float:
    """Returns the time of a query, in adapted queries."""
    return {"vote": 0.2, "mbpa": 1.0, "random": 0.9}.get(curve.partition("-")[0].partition("+")[0], 0.0)


def run_seed(run: Run, settings: Settings, seed: int, tasks: Callable[[], Iterator[Task]], progress: Progress) -> None:
    """Trains on the tasks in sequence and records the accuracy of every curve on every task seen so far.

    After the last task all of ``final`` test images count, before that ``point`` images, spread evenly over the tasks
    seen so far: for each task the first of its own fixed random order.

    Args:
        run: Where results are recorded; what it holds is not measured again.
        settings: The settings.
        seed: The seed.
        tasks: Begins the stream anew, for each companion.
        progress: Where work done is counted.
    """
    for companion in settings.companions():
        names = set(settings.curves(companion))
        known = sum(row.get("seed") == seed and row.get("curve") in names for row in run.rows)
        if known == len(names) * settings.tasks * (settings.tasks + 1) // 2:
            progress.skip(_work(settings, companion))  # nothing is missing: the network need not be trained again
        else:
            _run_companion(run, settings, seed, tasks(), progress, companion)


def _run_companion(
    run: Run, settings: Settings, seed: int, tasks: Iterator[Task], progress: Progress, companion: str
) -> None:
    checkpoint = run.folder / "checkpoints" / f"seed-{seed}-{companion}.safetensors"
    learner: Learner | None = None
    seen: list[Dataset] = []
    for number, task in enumerate(tasks, 1):
        if learner is None:
            learner = Learner(settings, seed, task.train.inputs.shape[1], checkpoint, companion)
        if settings.final > len(task.test.labels):
            raise SettingError(f"--final can be at most {len(task.test.labels)}, the test images of a task.")
        # Tasks share their test images, so a part of them must not be the same part for every task.
        order = torch.randperm(len(task.test.labels), generator=torch.Generator().manual_seed(1000 * seed + number))
        seen.append(task.test.take(order))
        learner.learn(number, task.train)
        for name, predictor in learner.predictors():
            for place, test in enumerate(seen, 1):
                part = test.take(slice(settings.images(name, number)))
                key = {"seed": seed, "trained": number, "curve": name, "task": place}
                if run.find(**key) is not None:
                    progress.skip(_cost(name) * len(part.labels))
                    continue
                if learner.trained > number:
                    raise FormatError(
                        f"{run.folder}/results.jsonl lacks results of task {number}, but the network has learned "
                        f"{learner.trained} tasks. Delete {checkpoint} to train anew."
                    )
                learner.draws.manual_seed(1_000_000 * seed + 1000 * number + place)
                correct = int((predictor(part.inputs).argmax(-1) == part.labels).sum())
                run.add(**key, correct=correct, total=len(part.labels))
                what = f"seed {seed}: task {number} of {settings.tasks}, {name}"
                progress.advance(_cost(name) * len(part.labels), what)
    checkpoint.unlink(missing_ok=True)
