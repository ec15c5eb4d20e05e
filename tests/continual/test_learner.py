"""``Learner`` against the loop that it stands for, written out."""

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.bits import bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recollect import EpisodicMemory, checkpoint
from recollect.continual import AGEM, EWC, GEM, MAS, SI, ClassBalanced, Learner, LwF, Reservoir, Ring
from recollect.errors import FormatError, LabelError, SettingError, ShapeError

DOUBLE = torch.float64
Data = tuple[Tensor, Tensor]
Rng = Callable[[], AbstractContextManager[None]]
SIZE, CLASSES, ROWS = 6, 4, 11


def network(seed: int = 1) -> nn.Module:
    """One whose loss differs between training and evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(SIZE, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def tasks(count: int, rows: int = ROWS) -> list[Data]:
    g = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, SIZE, generator=g), torch.randint(0, CLASSES, (rows,), generator=g)) for _ in range(count)
    ]


def buffer(kind: Any = Ring, seed: int = 0, capacity: int = 8) -> Any:
    return kind(EpisodicMemory(capacity, SIZE), generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches_of(task: Data | Iterable[Data], batch: int, generator: torch.Generator) -> list[Data]:
    """The batches of one pass: shuffled ones of a pair, or those that are there."""
    if not isinstance(task, tuple):
        return [(x, y) for x, y in task]
    order = torch.randperm(len(task[0]), generator=generator).tolist()
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [(task[0][part], task[1][part]) for part in parts]


def literal(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Data | Iterable[Data],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    penalty: Any = None,
    projection: Any = None,
    replay: Any = None,
    write: Any = None,
    keep: int | None = None,
) -> None:
    """One task, as the docstrings say it; ``write`` is the buffer that takes examples in, if any.

    Each is written after its step, or, where it is A-GEM's alone, at the end of the task.
    """
    late = isinstance(projection, AGEM) and write is not replay
    waiting = []
    net.train()
    left = 10**9 if keep is None else keep
    for epoch in range(epochs):
        stream = batches_of(task, batch, generator)
        for x, y in stream:
            union_x, union_y = x, y
            if replay is not None and len(replay) > 0:
                old_x, old_y = replay.sample(len(x))
                union_x, union_y = torch.cat([x, old_x]), torch.cat([y, old_y])
            total = loss(net(union_x), union_y)
            if penalty is not None:
                total = total + penalty()
            optimizer.zero_grad()
            total.backward()
            if projection is not None:
                projection.project(loss)
            optimizer.step()
            if write is not None and epoch == 0:
                for row in range(len(x)):
                    if left > 0:
                        waiting.append((x[row : row + 1], y[row : row + 1]))
                        left -= 1
                while waiting and not late:
                    write.write(*waiting.pop(0))
    if penalty is not None:
        penalty.consolidate(task)
    if projection is not None:
        projection.consolidate(task)
    for examples in waiting:
        write.write(*examples)


# The loop -------------------------------------------------------------------------------------------------------------

COMPANIONS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, int], dict[str, Any]]] = {
    "plain": lambda n, o, s: {},
    "ewc": lambda n, o, s: {"penalty": EWC(n, 5.0)},
    "ewc sampled": lambda n, o, s: {"penalty": EWC(n, 5.0, fisher="sampled", generator=seeded(s))},
    "mas": lambda n, o, s: {"penalty": MAS(n, 2.0)},
    "si": lambda n, o, s: {"penalty": SI(n, o, 1.0)},
    "lwf": lambda n, o, s: {"penalty": LwF(n, 2.0)},
    "gem": lambda n, o, s: {"projection": GEM(n, examples=5, generator=seeded(s))},
    "agem ring": lambda n, o, s: {"projection": AGEM(n, buffer(Ring, s), examples=4)},
    "agem reservoir": lambda n, o, s: {"projection": AGEM(n, buffer(Reservoir, s), examples=4)},
    "ring": lambda n, o, s: {"replay": buffer(Ring, s)},
    "reservoir": lambda n, o, s: {"replay": buffer(Reservoir, s)},
    "balanced": lambda n, o, s: {"replay": buffer(ClassBalanced, s)},
}


def one_buffer(net: nn.Module, one: Any) -> dict[str, Any]:
    return {"projection": AGEM(net, one, examples=4), "replay": one}


MORE: dict[str, Callable[[nn.Module, torch.optim.Optimizer, int], dict[str, Any]]] = {
    "memory": lambda n, o, s: {"memory": EpisodicMemory(20, SIZE), "keep": 3},
    "agem and replay of one buffer": lambda n, o, s: one_buffer(n, buffer(Reservoir, s)),
    "agem and replay of two buffers": lambda n, o, s: {
        "projection": AGEM(n, buffer(Ring, s), examples=4),
        "replay": buffer(ClassBalanced, s),
        "keep": 4,
    },
    "ewc, gem, replay and memory": lambda n, o, s: {
        "penalty": EWC(n, 5.0),
        "projection": GEM(n, examples=5, generator=seeded(s)),
        "replay": buffer(Reservoir, s),
        "memory": EpisodicMemory(20, SIZE),
        "keep": 5,
    },
    "lwf and agem": lambda n, o, s: {"penalty": LwF(n), "projection": AGEM(n, buffer(Ring, s), examples=4)},
    "si and agem": lambda n, o, s: {"penalty": SI(n, o, 1.0), "projection": AGEM(n, buffer(Ring, s), examples=4)},
}
ALL = COMPANIONS | MORE


def made(
    name: str,
    *,
    seed: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = sgd,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Learner:
    net = network(seed).to(dtype)
    steps = optimizer(net)
    settings: dict[str, Any] = {"epochs": 2, "batch": 4, "generator": seeded(seed)}
    return Learner(net, steps, **ALL[name](net, steps, seed), **(settings | more))


def by_hand(name: str, stream: list[Any], *, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    net = network().to(dtype)
    optimizer = sgd(net)
    parts = COMPANIONS[name](net, optimizer, 1)
    own = getattr(parts.get("projection"), "buffer", None)
    for task in stream:
        literal(net, optimizer, task, **parts, write=parts.get("replay", own), **settings)
    return net


def doubled(stream: list[Data]) -> list[Data]:
    return [(x.double(), y) for x, y in stream]


@pytest.mark.parametrize("name", [name for name in COMPANIONS if name[:3] not in ("ewc", "mas")])
@pytest.mark.usefixtures("untyped")
def test_learner_is_the_loop(name: str, rng_untouched: Rng) -> None:
    keep = 5 if "re" in name else None  # of what is stored, by the reservoirs
    learner = made(name, keep=keep)
    with rng_untouched():
        for task in tasks(3):
            learner.learn(task)
    expected = by_hand(name, tasks(3), epochs=2, batch=4, generator=seeded(1), keep=keep)
    assert bits(learner.network.state_dict()) == bits(expected.state_dict())
    assert learner.learned == 3
    assert learner.network.training


@pytest.mark.parametrize("name", ["ewc", "ewc sampled", "mas"])
@pytest.mark.usefixtures("untyped")
def test_learner_is_the_loop_to_rounding_where_gradients_are_added(name: str, rng_untouched: Rng) -> None:
    learner = made(name, dtype=DOUBLE)
    with rng_untouched():
        for task in doubled(tasks(3)):
            learner.learn(task)
    settings: dict[str, Any] = {"epochs": 2, "batch": 4, "dtype": DOUBLE}
    expected = by_hand(name, doubled(tasks(3)), generator=seeded(1), **settings).state_dict()
    for key, found in learner.network.state_dict().items():
        torch.testing.assert_close(found, expected[key], rtol=1e-10, atol=1e-12)
    naive = by_hand("plain", doubled(tasks(3)), generator=seeded(1), **settings).state_dict()
    assert not torch.allclose(naive["1.weight"], expected["1.weight"], rtol=1e-3), "the penalty did nothing"


@pytest.mark.parametrize(("epochs", "batch"), [(1, 1), (3, 4), (1, 11), (2, 128)])
def test_epochs_and_batches(epochs: int, batch: int) -> None:
    """A batch of one has no BatchNorm: another network."""
    net, other = nn.Linear(SIZE, CLASSES), nn.Linear(SIZE, CLASSES)
    other.load_state_dict(net.state_dict())
    replay, by = buffer(capacity=30), buffer(capacity=30)
    learner = Learner(net, sgd(net), replay=replay, epochs=epochs, batch=batch, generator=seeded(5))
    optimizer, generator = sgd(other), seeded(5)
    for task in tasks(2):
        learner.learn(task)
        literal(other, optimizer, task, epochs=epochs, batch=batch, generator=generator, replay=by, write=by)
    assert bits(net.state_dict()) == bits(other.state_dict())
    assert bits(replay.state_dict()) == bits(by.state_dict())


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("plain", "shuffled loader"),
        ("lwf", "list"),
        ("ring", "loader"),
        ("ring", "shuffled loader"),
        ("gem", "shuffled loader"),
        ("agem reservoir", "list"),
    ],
)
def test_batches_made_by_others_are_learned_in_their_order(name: str, form: str) -> None:
    def stream() -> list[Any]:
        if form == "list":
            return [[(x[:5], y[:5]), (x[5:7], y[5:7]), (x[7:], y[7:])] for x, y in tasks(2)]
        shuffled: dict[str, Any] = {"shuffle": True, "generator": seeded(3)} if form == "shuffled loader" else {}
        return [DataLoader(TensorDataset(x, y), batch_size=4, **shuffled) for x, y in tasks(2)]

    learner = made(name, generator=(generator := seeded(1)))
    for task in stream():
        learner.learn(task)
    expected = by_hand(name, stream(), epochs=2, batch=4, generator=seeded(1))
    assert bits(learner.network.state_dict()) == bits(expected.state_dict())
    assert torch.equal(generator.get_state(), seeded(1).get_state()), "nothing is shuffled here"


def test_a_large_batch_of_others_is_one_step() -> None:
    (task,) = tasks(1, rows=300)
    learner = made("plain", epochs=1, batch=4)
    learner.learn([task])
    expected = by_hand("plain", [[task]], epochs=1, batch=4, generator=seeded(1))
    assert bits(learner.network.state_dict()) == bits(expected.state_dict())


def test_another_loss_goes_everywhere() -> None:
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - nn.functional.one_hot(labels, CLASSES)).square().mean()

    for name in ("gem", "agem ring", "ring"):
        learner = made(name, loss=loss)
        for task in tasks(2):
            learner.learn(task)
        expected = by_hand(name, tasks(2), epochs=2, batch=4, generator=seeded(1), loss=loss)
        assert bits(learner.network.state_dict()) == bits(expected.state_dict())


def test_default_generator_is_its_own_and_seeded_with_0(rng_untouched: Rng) -> None:
    found = []
    for generator in (None, seeded(0)):
        learner = made("plain", generator=generator)
        with rng_untouched():
            learner.learn(tasks(1)[0])
        found.append(bits(learner.network.state_dict()))
    assert found[0] == found[1]


def test_a_network_in_evaluation_mode_is_trained_in_training_mode() -> None:
    learner = made("plain")
    learner.network.eval()
    learner.learn(tasks(1)[0])
    assert int(learner.network[2].num_batches_tracked) == 2 * 3
    assert all(module.training for module in learner.network.modules())


def test_a_stream_in_pieces_is_the_whole_for_replay() -> None:
    """As the class says: where nobody says when a task ends."""
    x, y = tasks(1, rows=12)[0]
    found = []
    for pieces in (
        [[(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]],
        [[(x[i : i + 4], y[i : i + 4])] for i in (0, 4, 8)],
    ):
        learner = made("reservoir", epochs=1)
        for piece in pieces:
            learner.learn(piece)
        found.append(bits(learner.network.state_dict()))
    assert found[0] == found[1]


# What is kept ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 4, 5, 11, None])
@pytest.mark.usefixtures("untyped")
def test_memory_holds_the_first_of_each_task_in_the_order_of_the_stream(keep: int | None) -> None:
    memory, ring = EpisodicMemory(100, SIZE), buffer(capacity=100)
    net = network()
    own = buffer(capacity=100)
    learner = Learner(
        net,
        sgd(net),
        memory=memory,
        replay=ring,
        projection=AGEM(net, own, examples=2),
        keep=keep,
        epochs=3,
        batch=4,
        generator=seeded(9),
    )
    generator = seeded(9)
    keys, values = [], []
    for number, (x, y) in enumerate(tasks(3), 1):
        learner.learn((x, y))
        order, *_ = (torch.randperm(len(x), generator=generator) for _ in range(3))
        keys.append(x[order][:keep])
        values.append(y[order][:keep])
        assert len(memory) == len(ring) == len(own) == number * (ROWS if keep is None else min(keep, ROWS))
    for held in (memory, ring.memory, own.memory):
        assert torch.equal(held.keys[: len(held)], torch.cat(keys))
        assert torch.equal(held.values[: len(held)], torch.cat(values))
        assert held.written[: len(held)].tolist() == list(range(len(held)))


def test_what_batches_of_others_leave_in_the_memory() -> None:
    memory = EpisodicMemory(100, SIZE)
    learner = made("plain", memory=memory, keep=6)
    (x, y), (a, b) = tasks(2)
    learner.learn([(x[:4], y[:4]), (x[4:9], y[4:9]), (x[9:], y[9:])])
    learner.learn([(a[:2], b[:2]), (a[2:], b[2:])])
    assert torch.equal(memory.keys[: len(memory)], torch.cat([x[:6], a[:6]]))
    assert torch.equal(memory.values[: len(memory)], torch.cat([y[:6], b[:6]]))


def test_an_example_is_written_after_its_step() -> None:
    """Else the first step would learn each example twice."""
    sizes = []
    replay = buffer(capacity=100)
    net = network()
    net.register_forward_pre_hook(lambda _, args: sizes.append((len(args[0]), len(replay))))
    learner = Learner(net, sgd(net), replay=replay, epochs=2, batch=4)
    learner.learn(tasks(1)[0])
    assert sizes == [(4, 0), (8, 4), (6, 8), (8, 11), (8, 11), (6, 11)]


def test_one_buffer_for_replay_and_agem_is_written_once() -> None:
    learner = made("agem and replay of one buffer")
    learner.learn(tasks(1)[0])
    assert learner.replay is not None
    assert int(learner.replay.seen) == ROWS


def test_a_memory_that_is_also_replayed_is_written_once() -> None:
    memory = EpisodicMemory(100, SIZE)
    learner = made("plain", memory=memory, replay=Ring(memory))
    learner.learn(tasks(1)[0])
    assert len(memory) == ROWS
    learner = made("plain", memory=(own := EpisodicMemory(100, SIZE)), replay=Ring(memory))
    learner.learn(tasks(1)[0])
    assert (len(own), len(memory)) == (ROWS, 2 * ROWS), "memories of their own are both written to"


@pytest.mark.parametrize("kind", [Ring, Reservoir, ClassBalanced])
def test_images_are_replayed_and_remembered(kind: Any) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    other = copy.deepcopy(net)
    x, y = torch.randn(10, 1, 4, 4), torch.randint(0, 3, (10,))
    replay, by = (kind(EpisodicMemory(6, 16), shape=(1, 4, 4)) for _ in range(2))
    memory = EpisodicMemory(20, 16)
    learner = Learner(net, sgd(net), replay=replay, memory=memory, batch=4, epochs=2, generator=seeded(2))
    optimizer, generator = sgd(other), seeded(2)
    for task in ((x, y), (x.flip(0), y.flip(0))):
        learner.learn(task)
        literal(other, optimizer, task, epochs=2, batch=4, generator=generator, replay=by, write=by)
    assert bits(net.state_dict()) == bits(other.state_dict())
    assert torch.equal(memory.keys[:10], x[torch.randperm(10, generator=seeded(2))].flatten(1))


# Outputs --------------------------------------------------------------------------------------------------------------


def split_tasks(dtype: torch.dtype = DOUBLE) -> list[tuple[Data, list[int]]]:
    g = seeded(4)
    found = []
    for outputs in ([2, 0], [1, 4, 3]):
        labels = torch.tensor(outputs)[torch.randint(0, len(outputs), (9,), generator=g)]
        found.append(((torch.randn(9, SIZE, generator=g, dtype=dtype), labels), outputs))
    return found


def own_loss(groups: list[list[int]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross entropy example by example, on the outputs of the label's own task."""

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=outputs.dtype)
        for row, label in zip(outputs, labels.tolist(), strict=True):
            (group,) = (g for g in groups if label in g)
            place = torch.tensor([group.index(label)])
            total = total + nn.functional.cross_entropy(row[group].unsqueeze(0), place)
        return total / len(labels)

    return loss


