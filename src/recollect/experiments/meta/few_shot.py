"""Which memory should I use? Omniglot, a few drawings of each of five new characters, learned in nine ways.

One embedding is trained once, by naming all characters of the training split. The nearest neighbor, the vote,
prototypes, MbPA, a context hypernetwork and fine-tuning stand on it as it is; MANN reads its features; MAML and the
Meta-LSTM train it further, as their start. All answer the same queries; what it costs stands beside how often they are
right.
"""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from recollect.adaptation import rules
from recollect.data import Episodes, episodes, sequences
from recollect.experiments.meta import few_shot_learners as learners
from recollect.experiments.meta import few_shot_report
from recollect.experiments.meta.drawings import TEST, TRAIN, VALID, Drawings, drawings
from recollect.experiments.meta.few_shot_learners import Choice, Learner
from recollect.experiments.meta.intervals import half_width
from recollect.experiments.meta.training import Part, train
from recollect.experiments.runner import Run, begin
from recollect.meta import MAML, MANN, ContextHypernetwork, Labels, LRUAccess, MetaLSTM, offset

_SIDE, _WAYS, _SHOTS, _SIZE = 28, 5, (1, 5), 128  # pixels, classes of a task, drawings of each, features
_TRAINING = ("inner", "steps", "rate", "rule_rate", "seed")  # settings that a training depends on
META_LSTM = ("nearest", "fine-tuning", "meta-lstm")
ALL = ("nearest", "vote", "prototypes", "mbpa", "hypernetwork", "mann", "fine-tuning", "maml", "meta-lstm")
TOGETHER = ("fine-tuning", "maml", "meta-lstm")  # normalize by the statistics of all queries that are asked at once


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    embedding: int
    """Batches of 128 drawings that the embedding is trained on."""
    mann: int
    """Batches of 16 episodes that MANN is trained on."""
    maml: int
    """Iterations of MAML: by turns 32 tasks of one drawing and 8 of five."""
    meta_lstm: int
    """Iterations of the Meta-LSTM of all layers: by turns 4 tasks of one drawing and of five."""
    meta_lstm_last: int
    """Iterations of the one of the last layer: by turns 32 tasks of one drawing and 8 of five."""
    hypernetwork: int
    """Iterations of the context hypernetwork: by turns 32 tasks of one drawing and 8 of five."""
    valid: int = 200
    """Validation tasks: settings are chosen on them."""
    test: int = 1000
    """Test tasks."""
    alone: int = 200
    """Test tasks whose queries are asked one at a time, too, where that makes a difference."""
    timed: int = 50
    """Tasks that are timed, one by one: with one query, and with all."""
    queries: int = 3
    """Of each class of a task."""
    every: int = 500
    """Iterations between two looks at validation tasks."""
    inner: float = 0.4
    """Rate of MAML's step. (Finn et al., 2017.)"""
    steps: int = 5
    """Of the Meta-LSTM. (Ravi and Larochelle, 2017, for 5 drawings; 12 for one.)"""
    rate: float = 1e-3
    """Of Adam, for all trainings; it falls to zero along a cosine."""
    rule_rate: float = 1e-2
    """The same, for the parameters of the Meta-LSTM's gates."""
    seed: int = 0


SCALES = {
    "smoke": Scale(3, 2, 2, 2, 2, 2, valid=3, test=5, alone=2, timed=2, every=2),
    "small": Scale(6_000, 8_000, 6_000, 1_500, 6_000, 3_000),
    "paper": Scale(60_000, 100_000, 60_000, 75_000, 60_000, 30_000),
}


@dataclass(frozen=True)
class FewShot:
    """Omniglot, 5 ways, 1 and 5 shots: MbPA, vote, prototypes, MANN, fine-tuning, MAML and Meta-LSTM by their cost."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (an hour on one core) or ``paper`` (a day)."""
    out: Path = Path("runs/few-shot")
    """The folder for results; a run that was stopped goes on there. ``meta-lstm`` may have the same."""


