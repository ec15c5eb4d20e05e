"""``run`` against a stream worked off by hand, its numbers against their definitions, and kills at any moment."""

import copy
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
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.bits import bits
from torch import Tensor, nn

from recollect import EpisodicMemory, LocalAdaptation, MbPA, checkpoint, rules
from recollect.continual import AGEM, EWC, GEM, MAS, SI, Accuracies, Learner, LwF, Reservoir, Ring, accuracy, run
from recollect.data import Dataset, Task, split
from recollect.errors import FormatError, SettingError, ShapeError

Rng = Callable[[], AbstractContextManager[None]]
SIZE, CLASSES, ROWS, TASKS = 6, 4, 12, 4


class StopError(Exception):
    """What an interruption raises."""


def stream(count: int = TASKS) -> list[Any]:
    g = torch.Generator().manual_seed(7)
    rule = torch.randn(SIZE, CLASSES, generator=g)
    found = []
    for _ in range(count):
        order = torch.randperm(SIZE, generator=g)
        x = torch.randn(ROWS + 12, SIZE, generator=g)
        y = (x @ rule).argmax(1)
        found.append(((x[:ROWS, order], y[:ROWS]), (x[ROWS:, order], y[ROWS:])))
    return found


def network(seed: int = 1, *, dropout: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drop = [nn.Dropout(0.5)] if dropout else []
        return nn.Sequential(nn.Linear(SIZE, 8), nn.BatchNorm1d(8), nn.Tanh(), *drop, nn.Linear(8, CLASSES))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.5)


def made(name: str = "naive", seed: int = 1, **more: Any) -> tuple[Learner, dict[str, Any]]:
    """A learner and its predictors."""
    net = network(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02) if name == "adam" else sgd(net)
    held, memory = Reservoir(EpisodicMemory(10, SIZE)), EpisodicMemory(40, SIZE)
    predictors: dict[str, Any] = {"network": net}
    parts: dict[str, Any] = {}
    if "memory" in name:
        adaptation = LocalAdaptation(rules.sgd(0.1), steps=2)
        predictors["mbpa"] = MbPA(nn.Linear(SIZE, CLASSES), memory, neighbors=3, adaptation=adaptation)
        with torch.no_grad():
            for number, p in enumerate(predictors["mbpa"].parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + number)
        parts = {"memory": memory, "keep": 7}
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "ewc": lambda: {"penalty": EWC(net, 5.0)},
        "mas": lambda: {"penalty": MAS(net, 1.0)},
        "si": lambda: {"penalty": SI(net, optimizer, 1.0)},
        "lwf": lambda: {"penalty": LwF(net)},
        "gem": lambda: {"projection": GEM(net, examples=5)},
        "agem": lambda: {"projection": AGEM(net, held, examples=6)},
        "replay": lambda: {"replay": Ring(EpisodicMemory(10, SIZE))},
    }
    for kind, make in kinds.items():
        if kind in name.split("+"):
            parts |= make()
    generator = torch.Generator().manual_seed(3)
    return Learner(net, optimizer, **({"epochs": 2, "batch": 6, "generator": generator} | parts | more)), predictors


NAMES = ["adam", "ewc+memory", "mas", "gem", "lwf+replay+memory", "si+agem"]


def end(learner: Learner, results: dict[str, Accuracies]) -> Any:
    return bits([learner.state_dict(), {name: list(found) for name, found in results.items()}])


# Numbers --------------------------------------------------------------------------------------------------------------

MATRICES = st.integers(2, 6).flatmap(
    lambda t: st.lists(st.integers(0, 64).map(lambda n: n / 64), min_size=t * t + t, max_size=t * t + t).map(
        lambda numbers: [numbers[i * t : (i + 1) * t] for i in range(t + 1)]
    )
)