@pytest.mark.parametrize("name", ["plain", "replay", "gem", "agem"])
def test_only_the_outputs_of_the_labels_own_task_count(name: str) -> None:
    net = nn.Linear(SIZE, 5).double()
    other = copy.deepcopy(net)

    def parts(n: nn.Module) -> dict[str, Any]:
        held = Reservoir(EpisodicMemory(8, SIZE, key_dtype=DOUBLE))
        kinds = {"replay": held, "gem": GEM(n, examples=4), "agem": AGEM(n, held, examples=5)}
        key = "replay" if name == "replay" else "projection"
        return {} if name == "plain" else {key: kinds[name]}

    learner = Learner(net, sgd(net), epochs=3, batch=4, generator=seeded(2), **parts(net))
    optimizer, generator, hand = sgd(other), seeded(2), parts(other)
    own = getattr(hand.get("projection"), "buffer", None)
    seen: list[list[int]] = []
    for task, outputs in split_tasks():
        seen.append(outputs)
        learner.learn(task, outputs=torch.tensor(outputs) if name in ("plain", "gem") else outputs)
        literal(
            other,
            optimizer,
            task,
            loss=own_loss(seen),
            epochs=3,
            batch=4,
            generator=generator,
            write=hand.get("replay", own),
            **hand,
        )
    for found, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", [EWC, MAS, LwF])
