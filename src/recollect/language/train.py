"""Training a language model by truncated backpropagation through time, stopped and resumed at any moment."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from recollect import checkpoint
from recollect.errors import (
    FormatError,
    NonFiniteError,
    SettingError,
    ShapeError,
)
from recollect.language.lstm import LSTMModel, State
from recollect.language.model import check_tokens
from recollect.language.schedule import Schedule
from recollect.memory.scan import multiplies_bfloat16

_SECONDS_BETWEEN_CHECKPOINTS = 60.0


class Turn(NamedTuple):
    """What a look at the validation text showed."""

    step: int
    """Steps since the beginning."""
    train: float
    """The mean training loss of this turn, in nats per word, with dropout."""
    valid: float
    """The validation loss in nats per word."""
    rate: float
    """The step size at its end, before the decay that it may bring about."""


class Step(NamedTuple):
    """Where training is, after each step."""

    step: int
    """Steps since the beginning."""
    steps: int
    """Steps of the longest training."""
    loss: float
    """The training loss of this step, in nats per word."""
    turn: Turn | None
    """The last turn, None in the first one."""


def train(
    model: LSTMModel,
    tokens: Int[Tensor, " n"],
    valid: Int[Tensor, " m"],
    schedule: Schedule,
    *,
    generator: torch.Generator,
    file: str | os.PathLike[str] | None = None,
    watch: Callable[[Step], None] = lambda step: None,
) -> list[Turn]:
    """Trains the model, and leaves it with the weights that were best on the validation text.

    The text is cut into ``schedule.batch`` stripes, read side by side from their first words on; what is left over
    after the last whole stripe is not read. A training that was stopped, even by kill -9, goes on where it was about a
    minute before, when it is called again with the same arguments, and ends with the same weights, bit for bit.

    Args:
        model: On any device.
        tokens: The training text by word numbers, on the model's device.
        valid: The validation text, likewise.
        schedule: How.
        generator: Draws dropout masks and resets; on the model's device.
        file: Where to keep the checkpoint; nowhere when None. One that is there takes the place of the weights and
            of the generator's state. Of a training that is over it stays, so that calling again gives its result.
        watch: Is told of each step.

    Returns:
        All turns, those before a stop included.

    Raises:
        ShapeError: If a text is too short for the schedule.
        LabelError, DtypeError, DeviceError: If the model cannot read a text; before the first step.
        FormatError: If the file belongs to a training with another schedule, model or text. (Texts are compared by
            their lengths, and the training text by the sum of its word numbers.)
        NonFiniteError: If the loss of a step, or that of every look at the validation text, is NaN or infinite.

    Example:
        >>> lm = LSTMModel(4, hidden_size=8, embedding_size=8, generator=torch.Generator().manual_seed(0))
        >>> text = torch.arange(400) % 4
        >>> schedule = Schedule(epochs=10.0, batch=4, segment=10, rate=0.02, turn=50)
        >>> turns = train(lm, text, text, schedule, generator=torch.Generator().manual_seed(1))
        >>> turns[-1].step, turns[-1].valid < 0.2
        (100, True)
    """
    trainer = _Trainer(model, tokens, valid, schedule, generator, file)
    was_training = model.training
    saved = time.monotonic()
    while not trainer.is_over:
        loss = trainer.advance()
        turn = trainer.turns[-1] if trainer.turns else None
        watch(Step(trainer.step, trainer.steps, loss, turn))
        if trainer.is_over or time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
            trainer.save()
            saved = time.monotonic()
    if not any(math.isfinite(turn.valid) for turn in trainer.turns):  # the best weights are those of the beginning
        raise _diverged(f"the validation loss at step {trainer.step} is {trainer.turns[-1].valid}", schedule)
    model.load_state_dict(trainer.best)
    model.train(was_training)
    return trainer.turns


def striped_loss(model: LSTMModel, tokens: Int[Tensor, " n"], *, stripes: int = 32, segment: int = 70) -> float:
    """Returns a quick estimate of the loss in nats per word, without dropout: the text is read as stripes side by side.

    Each stripe starts from a zero state, and its first word is not scored, nor is what is left over after the last
    whole stripe. So the loss of the text read as one is usually a little lower.

    Args:
        model: It is left as it is.
        tokens: The text, on the model's device.
        stripes: How many, or fewer, so that they have 200 words or more.
        segment: How many words are read at once; the result is the same but for rounding.

    Raises:
        ShapeError: If the text has fewer than two words.
    """
    rows = stripe(tokens, max(1, min(stripes, len(tokens) // 200)))
    was_training = model.training
    model.eval()
    total, count, state = 0.0, 0, None
    try:
        with torch.no_grad():
            for words, targets in segments(rows, segment):
                loss, state = model.loss(words, targets, state)
                total, count = total + float(loss) * targets.numel(), count + targets.numel()
    finally:
        model.train(was_training)
    return total / count


def stripe(tokens: Int[Tensor, " n"], stripes: int) -> Int[Tensor, "b m"]:
    """Cuts a text into stripes of equal length, one row each; what is left over at its end is dropped.

    Raises:
        ShapeError: If a stripe would have fewer than two words.
        SettingError: If ``stripes`` is below 1.
    """
    if stripes < 1:
        raise SettingError(f"a text is cut into one stripe or more, got {stripes}.")
    length = len(tokens) // stripes
    if length < 2:
        raise ShapeError(f"a text of {len(tokens)} words is too short for {stripes} stripes of two words or more.")
    return tokens[: stripes * length].view(stripes, length)


def segments(rows: Int[Tensor, "b m"], length: int) -> Iterator[tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]]:
    """Yields ``length`` words of each row and the words after them, segment by segment; the last may be shorter.

    Raises:
        SettingError: If ``length`` is below 1.
    """
    if length < 1:
        raise SettingError(f"a segment has one word or more, got {length}.")
    for start in range(0, rows.shape[1] - 1, length):
        end = min(start + length, rows.shape[1] - 1)
        yield rows[:, start:end], rows[:, start + 1 : end + 1]


@dataclass
class _Course:
    """How far a training is, and what its validation text has made of the rate."""

    step: int = 0
    factor: float = 1.0
    """What the rate is multiplied by."""
    since: int = 0
    """Turns since the best one."""
    waited: int = 0
    """Turns since the best one or the last decay."""
    losses: float = 0.0
    """The sum of this turn's training losses."""