@settings(max_examples=15)
@given(MATRICES)
def test_numbers_are_their_definitions(rows: list[list[float]]) -> None:
    *r, initial = rows
    t = len(initial)
    matrix = torch.full((t, t), math.nan)
    for i in range(t):
        for j in range(min(i + 2, t)):
            matrix[i, j] = r[i][j]
    before = matrix.clone()
    found = Accuracies(matrix, torch.tensor(initial))

    acc = 0.0
    for j in range(t):
        acc += r[t - 1][j] / t
    bwt = 0.0
    for j in range(t - 1):
        bwt += (r[t - 1][j] - r[j][j]) / (t - 1)
    fwt = 0.0
    for j in range(1, t):
        fwt += (r[j - 1][j] - initial[j]) / (t - 1)
    forgetting = 0.0
    for j in range(t - 1):
        best = max(r[i][j] for i in range(j, t - 1))
        forgetting += (best - r[t - 1][j]) / (t - 1)
    averages = [sum(r[i][: i + 1]) / (i + 1) for i in range(t)]

    assert found.average == pytest.approx(acc, abs=1e-6)
    assert found.backward_transfer == pytest.approx(bwt, abs=1e-6)
    assert found.forward_transfer == pytest.approx(fwt, abs=1e-6)
    assert found.forgetting == pytest.approx(forgetting, abs=1e-6)
    assert found.averages == pytest.approx(averages, abs=1e-6)
    assert found.forgetting >= -found.backward_transfer - 1e-6, "the best is at least the one when it was learned"
    assert bits(matrix) == bits(before)


def test_two_tasks_by_hand() -> None:
    found = Accuracies(torch.tensor([[0.75, 0.25], [0.5, 1.0]]), torch.tensor([0.5, 0.125]))
    assert (found.average, found.averages) == (0.75, [0.75, 0.75])
    assert (found.backward_transfer, found.forgetting, found.forward_transfer) == (-0.25, 0.25, 0.125)


def test_one_task() -> None:
    learner, _ = made()
    found = run(learner, stream(1))["network"]
    assert found.matrix.shape == (1, 1)
    assert found.averages == [found.average]
    assert math.isnan(found.backward_transfer)
    assert math.isnan(found.forward_transfer)
    assert math.isnan(found.forgetting)


# The matrix -----------------------------------------------------------------------------------------------------------


def by_hand(predictor: Any, test: tuple[Tensor, Tensor], outputs: Any = None, limit: int | None = None) -> float:
    """One example at a time."""
    inputs, labels = test[0][:limit], test[1][:limit]
    modes = [(m, m.training) for m in predictor.modules()] if isinstance(predictor, nn.Module) else []
    right = 0
    for x, y in zip(inputs, labels.tolist(), strict=True):
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            scores = predictor(x.unsqueeze(0))[0].tolist()
        among = range(len(scores)) if outputs is None else [int(o) for o in outputs]
        right += max(among, key=lambda c: scores[c]) == y
    for module, mode in modes:
        module.training = mode
    return right / len(inputs)


def literal(learner: Learner, predictors: dict[str, Any], tasks: list[Any], limits: dict[str, int | None]) -> Any:
    tasks = [(*task, None)[:3] for task in tasks]
    t = len(tasks)
    initial = {  # of the same number of examples as the rest
        name: [by_hand(learner.network, test, outputs, limits.get(name)) for _, test, outputs in tasks]
        for name in predictors
    }
    matrices = {name: [[math.nan] * t for _ in range(t)] for name in predictors}
    for i, (train, _, own) in enumerate(tasks):
        learner.learn(train, outputs=own)
        for name, predictor in predictors.items():
            for j in range(min(i + 2, t)):
                _, test, outputs = tasks[j]
                matrices[name][i][j] = by_hand(predictor, test, outputs, limits.get(name))
    found = {name: Accuracies(torch.tensor(rows), torch.tensor(initial[name])) for name, rows in matrices.items()}
    return end(learner, found)


@pytest.mark.parametrize(
    ("name", "limits"),
    [
        *(("lwf", None), ("si+agem", None), ("replay", 1), ("naive", 100)),
        *(("ewc+memory", limits) for limits in (None, {"mbpa": 4}, {"network": 9, "mbpa": 3})),
    ],
    ids=str,
)
@pytest.mark.usefixtures("untyped")
def test_matrix_is_that_of_a_stream_worked_off_by_hand(name: str, limits: Any, rng_untouched: Rng) -> None:
    learner, predictors = made(name)
    with rng_untouched():
        results = run(learner, stream(3), predictors=predictors, examples=limits)
    assert list(results) == list(predictors)
    other, others = made(name)
    each = limits if isinstance(limits, dict) else dict.fromkeys(predictors, limits)
    assert end(learner, results) == literal(other, others, stream(3), each)