def test_penalties_are_told_the_outputs(kind: Any) -> None:
    net = nn.Linear(SIZE, 5).double()
    other = copy.deepcopy(net)
    learner = Learner(net, sgd(net), penalty=kind(net, 3.0), epochs=2, batch=4, generator=seeded(2))
    optimizer, generator, penalty = sgd(other), seeded(2), kind(other, 3.0)
    seen: list[list[int]] = []
    for task, outputs in split_tasks():
        seen.append(outputs)
        learner.learn(task, outputs=outputs)
        told = copy.copy(penalty)
        told.consolidate = lambda data, outputs=outputs: penalty.consolidate(data, outputs=outputs)
        pair = type("Told", (), {"__call__": lambda _: penalty(), "consolidate": staticmethod(told.consolidate)})()
        literal(other, optimizer, task, loss=own_loss(seen), epochs=2, batch=4, generator=generator, penalty=pair)
    for found, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_outputs_of_another_task_do_not_move() -> None:
    net = nn.Linear(SIZE, 5).double()
    learner = Learner(net, torch.optim.SGD(net.parameters(), lr=0.5), epochs=2)
    before = net.weight.detach().clone()
    (task, outputs), _ = split_tasks()
    learner.learn(task, outputs=outputs)
    others = [c for c in range(5) if c not in outputs]
    assert torch.equal(net.weight[others], before[others])
    assert (net.weight[outputs] != before[outputs]).all()