class _Trainer:
    """A training and all that it needs to go on."""

    def __init__(
        self,
        model: LSTMModel,
        tokens: Tensor,
        valid: Tensor,
        schedule: Schedule,
        generator: torch.Generator,
        file: str | os.PathLike[str] | None,
    ) -> None:
        rows = stripe(tokens, schedule.batch)
        for name, words in (("tokens", rows), ("valid", stripe(valid, 1))):  # refused now, not after the first turn
            check_tokens(name, words, vocabulary=model.vocabulary, device=model.output.weight.device)
        self.model = model
        self._valid = valid
        self._schedule = schedule
        self._generator = generator
        self._file = None if file is None else Path(file)
        self._segments = list(segments(rows, schedule.segment))
        self.steps = max(1, math.ceil(schedule.epochs * len(self._segments)))
        self._optimizer = _adam(model, schedule)
        self._course = _Course()
        self._state = model.initial(schedule.batch)
        self.turns: list[Turn] = []
        self.best = _copy(model)
        self._run = {
            **{"words": len(tokens), "sum": int(tokens.sum()), "valid": len(valid), "vocabulary": model.vocabulary},
            **{"dropout": [model.input_dropout, model.state_dropout, model.output_dropout], **asdict(schedule)},
        }
        self._load()

    @property
    def step(self) -> int:
        return self._course.step

    @property
    def is_over(self) -> bool:
        return self.step >= self.steps or self._course.since >= self._schedule.stop

    def advance(self) -> float:
        """Takes one step, and after the last of a turn looks at the validation text; returns the loss."""
        schedule, model = self._schedule, self.model
        words, targets = self._segments[self.step % len(self._segments)]
        if self.step % len(self._segments) == 0:
            self._state = model.initial(len(words))
        model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.zero_grad()
        with self._autocast():
            loss, self._state = model.loss(words, targets, self._reset(self._state), generator=self._generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
        self._optimizer.step()
        number = float(loss.detach())
        if not math.isfinite(number):
            raise _diverged(f"the loss of step {self.step + 1} is {number}", schedule)
        self._course.step += 1
        self._course.losses += number
        if self.step % schedule.turn == 0 or self.step == self.steps:
            self._look()
        return number

    def _rate(self) -> float:
        left = (self.steps - self.step) / self.steps
        anneal = self._schedule.anneal
        return self._schedule.rate * self._course.factor * (min(1.0, left / anneal) if anneal else 1.0)

    def _reset(self, state: State) -> State:
        if self._schedule.reset == 0:
            return state
        kept = torch.empty_like(state.hidden[:, :1]).bernoulli_(1 - self._schedule.reset, generator=self._generator)
        return State(state.hidden * kept, state.cell * kept)

    def _autocast(self) -> AbstractContextManager[object]:
        device = self._state.hidden.device
        precision = self._schedule.precision
        if precision == "float32" or (precision == "auto" and not _gains_from_bfloat16(device)):
            return nullcontext()
        return torch.autocast(device.type, dtype=torch.bfloat16)

    def _look(self) -> None:
        """Ends a turn: measures the validation loss, keeps the weights if it is the best, else sees to the rate."""
        course = self._course
        with self._autocast():
            valid = striped_loss(self.model, self._valid)
        count = (self.step - 1) % self._schedule.turn + 1
        better = valid < min((turn.valid for turn in self.turns if not math.isnan(turn.valid)), default=math.inf)
        self.turns.append(Turn(self.step, course.losses / count, valid, self._rate()))
        course.losses = 0.0
        if better:
            self.best, course.since, course.waited = _copy(self.model), 0, 0
            return
        course.since, course.waited = course.since + 1, course.waited + 1
        if course.waited >= self._schedule.patience:
            course.factor, course.waited = course.factor * self._schedule.decay, 0

    def save(self) -> None:
        if self._file is None:
            return
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
            "state": tuple(self._state),
            "turns": [tuple(turn) for turn in self.turns],
            **asdict(self._course),
        }
        checkpoint.write(self._file, state, run=self._run)

    def _load(self) -> None:
        try:
            there = None if self._file is None else checkpoint.read(self._file, run=self._run)
        except FormatError as error:  # files have the short name
            raise FormatError(str(error).replace("sum=", "sum of the text's words=")) from error
        if there is None:
            return
        shapes = [{name: tuple(part.shape) for name, part in both.items()} for both in (self.best, there["model"])]
        if shapes[0] != shapes[1]:
            raise FormatError(
                f"{self._file} belongs to a model of other sizes ({shapes[1]} there, {shapes[0]} asked). "
                "Delete it, or name another file."
            )
        self.model.load_state_dict(there["model"])
        self.best = there["best"]
        self._optimizer.load_state_dict(there["optimizer"])
        self._generator.set_state(there["generator"])
        self._state = State(*(part.to(self._state.hidden.device) for part in there["state"]))
        self.turns = [Turn(*turn) for turn in there["turns"]]
        self._course = _Course(**{field.name: there[field.name] for field in fields(_Course)})


def _diverged(what: str, schedule: Schedule) -> NonFiniteError:
    return NonFiniteError(
        f"training diverges: {what}. Start anew with a lower rate (it was {schedule.rate:g}), and with another folder "
        "or file if it keeps one."
    )


def _adam(model: LSTMModel, schedule: Schedule) -> torch.optim.Adam:
    betas = float(schedule.beta1), float(schedule.beta2)
    return torch.optim.Adam(
        model.parameters(), lr=schedule.rate, betas=betas, weight_decay=schedule.l2, eps=1e-8, fused=True
    )


def _gains_from_bfloat16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else multiplies_bfloat16(device)


def _copy(model: LSTMModel) -> dict[str, Tensor]:
    return {name: part.detach().clone() for name, part in model.state_dict().items()}