def test_the_network_alone_is_judged_by_default() -> None:
    results = run(made()[0], stream(2))
    assert list(results) == ["network"]
    learner, predictors = made()
    assert end(made()[0], results) == end(made()[0], run(learner, stream(2), predictors=predictors))
    assert results["network"].average > 0.3, "nothing was learned"


def test_no_predictors_at_all() -> None:
    learner, _ = made()
    assert run(learner, stream(2), predictors={}) == {}
    assert learner.learned == 2


def split_stream(scenario: Any) -> Iterator[Task]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(96, SIZE, generator=g)
    y = torch.arange(96) % CLASSES
    x[torch.arange(96), y] += 1.0
    data = Dataset(x[:80], y[:80])
    return split(data, Dataset(x[80:], y[80:]), scenario=scenario, generator=g)


@pytest.mark.parametrize(
    ("name", "scenario"),
    [("naive", "task"), ("ewc+memory", "task"), ("gem", "class"), ("lwf", "domain")],
)
@pytest.mark.usefixtures("untyped")
def test_tasks_of_the_data_package(name: str, scenario: Any) -> None:
    learner, predictors = made(name)
    results = run(learner, split_stream(scenario), predictors=predictors)
    other, others = made(name)
    assert end(learner, results) == literal(other, others, list(split_stream(scenario)), {})
    if scenario == "task" and name == "naive":
        unmasked = run(made(name)[0], [task[:2] for task in split_stream("class")])["network"]
        assert results["network"].average > unmasked.average, "answers were sought among all outputs"