def test_a_task_without_outputs_after_one_with_uses_all_outputs() -> None:
    net = nn.Linear(SIZE, CLASSES)
    learner, other = Learner(net, sgd(net), epochs=2, generator=seeded(3)), copy.deepcopy(net)
    (x, y), _ = tasks(2)
    first = (x, torch.arange(ROWS) % 2)
    learner.learn(first, outputs=[0, 1])
    optimizer, generator = sgd(other), seeded(3)
    literal(other, optimizer, first, loss=own_loss([[0, 1]]), epochs=2, batch=128, generator=generator)
    rest = (x, 2 + y % 2)
    learner.learn(rest)
    literal(other, optimizer, rest, epochs=2, batch=128, generator=generator)
    for found, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [[0, 1], [0, 9], torch.tensor([3])], ids=str)
def test_a_label_outside_its_tasks_outputs_is_refused(outputs: Any) -> None:
    learner = made("plain")
    before = bits(learner.network.state_dict())
    with pytest.raises(LabelError, match="labels must be among the task's outputs"):
        learner.learn(tasks(1)[0], outputs=outputs)
    assert bits(learner.network.state_dict()) == before
    assert learner.learned == 0


def test_outputs_that_the_network_does_not_have() -> None:
    x, y = tasks(1)[0]
    with pytest.raises(SettingError, match="a task has output 9, but the network has 4 outputs"):
        made("plain").learn((x, torch.zeros_like(y)), outputs=[0, 9])


