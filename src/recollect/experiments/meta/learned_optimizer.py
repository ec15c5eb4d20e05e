"""Learned optimizers beside those made by hand, on problems that no training has seen.

The LSTM optimizer of Andrychowicz et al. (2016), Section 3.1, on random quadratic functions, and the policy of Li and
Malik (2017), Section 4, on logistic regressions, robust regressions and small networks. The policy is trained in three
ways that take about the same time: by gradients through its steps, by an evolution strategy, which needs no derivative
of them, and by guided policy search, the paper's. A fourth policy has the inputs that the paper prints, which lack the
current gradient. All begin with the imitation of momentum. Settings of what is made by hand, and the moment at which a
learned rule is taken, are chosen on validation problems.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from recollect.adaptation.rules import Params, Rule
from recollect.errors import NonFiniteError
from recollect.experiments.meta import learned_optimizer_report
from recollect.experiments.meta.hand_made import LINE_SEARCHES, HandMade, line_search, trajectories, tuned
from recollect.experiments.meta.intervals import half_width
from recollect.experiments.meta.training import train
from recollect.experiments.runner import Run, begin
from recollect.meta import (
    Backpropagation,
    EvolutionStrategy,
    GuidedPolicySearch,
    LSTMOptimizer,
    Policy,
    Problem,
    logistic_regression,
    margin_of_victory,
    quadratics,
    relu_network,
    robust_regression,
)
from recollect.meta.coordinates import flatten

LSTM, POLICY, EVOLVED = "LSTM optimizer", "policy, by gradients", "policy, by evolution"
GUIDED, PRINTED = "policy, by guided policy search", "policy, inputs as printed"
_VALID, _TEST = 1, 2  # seeds


@dataclass(frozen=True)
class Family:
    """A kind of problems."""

    draw: Callable[..., Problem]
    objectives: int | None = None
    """For training, as many as in Li and Malik (2017); new ones at each iteration when None."""
    learned: tuple[str, ...] = (POLICY, EVOLVED, GUIDED, PRINTED)
    searches: tuple[str, ...] = tuple(LINE_SEARCHES)


FAMILIES = {
    "quadratic functions": Family(quadratics, learned=(LSTM,), searches=()),
    "logistic regression": Family(logistic_regression, 90),
    "robust regression": Family(robust_regression, 120),
    "ReLU network": Family(relu_network, 80),
}


@dataclass(frozen=True)
class Course:
    """How long a rule is trained, and how it is judged."""

    iterations: int
    """(Ours.)"""
    steps: int
    """Of a rule on a problem."""
    rate: float
    """Of Adam, at first; it falls to zero along a cosine. (Ours.)"""
    every: int
    """Iterations between two looks at validation problems. (Ours.)"""
    test: int
    """Test problems."""


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    lstm: Course
    policy: Course
    batch: int = 48
    """Quadratic functions in an iteration. (Ours; 128 in the authors' code.)"""
    truncation: int = 20
    """Steps between two changes of the LSTM optimizer, as in the authors' code."""
    pairs: int = 4
    """Of policies that the evolution strategy tries for one change; each takes the time of an iteration by gradients,
    so there are as many times fewer. (Ours.)"""
    deviation: float = 0.01
    """Of what it tries. (Ours.)"""
    guided: int = 12
    """Iterations by gradients that take as much time as one of guided policy search (8 to 16, by family): so there are
    as many times fewer. (Ours.)"""
    samples: int = 20
    """Trajectories of each problem that guided policy search draws in an iteration, as in the paper."""
    imitation: int = 300
    """Iterations in which a policy first learns to follow momentum, which makes the first trajectories of the paper's
    guided policy search. Without, that of the ReLU network goes where all units are dead. (Ours.)"""
    imitation_rate: float = 3e-3
    """Of Adam. (Ours.)"""
    spacing: float = 2**0.25
    """The ratio of two neighboring rates in the grids of what is made by hand. (Ours.)"""
    valid: int = 200
    """Validation problems. (Ours.)"""
    seed: int = 0


SCALES = {
    "smoke": Scale(
        Course(6, 20, 1e-2, 3, 20), Course(8, 10, 1e-3, 4, 6), imitation=2, samples=2, spacing=8.0, valid=20
    ),
    "small": Scale(Course(1500, 100, 1e-2, 20, 1000), Course(1500, 40, 1e-3, 10, 100)),
    "paper": Scale(Course(10_000, 100, 1e-3, 100, 1000), Course(5000, 40, 1e-3, 10, 100), batch=128, valid=1000),
}


@dataclass(frozen=True)
class LearnedOptimizer:
    """Learned optimizers against SGD, momentum, RMSprop, Adam, conjugate gradient and L-BFGS."""

    scale: Literal["smoke", "small", "paper"] = "smoke"
    """``smoke`` (seconds), ``small`` (twenty minutes of one core) or ``paper`` (two hours)."""
    out: Path = Path("runs/learned-optimizer")
    """The folder for results; a run that was stopped goes on there."""


class Best(nn.Module):
    """The state of a rule that did best on validation problems so far.

    Args:
        rule: The rule before its training.
    """

    def __init__(self, rule: LSTMOptimizer | Policy) -> None:
        super().__init__()
        self.rule = copy.deepcopy(rule)
        self.loss = nn.Buffer(torch.tensor(math.inf, dtype=torch.float64))

    def offer(self, rule: LSTMOptimizer | Policy, loss: float) -> None:
        """Takes over a rule that did better."""
        if loss < self.loss:
            self.rule.load_state_dict(rule.state_dict())
            self.loss.fill_(loss)


class Follower:
    """A rule that takes the steps of a teacher, and notes how far from them those of a policy are.

    Args:
        policy: Sees what the teacher sees.
        teacher: Any rule.
    """

    def __init__(self, policy: Rule, teacher: Rule) -> None:
        self._policy = policy
        self._teacher = teacher
        self.errors: list[Float[Tensor, " b"]] = []

    def init(self, params: Params) -> tuple[Any, Any]:
        return self._teacher.init(params), self._policy.init(params)

    def update(
        self, grads: Params, state: tuple[Any, Any], params: Params, loss: Float[Tensor, " b"]
    ) -> tuple[Params, tuple[Any, Any]]:
        steps, after = self._teacher.update(grads, state[0], params, loss)
        with torch.enable_grad():
            own, seen = self._policy.update(grads, state[1], params, loss)
            away = flatten(own, loss, like=params) - flatten(steps, loss, like=params)
            self.errors.append(away.square().sum(-1))
        return steps, (after, seen)


def imitation_error(policy: Rule, teacher: Rule, problem: Problem, steps: int) -> Float[Tensor, ""]:
    """Returns the mean squared distance of a policy's steps from those of a teacher, which it sees take its way."""
    follower = Follower(policy, teacher)
    trajectories(follower, problem, steps)
    return torch.stack(follower.errors).mean()


def run(config: LearnedOptimizer) -> str:
    """Runs what has not been run, and returns the table.

    Raises:
        MissingExtraError: If scipy or matplotlib is not installed.
        SettingError: If there is no such scale, or the folder holds a run of other settings, or pictures of no run.
    """
    record, scale = begin(config, SCALES)
    for name in FAMILIES:
        _Study(record, scale, name).measure()
    return learned_optimizer_report.report(record)


def final_loss(losses: Float[Tensor, "t b"]) -> float:
    """Returns the mean loss after the last step, by which quadratic functions are judged; infinity if it is NaN."""
    return float(losses[-1].mean().nan_to_num(math.inf))


def loss_on_the_way(losses: Float[Tensor, "t b"]) -> float:
    """Returns the mean loss after all steps, which decides margins of victory; infinity if it is NaN."""
    return float(losses[1:].mean().nan_to_num(math.inf))


def margins(losses: Mapping[str, Float[Tensor, "t b"]], learned: tuple[str, ...]) -> dict[str, Float[Tensor, " b"]]:
    """Returns the margin of victory of each optimizer on each problem, as a mean over the steps.

    Paper: Li and Malik (2017), Section 4: at each iteration, the lowest objective value that any other optimizer has,
    less the optimizer's own; above zero it beats all others. The start, which all share, does not count.

    *Ours:* of several learned rules each competes with what is made by hand, not with the others; what is made by hand
    competes with the first of them.

    Args:
        losses: Of each optimizer, at the start and after each step, of each problem.
        learned: Which of them are learned.
    """
    rivals = {name: loss[1:] for name, loss in losses.items() if name not in learned}
    answer = dict[str, Tensor]()
    for name in learned:
        entered = {name: losses[name][1:], **rivals}
        problems = range(entered[name].shape[1])
        each = [margin_of_victory({k: loss[:, [row]] for k, loss in entered.items()}) for row in problems]
        found = {k: torch.stack([margin[k].mean() for margin in each]) for k in entered}
        answer |= found if name == learned[0] else {name: found[name]}
    return answer


class _Study:
    """All that is measured on one family of problems."""

    def __init__(self, record: Run, scale: Scale, name: str) -> None:
        self._record = record
        self._scale = scale
        self._name = name
        self._family = FAMILIES[name]
        self._course = scale.lstm if LSTM in self._family.learned else scale.policy
        self._judge = final_loss if LSTM in self._family.learned else loss_on_the_way

    def measure(self) -> None:
        """Adds a row for each optimizer, after all have been trained or tuned: a margin of victory needs them all."""
        family, steps = self._family, self._course.steps
        names = (*family.learned, "SGD", "momentum", "RMSprop", "Adam", *family.searches)
        missing = [name for name in names if self._record.find(family=self._name, optimizer=name) is None]
        if not missing:
            return
        valid, test = self._problem(self._scale.valid, _VALID), self._problem(self._course.test, _TEST)
        made = tuned(valid, steps=steps, spacing=self._scale.spacing, judge=self._judge)
        learned = {name: self._learned(name, made["momentum"]) for name in family.learned}
        more: dict[str, dict[str, Any]] = {name: {"settings": asdict(rule)} for name, rule in made.items()}
        losses = {name: trajectories(rule, test, steps) for name, rule in {**learned, **made}.items()}
        for name in family.searches:
            found = line_search(test, steps=steps, method=name)
            losses[name], more[name] = found.losses, {"gradients": round(found.gradients, 2)}
        won = margins(losses, family.learned)
        for name in missing:
            row = {"loss": _means(losses[name]), "interval": _rounded(half_width(losses[name]))}
            row |= {"margin": _means(won[name]), "margin_interval": _rounded(half_width(won[name]))}
            self._record.add(part="test", family=self._name, optimizer=name, **row, **more.get(name, {}))

    def _learned(self, name: str, teacher: HandMade) -> Rule:
        """Trains a rule, and returns it as it was when it did best on validation problems."""
        scale, course, family = self._scale, self._course, self._family
        g = torch.Generator().manual_seed(scale.seed)
        fixed = None if family.objectives is None else family.draw(family.objectives, generator=g)
        rule, trainer = self._rule(name, g), self._trainer(name)
        best, valid = Best(rule), self._problem(scale.valid, _VALID)
        share = {EVOLVED: scale.pairs, GUIDED: scale.guided}.get(name, 1)
        iterations, every = (max(1, number // share) for number in (course.iterations, course.every))
        before = 0 if name == LSTM else scale.imitation
        imitator = torch.optim.Adam(rule.parameters(), lr=scale.imitation_rate)
        optimizer = torch.optim.Adam(rule.parameters(), lr=course.rate)
        schedule = CosineAnnealingLR(optimizer, iterations)

        def step(number: int) -> float:
            problem = fixed or family.draw(scale.batch, generator=g)
            if number <= before:
                error = imitation_error(rule, teacher, problem, course.steps)
                imitator.zero_grad()
                error.backward()
                imitator.step()
                loss = error.item()
            else:
                try:
                    loss = trainer.step(rule, problem, optimizer=optimizer, generator=g).mean().item()
                except NonFiniteError:  # steps that grow and grow: back to where they did not
                    rule.load_state_dict(best.rule.state_dict())
                    loss = best.loss.item()
                schedule.step()
            if number % every == 0 or number == before + iterations:
                best.offer(rule, self._judge(trajectories(rule, valid, course.steps)))
            return loss

        parts = {"rule": rule, "best": best, "optimizer": optimizer, "schedule": schedule}
        run_of = {"family": self._name, "rule": name, "course": asdict(course), "trainer": asdict(trainer)}
        run_of |= {"batch": scale.batch, "valid": scale.valid, "seed": scale.seed}
        if isinstance(trainer, GuidedPolicySearch):
            parts["trainer"] = trainer
        if before:
            parts["imitator"] = imitator
            run_of |= {"teacher": asdict(teacher), "imitation": before, "imitation_rate": scale.imitation_rate}
        title, steps = f"{name}: {self._name}", before + iterations
        train(self._record.folder, title, parts, run=run_of, generator=g, steps=steps, step=step)
        return best.rule

    def _rule(self, name: str, generator: torch.Generator) -> LSTMOptimizer | Policy:
        if name == LSTM:
            return LSTMOptimizer(p=5.0, scale=0.1, generator=generator)
        start = self._problem(1, _VALID).start
        return Policy(sum(tensor.numel() for tensor in start.values()), current=name != PRINTED, generator=generator)

    def _trainer(self, name: str) -> Backpropagation | EvolutionStrategy | GuidedPolicySearch:
        scale, steps = self._scale, self._course.steps
        if name == LSTM:
            return Backpropagation(steps=steps, truncation=scale.truncation)
        if name in (POLICY, PRINTED):
            return Backpropagation(steps=steps, truncation=None, first_order=False, clip=1.0)
        if name == GUIDED:
            return GuidedPolicySearch(steps=steps, samples=scale.samples)
        return EvolutionStrategy(steps=steps, pairs=scale.pairs, deviation=scale.deviation)

    def _problem(self, count: int, seed: int) -> Problem:
        """Draws problems to judge by; line searches need float64, so all have it."""
        return self._family.draw(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _means(numbers: Float[Tensor, "*t b"]) -> Any:
    return _rounded(numbers.mean(-1))


def _rounded(numbers: Float[Tensor, "*t"]) -> Any:
    return (numbers * 1e5).round().div(1e5).tolist()
