"""What the permuted-pixels experiments share: the learner, its predictors, and the evaluation that can be resumed.

Paper: Section 4.1. One network is trained on one task after the other and forgets. The embedding is the identity: the
keys are pixels, and the whole network is the head that adapts.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, NonParametric, Parametric, dot_product, gaussian, rules
from recollect.data import Dataset, Task
from recollect.errors import FormatError, SettingError
from recollect.experiments import plots
from recollect.experiments.runner import Progress, Run
from recollect.memory.index import Neighbors, exact_distances
from recollect.models import mlp
from recollect.predictors import Predictor

_COST = {"mlp": 0.0, "vote": 0.2, "mbpa": 1.0, "random": 0.9}  # time of a query, in adapted queries


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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else (value,)
            if not values or not all(v > 0 for v in values):
                raise SettingError(f"--{name.replace('_', '-')} must be above 0, got {value}.")
        if list(self.memory) != sorted(set(self.memory)) or self.memory[-1] > self.examples:
            raise SettingError(
                f"--memory must list rising sizes of at most {self.examples} (the examples of a task), "
                f"got {self.memory}."
            )
        for name in ("bandwidth", "vote_bandwidth"):
            if len(getattr(self, name)) not in {1, len(self.memory)}:
                raise SettingError(
                    f"--{name.replace('_', '-')} needs one number, or one for each of the {len(self.memory)} memory "
                    f"sizes, got {getattr(self, name)}."
                )


class Learner:
    """The network, its optimizer and the memories of one seed, with a checkpoint after each task.

    Args:
        settings: The settings.
        seed: Determines the initial weights and the order of the examples.
        inputs: The number of pixels.
        checkpoint: Where the network lies between tasks; training goes on from there. None keeps nothing.
    """

    def __init__(self, settings: Settings, seed: int, inputs: int, checkpoint: Path | None = None) -> None:
        self._settings = settings
        self._seed = seed
        self._checkpoint = checkpoint
        generator = torch.Generator().manual_seed(seed)
        self.network = mlp(inputs, settings.hidden, settings.hidden, 10, generator=generator)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        self.memories = {size: EpisodicMemory(size * settings.tasks, inputs) for size in settings.memory}
        self.draws = torch.Generator()  # of the control; seeded anew for each result, so that a resumed run is the same
        self.trained = 0
        if checkpoint is not None and checkpoint.exists():
            self._restore(checkpoint)

    def learn(self, number: int, train: Dataset) -> None:
        """Trains on task ``number`` (unless the checkpoint has) and appends its first examples to the memories."""
        for size, memory in self.memories.items():
            memory.write(train.inputs[:size], train.labels[:size])
        if number <= self.trained:
            return
        order = torch.Generator().manual_seed(1000 * (self._seed + 1) + number)
        for _ in range(self._settings.epochs):
            for batch in train.batches(self._settings.batch, generator=order):
                self._optimizer.zero_grad()
                nn.functional.cross_entropy(self.network(batch.inputs), batch.labels).backward()
                self._optimizer.step()
        self.trained = number
        if self._checkpoint is not None:
            self._save(self._checkpoint)

    def _save(self, path: Path) -> None:
        tensors = {f"network.{name}": p.detach() for name, p in self.network.named_parameters()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            tensors.update({f"adam.{index}.{name}": value for name, value in moments.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(save({**tensors, "trained": torch.tensor(self.trained)}, {"run": self._run()}))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _run(self) -> str:
        """Returns what a network must have in common with this run, as text."""
        return json.dumps({"seed": self._seed, **dataclasses.asdict(self._settings)}, sort_keys=True)

    def _restore(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                run = (file.metadata() or {}).get("run")
            tensors = load_file(path)
            self.network.load_state_dict({n: tensors[f"network.{n}"] for n, _ in self.network.named_parameters()})
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                kind, *place = name.split(".")
                if kind == "adam":
                    state.setdefault(int(place[0]), {})[place[1]] = value
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.trained = int(tensors["trained"])
        except Exception as error:
            raise FormatError(f"{path} is no checkpoint ({error}). Delete it to train anew.") from error
        if run != self._run():
            raise FormatError(
                f"{path} is a network of other settings. Delete it to train anew, or choose another --out."
            )

    def predictors(self) -> Iterator[tuple[str, Predictor]]:
        """Yields the curves' names and predictors, sharing the network and the memories."""
        s = self._settings
        yield "mlp", Parametric(self.network)
        for place, (size, memory) in enumerate(self.memories.items()):
            vote = gaussian(s.vote_bandwidth[min(place, len(s.vote_bandwidth) - 1)])
            yield f"vote-{size}", NonParametric(memory, classes=10, neighbors=s.vote_neighbors, kernel=vote)
            adaptation = LocalAdaptation(rules.sgd(s.rate), steps=s.steps)
            kernel = gaussian(s.bandwidth[min(place, len(s.bandwidth) - 1)])
            yield (
                f"mbpa-{size}",
                MbPA(self.network, memory, neighbors=s.neighbors, adaptation=adaptation, kernel=kernel),
            )
        size, memory = list(self.memories.items())[-1]
        yield f"random-{size}", self._random(memory)

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
    queries = settings.tasks * settings.final + (settings.tasks - 1) * settings.point
    return queries * (len(settings.memory) * (_COST["mbpa"] + _COST["vote"]) + _COST["random"])


