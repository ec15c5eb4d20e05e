"""Training: written out literally in float64, and stopped at any moment."""

import importlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.bits import bits
from torch import Tensor
from torch.nn.functional import cross_entropy

from recollect import checkpoint
from recollect.errors import DeviceError, DtypeError, FormatError, LabelError, NonFiniteError, SettingError, ShapeError
from recollect.language.lstm import LSTMModel, State
from recollect.language.schedule import Schedule
from recollect.language.train import Step, Turn, segments, stripe, striped_loss, train

Rng = Callable[[], AbstractContextManager[None]]
WORDS = 10
module = importlib.import_module("recollect.language.train")  # by its name the package has the function
# Whatever a training has to remember is in use: 3 segments, the last a short one, a decay, dropout, resets.
SCHEDULE = Schedule(
    epochs=4.5, batch=4, segment=7, rate=0.05, turn=4, patience=1, decay=0.5, anneal=0.3, reset=0.2, l2=1e-3
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(*, hidden: int = 8, words: int = WORDS, dropout: float = 0.3) -> LSTMModel:
    dropouts = {"input_dropout": dropout, "state_dropout": dropout, "output_dropout": dropout}
    return LSTMModel(words, hidden_size=hidden, embedding_size=6, generator=seeded(), **dropouts)


def text(length: int, seed: int = 0) -> Tensor:
    """Each word is three up from the word before, but one in ten is any word."""
    g = seeded(seed)
    steps = torch.where(torch.rand(length, generator=g) < 0.9, 3, torch.randint(0, WORDS, (length,), generator=g))
    return steps.cumsum(0) % WORDS


TEXT, VALID = text(81), text(60, seed=1)


def run(lm: LSTMModel, schedule: Schedule = SCHEDULE, **settings: Any) -> tuple[Any, list[Turn]]:
    """What a training ends with: weights and the generator's state as bits, and its turns."""
    generator = seeded(7)
    turns = train(lm, TEXT, VALID, schedule, generator=generator, **settings)
    return bits([lm.state_dict(), generator.get_state()]), turns


# Stopped and resumed --------------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


def stop_at(*steps: int) -> Callable[[Step], None]:
    def watch(step: Step) -> None:
        if step.step in steps:
            raise StopError

    return watch


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_stopped_by_an_exception(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a turn and at its end (4), within a pass over the text and at its end (9), at the very end (14)."""
    monkeypatch.setattr(module, "_SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    schedule = Schedule(**{**vars(SCHEDULE), "precision": precision})
    whole = run(model(), schedule)
    assert [turn.step for turn in whole[1]] == [4, 8, 12, 14]
    for stop in (2, 4, 9, 14) if precision == "bfloat16" else (5,):
        file = tmp_path / f"{stop}"
        with pytest.raises(StopError):
            run(model(), schedule, file=file, watch=stop_at(stop))
        seen: list[int] = []
        assert run(model(), schedule, file=file, watch=lambda step, seen=seen: seen.append(step.step)) == whole
        assert seen == list(range(stop, 15)), "a step is saved once it has been told of"


def test_stopped_again_and_again_with_old_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps after the last checkpoint are taken again, with the same numbers."""
    whole = run(model())
    file = tmp_path / "training"
    for saved, stop in ((2, 3), (4, 8), (7, 9), (11, 14)):

        def watch(step: Step, saved: int = saved, stop: int = stop) -> None:
            seconds = -1.0 if step.step <= saved else math.inf
            monkeypatch.setattr(module, "_SECONDS_BETWEEN_CHECKPOINTS", seconds)
            stop_at(stop)(step)

        with pytest.raises(StopError):
            run(model(), file=file, watch=watch)
    assert run(model(), file=file) == whole


def test_of_one_that_is_over_the_result_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "training"
    first = run(model(), file=file)
    before = file.read_bytes()
    assert run(model(), file=file, watch=stop_at(*range(100))) == first
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("kind", [str, Path])
def test_the_file_may_be_a_string(kind: type, tmp_path: Path) -> None:
    first = run(model(), file=kind(tmp_path / "training"))
    assert run(model(), file=tmp_path / "training", watch=stop_at(*range(100))) == first


def test_the_checkpoint(tmp_path: Path) -> None:
    """What is in the file: trainings of earlier versions must go on."""
    file = tmp_path / "training"
    lm = model()
    run(lm, file=file)
    dropout = [lm.input_dropout, lm.state_dropout, lm.output_dropout]
    text = {"words": 81, "sum": int(TEXT.sum()), "valid": len(VALID), "vocabulary": WORDS}
    settings = {**text, "dropout": dropout, **vars(SCHEDULE)}
    assert " ".join(settings) == (
        "words sum valid vocabulary dropout "
        "epochs batch segment rate beta1 beta2 l2 clip turn patience decay anneal stop reset precision"
    )
    there = checkpoint.read(file, run=settings)
    assert there is not None
    assert sorted(there) == sorted(
        ["best", "factor", "generator", "losses", "model", "optimizer", "since", "state", "step", "turns", "waited"]
    )
    assert bits(there["best"]) == bits(dict(lm.state_dict()))
    assert there["step"] == 14
    assert [tuple(part.shape) for part in there["state"]] == [(4, 8)] * 2


def test_saves_are_a_minute_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, saves = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "write", lambda file, state, run: saves.append(state["step"]))

    def watch(step: Step) -> None:
        clock[0] += 25.0

    run(model(), file=tmp_path / "training", watch=watch)
    assert saves == [3, 6, 9, 12, 14]


def _train_for_long(folder: Path, seconds: float) -> None:
    """A training of 60 steps."""
    schedule = Schedule(**{**vars(SCHEDULE), "epochs": 20.0, "stop": 1000})
    generator, lm = seeded(7), model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_SECONDS_BETWEEN_CHECKPOINTS", seconds)
        turns = train(lm, TEXT, VALID, schedule, generator=generator, file=folder / "training")
    (folder / "new").write_text(json.dumps([repr(bits([lm.state_dict(), generator.get_state()])), turns]))
    (folder / "new").replace(folder / "result.json")


def _kill_again_and_again(folder: Path) -> None:
    """In a process of its own: forks trainings, and kills each at some moment after it has saved again."""
    draw, kills, file = random.Random(0), 0, folder / "training"
    torch.optim.Adam([torch.zeros(1)])  # imports half of torch, once instead of in each fork
    while not (folder / "result.json").exists():
        before = file.stat().st_mtime_ns if file.exists() else 0
        pid = os.fork()
        if pid == 0:
            try:
                _train_for_long(folder, -1.0)
                os._exit(0)
            finally:
                os._exit(1)
        if kills < 4:
            runs = os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
            while os.waitid(*runs) is None and not (file.exists() and file.stat().st_mtime_ns != before):
                time.sleep(0.001)
            time.sleep(draw.uniform(0.0, 0.05))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or status == 0, "a training failed"
        kills += os.WIFSIGNALED(status)
    (folder / "kills").write_text(str(kills))


def test_killed(tmp_path: Path) -> None:
    """kill -9 at random moments, while it saves after each step."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(killed)], check=True, timeout=300, env=environment)
    assert int((killed / "kills").read_text()) >= 3, "the kills came too late to prove anything"
    _train_for_long(whole, math.inf)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, killed)]
    assert results[0] == results[1]


# The literal training -------------------------------------------------------------------------------------------------


def test_three_steps_written_out() -> None:
    """Truncated backpropagation, clipping, the l2 term behind it, and Adam with beta1 = 0, in float64."""
    lm, reference = model(dropout=0.0).double(), model(dropout=0.0).double()
    schedule = Schedule(
        epochs=1.0, batch=4, segment=7, rate=0.02, l2=0.05, clip=0.05, reset=0.0, anneal=0.5, precision="float32"
    )
    turns = train(lm, TEXT, VALID, schedule, generator=seeded())
    weights = list(reference.parameters())
    squares = [torch.zeros_like(w) for w in weights]
    state, losses = None, []
    parts = [(slice(0, 7), slice(1, 8)), (slice(7, 14), slice(8, 15)), (slice(14, 19), slice(15, 20))]
    for step, (words, targets) in enumerate(parts, start=1):
        rows = TEXT[:80].view(4, 20)
        logits, state = reference(rows[:, words], state)
        loss = cross_entropy(logits.flatten(0, 1), rows[:, targets].flatten())
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, weights)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm > 2 * 0.05, "nothing is clipped"
        rate = 0.02 * min(1.0, (3 - step + 1) / 3 / 0.5)
        with torch.no_grad():
            for weight, gradient, square in zip(weights, gradients, squares, strict=True):
                pull = gradient * 0.05 / (norm + 1e-6) + 0.05 * weight
                square.mul_(0.999).add_(0.001 * pull**2)
                weight.sub_(rate * pull / ((square / (1 - 0.999**step)).sqrt() + 1e-8))
    for ours, theirs in zip(lm.parameters(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert turns == [pytest.approx((3, sum(losses) / 3, striped_loss(reference, VALID), 0.0), rel=1e-9)]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Puts these in the place of the validation losses."""
    there: Iterator[float] = iter(losses)
    monkeypatch.setattr(module, "striped_loss", lambda *_: next(there))


def literal_rates(losses: list[float], schedule: Schedule, steps: int) -> tuple[list[float], list[Turn]]:
    """The rate of each step until training ends, and its turns without their training losses."""
    rates, turns = [], []
    factor, best, since, waited = 1.0, math.inf, 0, 0
    for step in range(steps):
        left = 1 - step / steps
        line = left / schedule.anneal if schedule.anneal and left < schedule.anneal else 1.0
        rates.append(schedule.rate * factor * line)
        if (step + 1) % schedule.turn and step + 1 < steps:
            continue
        loss, left = losses[len(turns)], 1 - (step + 1) / steps
        line = left / schedule.anneal if schedule.anneal and left < schedule.anneal else 1.0
        turns.append(Turn(step + 1, math.nan, loss, schedule.rate * factor * line))
        if loss < best:
            best, since, waited = loss, 0, 0
        else:
            since, waited = since + 1, waited + 1
            if waited == schedule.patience:
                factor, waited = factor * schedule.decay, 0
            if since == schedule.stop:
                break
    return rates, turns


@pytest.mark.parametrize("anneal", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("patience", "stop"), [(1, 100), (2, 100), (2, 4), (3, 2), (5, 1)])
def test_rates_and_early_stop(patience: int, stop: int, anneal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [5.0, 4.0, 4.0, 4.5, 3.0, 3.5, 3.0, 2.0, math.nan, 2.5, 2.0, 2.0, 1.0, 2.0]
    scripted(monkeypatch, losses)
    schedule = Schedule(**{**vars(SCHEDULE), "epochs": 9.0, "turn": 2, "patience": patience, "stop": stop})
    schedule = Schedule(**{**vars(schedule), "anneal": anneal})
    rates: list[float] = []
    hook = torch.optim.Adam.step

    def step(self: torch.optim.Adam) -> None:
        rates.append(self.param_groups[0]["lr"])
        hook(self)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    _, turns = run(model(), schedule)
    expected, literal = literal_rates(losses, schedule, steps=27)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [turn.step for turn in turns] == [turn.step for turn in literal]
    assert bits([turn.valid for turn in turns]) == bits([turn.valid for turn in literal])
    assert [turn.rate for turn in turns] == pytest.approx([turn.rate for turn in literal], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("best", range(4))
def test_the_best_weights_are_left_in_the_model(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [3.0, 3.0, 3.0, 3.0]
    losses[best] = 2.0
    scripted(monkeypatch, losses)
    lm = model()
    seen, steps = {}, []

    def watch(step: Step) -> None:
        seen[step.step] = bits(lm.state_dict())
        steps.append(step)

    _, turns = run(lm, watch=watch)
    assert len(set(map(repr, seen.values()))) == 14
    assert bits(lm.state_dict()) == seen[turns[best].step]
    assert [(step.step, step.steps) for step in steps] == [(number, 14) for number in range(1, 15)]
    assert [step.turn for step in steps] == [
        turns[step.step // 4 - 1 + (step.step == 14)] if step.step >= 4 else None for step in steps
    ]
    means = [
        sum(step.loss for step in steps[start : start + 4]) / len(steps[start : start + 4]) for start in (0, 4, 8, 12)
    ]
    assert [turn.train for turn in turns] == pytest.approx(means)


def test_a_loss_that_is_not_finite_ends_training(tmp_path: Path) -> None:
    schedule, seen = Schedule(**{**vars(SCHEDULE), "rate": 1e30}), []
    with pytest.raises(NonFiniteError, match=r"the loss of step 2 is (nan|inf)\. .* lower rate \(it was 1e\+30\)"):
        run(model(), schedule, file=tmp_path / "training", watch=seen.append)
    assert [step.step for step in seen] == [1]
    assert math.isfinite(seen[0].loss)


@pytest.mark.parametrize("losses", [[math.nan] * 4, [math.inf, math.nan, math.nan, math.inf]])
def test_untrained_weights_are_no_result(losses: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no look at the validation text shows a number, there are no best weights; one that does is enough."""
    scripted(monkeypatch, losses)
    for _ in range(2):  # it stays so when it is called again
        with pytest.raises(NonFiniteError, match=f"the validation loss at step 14 is {losses[-1]}.* lower rate"):
            run(model(), file=tmp_path / "training")
    scripted(monkeypatch, [*losses[:3], 5.0])
    weights: list[Any] = []
    lm = model()
    run(lm, watch=lambda step: weights.append(bits(lm.state_dict())))
    assert bits(lm.state_dict()) == weights[-1]


def test_states_are_carried_and_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """From segment to segment, but not from the end of the text to its beginning, and not where a reset is drawn."""
    starts, ends = [], []
    loss = LSTMModel.loss

    def seen(self: LSTMModel, tokens: Tensor, targets: Tensor, state: State | None = None, **more: Any) -> Any:
        result = loss(self, tokens, targets, state, **more)
        if self.training:
            starts.append(state)
            ends.append(result[1])
        return result

    monkeypatch.setattr(LSTMModel, "loss", seen)
    run(model(dropout=0.0), Schedule(**{**vars(SCHEDULE), "epochs": 20.0, "reset": 0.25, "stop": 100}))
    kept = []
    for step, start in enumerate(starts):
        if step % 3 == 0:
            assert not start.hidden.any()
            assert not start.cell.any()
            continue
        rows = start.hidden.any(1)
        assert torch.equal(start.cell.any(1), rows)
        for part, old in zip(start, ends[step - 1], strict=True):
            assert torch.equal(part[rows], old[rows])
            assert not part[~rows].any()
        kept += rows.tolist()
    assert 0.65 < sum(kept) / len(kept) < 0.85


def test_it_learns() -> None:
    """Close to what is to be known: 0.5 nats; with each word by itself they are 2.3."""
    tokens, valid = text(3000), text(1000, seed=1)
    chance = 0.1 * 0.1
    entropy = -(0.9 + chance) * math.log(0.9 + chance) - 9 * chance * math.log(chance)
    counts = tokens.bincount() / len(tokens)
    unigrams = -float((counts * counts.log()).sum())
    lm = model(hidden=16, dropout=0.05)
    schedule = Schedule(epochs=4.0, batch=8, segment=15, rate=0.03, turn=20, anneal=0.5)
    turns = train(lm, tokens, valid, schedule, generator=seeded())
    best = min(turn.valid for turn in turns)
    assert unigrams > 2.2
    assert entropy - 0.1 < best < 0.4 * unigrams
    assert striped_loss(lm, valid) == pytest.approx(best, rel=0.01)


# The text as stripes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "stripes", "rows"), [(1003, 4, 4), (1003, 32, 5), (1003, 1, 1), (199, 8, 1), (2, 32, 1), (400, 2, 2)]
)
def test_striped_loss_is_the_mean_of_all_stripes(length: int, stripes: int, rows: int) -> None:
    lm, tokens = model().double(), text(length)
    losses = []
    for row in range(rows):
        words = tokens[row * (length // rows) : (row + 1) * (length // rows)]
        logits, _ = lm(words[:-1].unsqueeze(0))
        losses.append(cross_entropy(logits[0], words[1:], reduction="none"))
    literal = float(torch.cat(losses).mean().detach())
    for segment in (1, 70, 10_000):
        if segment > 1 or length < 500:
            assert striped_loss(lm, tokens, stripes=stripes, segment=segment) == pytest.approx(literal, rel=1e-12)


@pytest.mark.parametrize("mode", [True, False])
def test_striped_loss_leaves_the_model_as_it_is(mode: bool, rng_untouched: Rng) -> None:
    lm = model().train(mode)
    before = bits(lm.state_dict())
    with rng_untouched():
        striped_loss(lm, VALID)
    assert lm.training is lm.lstm.training is mode
    with pytest.raises(LabelError):
        striped_loss(lm, VALID + 5)
    assert lm.training is lm.lstm.training is mode
    assert bits(lm.state_dict()) == before
    assert all(p.grad is None for p in lm.parameters())


def test_stripes_and_segments() -> None:
    rows = stripe(torch.arange(23), 3)
    assert rows.tolist() == [list(range(7)), list(range(7, 14)), list(range(14, 21))]
    parts = [(words.tolist(), targets.tolist()) for words, targets in segments(rows[:1], 4)]
    assert parts == [([[0, 1, 2, 3]], [[1, 2, 3, 4]]), ([[4, 5]], [[5, 6]])]
    assert len(list(segments(rows, 6))) == 1


# What stays and what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [True, False])
def test_what_training_leaves_alone(mode: bool, rng_untouched: Rng, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    lm = model().train(mode)
    with rng_untouched():
        run(lm)
    assert lm.training is mode
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"rate": 0.04}, {"epochs": 5.0}, {"precision": "float32"}, {"batch": 5}])
def test_other_settings_are_refused_by_name(setting: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "training"
    run(model(), file=file)
    before, lm, generator = file.read_bytes(), model(), seeded(3)
    ((name, value),) = setting.items()
    with pytest.raises(FormatError, match=f"{name}={vars(SCHEDULE)[name]} there, {value} asked"):
        train(lm, TEXT, VALID, Schedule(**{**vars(SCHEDULE), **setting}), generator=generator, file=file)
    with pytest.raises(FormatError, match="words=81 there, 80 asked"):
        train(lm, TEXT[:80], VALID, SCHEDULE, generator=generator, file=file)
    changed = torch.cat([TEXT[:-1], (TEXT[-1:] + 1) % WORDS])
    totals = f"sum of the text's words={int(TEXT.sum())} there, {int(changed.sum())} asked"
    with pytest.raises(FormatError, match=totals):
        train(lm, changed, VALID, SCHEDULE, generator=generator, file=file)
    assert file.read_bytes() == before
    assert bits([lm.state_dict(), generator.get_state()]) == bits([model().state_dict(), seeded(3).get_state()])


def test_another_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "training"
    run(model(), file=file)
    before = file.read_bytes()
    with pytest.raises(FormatError, match="vocabulary=10 there, 11 asked"):
        run(model(words=11), file=file)
    for other in (model(hidden=9), model(hidden=6)):
        weights = bits(other.state_dict())
        with pytest.raises(FormatError, match=r"model of other sizes .*\(32, 8\).*Delete it"):
            run(other, file=file)
        assert bits(other.state_dict()) == weights
    assert file.read_bytes() == before


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "training"
    file.write_bytes(b"my thesis")
    with pytest.raises(FormatError, match="no checkpoint"):
        run(model(), file=file)
    assert file.read_bytes() == b"my thesis"


@pytest.mark.parametrize(
    ("tokens", "valid", "words"),
    [
        (TEXT[:7], VALID, "7 words is too short for 4 stripes"),
        (TEXT[:0], VALID, "0 words is too short for 4 stripes"),
        (TEXT, VALID[:1], "1 words is too short for 1 stripes"),
        (TEXT, VALID[:0], "0 words is too short for 1 stripes"),
    ],
)
def test_a_text_that_is_too_short_is_refused_before_the_first_step(tokens: Tensor, valid: Tensor, words: str) -> None:
    lm = model()
    with pytest.raises(ShapeError, match=words):
        train(lm, tokens, valid, SCHEDULE, generator=seeded(), watch=stop_at(*range(100)))
    assert bits(lm.state_dict()) == bits(model().state_dict())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("tokens", "valid", "error", "message"),
    [
        (TEXT, VALID + 5, LabelError, "from 0 to 9 in this model, got 14"),
        (torch.cat([TEXT[:-2], TEXT[-2:] - WORDS]), VALID, LabelError, "from 0 to 9 in this model, got -"),
        (TEXT, VALID.float(), DtypeError, "valid must be whole numbers"),
        (TEXT, VALID.to("meta"), DeviceError, "valid are on meta"),
    ],
)
def test_a_text_that_the_model_cannot_read_is_refused_before_the_first_step(
    tokens: Tensor, valid: Tensor, error: type[Exception], message: str
) -> None:
    lm = model()
    with pytest.raises(error, match=message):
        train(lm, tokens, valid, SCHEDULE, generator=seeded(), watch=stop_at(*range(100)))
    assert bits(lm.state_dict()) == bits(model().state_dict())


def test_stripes_and_segments_have_a_length() -> None:
    for wrong in (0, -1):
        with pytest.raises(SettingError, match=f"one stripe or more, got {wrong}"):
            stripe(TEXT, wrong)
        with pytest.raises(SettingError, match=f"one word or more, got {wrong}"):
            next(segments(TEXT.view(1, -1), wrong))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -1, 1.0, True, "1", None)) for name in ("batch", "segment", "turn", "patience", "stop")),
        *((name, (0.0, -1.0, math.nan, math.inf, "1", None)) for name in ("epochs", "rate", "clip")),
        *((name, (-0.1, math.nan, math.inf, "1")) for name in ("beta1", "beta2", "l2", "decay", "anneal", "reset")),
        *((name, (1.0, 2.0)) for name in ("beta1", "beta2")),
        *((name, (1.1,)) for name in ("decay", "anneal", "reset")),
        ("precision", ("float16", "", None)),
    ],
)
def test_settings(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(SettingError, match=name):
            Schedule(**{name: value})


@pytest.mark.usefixtures("untyped")
def test_settings_may_be_whole_numbers() -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "epochs": 1, "beta1": 0, "reset": 0, "clip": 1})
    assert len(run(model(), schedule)[1]) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    _kill_again_and_again(Path(sys.argv[1]))