def test_outputs_mask_what_would_win() -> None:
    test = (torch.eye(3), torch.tensor([1, 1, 2]))
    assert accuracy(lambda x: x, test) == pytest.approx(2 / 3)
    assert accuracy(lambda x: x, test, outputs=[1, 2]) == 1.0
    assert accuracy(lambda x: -1e30 - x, test, outputs=torch.tensor([1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize("form", ["list", "iterator", "generator", "tuples of three", "task", "batches"])
def test_forms_of_tasks(form: str) -> None:
    tasks: Any = stream(3)
    if form == "iterator":
        tasks = iter(tasks)
    elif form == "generator":
        tasks = (task for task in stream(3))
    elif form == "tuples of three":
        tasks = [(*task, None) for task in tasks]
    elif form == "task":
        tasks = [Task(Dataset(*train), Dataset(*test)) for train, test in tasks]
    elif form == "batches":
        tasks = [(train, [(x[:9], y[:9]), (x[9:], y[9:])]) for train, (x, y) in tasks]
    learner, other = made()[0], made()[0]
    assert end(learner, run(learner, tasks)) == end(other, run(other, stream(3)))


def test_tasks_are_taken_one_by_one() -> None:
    learner, _ = made()
    taken = []

    def tasks() -> Iterator[Any]:
        for number, task in enumerate(stream(3)):
            taken.append((number, learner.learned))
            yield task

    run(learner, tasks())
    assert taken == [(0, 0), (1, 1), (2, 2)]


# Judging --------------------------------------------------------------------------------------------------------------


def test_evaluation_mode_and_back_module_by_module() -> None:
    net = network(dropout=True)
    net[1].eval()  # a frozen BatchNorm in a network that trains
    modes = [m.training for m in net.modules()]
    seen = []
    net[3].register_forward_hook(lambda module, *_: seen.append(module.training))
    before = bits(net.state_dict())
    test = stream(1)[0][1]
    assert accuracy(net, test) == by_hand(net, test)
    assert not any(seen)
    assert [m.training for m in net.modules()] == modes
    net[1].train()
    accuracy(net, test)
    assert bits(net.state_dict()) == before, "running statistics have moved"
    with pytest.raises(RuntimeError):
        accuracy(net, (torch.zeros(3, SIZE + 1), torch.zeros(3, dtype=torch.long)))
    assert all(m.training for m in net.modules())


def test_a_predictor_of_its_own_keeps_its_modes(rng_untouched: Rng) -> None:
    other = network(5, dropout=True)
    other[0].eval()
    modes = [m.training for m in other.modules()]
    before = bits(other.state_dict())
    learner, _ = made()
    with rng_untouched():
        results = run(learner, stream(2), predictors={"other": other, "function": lambda x: x[:, :CLASSES]})
    assert [m.training for m in other.modules()] == modes
    assert bits(other.state_dict()) == before
    assert float(results["other"].matrix[1, 0]) == float(results["other"].matrix[0, 0])


def test_judging_has_no_gradients_and_at_most_1000_rows_at_once() -> None:
    sizes = []

    def predictor(x: Tensor) -> Tensor:
        sizes.append((len(x), torch.is_grad_enabled()))
        return x

    x, y = torch.eye(3).repeat(834, 1)[:2500], torch.zeros(2500, dtype=torch.long)
    for limit, expected in [(None, [1000, 1000, 500]), (1000, [1000]), (1001, [1000, 1]), (2500, [1000, 1000, 500])]:
        sizes.clear()
        assert accuracy(predictor, (x, y), examples=limit) == by_hand(lambda x: x, (x, y), limit=limit)
        assert sizes == [(size, False) for size in expected]
    sizes.clear()
    assert accuracy(predictor, [(x[:2], y[:2]), (x[2:5], y[2:5])], examples=3) == pytest.approx(1 / 3)
    assert sizes == [(2, False), (1, False)]


@pytest.mark.parametrize("examples", [0, -3])
def test_too_few_examples(examples: int) -> None:
    with pytest.raises(SettingError, match="examples"):
        accuracy(lambda x: x, (torch.eye(3), torch.arange(3)), examples=examples)


def test_limits_of_predictors_that_are_not_there() -> None:
    with pytest.raises(SettingError, match="mbpaa"):
        run(made()[0], stream(1), examples={"mbpaa": 3})


def test_forward_transfer_compares_the_same_examples() -> None:
    learner, _ = made()
    found = run(learner, stream(2), examples=3)["network"]
    untrained = network()
    assert found.initial.tolist() == pytest.approx([by_hand(untrained, test, limit=3) for _, test in stream(2)])


@pytest.mark.parametrize("test", [torch.randn(3, SIZE), [torch.randn(3, SIZE)]])
def test_missing_labels(test: Any) -> None:
    with pytest.raises(SettingError, match=r"test examples need labels: pass pairs \(inputs, labels\)"):
        run(made()[0], [(stream(1)[0][0], test)])


@pytest.mark.parametrize("shape", [(3, 1), (3, 3)])
def test_labels_that_are_not_one_number_each(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"labels must have shape \(b,\), one number for each input"):
        accuracy(lambda x: x, (torch.eye(3), torch.zeros(shape)))


def test_no_test_examples() -> None:
    with pytest.raises(SettingError, match="no examples"):
        accuracy(lambda x: x, [])
    with pytest.raises(SettingError, match="no examples"):
        accuracy(lambda x: x, (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))


# Interruptions --------------------------------------------------------------------------------------------------------


class Breaking:
    """Batches of a task, of which one pass ends with an exception."""

    def __init__(self, task: Any, passes: int) -> None:
        self._task, self._passes = task, passes

    def __iter__(self) -> Iterator[Any]:
        x, y = self._task
        self._passes -= 1
        yield x[:6], y[:6]
        if self._passes == 0:
            raise StopError
        yield x[6:], y[6:]


def stop_after(number: int) -> Callable[[int], None]:
    def after(done: int) -> None:
        if done == number:
            raise StopError

    return after


@pytest.mark.parametrize(
    ("name", "same_objects"),
    [*((name, False) for name in NAMES), ("ewc+memory", True), ("si+agem", True)],
)
@pytest.mark.usefixtures("untyped")
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(name: str, same_objects: bool, tmp_path: Path) -> None:
    learner, predictors = made(name)
    expected = end(learner, run(learner, stream(), predictors=predictors))
    path = tmp_path / "c.safetensors"
    learner, predictors = made(name)
    with pytest.raises(StopError):
        run(learner, stream(), predictors=predictors, checkpoint=path, after=stop_after(1))
    if not same_objects:
        learner, predictors = made(name, seed=2)  # even the network's first weights come from the checkpoint
    broken = stream()
    broken[2] = (Breaking(broken[2][0], passes=2), broken[2][1])
    with pytest.raises(StopError):
        run(learner, broken, predictors=predictors, checkpoint=path)
    if not same_objects:
        learner, predictors = made(name, seed=3)
    assert end(learner, run(learner, stream(), predictors=predictors, checkpoint=path)) == expected
    learner, predictors = made(name, seed=4)
    assert end(learner, run(learner, stream(), predictors=predictors, checkpoint=path)) == expected, (
        "nothing left to do"
    )


@pytest.mark.usefixtures("untyped")
def test_a_stop_while_judging(tmp_path: Path) -> None:
    expected = run((other := made("replay"))[0], stream(), predictors={"f": other[0].network})
    for call in range(1, 14, 4):
        path, calls = tmp_path / f"{call}", []
        for _ in range(2):
            learner, _ = made("replay")

            def predictor(x: Tensor, net: nn.Module = learner.network, calls: list[int] = calls, at: int = call) -> Any:
                calls.append(0)
                if len(calls) == at:
                    raise StopError
                return copy.deepcopy(net).eval()(x)

            try:
                results = run(learner, stream(), predictors={"f": predictor}, checkpoint=path)
            except StopError:
                continue
        assert end(learner, results) == end(other[0], expected)


def test_a_longer_stream_goes_on_where_a_shorter_ended(tmp_path: Path) -> None:
    run(made("si")[0], stream()[:2], checkpoint=tmp_path / "c")
    learner, other = made("si", seed=2)[0], made("si")[0]
    found = run(learner, iter(stream()), checkpoint=tmp_path / "c")
    assert end(learner, found) == end(other, run(other, stream()))


def test_a_shorter_stream_than_what_was_learned(tmp_path: Path) -> None:
    run(made()[0], stream(3), checkpoint=tmp_path / "c")
    with pytest.raises(SettingError, match="tasks"):
        run(made()[0], stream(2), checkpoint=tmp_path / "c")


@pytest.mark.parametrize("count", [2, 3])
def test_other_predictors_than_before(tmp_path: Path, count: int) -> None:
    run(made()[0], stream(2), checkpoint=tmp_path / "c")
    learner, _ = made()
    with pytest.raises(FormatError, match="mine"):
        run(learner, stream(count), predictors={"mine": learner.network}, checkpoint=tmp_path / "c")


def test_after_is_told_how_many_when_they_are_kept(tmp_path: Path) -> None:
    told = []

    def after(number: int) -> None:
        kept = checkpoint.read(tmp_path / "c", run=made_with)
        assert kept is not None
        told.append((number, int(kept["learner"]["learned"])))

    learner = made()[0]
    made_with = {"learner": learner.settings(), "examples": {"network": None}, "settings": {"a": 1}}
    run(learner, stream(3), checkpoint=tmp_path / "c", settings={"a": 1}, after=after)
    assert told == [(1, 1), (2, 2), (3, 3)]
    assert (tmp_path / "c").exists()
    told.clear()
    run(made()[0], stream(3), after=told.append)
    assert told == [1, 2, 3]


def test_a_checkpoint_of_other_settings_is_refused_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "c"
    run(made()[0], stream(2), checkpoint=path, settings={"strength": 1.0, "sizes": (3, 4)})
    before = path.read_bytes()
    for other in ({"strength": 2.0, "sizes": (3, 4)}, None, {"strength": 1.0}):
        learner, _ = made()
        unlearned = bits(learner.state_dict())
        with pytest.raises(FormatError, match="other settings"):
            run(learner, stream(2), checkpoint=path, settings=other)
        assert bits(learner.state_dict()) == unlearned
        assert path.read_bytes() == before
    run(made()[0], stream(2), checkpoint=path, settings={"sizes": [3, 4], "strength": 1.0})
    path.write_bytes(before[:-3])
    with pytest.raises(FormatError, match="damaged"):
        run(made()[0], stream(2), checkpoint=path, settings={"strength": 1.0, "sizes": (3, 4)})
    assert path.read_bytes() == before[:-3]


def test_a_learner_that_has_learned_is_refused(tmp_path: Path) -> None:
    learner, _ = made()
    learner.learn(stream(1)[0][0])
    before = bits(learner.state_dict())
    for path in (None, tmp_path / "none"):
        with pytest.raises(SettingError, match="has learned already"):
            run(learner, stream(2), checkpoint=path)
    assert bits(learner.state_dict()) == before
    assert not (tmp_path / "none").exists()


def test_no_tasks() -> None:
    used = iter(stream(1))
    run(made()[0], used)
    for tasks in ([], used):
        with pytest.raises(SettingError, match=r"there are 0 tasks.*no used-up iterator"):
            run(made()[0], tasks)


def test_a_task_that_is_an_iterator() -> None:
    task = stream(1)[0]
    with pytest.raises(SettingError, match="more than once"):
        run(made()[0], [(iter([task[0]]), task[1])])
    with pytest.raises(SettingError, match="no examples"):  # found when it is judged a second time
        run(made()[0], [(task[0], iter([task[1]]))])


# Kills ----------------------------------------------------------------------------------------------------------------

KILLED = ("si+agem+memory",)
_MOMENTS = [("step", 3), ("fsync", 1), ("named", 1), ("forward", 12), ("replace", 1)]


def _die_at(moment: str, count: int, learner: Learner) -> None:
    """In a child: a kill -9 at the n-th step, call of the network, flush, renaming, or just after that."""
    left, replace = [count], Path.replace

    def die(*_: object) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced(self: Path, target: Path) -> None:
        if moment == "replace":
            die()
        replace(self, target)
        if moment == "named":
            die()

    if moment == "step":
        learner.optimizer.register_step_post_hook(die)
    elif moment == "forward":
        learner.network.register_forward_hook(die)
    elif moment == "fsync":
        os.fsync = die
    else:
        Path.replace = replaced


def _attempt(name: str, folder: Path, moment: tuple[str, int] | None, seconds: float | None) -> float | None:
    """Forks a run, kills it, or lets it end; returns how long it took if it ended."""
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            learner, predictors = made(name)
            if moment is not None:
                _die_at(*moment, learner)

            def after(number: int) -> None:
                with (folder / "told").open("a") as file:
                    file.write(f"{number}\n")

            results = run(learner, stream(), predictors=predictors, checkpoint=folder / "c.safetensors", after=after)
            (folder / "end").write_text(repr(end(learner, results)))
            os._exit(0)
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, "the run failed"
    return time.monotonic() - start


def _kill_again_and_again(name: str, folder: Path) -> None:
    """In a process of its own."""
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    took = _attempt(name, whole, None, None)
    assert took is not None
    draw, kills = random.Random(name), 0
    for moment in _MOMENTS:
        kills += _attempt(name, killed, moment, None) is None
        if moment[0] in ("fsync", "named"):  # and at any time, early enough for some of the run to be left
            kills += _attempt(name, killed, None, draw.uniform(0, 0.3 * took)) is None
    while _attempt(name, killed, None, None) is None:
        pass
    (folder / "kills.json").write_text(json.dumps(kills))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300, env=environment)
    return folder


@pytest.mark.parametrize("name", KILLED)
def test_kills_at_any_moment_change_nothing(name: str, killed: Path) -> None:
    folder = killed / name
    assert json.loads((folder / "kills.json").read_text()) >= len(_MOMENTS)
    assert (folder / "killed" / "end").read_text() == (folder / "whole" / "end").read_text()
    told = [int(line) for line in (folder / "killed" / "told").read_text().split()]
    assert told == sorted(set(told)), "a task that was kept was learned again"
    assert (folder / "whole" / "told").read_text().split() == ["1", "2", "3", "4"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(made("si+agem")[0], stream(1))  # what torch imports late is here before the forks
    for each in KILLED:
        (Path(sys.argv[1]) / each).mkdir()
        _kill_again_and_again(each, Path(sys.argv[1]) / each)