def run_seed(run: Run, settings: Settings, seed: int, tasks: Iterator[Task], progress: Progress) -> None:
    """Trains on the tasks in sequence and records the accuracy of every curve on every task seen so far.

    After the last task all of ``final`` test images count, before that ``point`` images, spread evenly over the tasks
    seen so far: for each task the first of its own fixed random order.
    """
    curves = 2 * len(settings.memory) + 2
    if sum(row.get("seed") == seed for row in run.rows) == curves * settings.tasks * (settings.tasks + 1) // 2:
        progress.skip(work(settings))  # nothing is missing: the networks need not be trained again
        return
    checkpoint = run.folder / "checkpoints" / f"seed-{seed}.safetensors"
    learner: Learner | None = None
    seen: list[Dataset] = []
    for number, task in enumerate(tasks, 1):
        if learner is None:
            learner = Learner(settings, seed, task.train.inputs.shape[1], checkpoint)
        if settings.final > len(task.test.labels):
            raise SettingError(f"--final can be at most {len(task.test.labels)}, the test images of a task.")
        # Tasks share their test images, so a part of them must not be the same part for every task.
        order = torch.randperm(len(task.test.labels), generator=torch.Generator().manual_seed(1000 * seed + number))
        seen.append(task.test.take(order))
        learner.learn(number, task.train)
        last = number == settings.tasks
        count = settings.final if last else max(1, min(settings.point // number, settings.final))
        for name, predictor in learner.predictors():
            cost = _COST[name.partition("-")[0]]
            for place, test in enumerate(seen, 1):
                part = test.take(slice(count))
                key = {"seed": seed, "trained": number, "curve": name, "task": place}
                if run.find(**key) is not None:
                    progress.skip(cost * len(part.labels))
                    continue
                if learner.trained > number:
                    raise FormatError(
                        f"{run.folder}/results.jsonl lacks results of task {number}, but the network has learned "
                        f"{learner.trained} tasks. Delete {checkpoint} to train anew."
                    )
                learner.draws.manual_seed(1_000_000 * seed + 1000 * number + place)
                correct = int((predictor(part.inputs).argmax(-1) == part.labels).sum())
                run.add(**key, correct=correct, total=len(part.labels))
                progress.advance(cost * len(part.labels), f"seed {seed}: task {number} of {settings.tasks}, {name}")
    checkpoint.unlink(missing_ok=True)


def curves(rows: list[dict], seeds: list[int]) -> dict[str, list[list[float]]]:
    """Returns, for each curve, each seed's mean accuracy in percent over the tasks seen so far, after each task."""
    cells: dict[tuple[str, int, int], list[float]] = {}
    fields = {"curve", "seed", "trained", "task", "correct", "total"}
    for row in rows:
        if not fields <= row.keys():
            raise FormatError(
                f"results.jsonl holds a row that is no result of this experiment: {row}. Choose another --out."
            )
        cells.setdefault((row["curve"], row["seed"], row["trained"]), []).append(row["correct"] / row["total"])
    names = list(dict.fromkeys(row["curve"] for row in rows))
    trained = sorted({row["trained"] for row in rows})
    return {
        name: [[100 * sum(c) / len(c) for n in trained if (c := cells.get((name, seed, n)))] for seed in seeds]
        for name in names
    }


def report(record: Run, seeds: list[int], settings: Settings, title: str, paper: dict[str, float]) -> str:
    """Writes the table and the figure of the rows that a run holds, and returns the table.

    Args:
        record: The run.
        seeds: The seeds to average over.
        settings: Their settings.
        title: Of the figure.
        paper: The paper's numbers for some of the curves; their column is left out where there are none.
    """
    results = {name: _summary(runs) for name, runs in curves(record.rows, seeds).items()}
    lines = [
        f"Accuracy in percent over all {settings.tasks} tasks after the last one: {len(seeds)} "
        f"seed{'s (+-: standard error)' if len(seeds) > 1 else ''}, {settings.final:,} test images for each task.",
        "",
        "| model | paper | ours | difference |" if paper else "| model | accuracy |",
        "|---|---|---|---|" if paper else "|---|---|",
    ]
    for name, (means, errors) in results.items():
        ours = f"{means[-1]:.2f} +- {errors[-1]:.2f}" if len(seeds) > 1 else f"{means[-1]:.2f}"
        known = paper.get(name)
        there = f"{known} | {ours} | {means[-1] - known:+.1f}" if known is not None else f" | {ours} | "
        lines.append(f"| {label(name)} | {there if paper else ours} |")
    table = "\n".join(lines) + "\n"
    record.write_table(table)
    drawn = [
        plots.Curve(label(name), range(1, len(means) + 1), means, errors, *_style(name))
        for name, (means, errors) in results.items()
    ]
    plots.curves(drawn, record.folder / "figure.png", title=title, xlabel="tasks", ylabel="accuracy (%)")
    return table


def _summary(runs: list[list[float]]) -> tuple[list[float], list[float]]:
    """Returns the mean over seeds and its standard error, point by point."""
    points = list(zip(*runs, strict=True))
    means = [statistics.fmean(p) for p in points]
    errors = [statistics.stdev(p) / len(p) ** 0.5 if len(p) > 1 else 0.0 for p in points]
    return means, errors


def label(name: str) -> str:
    """Returns how a curve is called in tables and figures."""
    kind, _, size = name.partition("-")
    names = {
        "mlp": "network alone",
        "vote": f"k-NN vote, {size} per task",
        "mbpa": f"MbPA, {size} per task",
        "random": f"random memories, {size} per task",
    }
    return names[kind]


def _style(name: str) -> tuple[str, str]:
    kind, _, size = name.partition("-")
    colors = {"mlp": plots.GRAY, "random": plots.RED}
    by_size = {"100": plots.ORANGE, "250": plots.GREEN, "1000": plots.BLUE}
    styles = {"mlp": "-", "vote": ":", "mbpa": "-", "random": "--"}
    return colors.get(kind) or by_size.get(size, plots.PURPLE), styles[kind]