@pytest.mark.parametrize("outputs", [[0, 0], [0.5, 1.5], [True, False], [], [-1, 0]], ids=str)
@pytest.mark.usefixtures("untyped")
def test_outputs_that_are_none(outputs: Any) -> None:
    learner = made("plain")
    with pytest.raises(SettingError, match="outputs must be"):
        learner.learn(tasks(1)[0], outputs=outputs)


def test_refused_outputs_change_nothing() -> None:
    learner, other = made("plain"), made("plain")
    with pytest.raises(SettingError, match="outputs must be"):
        learner.learn(tasks(1)[0], outputs=[0, 0])
    assert go_on(learner, pairs(1, outputs=False)) == go_on(other, pairs(1, outputs=False))


@pytest.mark.parametrize("outputs", [[0, 1], [0, 9]], ids=str)
def test_a_task_that_was_refused_leaves_its_outputs_nowhere(outputs: list[int]) -> None:
    learner, other = made("plain", generator=seeded(1)), made("plain", generator=seeded(1))
    x, y = tasks(1)[0]
    with pytest.raises((LabelError, SettingError)):
        learner.learn([(x, y if 9 not in outputs else torch.zeros_like(y))], outputs=outputs)
    learner.load_state_dict({**other.state_dict(), "together": learner.state_dict()["together"]})
    assert go_on(learner, pairs(1, outputs=False)) == go_on(other, pairs(1, outputs=False))