@dataclass(frozen=True)
class MetaLstm:
    """The Meta-LSTM beside fine-tuning and the nearest neighbor: a part of ``few-shot``."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (half an hour on one core) or ``paper`` (half a day)."""
    out: Path = Path("runs/meta-lstm")
    """The folder for results; a run that was stopped goes on there. ``few-shot`` may have the same."""


def run(config: FewShot | MetaLstm) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingDataError, MissingExtraError, FormatError: See ``recollect.data.omniglot``.
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    record, scale = begin(config, SCALES)
    study = _Study(record, scale)
    pairs = list(itertools.product(META_LSTM if isinstance(config, MetaLstm) else ALL, _SHOTS))
    rows = {(name, shots): record.find(part="test", learner=name, shots=shots) for name, shots in pairs}
    tested = {pair: study.test(*pair) if row is None else row for pair, row in rows.items()}
    for (name, shots), row in tested.items():
        if record.find(part="cost", learner=name, shots=shots) is None:
            study.cost(name, shots, row["settings"])
    return few_shot_report.report(record, "meta-lstm" if isinstance(config, MetaLstm) else "few-shot")


class _Study:
    def __init__(self, record: Run, scale: Scale) -> None:
        self._record = record
        self._scale = scale

    @cached_property
    def _data(self) -> Drawings:
        return drawings(_SIDE, seed=self._scale.seed)

    def test(self, name: str, shots: int) -> dict[str, Any]:
        """Trains what a learner needs, chooses its settings, adds the row of its test, and returns it."""
        choices = self._choices(name, shots)
        best, valid = choices[0], None
        if len(choices) > 1:
            accuracy = [
                float(self._right(choice.learner, VALID, shots, self._scale.valid).mean()) for choice in choices
            ]
            best, valid = choices[accuracy.index(max(accuracy))], round(max(accuracy), 2)
        right = self._right(best.learner, TEST, shots, self._scale.test)
        row = {"learner": name, "shots": shots, "settings": best.settings, "valid": valid}
        row |= {"accuracy": round(float(right.mean()), 2), "interval": round(float(half_width(right)), 2)}
        if name in TOGETHER:
            right = self._right(learners.alone(best.learner), TEST, shots, self._scale.alone)
        row |= {"alone": round(float(right.mean()), 2), "alone_interval": round(float(half_width(right)), 2)}
        self._record.add(part="test", **row)
        return row

    def cost(self, name: str, shots: int, settings: dict[str, Any]) -> None:
        """Adds the median time to learn a task and to answer one query, or all; in milliseconds for each query."""
        choice = next(choice for choice in self._choices(name, shots) if choice.settings == settings)
        some = self._draw(TEST, self._scale.timed, shots, generator=torch.Generator().manual_seed(0))
        found = list[float]()
        for count in (1, some.queries.shape[1]):
            times = list[float]()
            for task in range(-1, self._scale.timed):  # the first is a warm-up
                one = Episodes(*(part[[task]] for part in some))
                one = one._replace(queries=one.queries[:, :count], query_labels=one.query_labels[:, :count])
                start = time.perf_counter()
                choice.learner(one)
                times.append(1000 * (time.perf_counter() - start) / count)
            found.append(round(median(times[1:]), 3))
        self._record.add(part="cost", learner=name, shots=shots, milliseconds=found[0], together=found[1])

    def _choices(self, name: str, shots: int) -> list[Choice]:
        """Returns a learner under each of its settings, trained if need be."""
        steps = self._scale.steps
        makers: dict[str, Callable[[], list[Choice]]] = {
            "nearest": lambda: [Choice({}, learners.nearest(self._features))],
            "vote": lambda: learners.vote(self._features, shots, _WAYS),
            "prototypes": lambda: [Choice({}, learners.prototypes(self._features))],
            "mbpa": lambda: learners.mbpa(self._features, shots, _WAYS),
            "hypernetwork": lambda: [Choice({}, learners.generated(self._features, self._hypernetwork, _WAYS))],
            "mann": lambda: [Choice({}, learners.read_on(self._features, self._mann, _WAYS))],
            "fine-tuning": lambda: learners.fine_tuning(self._features, _SIZE, _WAYS),
            "maml": lambda: [Choice({"steps": n}, learners.after(self._maml, n)) for n in (1, 3, 5, 10)],
            "meta-lstm": lambda: [
                Choice({"layers": layers, "steps": steps}, learners.after(maml, steps))
                for layers, maml in self._meta_lstms.items()
            ],
        }
        return makers[name]()

    def _right(self, learner: Learner, split: int, shots: int, tasks: int) -> Float[Tensor, " t"]:
        """Returns the accuracy of each task of a split, in percent; the tasks are the same for all learners."""
        g = torch.Generator().manual_seed(100 * split + shots)
        found = list[Tensor]()
        for start in range(0, tasks, 50):
            some = self._draw(split, min(50, tasks - start), shots, generator=g)
            found.append((learner(some) == some.query_labels).float().mean(1))
        return 100 * torch.cat(found)

    def _draw(self, split: int, tasks: int, shots: int, *, generator: torch.Generator) -> Episodes:
        return episodes(
            self._data.pixels[:, :, None],
            self._data.splits[split],
            tasks=tasks,
            ways=_WAYS,
            shots=shots,
            queries=shots if split == TRAIN else self._scale.queries,
            turned=split == TRAIN,
            generator=generator,
        )

    @cached_property
    def _turned(self) -> Tensor:
        """All training characters, and each of them turned by a quarter, a half and three quarters."""
        pixels = self._data.pixels[self._data.splits[TRAIN]]
        return torch.cat([pixels.rot90(turn, (2, 3)) for turn in range(4)])[:, :, None]

    @cached_property
    def _features(self) -> nn.Module:
        """The embedding: all but the last layer of a network that names every training character, turns told apart."""
        images, g = self._turned, self._generator()
        net = learners.network(_SIDE, len(images), generator=g)

        def loss(_: int) -> Tensor:
            labels = torch.randint(len(images), (128,), generator=g)
            places = torch.randint(images.shape[1], (128,), generator=g)
            return cross_entropy(net(images[labels, places] / 255), labels)

        self._train("embedding", net, self._scale.embedding, loss, generator=g)
        return net[:-1].eval()

    @cached_property
    def _known(self) -> Float[Tensor, "c n d"]:
        """The keys of all that is in ``_turned``."""
        return torch.stack([learners.keys(self._features, drawn / 255) for drawn in self._turned])

    @cached_property
    def _hypernetwork(self) -> ContextHypernetwork:
        known, g = self._known, self._generator()
        hypernetwork = ContextHypernetwork(_SIZE, rate=10.0, generator=g)
        head = learners.blank(_SIZE, _WAYS).requires_grad_(False)

        def outputs(keys: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
            context = learners.remembered(keys, labels).read(asked, len(keys))
            return hypernetwork.adapted(head, asked, context)

        def loss(number: int) -> Tensor:
            turn = (number + 1) % 2
            some = episodes(
                known,
                torch.arange(len(known)),
                tasks=(32, 8)[turn],
                ways=_WAYS,
                shots=_SHOTS[turn],
                queries=_SHOTS[turn],
                generator=g,
            )
            tasks = zip(some.support, some.support_labels, some.queries, strict=True)
            return cross_entropy(torch.cat([outputs(*task) for task in tasks]), some.query_labels.flatten())

        learner = learners.generated(self._features, hypernetwork, _WAYS)
        self._train("hypernetwork", hypernetwork, self._scale.hypernetwork, loss, generator=g, learner=learner)
        return hypernetwork

    @cached_property
    def _mann(self) -> MANN:
        features, labels, g = self._features, Labels(_WAYS), self._generator()
        known = _SIZE**0.5 * self._known  # as ``entries`` has them
        size = _SIZE + labels.size
        mann = MANN(size, labels.size, access=LRUAccess(200, separate=True, generator=g), generator=g)

        def loss(_: int) -> Tensor:
            some = sequences(known, torch.arange(len(known)), tasks=16, ways=_WAYS, instances=6, generator=g)
            logits, _ = mann(offset(some.inputs, labels.encode(some.labels)))
            return -labels.log_prob(logits, some.labels).mean()

        learner = learners.read_on(features, mann, _WAYS)
        self._train("mann", mann, self._scale.mann, loss, generator=g, learner=learner)
        return mann

    @cached_property
    def _maml(self) -> MAML:
        g = self._generator()
        maml = MAML(self._start(), rule=rules.sgd(self._scale.inner))
        self._meta_train("maml", maml, self._scale.maml, (32, 8), generator=g)
        return maml

    @cached_property
    def _meta_lstms(self) -> dict[str, MAML]:
        """A rule for all layers, and one for the last alone; the start of the other layers is learned there too."""
        found, scale = dict[str, MAML](), self._scale
        for layers, name, iterations, tasks, parameters in (
            ("all", "meta-lstm", scale.meta_lstm, (4, 4), None),
            ("last", "meta-lstm-last", scale.meta_lstm_last, (32, 8), ("1",)),
        ):
            g = self._generator()
            rule = MetaLSTM(generator=g)
            maml = MAML(self._start(), rule=rule, steps=scale.steps, first_order=True, parameters=parameters)
            self._meta_train(name, maml, iterations, tasks, generator=g)
            found[layers] = maml
        return found

    def _start(self) -> nn.Module:
        """Returns where the learned starts begin, which is where fine-tuning starts."""
        return nn.Sequential(copy.deepcopy(self._features), learners.blank(_SIZE, _WAYS))

    def _meta_train(
        self, name: str, maml: MAML, iterations: int, tasks: tuple[int, int], *, generator: torch.Generator
    ) -> None:
        """Trains a start, and a learned rule with it, by turns on tasks of one drawing and of five."""

        def loss(number: int) -> Tensor:
            turn = (number + 1) % 2
            some = self._draw(TRAIN, tasks[turn], _SHOTS[turn], generator=generator)
            outputs = maml(some.support, some.support_labels, some.queries)
            return cross_entropy(outputs.flatten(0, 1), some.query_labels.flatten())

        learner = learners.after(maml, maml.steps)
        self._train(name, maml, iterations, loss, generator=generator, learner=learner)

    def _train(
        self,
        name: str,
        net: nn.Module,
        iterations: int,
        loss: Callable[[int], Tensor],
        *,
        generator: torch.Generator,
        learner: Learner | None = None,
    ) -> None:
        """Trains a network, with rows of what a learner makes of it on validation tasks of one drawing and of five."""
        scale = self._scale
        rule = [p for part, p in net.named_parameters() if part.startswith("rule.")]
        rest = [p for part, p in net.named_parameters() if not part.startswith("rule.")]
        groups = [{"params": rest}, *([{"params": rule, "lr": scale.rule_rate}] if rule else [])]
        optimizer = torch.optim.Adam(groups, lr=scale.rate)
        schedule = CosineAnnealingLR(optimizer, iterations)

        def step(number: int) -> float:
            value = loss(number)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            key = {"part": "learning", "learner": name, "iterations": number}
            if learner is not None and number % scale.every == 0 and self._record.find(**key) is None:
                right = [float(self._right(learner, VALID, shots, scale.valid).mean()) for shots in _SHOTS]
                self._record.add(**key, loss=round(value.item(), 5), accuracy=[round(number, 2) for number in right])
            return value.item()

        parts: dict[str, Part] = {"net": net, "optimizer": optimizer, "schedule": schedule}
        run_of = {"learner": name, "iterations": iterations, **{k: getattr(scale, k) for k in _TRAINING}}
        train(self._record.folder, name, parts, run=run_of, generator=generator, steps=iterations, step=step)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._scale.seed)