# States ---------------------------------------------------------------------------------------------------------------


def through_a_file(state: Any, folder: Path) -> Any:
    checkpoint.write(folder / "c.safetensors", state, run={})
    return checkpoint.read(folder / "c.safetensors", run={})


def go_on(learner: Learner, stream: list[Any]) -> Any:
    for task, outputs in stream:
        learner.learn(task, outputs=outputs)
    return bits(learner.state_dict())


def pairs(count: int, outputs: bool) -> list[Any]:
    if not outputs:
        return [(task, None) for task in tasks(count)]
    found = []
    for number, (x, y) in enumerate(tasks(count)):
        own = [0, 3] if number % 2 == 0 else [1, 2]
        found.append(((x, torch.tensor(own)[y % 2]), own))
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("untyped")
def test_a_learner_made_anew_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    learner = made(name, epochs=1)
    stream = pairs(3, outputs=name not in ("plain", "gem", "ring", "si and agem"))
    go_on(learner, stream[:2])
    state = through_a_file(learner.state_dict(), tmp_path)
    other = made(name, seed=2, epochs=1)  # other weights and other generators: all of it must come from the state
    other.load_state_dict(state)
    assert bits(other.state_dict()) == bits(learner.state_dict())
    assert other.learned == 2
    assert go_on(other, stream[2:]) == go_on(learner, stream[2:])


@pytest.mark.parametrize(
    "name", ["ewc sampled", "si and agem", "balanced", "ewc, gem, replay and memory", "lwf and agem"]
)
@pytest.mark.usefixtures("untyped")
def test_a_learner_goes_back_to_where_it_was_and_to_its_beginning(name: str, tmp_path: Path) -> None:
    learner = made(name, epochs=1)
    stream = pairs(2, outputs=False)
    fresh = through_a_file(learner.state_dict(), tmp_path)
    go_on(learner, stream[:1])
    state = through_a_file(learner.state_dict(), tmp_path)
    end = go_on(learner, stream[1:])
    learner.load_state_dict(state)
    assert learner.learned == 1
    assert go_on(learner, stream[1:]) == end
    learner.load_state_dict(fresh)
    assert learner.learned == 0
    assert go_on(learner, stream) == end


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda n: torch.optim.Adam(n.parameters(), lr=0.01),
        lambda n: torch.optim.AdamW(n.parameters(), lr=0.01, amsgrad=True),
        lambda n: torch.optim.SGD(n.parameters(), lr=0.01),
    ],
    ids=["adam", "adamw", "sgd"],
)
def test_optimizers_are_in_the_state(optimizer: Callable[..., torch.optim.Optimizer], tmp_path: Path) -> None:
    learner = made("si", optimizer=optimizer)
    stream = pairs(3, outputs=False)
    go_on(learner, stream[:1])
    other = made("si", seed=2, optimizer=optimizer)
    other.load_state_dict(through_a_file(learner.state_dict(), tmp_path))
    assert go_on(other, stream[1:]) == go_on(learner, stream[1:])


@pytest.mark.parametrize(("there", "here"), [("ewc", "plain"), ("plain", "ewc"), ("plain", "ring"), ("gem", "mas")])
def test_the_state_of_a_learner_with_other_companions_is_refused(there: str, here: str) -> None:
    learner, state = made(here), made(there).state_dict()
    before = bits(learner.state_dict())
    with pytest.raises(FormatError, match=r"the state of a learner with .* Make the learner as it was made then"):
        learner.load_state_dict(state)
    assert bits(learner.state_dict()) == before


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"batch": 0}, {"keep": -1}, {"epochs": -2, "batch": 3}], ids=str)
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=r"epochs and batch must be at least 1 and keep at least 0, got "):
        made("plain", **settings)


@pytest.mark.usefixtures("untyped")
def test_things_of_another_kind() -> None:
    net: Any = network()
    with pytest.raises(SettingError, match=r"network must be a torch\.nn\.Module"):
        Learner(nn.Linear, sgd(net))
    with pytest.raises(SettingError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        Learner(net, torch.optim.SGD)
    with pytest.raises(SettingError, match=r"optimizer must be"):
        Learner(net, None)


@pytest.mark.parametrize(
    "task",
    [
        lambda x, y: iter([(x, y)]),
        lambda x, y: ((x, y) for _ in range(1)),
        lambda x, y: zip([x], [y], strict=True),
        lambda x, y: iter(DataLoader(TensorDataset(x, y))),
        lambda x, y: map(tuple, [(x, y)]),
    ],
    ids=["iter", "generator", "zip", "loader", "map"],
)
def test_iterators_are_refused_before_anything_is_learned(task: Callable[..., Iterator[Data]]) -> None:
    learner = made("ewc")
    before = bits(learner.state_dict())
    with pytest.raises(SettingError, match="more than once: pass tensors, a list or a DataLoader"):
        learner.learn(task(*tasks(1)[0]))
    assert bits(learner.state_dict()) == before


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: [x[:4], x[4:8], x[8:]]])
def test_missing_labels(form: Callable[[Tensor], Any]) -> None:
    learner = made("plain")
    with pytest.raises(SettingError, match="needs labels: pass pairs"):
        learner.learn(form(tasks(1)[0][0]))
    assert learner.learned == 0


def test_no_examples() -> None:
    with pytest.raises(SettingError, match="no examples"):
        made("plain").learn([])


def test_an_empty_pair() -> None:
    x, y = tasks(1)[0]
    with pytest.raises(SettingError, match="no examples"):
        made("plain").learn((x[:0], y[:0]))


@pytest.mark.parametrize("labels", [5, 20])
def test_a_pair_whose_lengths_differ(labels: int) -> None:
    x, _ = tasks(1)[0]
    with pytest.raises(ShapeError, match="one label for each input"):
        made("plain").learn((x, torch.zeros(labels, dtype=torch.long)))


def test_batches_whose_lengths_differ() -> None:
    x, y = tasks(1)[0]
    with pytest.raises(ShapeError, match="one label for each input"):
        made("plain").learn([(x, y[:5])])


def test_a_list_of_two_tensors_is_refused() -> None:
    with pytest.raises(SettingError, match="a list of two tensors may be"):
        made("plain").learn(list(tasks(1)[0]))


def test_learned_counts_tasks() -> None:
    learner = made("plain")
    for number, task in zip(itertools.count(1), tasks(3), strict=False):
        learner.learn(task)
        assert learner.learned == number
